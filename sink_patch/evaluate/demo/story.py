"""`sink-patch demo`: generates a story far longer than the window, and shows that speed and memory stay the same."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from transformers import LogitsProcessorList

import sink_patch  # noqa: F401 - patches generate
from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.demo.progress import (
    CacheCapture,
    Measurement,
    MeasuringStreamer,
    RecentRepetitionPenalty,
    sink_cache_in,
)
from sink_patch.evaluate.models import Loaded

PROMPT = (
    "Write a very long adventure story, with much dialogue, about a young sailor called Nora who crosses an unknown "
    "sea. Describe each day of the journey."
)
_SEED = 7
_SIZES = Sizes()
_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "no_repeat_ngram_size": 6}


@dataclass(frozen=True)
class Settings:
    """What the demo generates.

    Args:
        window_length: tokens in the window, including the sinks.
        num_sink_tokens: first tokens that stay in the window.
        max_new_tokens: length of the story in tokens.
        prompt: what to ask the model for.

    Raises:
        SinkArgumentError: `max_new_tokens` is below 1.
    """

    window_length: int = _SIZES.window_length
    num_sink_tokens: int = _SIZES.num_sink_tokens
    max_new_tokens: int = 1500
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SinkArgumentError(f"max_new_tokens={self.max_new_tokens}: give a number of tokens, 1 or more.")


def run(loaded: Loaded, settings: Settings, out: TextIO | None = None) -> None:
    """Write the story to `out` (default: stdout), then a summary.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream.
    """
    out = out or sys.stdout
    capture = CacheCapture()
    streamer = MeasuringStreamer(loaded.tokenizer, capture, settings.window_length, out)
    encoded = inputs(loaded.tokenizer, settings.prompt)
    out.write(f"{loaded.name}, window of {settings.window_length} tokens, {settings.num_sink_tokens} sinks\n\n")
    torch.manual_seed(_SEED)
    hook = loaded.model.register_forward_hook(capture, with_kwargs=True)
    try:
        output = loaded.model.generate(
            **encoded,
            cache_implementation="sink",
            window_length=settings.window_length,
            num_sink_tokens=settings.num_sink_tokens,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.max_new_tokens,  # an end-of-text token does not stop it
            logits_processor=LogitsProcessorList([RecentRepetitionPenalty()]),
            streamer=streamer,
            return_dict_in_generate=True,
            **_SAMPLING,
        )
    finally:
        hook.remove()
    out.write("\n" + summary(settings, encoded["input_ids"].shape[1], output, streamer.measurements) + "\n")


def summary(settings: Settings, prompt_tokens: int, output: Any, measurements: list[Measurement]) -> str:
    """What happened, in a few sentences.

    Args:
        settings: of this run.
        prompt_tokens: length of the prompt.
        output: what `generate` returned.
        measurements: those of the streamer, in order.
    """
    tokens = output.sequences.shape[1]
    windows = tokens / settings.window_length
    cache = type(sink_cache_in(output.values())).__name__
    lines = [f"{tokens} tokens, prompt counted in: {windows:.1f} windows, in a {cache}."]
    if len(measurements) > 1:
        first, last = measurements[0], measurements[-1]
        lines += [
            f"Speed: {first.tokens_per_second:.1f} tokens/s at first, {last.tokens_per_second:.1f} at the end.",
            f"Cache: {first.cache_megabytes:.2f} MB at first, {last.cache_megabytes:.2f} MB at the end.",
        ]
        if first.process_megabytes is not None and last.process_megabytes is not None:
            sizes = f"{first.process_megabytes:.0f} MB at first, {last.process_megabytes:.0f} MB at the end"
            lines.append(f"Memory of the process: {sizes}.")
    recent = settings.window_length - settings.num_sink_tokens
    if windows > 1:
        lines.append(
            f"The model sees the first {settings.num_sink_tokens} tokens and the newest {recent}. What left the window "
            "is forgotten: the text goes on fluently, but it cannot recall how it began, and may wander off."
        )
        if settings.num_sink_tokens < prompt_tokens < settings.window_length:
            lines.append(f"To keep the whole prompt in sight, make it the sinks: --num-sink-tokens {prompt_tokens}")
    else:
        lines.append("Nothing has left the window yet: ask for more with --max-new-tokens.")
    return "\n".join(lines)


def inputs(tokenizer: Any, prompt: str) -> dict[str, Any]:
    """The prompt in the model's chat template, or unchanged for a model without one: tensors of shape [1, tokens]."""
    text, special = prompt, True
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        special = False  # the template contains them
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
