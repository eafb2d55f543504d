"""Adapters for a model that no family claims: those of the known conventions that fit its readings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sink_patch.buffers.rotation import Rotation
from sink_patch.compat import Entry
from sink_patch.errors import UnsupportedModelError
from sink_patch.models.adapters.adapter import Adapter
from sink_patch.models.adapters.frequencies import exact, frequency_buffers
from sink_patch.models.adapters.rope import no_positions
from sink_patch.models.entries import text_config
from sink_patch.models.probe.readings import Reading


def choose(model: nn.Module, entries: Sequence[Entry], readings: Sequence[Reading | None]) -> list[Adapter]:
    """One adapter for each layer, among the known conventions.

    Args:
        model: holds the frequencies.
        entries, readings: one for each layer of the model's cache.

    Raises:
        UnsupportedModelError: nothing fits, or no layer turns at all (then position enters in some other way).
    """
    candidates = _candidates(model, readings)
    chosen = []
    for layer_idx, (entry, reading) in enumerate(zip(entries, readings, strict=True)):
        if not entry.attention:
            chosen.append(no_positions())
            continue
        fitting = [] if reading is None else [adapter for adapter in candidates if reading.mismatch(adapter) is None]
        if not fitting:
            raise UnsupportedModelError(
                f"No family is registered for {text_config(model).model_type!r}, and in layer {layer_idx} the cache "
                "turns in none of the known ways. Register a family with an adapter: sink_patch.register_family."
            )
        chosen.append(fitting[0])
    if not any(adapter.turns for adapter in chosen):
        raise UnsupportedModelError(
            f"No family is registered for {text_config(model).model_type!r}, and none of its keys turns with position, "
            "so position enters in a way that the cache does not show (ALiBi, learned or relative positions). Use "
            "another cache_implementation."
        )
    return chosen


def still_hold(adapters: Sequence[Adapter], model: nn.Module) -> bool:
    """Whether adapters that were chosen before have the frequencies that the model has now (a cast rounds them)."""
    held = [exact(buffer).tolist() for buffer in frequency_buffers(model).values()]
    rotations = [rotation for adapter in adapters for rotation in (adapter.keys, adapter.values)]
    return all(rotation.inv_freq.tolist() in held for rotation in rotations if rotation is not None)


def _candidates(model: nn.Module, readings: Sequence[Reading | None]) -> list[Adapter]:
    """No rotation; then each frequency buffer of the model by pairing, place in the head, sign and cached tensor."""
    filled = [reading for reading in readings if reading is not None]
    head_dims = {pair[0].shape[-1] for reading in filled for pair in (reading.keys, reading.values)}
    candidates = [no_positions()]
    for buffer in frequency_buffers(model).values():
        inv_freq = exact(buffer)  # [rotary_dim / 2]
        starts = {0} | {dim - 2 * inv_freq.numel() for dim in head_dims if dim > 2 * inv_freq.numel()}
        candidates += [
            Adapter(**{cached_in: Rotation(inv_freq, pairing, start, sign)})
            for cached_in in ("keys", "values")
            for pairing in ("half", "interleaved")
            for start in sorted(starts)
            for sign in (1, -1)
        ]
    return candidates
