"""A layer taken apart into a record and tensors, which have the names of their places (unpacking.py is the way back).

What a stream changes is written, and nothing else: the rings of our layers, and known attributes of the layers of
states of transformers (`LinearAttentionLayer` and its kin, cache_utils.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from sink_patch.buffers.layers import SinkLayer, attributes_of
from sink_patch.buffers.rings import Ring
from sink_patch.buffers.sinks.owner import Sinks
from sink_patch.cache.header import Held, KindRecord, LayerRecord, Packed, RingRecord, RowRecord, TensorName, Value
from sink_patch.errors import CacheStateError
from sink_patch.history.rows import RowHistory
from sink_patch.rules.rows import Row

Tensors = dict[str, torch.Tensor]

RINGS = ("keys", "values")
OF_A_STATE = {
    "conv_states": torch.Tensor,
    "recurrent_states": torch.Tensor,
    "is_conv_states_initialized": bool,
    "is_recurrent_states_initialized": bool,
    "has_previous_state": bool,
    "conv_kernel_size": int,
    "max_batch_size": int,
    "device": torch.device,
    "dtype": torch.dtype,
}
"""What a stream changes in a layer of states: one value, or a dict of one for each state; None where there is none."""

UNCHANGED = frozenset({"number_of_states", "record_past", "is_initialized", "keys", "values"})
"""What is written too, and is always as in a fresh layer."""


def pack_layer(layer: object, name: str, sinks: Sinks, tensors: Tensors) -> LayerRecord:
    """The record of a layer; its tensors go into `tensors`, under names that begin with `name`.

    Raises:
        CacheStateError: it holds something of which nothing is known.
    """
    held = attributes_of(layer)
    packed = Held([(key, _pack(value, f"{name}.{key}", tensors)) for key, value in held.items()])
    for key in held.keys() - OF_A_STATE.keys() - UNCHANGED:
        raise _unknown(f"{name}.{key}", held[key])
    if not isinstance(layer, SinkLayer):
        return LayerRecord(packed)
    keys, values = (
        _pack_ring(ring, sinks.pristine_of(ring), f"{name}.{what}", tensors)
        for ring, what in zip(layer.rings, RINGS, strict=True)
    )
    return LayerRecord(packed, KindRecord(**asdict(layer.kind)), keys, values)


def pack_row(row: Row) -> RowRecord:
    """The record of a row."""
    # msgspec leaves out an empty tuple if it is the very one that is the default, and in Python 3.10 there are others
    return RowRecord(**{name: held for name, held in vars(row).items() if held != ()})


def pack_history(rows: Sequence[RowHistory] | None, tensors: Tensors) -> list[list[tuple[int, str]]] | None:
    """The marks of all rows; their ids go into `tensors`, those of the first block in front where they are left out."""
    for number, row in enumerate(rows or ()):
        first = row.first if row.marks[-1].tokens else ()
        tensors[f"history.{number}"] = torch.tensor([*first, *row.newest], dtype=torch.long, device="cpu")
    return None if rows is None else [[(count, digest.hex()) for count, digest in row.marks[1:]] for row in rows]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a nest of dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(one)


def _pack_ring(ring: Ring, pristine: torch.Tensor | None, name: str, tensors: Tensors) -> RingRecord:
    held = {f"{name}.buffer": ring.buffer, f"{name}.pristine": pristine}
    tensors.update({place: tensor for place, tensor in held.items() if tensor is not None})
    buffer, sinks = (None if tensor is None else TensorName(place) for place, tensor in held.items())
    return RingRecord((("buffer", buffer), ("pristine", sinks)))


def _pack(value: object, name: str, tensors: Tensors) -> Value:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return Packed(tensor=name)
    if isinstance(value, torch.dtype):
        return Packed(dtype=str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Packed(device=str(value))
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return Packed(entries=[(key, _pack(one, f"{name}.{key}", tensors)) for key, one in value.items()])
    raise _unknown(name, value)


def _unknown(name: str, value: object) -> CacheStateError:
    return CacheStateError(
        f"This cache cannot be saved: {name} is a {type(value).__name__}, which sink_patch cannot write to a file. "
        "Keep the cache in memory (clone() copies it)."
    )
