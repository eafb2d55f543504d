"""What is measured while a model generates: speed and memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

import sink_patch
from sink_patch.evaluate.measures.memory import process_bytes

_EVERY = 8  # tokens; the line of figures changes about once a second on a slow machine


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


class Meter:
    """Measures a stream, token by token. The time for the prompt is left out: the clock starts at the first new token.

    Args:
        cache: of the stream.
        window_length: so many tokens apart are the `windows`.
    """

    def __init__(self, cache: sink_patch.SinkCache, window_length: int):
        self.tokens = 0
        self.windows: list[Measurement] = []
        self._cache, self._window_length = cache, window_length
        self._newest = self._window = (0.0, 0)  # when, and at which length, the last of its kind was taken

    def piece(self) -> tuple[Measurement | None, bool]:
        """After each piece of text: a measurement now and then, and whether a whole window has passed with it."""
        self.tokens = self._cache.get_seq_length()
        now = (time.perf_counter(), self.tokens)
        if self._newest == (0.0, 0):
            self._newest = self._window = now
        if self.tokens - self._window[1] >= self._window_length:
            self.windows.append(self._since(self._window, now))
            self._newest = self._window = now
            return self.windows[-1], True
        if self.tokens - self._newest[1] < _EVERY:
            return None, False
        newest, self._newest = self._since(self._newest, now), now
        return newest, False

    def _since(self, before: tuple[float, int], now: tuple[float, int]) -> Measurement:
        seconds = now[0] - before[0]
        speed = (now[1] - before[1]) / seconds if seconds else 0.0
        process = process_bytes()
        return Measurement(now[1], speed, self._cache.nbytes / 1e6, None if process is None else process / 1e6)


class RecentRepetitionPenalty(LogitsProcessor):
    """Makes the tokens behind the sinks less likely, because a small model otherwise repeats one sentence without end.

    The repetition penalty of `generate` would make the words of the prompt less likely, too, for as long as they stay.

    Args:
        num_sink_tokens: how many of the first ids it leaves alone.
        penalty: positive scores are divided by it, negative ones multiplied, as in `RepetitionPenaltyLogitsProcessor`.
    """

    def __init__(self, num_sink_tokens: int, penalty: float = 1.15):
        self._sinks, self._penalty = num_sink_tokens, penalty

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] after the ids of the window [rows, tokens]."""
        recent = input_ids[:, self._sinks :]  # [rows, recent]
        old = scores.gather(1, recent)  # [rows, recent]
        return scores.scatter(1, recent, torch.where(old < 0, old * self._penalty, old / self._penalty))
