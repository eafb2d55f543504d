"""Windows over a text by an explicit mask: many tokens in one forward, where that is the same as one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import DynamicCache

from sink_patch.evaluate.measures.perplexity.scoring import Reading, Streamed, Way

_TOKENS_OF_THE_TRIAL = 64
_AGREE = {torch.float32: 0.01}  # nats, on average
_AGREE_IN_16_BITS = 0.1


class _Band(DynamicCache):
    """Keeps the sinks and the newest tokens that a later one sees, with keys as they were made.

    Args:
        num_sink_tokens, newest: how many.
    """

    def __init__(self, num_sink_tokens: int, newest: int):
        super().__init__()
        self._sinks, self._newest = num_sink_tokens, newest
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.seen = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, heads, kept + new, head_dim] of what is kept, and of the new tokens."""
        both = key_states, value_states
        if layer_idx in self.kept:
            before = self.kept[layer_idx]
            both = torch.cat([before[0], key_states], dim=-2), torch.cat([before[1], value_states], dim=-2)
        self.kept[layer_idx] = self._trimmed(both[0]), self._trimmed(both[1])
        return both

    def get_seq_length(self, *_args: Any, **_options: Any) -> int:
        return self.seen

    def _trimmed(self, states: torch.Tensor) -> torch.Tensor:
        """The sinks and the newest of states [1, heads, tokens, head_dim]."""
        tokens = states.shape[-2]
        return torch.cat([states[:, :, : self._sinks], states[:, :, tokens - self._newest :]], dim=-2)


class Masked(Way):
    """A token sees the same tokens as in a `SinkCache`, but at their positions in the text.

    Without sinks that is the same, where only distances matter (`agrees`). With sinks the distance to them grows.

    Args:
        reading: what is read.
        num_sink_tokens: first tokens that are always seen.
        shift: is added to all positions.
    """

    def __init__(self, reading: Reading, num_sink_tokens: int, shift: int = 0):
        super().__init__(reading)
        self._sinks, self._shift = num_sink_tokens, shift
        self._newest = reading.window_length - num_sink_tokens - 1  # that the next token sees beside itself
        self._cache = _Band(num_sink_tokens, self._newest)

    def read(self, start: int, stop: int) -> torch.Tensor:
        one, wanted = self.reading, self.reading.scored(start, stop)
        logits, _ = one.forward(
            one.ids[None, start:stop],  # [1, piece]
            [each - start for each in wanted],
            self._cache,
            attention_mask=self._mask(start, stop),
            position_ids=torch.arange(start, stop)[None] + self._shift,  # [1, piece]
        )
        self._cache.seen = stop
        return one.score(logits[0], wanted) if wanted else torch.empty(0)

    def save(self, path: Path) -> bool:
        named = {f"{layer}.{part}": both[part] for layer, both in self._cache.kept.items() for part in (0, 1)}
        safetensors.torch.save_file({name: states.contiguous() for name, states in named.items()}, path)
        return True

    def resume(self, path: Path | None, start: int) -> None:
        if path is not None:
            named = safetensors.torch.load_file(path)
            layers = sorted({int(name.partition(".")[0]) for name in named})
            self._cache.kept = {layer: (named[f"{layer}.0"], named[f"{layer}.1"]) for layer in layers}
            self._cache.seen = start

    def _mask(self, start: int, stop: int) -> torch.Tensor:
        """Additive mask [1, 1, piece, kept + piece]: a token sees the sinks and the newest others, W in all."""
        query = torch.arange(start, stop)[:, None]
        kept = [torch.arange(self._sinks), torch.arange(start - self._newest, start)] if start else []
        key = torch.cat([*kept, torch.arange(start, stop)])[None]
        window = self.reading.window_length
        visible = (key <= query) & ((query - key < window - self._sinks) | (key < self._sinks) | (query < window))
        dtype: torch.dtype = self.reading.model.dtype
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def disagreement(reading: Reading) -> str | None:
    """Why a mask does not read this model as a `SinkCache` without sinks does; None: it does.

    Some tokens past the first window are read both ways, by the mask at the last positions of the text: a model whose
    attention depends on more than distances, that has a state, or sliding windows of its own would show it.
    """
    window = reading.window_length
    stop = min(window + _TOKENS_OF_THE_TRIAL, len(reading.ids) - 1)
    trial = Reading(reading.model, reading.ids, range(window, stop), window)
    try:
        masked = Masked(trial, 0, shift=len(reading.ids) - stop)
        masked.read(0, window)
        scores = masked.read(window, stop)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as failure:
        return f"the model takes no mask of this kind ({type(failure).__name__}: {failure})"
    streamed = Streamed(trial, 0)
    streamed.read(0, window)
    difference = float((scores - streamed.read(window, stop)).abs().mean())
    if not difference < _AGREE.get(reading.model.dtype, _AGREE_IN_16_BITS):
        return f"read with a mask, its scores differ by {difference:.2g} nats from those of a stream"
    return None
