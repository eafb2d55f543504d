"""A story far longer than the window, while speed and memory stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

import sink_patch
from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.demo.defaults import PROMPT, TOKENS, WINDOW
from sink_patch.evaluate.demo.progress import Measurement, Meter, RecentRepetitionPenalty
from sink_patch.evaluate.demo.screens import Screen
from sink_patch.evaluate.models import Loaded
from sink_patch.evaluate.options import check_utf8

_SEED = 7
_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "no_repeat_ngram_size": 6}


@dataclass(frozen=True)
class Settings:
    """What the demo generates.

    Args:
        window_length: tokens in the window, including the sinks.
        num_sink_tokens: first tokens that stay in the window; None: the whole prompt, where it takes half of the window
            at most, else the default of the cache.
        max_new_tokens: length of the story in tokens.
        prompt: what to ask the model for.

    Raises:
        SinkArgumentError: `max_new_tokens` is below 1, the sizes are impossible, or the prompt is not UTF-8.
    """

    window_length: int = WINDOW
    num_sink_tokens: int | None = None
    max_new_tokens: int = TOKENS
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SinkArgumentError(f"max_new_tokens={self.max_new_tokens}: give a number of tokens, 1 or more.")
        Sizes(self.window_length, self.sinks(self.window_length))
        check_utf8("--prompt", self.prompt)

    def sinks(self, prompt_tokens: int) -> int:
        """How many sinks there are with a prompt of this length."""
        if self.num_sink_tokens is not None:
            return self.num_sink_tokens
        return prompt_tokens if 2 * prompt_tokens <= self.window_length else Sizes().num_sink_tokens


def tell(loaded: Loaded, settings: Settings, screen: Screen) -> None:
    """Show the story, then a summary, which an interrupt does not prevent.

    Raises:
        UnsupportedModelError: the model cannot stream.
        KeyboardInterrupt: Ctrl-C, after the summary.
    """
    ids = prompt_ids(loaded.tokenizer, settings.prompt)
    sinks = settings.sinks(ids.shape[1])
    screen.line(f"{loaded.name}, window of {settings.window_length} tokens, {sinks} sinks\n")
    torch.manual_seed(_SEED)
    stream = sink_patch.stream(
        loaded.model,
        loaded.tokenizer,
        ids,
        window_length=settings.window_length,
        num_sink_tokens=sinks,
        max_new_tokens=settings.max_new_tokens,
        logits_processor=LogitsProcessorList([RecentRepetitionPenalty(sinks)]),
        suppress_tokens=loaded.tokenizer.all_special_ids,  # the story does not end, and no other message begins
        **_SAMPLING,
    )
    meter, is_whole = Meter(stream.cache, settings.window_length), False
    try:
        with screen:
            for piece in stream:
                screen.text(piece)
                measurement, is_window = meter.piece()
                if measurement is not None:
                    screen.figures(measurement.line(settings.window_length), is_window=is_window)
        is_whole = True
    finally:
        screen.line("\n" + summary(settings, ids.shape[1], meter.tokens, meter.windows, is_whole=is_whole))


def summary(
    settings: Settings, prompt_tokens: int, tokens: int, measurements: list[Measurement], *, is_whole: bool
) -> str:
    """What happened, in a few sentences.

    Args:
        settings: of this run.
        prompt_tokens: length of the prompt.
        tokens: of the whole stream.
        measurements: one a window.
        is_whole: whether the story was not stopped.
    """
    sinks = settings.sinks(prompt_tokens)
    lines = [f"{tokens} tokens, prompt counted in: {tokens / settings.window_length:.1f} windows."]
    if len(measurements) > 1:
        first, last = measurements[0], measurements[-1]
        lines += [
            f"Speed: {first.tokens_per_second:.1f} tokens/s at first, {last.tokens_per_second:.1f} at the end.",
            f"Cache: {first.cache_megabytes:.2f} MB at first, {last.cache_megabytes:.2f} MB at the end.",
        ]
        if first.process_megabytes is not None and last.process_megabytes is not None:
            sizes = f"{first.process_megabytes:.0f} MB at first, {last.process_megabytes:.0f} MB at the end"
            lines.append(f"Memory of the process: {sizes}.")
    if tokens <= settings.window_length:
        more = "Nothing has left the window yet: ask for more with --max-new-tokens."
        return "\n".join([*lines, more if is_whole else "Stopped before anything left the window."])
    seen = f"The model sees the first {sinks} tokens and the newest {settings.window_length - sinks}."
    if sinks >= prompt_tokens:
        lines.append(f"{seen} The first are the prompt, so it keeps to its subject. What lies between is forgotten.")
    else:
        lines.append(f"{seen} What lies between is forgotten, the prompt too, so that it may wander off its subject.")
    return "\n".join(lines)


def prompt_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Ids [1, tokens] of the prompt in the model's chat template, or as it is for a model without one."""
    text, special = prompt, True
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        special = False  # the template contains them
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
    return ids
