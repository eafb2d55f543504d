"""What the demo shows while a model generates: the text as it comes, and now and then what it costs."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from transformers import LogitsProcessor, TextStreamer

from sink_patch.models.entries import CACHE_NAMES


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


class NoLoops(LogitsProcessor):
    """Makes the words of the last few sentences less likely, as a small model else tells one sentence for ever.

    The repetition penalty of `generate` looks back to the start, and would leave a long story without "the" and "and".
    """

    def __init__(self, penalty: float = 1.15, tokens: int = 256):
        self._penalty, self._tokens = penalty, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] after input_ids [rows, tokens]."""
        recent = input_ids[:, -self._tokens :]
        told = scores.gather(1, recent)  # [rows, recent]
        return scores.scatter(1, recent, torch.where(told < 0, told * self._penalty, told / self._penalty))


class Watch:
    """A forward hook that holds on to the cache which `generate` has made."""

    cache: Any = None

    def __call__(self, _module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        self.cache = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), self.cache)

    def megabytes(self) -> float:
        """All that the cache holds, in 10^6 bytes."""
        return 0.0 if self.cache is None else float(self.cache.nbytes) / 1e6


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
        super().put(value)  # type: ignore[no-untyped-call]
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
        psutil = importlib.import_module("psutil")
    except ImportError:
        return None
    return float(psutil.Process().memory_info().rss) / 1e6
