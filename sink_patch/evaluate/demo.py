"""`sink-patch demo`: a story far longer than the window, told at constant speed and memory."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from transformers import TextStreamer

import sink_patch  # noqa: F401 - teaches generate the sink cache
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.models import Loaded

PROMPT = (
    "Write a very long adventure story, with much dialogue, about a young sailor called Nora who crosses an unknown "
    "sea. Describe each day of the journey."
)
_SEED = 7
# Small models fall into loops or end early: mild sampling, words of the last pages made less likely, no end token.
_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}


@dataclass(frozen=True)
class Settings:
    """What the demo generates."""

    window_length: int = 256
    num_sink_tokens: int = 4
    max_new_tokens: int = 1500
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SinkArgumentError(f"max_new_tokens={self.max_new_tokens}: give a number of tokens, 1 or more.")


@dataclass(frozen=True)
class Stretch:
    """What was measured when `tokens` tokens of the stream, prompt counted in, had been read or written."""

    tokens: int
    tokens_per_second: float
    cache_megabytes: float
    process_megabytes: float | None

    def line(self, window_length: int) -> str:
        process = "" if self.process_megabytes is None else f" | process {self.process_megabytes:.0f} MB"
        return (
            f"[{self.tokens} tokens = {self.tokens / window_length:.1f} windows | {self.tokens_per_second:.1f} tokens/s"
            f" | cache {self.cache_megabytes:.2f} MB{process}]"
        )


class Watch:
    """A forward hook that holds on to the cache which `generate` has made."""

    cache: Any = None

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.cache = kwargs.get("past_key_values", self.cache)

    def megabytes(self) -> float:
        """Keys and values of all layers, in 10^6 bytes."""
        layers = [] if self.cache is None else self.cache.layers
        held = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held) / 1e6


class Teller(TextStreamer):
    """Prints the text as it comes, and every `window_length` tokens a line with what has been measured.

    Plain text with no control codes, so that it reads as well from a file. The first token waits for the prompt to be
    read, so the clock starts with it.
    """

    def __init__(self, tokenizer: Any, watch: Watch, window_length: int, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stretches: list[Stretch] = []
        self._watch, self._window_length, self._out = watch, window_length, out
        self._tokens = self._timed_from = 0
        self._started: float | None = None
        self._due = False

    def put(self, value: torch.Tensor) -> None:
        """Token ids: the prompt, shape [1, tokens], then one token at a time."""
        self._tokens += value.numel()
        super().put(value)
        if self._started is None and value.numel() == 1:
            self._started, self._timed_from = time.perf_counter(), self._tokens
        if self._tokens - self._timed_from >= self._window_length:
            self._measure()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._out.write(text)
        if self._due and text:  # between two words, since the streamer holds text back until a word is complete
            self._out.write(f"\n\n{self.stretches[-1].line(self._window_length)}\n\n")
            self._due = False
        if stream_end:
            self._out.write("\n")
        self._out.flush()

    def _measure(self) -> None:
        now = time.perf_counter()
        seconds = now - (self._started or now)
        speed = (self._tokens - self._timed_from) / seconds if seconds else 0.0
        self.stretches.append(Stretch(self._tokens, speed, self._watch.megabytes(), process_megabytes()))
        self._started, self._timed_from, self._due = now, self._tokens, True


def process_megabytes() -> float | None:
    """Resident memory of this process in 10^6 bytes; None where psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return float(psutil.Process(os.getpid()).memory_info().rss) / 1e6


def run(loaded: Loaded, settings: Settings, out: TextIO | None = None) -> None:
    """Tell the story to `out` (stdout), then say in plain words what happened.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream.
    """
    out = out or sys.stdout
    watch = Watch()
    teller = Teller(loaded.tokenizer, watch, settings.window_length, out)
    inputs = _inputs(loaded.tokenizer, settings.prompt)
    out.write(f"{loaded.name}, window of {settings.window_length} tokens, {settings.num_sink_tokens} sinks\n\n")
    torch.manual_seed(_SEED)
    hook = loaded.model.register_forward_hook(watch, with_kwargs=True)
    try:
        made = loaded.model.generate(
            **inputs,
            cache_implementation="sink",
            window_length=settings.window_length,
            num_sink_tokens=settings.num_sink_tokens,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.max_new_tokens,
            streamer=teller,
            return_dict_in_generate=True,
            **_SAMPLING,
        )
    finally:
        hook.remove()
    out.write("\n" + summary(settings, made, teller.stretches) + "\n")


def summary(settings: Settings, made: Any, stretches: list[Stretch]) -> str:
    """What happened, in plain words. `made` is what `generate` returned."""
    tokens = made.sequences.shape[1]
    windows = tokens / settings.window_length
    lines = [f"{tokens} tokens, prompt counted in: {windows:.1f} windows, in a {type(made.past_key_values).__name__}."]
    if len(stretches) > 1:
        first, last = stretches[0], stretches[-1]
        lines.append(
            f"Speed: {first.tokens_per_second:.1f} tokens/s at first, {last.tokens_per_second:.1f} at the end. Cache: "
            f"{first.cache_megabytes:.2f} MB at first, {last.cache_megabytes:.2f} at the end."
        )
    recent = settings.window_length - settings.num_sink_tokens
    if windows > 1:
        lines.append(
            f"The model sees the first {settings.num_sink_tokens} tokens and the newest {recent}. What left the window "
            "is forgotten: the story goes on fluently, but it cannot recall how it began."
        )
    else:
        lines.append("Nothing has left the window yet: ask for more with --max-new-tokens.")
    return "\n".join(lines)


def _inputs(tokenizer: Any, prompt: str) -> dict[str, Any]:
    """The prompt as the model's chat template has it, or as it stands for a model without one."""
    text, special = prompt, True
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        special = False  # the template has written them
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
