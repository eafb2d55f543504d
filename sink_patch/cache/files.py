"""A `SinkCache` in a file: tensors by safetensors, and all else as JSON in its header.

Nothing in it is code, so a file from anywhere may be opened. Keys and values are the same in every version of
transformers; recurrent and convolution states lie in layers of its own, and go on in the version that wrote them.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sink_patch import __version__
from sink_patch.arguments import Sizes
from sink_patch.buffers.layers import SinkLayer
from sink_patch.cache.binding import new_streams
from sink_patch.cache.fingerprint import differences, fingerprint
from sink_patch.cache.packing import pack, unpack
from sink_patch.errors import CacheFileError
from sink_patch.models.entries import decoder_of
from sink_patch.models.examine import examine
from sink_patch.models.facts import ModelFacts
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.rows import Row
from sink_patch.streaming.streams import Streams

FORMAT = 1
"""Goes up whenever a file of before cannot be read any more."""

_KEY = "sink_patch"  # in the header
_FROM_THE_MODEL = frozenset({"kind", "kind_index", "rings", "is_sliding"})  # what layers do not have from the stream
_RINGS = ("keys", "values")

Path_ = str | os.PathLike[str]
Tensors = dict[str, torch.Tensor]
_Record = TypeVar("_Record", Row, LayerKind)


def write(path: Path_, model: nn.Module, streams: Streams) -> None:
    """Write what `read` reads. A file that is there already is replaced at the end, or left as it was."""
    tensors: Tensors = {}
    window_length, num_sink_tokens = streams.sizes.window_length, streams.sizes.num_sink_tokens
    sinks = streams.store.sinks
    header = {
        "format": FORMAT,
        "sink_patch": __version__,
        "transformers": transformers.__version__,
        "window_length": window_length,
        "num_sink_tokens": num_sink_tokens,
        "rows": None if streams.rows is None else [asdict(row) for row in streams.rows],
        "columns": streams.columns,
        "recording": streams.recording,
        "layers": [
            _pack_layer(layer, f"layers.{index}", sinks, tensors) for index, layer in enumerate(streams.store.layers)
        ],
        "model": fingerprint(model, streams.facts, window_length, num_sink_tokens),
    }
    target = Path(path).resolve()  # where it is a link, what it points to is replaced
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, unfinished, metadata={_KEY: json.dumps(header)})
        unfinished.replace(target)
    except SafetensorError as error:
        raise CacheFileError(f"{target} could not be written: {error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path_) -> Saved:
    """What is in a file.

    Raises:
        CacheFileError: it was not written by `write`, or by one of another format, or is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata())
            return Saved(Path(path), header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise CacheFileError(f"{path} holds no SinkCache, or has been cut short: {error}.") from error


def load(path: Path_, model: nn.Module) -> tuple[Sizes, Streams]:
    saved = read(path)
    facts = examine(model)
    saved.check(model, facts)
    sizes = Sizes(*saved.sizes)
    streams = new_streams(model, sizes, facts)
    saved.fill(streams, model)
    saved.set(streams)
    return sizes, streams


def _header(path: Path_, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if _KEY not in (metadata or {}):
        raise CacheFileError(f"{path} holds no SinkCache. Load a file that cache.save(path) has written.")
    header: dict[str, Any] = json.loads((metadata or {})[_KEY])
    if header["format"] != FORMAT:
        raise CacheFileError(
            f"{path} is of format {header['format']}, written by sink_patch {header['sink_patch']}; sink_patch "
            f"{__version__} reads format {FORMAT}. Load it with that version, or feed the text again."
        )
    return header


@dataclass(frozen=True)
class Saved:
    """What is in a file; its tensors may lie there still."""

    path: Path
    header: dict[str, Any]
    tensors: Tensors

    @property
    def sizes(self) -> tuple[int, int]:
        """`window_length` and `num_sink_tokens`."""
        return self.header["window_length"], self.header["num_sink_tokens"]

    def check(self, model: nn.Module, facts: ModelFacts) -> None:
        """Whether a model can go on with it.

        Raises:
            CacheFileError: it cannot, with what is not the same.
        """
        found = differences(self.header["model"], fingerprint(model, facts, *self.sizes))
        if found:
            raise CacheFileError(
                f"{self.path} was saved with another model than this {facts.model_class}; not the same: "
                f"{', '.join(found)}. Load it with the model that it was saved with."
            )
        wrote, have = self.header["transformers"], transformers.__version__
        if wrote != have and any(layer.entry.state for layer in facts.layers):
            raise CacheFileError(
                f"{self.path} holds recurrent or convolution states of transformers {wrote}, and this is {have}. Load "
                "it with that version, or feed the text again."
            )

    @torch.inference_mode(False)  # else the cache could not be written to outside it
    def fill(self, streams: Streams, model: nn.Module) -> None:
        """Put into fresh layers what those of the cache held, each on the device of the model's layer."""
        devices = _devices(model)
        for index, (layer, packed) in enumerate(zip(streams.store.layers, self.header["layers"], strict=True)):
            self._fill_layer(layer, packed, streams.store.sinks, devices.get(index, _device_of(model)))
        streams.store.note_kinds()

    def set(self, streams: Streams) -> None:
        """Let the rows stand where they stood."""
        rows = self.header["rows"]
        streams.rows = None if rows is None else [self._made(Row, row) for row in rows]
        streams.columns, streams.recording = self.header["columns"], self.header["recording"]

    def _fill_layer(self, layer: Any, packed: dict[str, Any], sinks: Any, device: torch.device) -> None:
        vars(layer).update(unpack(packed["held"], self.tensors, device))
        if not isinstance(layer, SinkLayer):
            return
        layer.kind = self._made(LayerKind, packed["kind"])
        for ring, name in zip(layer.rings, _RINGS, strict=True):
            held = unpack(packed[name], self.tensors, device)
            self._check_names("Ring", held.keys(), ("buffer", "pristine"))
            ring.buffer = held["buffer"]
            if held["pristine"] is not None:
                sinks.put(ring, held["pristine"])

    def _made(self, record: type[_Record], held: dict[str, Any]) -> _Record:
        self._check_names(record.__name__, held.keys(), {field.name for field in fields(record)})
        as_they_were: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in held.items()
        }
        return record(**as_they_were)

    def _check_names(self, what: str, saved: Any, known: Any) -> None:
        if set(saved) != set(known):
            raise CacheFileError(
                f"{self.path} was written by sink_patch {self.header['sink_patch']}, whose {what} holds "
                f"{sorted(saved)}; that of sink_patch {__version__} holds {sorted(known)}. Load it with that version, "
                "or feed the text again."
            )


def _pack_layer(layer: Any, name: str, sinks: Any, tensors: Tensors) -> dict[str, Any]:
    packed: dict[str, Any] = {"held": pack(_held(layer), name, tensors)}
    if isinstance(layer, SinkLayer):
        packed["kind"] = asdict(layer.kind)
        for ring, what in zip(layer.rings, _RINGS, strict=True):
            packed[what] = pack({"buffer": ring.buffer, "pristine": sinks.pristine_of(ring)}, f"{name}.{what}", tensors)
    return packed


def _held(thing: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(thing).items() if name not in _FROM_THE_MODEL}


def _devices(model: nn.Module) -> dict[int, torch.device]:
    """Where the parameters of each layer are, for all layers that say their number."""
    numbered = [(getattr(module, "layer_idx", None), module) for module in decoder_of(model).modules()]
    return {
        index: _device_of(module)
        for index, module in numbered
        if isinstance(index, int) and next(module.parameters(), None) is not None
    }


def _device_of(module: nn.Module) -> torch.device:
    """Where its parameters are; those that accelerate fetches from elsewhere when they are used are on "meta"."""
    found = [parameter.device for parameter in module.parameters() if not parameter.is_meta]
    return found[0] if found else torch.device("cpu")
