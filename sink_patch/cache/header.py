"""The header of a saved file: records that are written as JSON, and whose types are checked when they are read.

A header says what the tensors of a file are, and what else a cache holds. A file may come from anywhere: what can be
said of a header alone is checked here; whether it agrees with the tensors is checked in unpacking.py, and whether it
agrees with the model in files.py.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from sink_patch import __version__
from sink_patch.arguments import TOKENS
from sink_patch.errors import CacheFileError

FORMAT = 1
"""Goes up whenever a file of before cannot be read any more."""

Count = Annotated[int, Meta(ge=0, le=2**53)]  # as far as all readers of JSON have exact integers
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Turning = tuple[str, int, int, list[float]]  # pairing, start, sign and inv_freq of a `Rotation`

_Record = TypeVar("_Record", bound="Preamble")


class RowRecord(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A `Row` (rules/rows.py); files of before know nothing of messages and images."""

    seen: Count
    base: Count
    recallable: Count
    complete: bool
    dropped: Count = 0
    searched: Count = 0
    places: tuple[tuple[Count, Count, bool], ...] = ()
    sink_end: Count = 0
    images_end: Count = 0
    spans: tuple[tuple[Count, Count], ...] = ()
    images: tuple[Annotated[str, Meta(pattern=r"^([a-z][0-9a-f]{32})?\Z")], ...] = ()

    def __post_init__(self) -> None:
        firsts, borders = [place[0] for place in self.places], [border for span in self.spans for border in span]
        most = max(self.base, self.recallable, self.dropped, self.searched, self.images_end, *firsts, *borders)
        if firsts != sorted(set(firsts)) or borders != sorted(borders) or most > self.seen:
            raise ValueError(f"base={self.base} beside seen={self.seen} in {self}")


class KindRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A `LayerKind` (rules/kinds.py)."""

    capacity: Count
    num_sink_tokens: Count
    local: bool
    ordered: bool
    spare: Count


class TensorName(Struct, frozen=True, forbid_unknown_fields=True):
    """The name of a tensor of the file."""

    tensor: str


class RingRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """The tensors of a ring: its buffer, and its sinks as the model made them."""

    entries: tuple[
        tuple[Literal["buffer"], TensorName | None],
        tuple[Literal["pristine"], TensorName | None],
    ] = field(name="dict")


class Packed(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A value that JSON does not have, exactly one of them: the name of a tensor, a dict, a dtype or a device."""

    tensor: str | None = None
    entries: list[tuple[int | str, Value]] | None = field(default=None, name="dict")
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if [self.tensor, self.entries, self.dtype, self.device].count(None) != 3:
            raise ValueError("one of tensor, dict, dtype and device is expected")


Value = Packed | bool | int | float | str | None


class Held(Struct, frozen=True, forbid_unknown_fields=True):
    """Attributes of a layer, by name."""

    entries: list[tuple[str, Value]] = field(name="dict")


class LayerRecord(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A layer of the cache; all but `held` only where it has keys and values."""

    held: Held
    kind: KindRecord | None = None
    keys: RingRecord | None = None
    values: RingRecord | None = None


class Fingerprint(Struct, frozen=True, omit_defaults=True):
    """What a model is known by (fingerprint.py); the names in the file are words for people.

    Args:
        positions: length of the context, and how many positions may be used at most.
        kinds_of_layers: for each layer, whether it holds keys and values, whether it holds a state, and its kind.
        rotations: for each layer, how its keys and its values turn.
        part: which part of its weights the process had, where several processes share them; None: all.
    """

    model_class: str = field(name="class")
    model_type: str
    family: str | None
    positions: tuple[int | float, int | float | None]
    number_of_layers: int = field(name="number of layers")
    kinds_of_layers: list[tuple[bool, bool, KindRecord]] = field(name="kinds of layers")
    rotations: list[tuple[Turning | None, Turning | None]]
    weights: str
    part: str | None = field(default=None, name="part of the weights")


class Preamble(Struct, frozen=True):
    """What a header of any format has."""

    format: int
    sink_patch: str


class Header(Preamble, frozen=True, omit_defaults=True):
    """The whole header; `sink_patch` and `transformers` are the versions that wrote it.

    Args:
        history: for each row, the marks of its `RowHistory` (history/rows.py); None: what was read is not known, as of
            files of before.
        evict, turn_start: how the cache forgets (`Sizes`); files of before let single tokens leave.
    """

    transformers: str
    window_length: Count
    num_sink_tokens: Count
    rows: list[RowRecord] | None
    columns: Count
    recording: bool
    layers: list[LayerRecord]
    model: Fingerprint
    history: list[list[tuple[Count, Digest]]] | None = None
    evict: str = TOKENS
    turn_start: list[list[Count]] = []

    def __post_init__(self) -> None:
        if self.window_length <= self.num_sink_tokens:
            raise ValueError(f"window_length={self.window_length} beside num_sink_tokens={self.num_sink_tokens}")
        most = max((row.seen for row in self.rows or ()), default=0)
        left = [row for row in self.rows or () if row.dropped]
        odd = [row for row in left if self.evict == TOKENS and not (row.images_end or row.places)]
        if odd or any(row.dropped + self.num_sink_tokens > row.seen for row in left):
            raise ValueError(f"evict={self.evict!r} and num_sink_tokens={self.num_sink_tokens} beside {left[0]}")
        if self.evict != TOKENS and self.rows is not None and self.history is None:
            raise ValueError(f"evict={self.evict!r} without the ids that were read")
        if most > self.columns or (self.rows is None and self.columns):
            raise ValueError(f"columns={self.columns} of a cache whose longest row has seen {most} tokens")


def encode(header: Header) -> str:
    """JSON."""
    return msgspec.json.encode(header).decode()


def decode(path: object, text: str) -> Header:
    """The record again.

    Args:
        path: of the file, for people.

    Raises:
        CacheFileError: the text is not the JSON of a `Header`, or one of another format.
    """
    preamble = _decoded(path, text, Preamble)
    if preamble.format != FORMAT:
        raise CacheFileError(
            f"{path} is of format {preamble.format}, written by sink_patch {preamble.sink_patch}; sink_patch "
            f"{__version__} reads format {FORMAT}. Load it with that version, or feed the text again."
        )
    return _decoded(path, text, Header, preamble.sink_patch)


def _decoded(path: object, text: str, record: type[_Record], version: str = "an unknown version") -> _Record:
    try:
        return msgspec.json.decode(text, type=record)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise CacheFileError(
            f"{path} was written by sink_patch {version}, and sink_patch {__version__} cannot read its header: {error}."
            " Load a file that cache.save(path) has written, with that version, or feed the text again."
        ) from error
