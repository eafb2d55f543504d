"""What the demo shows while a model generates: the text as it comes, and now and then its speed and memory."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from transformers import LogitsProcessor, TextStreamer

import sink_patch


@dataclass(frozen=True)
class Measurement:
    """Speed and memory at one point of the stream.

    Args:
        tokens: length of the stream so far, including the prompt.
        tokens_per_second: since the measurement before.
        cache_megabytes: size of the cache in 10^6 bytes.
        process_megabytes: resident memory of the process in 10^6 bytes; None: unknown, as psutil is not installed.
    """

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


class RecentRepetitionPenalty(LogitsProcessor):
    """Makes the newest tokens less likely, because a small model otherwise repeats one sentence without end.

    The repetition penalty of `generate` applies to the whole text, so a long story would run out of words such as "the"
    and "and".

    Args:
        penalty: positive scores are divided by it, negative ones multiplied, as in `RepetitionPenaltyLogitsProcessor`.
        tokens: how many of the newest tokens it applies to.
    """

    def __init__(self, penalty: float = 1.15, tokens: int = 256):
        self._penalty, self._tokens = penalty, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] after input_ids [rows, tokens]."""
        recent = input_ids[:, -self._tokens :]
        old = scores.gather(1, recent)  # [rows, recent]
        return scores.scatter(1, recent, torch.where(old < 0, old * self._penalty, old / self._penalty))


class CacheCapture:
    """A forward hook (`with_kwargs=True`) that keeps a reference to the `SinkCache` that `generate` has made."""

    cache: sink_patch.SinkCache | None = None

    def __call__(self, _module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        self.cache = sink_cache_in(kwargs.values()) or self.cache

    def megabytes(self) -> float:
        """Size of the cache in 10^6 bytes; 0 before the first forward."""
        return 0.0 if self.cache is None else float(self.cache.nbytes) / 1e6


class MeasuringStreamer(TextStreamer):
    """Prints the text as it comes, and a measurement every `window_length` tokens.

    It writes plain text without control codes, so that the output can go to a file. The time for the prompt is not
    measured: the clock starts at the first generated token.
    """

    def __init__(self, tokenizer: Any, capture: CacheCapture, window_length: int, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.measurements: list[Measurement] = []
        self._capture, self._window_length, self._out = capture, window_length, out
        self._tokens = self._measured_tokens = 0
        self._measured_at: float | None = None
        self._unprinted = False

    def put(self, value: torch.Tensor) -> None:
        """Token ids: the prompt, shape [1, tokens], then one token at a time."""
        self._tokens += value.numel()
        super().put(value)  # type: ignore[no-untyped-call]
        if self._measured_at is None and value.numel() == 1:
            self._measured_at, self._measured_tokens = time.perf_counter(), self._tokens
        if self._tokens - self._measured_tokens >= self._window_length:
            self._measure()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._out.write(text)
        if self._unprinted and text:  # between two words, since TextStreamer holds text back until a word is complete
            self._out.write(f"\n\n{self.measurements[-1].line(self._window_length)}\n\n")
            self._unprinted = False
        if stream_end:
            self._out.write("\n")
        self._out.flush()

    def _measure(self) -> None:
        now = time.perf_counter()
        seconds = now - (self._measured_at or now)
        speed = (self._tokens - self._measured_tokens) / seconds if seconds else 0.0
        self.measurements.append(Measurement(self._tokens, speed, self._capture.megabytes(), process_megabytes()))
        self._measured_at, self._measured_tokens, self._unprinted = now, self._tokens, True


def sink_cache_in(values: Iterable[Any]) -> sink_patch.SinkCache | None:
    """The first `SinkCache` among arguments or outputs, whose names differ between versions of transformers."""
    return next((value for value in values if isinstance(value, sink_patch.SinkCache)), None)


def process_megabytes() -> float | None:
    """Resident memory of this process in 10^6 bytes; None where psutil is not installed."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return None
    return float(psutil.Process().memory_info().rss) / 1e6
