"""Whether a model's cache turns as its family says."""

from __future__ import annotations

from collections.abc import Sequence

from sink_patch.compat import Entry
from sink_patch.errors import AdapterMismatchError
from sink_patch.models.adapters.adapter import Adapter
from sink_patch.models.probe.readings import Reading


def fits(readings: Sequence[Reading | None], entries: Sequence[Entry], adapters: Sequence[Adapter]) -> bool:
    """Whether every adapter is what the model does.

    Args:
        readings, entries, adapters: one for each layer of the model's cache.
    """
    return _first_mismatch(readings, entries, adapters) is None


def verify(
    readings: Sequence[Reading | None], entries: Sequence[Entry], adapters: Sequence[Adapter], family: str
) -> None:
    """Do nothing if every adapter is what the model does.

    Args:
        readings, entries, adapters: one for each layer of the model's cache.
        family: the name of the family that gave the adapters.

    Raises:
        AdapterMismatchError: an adapter is not; the message names the first such layer.
    """
    mismatch = _first_mismatch(readings, entries, adapters)
    if mismatch is not None:
        layer_idx, found = mismatch
        raise AdapterMismatchError(
            f"The model's cache does not turn as the family {family!r} says ({adapters[layer_idx].describe()}). In "
            f"layer {layer_idx} {found}. Streaming would give wrong text, so it is refused. If this is a variant of "
            "that family, register it under its own model_type: sink_patch.register_family."
        )


def _first_mismatch(
    readings: Sequence[Reading | None], entries: Sequence[Entry], adapters: Sequence[Adapter]
) -> tuple[int, str] | None:
    """(layer index, what does not fit) of the first layer with attention whose adapter is wrong."""
    for layer_idx, (reading, entry, adapter) in enumerate(zip(readings, entries, adapters, strict=True)):
        if entry.attention:
            found = "it caches nothing" if reading is None else reading.mismatch(adapter)
            if found is not None:
                return layer_idx, found
    return None
