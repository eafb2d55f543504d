"""Layers put together again from the records and tensors of a file, which must fit them.

Every value is held against the layer that it is for: a file sets nothing but known names, each to a value of its type.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from sink_patch.buffers.layers import SinkLayer, attributes_of
from sink_patch.buffers.rings import Ring
from sink_patch.buffers.sinks.owner import Sinks
from sink_patch.cache.header import Held, LayerRecord, Packed, RingRecord, RowRecord, Value
from sink_patch.cache.packing import OF_A_STATE, RINGS, UNCHANGED, Tensors, tensors_in
from sink_patch.errors import CacheFileError
from sink_patch.history.rows import BLOCK, START, Mark, RowHistory
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.rows import Row

_WRITTEN_BEFORE = frozenset({"kind_index"})  # by the first releases; it follows from the kinds
_SET_LATER = frozenset({"conv_kernel_size", "max_batch_size", "device", "dtype"})  # by some, in a first forward
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_DTYPES_HELD = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Unpacker:
    """Fills fresh layers with what a file holds.

    Args:
        path: of the file, for people.
        tensors: of the file.
        rows: of the cache; None: it holds nothing.
    """

    def __init__(self, path: object, tensors: Tensors, rows: Sequence[RowRecord] | None):
        self._path, self._tensors, self._not_used = path, tensors, set(tensors)
        self._rows = None if rows is None else len(rows)
        self._held = [Row(**structs.asdict(row)) for row in rows or ()]

    def fill(
        self, layer: object, record: LayerRecord, name: str, sinks: Sinks, device: torch.device, *, elsewhere: bool
    ) -> None:
        """Fill one layer; what it holds will be on `device`.

        Args:
            elsewhere: whether another process has that layer of the model, so that it holds nothing.

        Raises:
            CacheFileError: the record does not fit the layer, or its tensors do not.
        """
        self._fill_states(layer, record.held, name, device)
        kind, keys, values = record.kind, record.keys, record.values
        if not isinstance(layer, SinkLayer):
            nothing = all(one is None for one in (kind, keys, values))
            self.check(nothing, f"{name} has keys and values, and none in this model")
            return
        if kind is None or keys is None or values is None:
            raise self.fault(f"{name} has no keys and values, and has some in this model")
        found = LayerKind(**structs.asdict(kind))
        self.check(replace(found, spare=0) == layer.kind, f"{name} is a {found}, and a {layer.kind} in this model")
        layer.kind = found
        if elsewhere:
            nothing = all(tensor is None for packed in (keys, values) for _, tensor in packed.entries)
            self.check(nothing, f"{name} has keys and values, and in this model another process has that layer")
            return
        for ring, packed, what in zip(layer.rings, (keys, values), RINGS, strict=True):
            self._fill_ring(ring, packed, f"{name}.{what}", found, sinks, device)
        shapes = [None if ring.buffer is None else ring.buffer.shape[:3] for ring in layer.rings]
        self.check(shapes[0] == shapes[1], f"keys and values of {name} are of shapes {shapes}")

    def history(self, marks: Sequence[Sequence[tuple[int, str]]], seen: Sequence[int]) -> list[RowHistory]:
        """What the rows have read; they have seen `seen` tokens.

        Raises:
            CacheFileError: the marks do not fit the ids, or either does not fit the rows.
        """
        self.check(len(marks) == len(seen), f"it has the history of {len(marks)} rows, of {len(seen)}")
        return [self._row_history(f"history.{row}", *one) for row, one in enumerate(zip(marks, seen, strict=True))]

    def _row_history(self, name: str, marks: Sequence[tuple[int, str]], seen: int) -> RowHistory:
        ids = self._tensor(name, name, torch.device("cpu"))
        self.check(ids.dtype == torch.long and ids.ndim == 1, f"{name} is of shape {list(ids.shape)} and {ids.dtype}")
        counts, all_ids = [count for count, _ in marks], array("q", ids.tolist())
        ordered = counts == sorted(set(counts)) and all(count and count % BLOCK == 0 for count in counts)
        found = (START, *(Mark(count, bytes.fromhex(digest)) for count, digest in marks))
        newest = all_ids[BLOCK:] if marks else all_ids
        right = ordered and found[-1].tokens + len(newest) == seen and len(all_ids) >= min(seen, BLOCK)
        self.check(right, f"{name} has {len(all_ids)} ids and marks at {counts}, of {seen} tokens")
        return RowHistory(found, newest, all_ids[:BLOCK])

    def check(self, right: bool, otherwise: str) -> None:
        """Raise a CacheFileError where the file is not right."""
        if not right:
            raise self.fault(otherwise)

    def check_all_used(self) -> None:
        self.check(not self._not_used, f"its header says nothing of {sorted(self._not_used)}")

    def fault(self, what: str) -> CacheFileError:
        return CacheFileError(
            f"{self._path} is not as cache.save(path) writes it: {what}. Save the cache again, or feed the text again."
        )

    def _fill_ring(
        self, ring: Ring, record: RingRecord, name: str, kind: LayerKind, sinks: Sinks, device: torch.device
    ) -> None:
        (_, buffer), (_, pristine) = record.entries
        seen = max(map(kind.count, self._held), default=0)
        if buffer is None:
            self.check(not seen and pristine is None, f"{name} holds nothing of {seen} tokens")
            return
        self.check(self._rows is not None, f"{name} holds something, and no tokens were seen")
        found = self._tensor(buffer.tensor, f"{name}.buffer", device)  # [rows, heads, slots, dim]
        self._check_states(found, 4, f"{name}.buffer")
        _, heads, slots, dim = found.shape
        fewest = max(min(seen, kind.slots), kind.num_sink_tokens)
        turning = 0 if ring.rotation is None else ring.rotation.start + ring.rotation.rotary_dim
        right = fewest <= slots <= kind.slots and dim >= turning
        self.check(right, f"{name}.buffer is of shape {list(found.shape)} for {seen} tokens in a {kind}")
        ring.buffer = found
        if pristine is None:
            self.check(ring.owner is None or not seen, f"{name} has no sinks")
            return
        self.check(ring.owner is not None, f"{name} has sinks that turn, and none in this model")
        found = self._tensor(pristine.tensor, f"{name}.pristine", device)  # [rows, heads, num_sink_tokens, dim]
        self._check_states(found, 4, f"{name}.pristine")
        right = found.shape[1:] == (heads, kind.num_sink_tokens, dim)
        self.check(right, f"{name}.pristine is of shape {list(found.shape)} for {kind.num_sink_tokens} sinks")
        sinks.put(ring, found)

    def _fill_states(self, layer: object, held: Held, name: str, device: torch.device) -> None:
        fresh = attributes_of(layer)
        found = {key: value for key, value in held.entries if key not in _WRITTEN_BEFORE}
        names = sorted(key for key, _ in held.entries if key not in _WRITTEN_BEFORE)
        later = _SET_LATER if "conv_states" in fresh and "device" not in fresh else frozenset()
        known = found.keys() in (fresh.keys(), fresh.keys() | later)
        self.check(known and names == sorted(found), f"{name} holds {names}, and {sorted(fresh)} in this model")
        made = {key: self._attribute(value, key, fresh.get(key), name, device) for key, value in found.items()}
        for what in made.keys() & {"conv_states", "recurrent_states"}:
            there = _each(made[what], lambda state: state is not None)
            self.check(made.get(f"is_{what}_initialized") == there, f"{name}.{what} is not whole")
        conv_states = made.get("conv_states")
        lengths = _each(conv_states, lambda state: None if state is None else state.shape[-1])
        self.check(made.get("conv_kernel_size") == lengths, f"{name}.conv_states is of another length")
        begun = next(tensors_in(conv_states), None) is not None
        placed = {made.get(what) is not None for what in ("device", "dtype", *(made.keys() - fresh.keys()))}
        self.check(not made or placed == {begun}, f"{name}.conv_states has another device or dtype")
        if made:
            vars(layer).update(made)

    def _attribute(self, value: Value, key: str, fresh: Any, name: str, device: torch.device) -> Any:
        """The value of an attribute `key`, which is `fresh` in a fresh layer."""
        name = f"{name}.{key}"
        if not isinstance(fresh, dict):
            return self._one(value, key, fresh, name, device)
        entries = value.entries if isinstance(value, Packed) else None
        self.check([one for one, _ in entries or ()] == list(fresh), f"{name} is {value!r}")
        return {one: self._one(held, key, fresh[one], f"{name}.{one}", device) for one, held in entries or ()}

    def _one(self, value: Value, key: str, fresh: Any, name: str, device: torch.device) -> Any:
        found: Any = value
        if isinstance(value, Packed) and value.tensor is not None:
            found = self._tensor(value.tensor, name, device)
            self._check_states(found, None, name)
        elif isinstance(value, Packed):
            found = device if value.device is not None else _DTYPES.get(str(value.dtype))
        if key in UNCHANGED or found is None:
            right = value is None or not isinstance(value, Packed)
            right = right and type(found) is type(fresh) and found == fresh
        else:
            right = type(found) is OF_A_STATE.get(key)
        self.check(right, f"{name} is {value!r}")
        return found

    def _tensor(self, named: str, name: str, device: torch.device) -> torch.Tensor:
        """A copy of the tensor that belongs to the place `name`."""
        self.check(named == name and name in self._tensors, f"{name} is said to be the tensor {named!r}")
        self._not_used.discard(name)
        return self._tensors[name].to(device=device, copy=True)

    def _check_states(self, tensor: torch.Tensor, dims: int | None, name: str) -> None:
        """Whether a tensor can be what a model has computed for the rows of the cache, [rows, ...]."""
        right = tensor.dtype in _DTYPES_HELD and tensor.ndim > 0 and dims in (None, tensor.ndim)
        right = right and self._rows in (None, tensor.shape[0])
        self.check(right, f"{name} is of shape {list(tensor.shape)} and dtype {tensor.dtype} for {self._rows} rows")


def _each(states: Any, of: Callable[[Any], Any]) -> Any:
    """Something of a state, or of each of several in a dict."""
    return {key: of(state) for key, state in states.items()} if isinstance(states, dict) else of(states)
