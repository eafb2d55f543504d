"""A `SinkCache` in a file: tensors by safetensors, and all else as JSON in its header (header.py).

Nothing in it is code, and `load` takes nothing in it for granted, so a file from anywhere may be opened. Keys and
values are the same in every version of transformers; recurrent and convolution states lie in layers of its own, and go
on in the version that wrote them.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from msgspec import structs
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sink_patch import __version__
from sink_patch.arguments import Sizes
from sink_patch.cache.binding import new_streams
from sink_patch.cache.fingerprint import differences, fingerprint
from sink_patch.cache.header import FORMAT, Header, RowRecord, decode, encode
from sink_patch.cache.packing import Tensors, pack_history, pack_layer, pack_row
from sink_patch.cache.unpacking import Unpacker
from sink_patch.errors import CacheFileError, SinkArgumentError
from sink_patch.models.entries import decoder_of
from sink_patch.models.examine import examine
from sink_patch.models.facts import ModelFacts
from sink_patch.rules.rows import Row
from sink_patch.streaming.streams import Streams

_KEY = "sink_patch"  # of our header among the metadata of the file

PathLike = str | os.PathLike[str]


def write(path: PathLike, model: nn.Module, streams: Streams) -> None:
    """Write what `load` reads. A file that is there already is replaced at the end, or left as it was.

    Raises:
        CacheStateError: a layer holds something of which nothing is known.
        CacheFileError: the file cannot be written.
    """
    tensors: Tensors = {}
    header = _header(model, streams, tensors)
    target = Path(path).resolve()  # where it is a link, what it points to is replaced
    if target.is_dir():
        raise CacheFileError(f"{target} could not be written: it is a directory. Give the path of a file.")
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, unfinished, metadata={_KEY: encode(header)})
        unfinished.replace(target)
    except (SafetensorError, OSError) as error:
        raise CacheFileError(
            f"{target} could not be written: {error}. Give the path of a file in a directory that is there."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where it could not be begun, there is nothing to remove
            unfinished.unlink(missing_ok=True)


def load(path: PathLike, model: nn.Module) -> tuple[Sizes, Streams]:
    """The sizes and the streams of a cache that `write` has written, for the same model; the model is not changed.

    Raises:
        CacheFileError: the file holds no whole cache, or one of another model.
        FileNotFoundError: there is no such file.
        UnsupportedModelError: the model cannot stream.
    """
    saved = _read(path)
    facts = examine(model)
    saved.check_model(model, facts)
    header = saved.header
    try:
        sizes = Sizes(header.window_length, header.num_sink_tokens, header.evict, tuple(map(tuple, header.turn_start)))
        streams = new_streams(model, sizes, facts)
    except SinkArgumentError as error:
        raise CacheFileError(f"{path} is of a cache that this model cannot have: {error}") from error
    saved.fill(streams, model)
    return sizes, streams


def _header(model: nn.Module, streams: Streams, tensors: Tensors) -> Header:
    store = streams.store
    window_length, num_sink_tokens = streams.sizes.window_length, streams.sizes.num_sink_tokens
    return Header(
        format=FORMAT,
        sink_patch=__version__,
        transformers=transformers.__version__,
        window_length=window_length,
        num_sink_tokens=num_sink_tokens,
        rows=None if streams.rows is None else [pack_row(row) for row in streams.rows],
        columns=streams.columns,
        recording=streams.recording,
        layers=[pack_layer(layer, f"layers.{index}", store.sinks, tensors) for index, layer in enumerate(store.layers)],
        model=fingerprint(model, streams.facts, window_length, num_sink_tokens),
        history=pack_history(streams.history.rows, tensors),
        evict=streams.sizes.evict,
        turn_start=[list(run) for run in streams.sizes.turn_start],
    )


def _read(path: PathLike) -> _Saved:
    try:
        # older safetensors read to the default device
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise CacheFileError(f"{path} holds no SinkCache. Load a file that cache.save(path) has written.")
            header = decode(path, text)
            return _Saved(Path(path), header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError:
        raise
    except SafetensorError as error:
        raise CacheFileError(
            f"{path} holds no SinkCache, or has been cut short: {error}. Load a file that cache.save(path) has written."
        ) from error
    except OSError as error:
        why = "it is a directory" if Path(path).is_dir() else str(error)
        raise CacheFileError(
            f"{path} could not be read: {why}. Give the path of a file that cache.save(path) has written."
        ) from error


@dataclass(frozen=True)
class _Saved:
    """What is in a file."""

    path: Path
    header: Header
    tensors: Tensors

    def check_model(self, model: nn.Module, facts: ModelFacts) -> None:
        """Raise a CacheFileError if a model cannot go on with it, with what is not the same."""
        header = self.header
        found = differences(header.model, fingerprint(model, facts, header.window_length, header.num_sink_tokens))
        if found:
            raise CacheFileError(
                f"{self.path} was saved with another model than this {facts.model_class}; not the same: "
                f"{', '.join(found)}. Load it with the model that it was saved with; where several processes share a "
                "model, each loads what it has saved."
            )
        wrote, have = header.transformers, transformers.__version__
        if wrote != have and any(layer.entry.state for layer in facts.layers):
            raise CacheFileError(
                f"{self.path} holds recurrent or convolution states of transformers {wrote}, and this is {have}. Load "
                "it with that version, or feed the text again."
            )

    @torch.inference_mode(False)  # else the cache could not be written to outside it
    def fill(self, streams: Streams, model: nn.Module) -> None:
        """Put into fresh streams what those of the cache held, each layer on the device of the model's layer."""
        header, store, devices = self.header, streams.store, _devices(model)
        unpacker = Unpacker(self.path, self.tensors, header.rows)
        unpacker.check(len(header.layers) == len(store.layers), f"it has {len(header.layers)} layers")
        layers = zip(store.layers, header.layers, streams.facts.layers, strict=True)
        for index, (layer, record, facts) in enumerate(layers):
            device = devices.get(index, _device_of(model))
            unpacker.fill(layer, record, f"layers.{index}", store.sinks, device, elsewhere=facts.elsewhere)
        seen = [row.seen for row in header.rows or ()]
        history = None if header.history is None else unpacker.history(header.history, seen)
        unpacker.check_all_used()
        store.note_kinds()
        spare, fewest = store.slots.spare, store.slots.fewest
        unpacker.check(all(kind.spare == spare for kind in store.kinds), "its layers have different numbers of slots")
        for row in header.rows or ():
            right = row.recallable <= spare and (not row.complete or _row(row).stays_complete(0, store.slots))
            unpacker.check(right, f"{row} does not go with {fewest} slots, {spare} of them to spare")
        streams.rows = None if header.rows is None else [_row(row) for row in header.rows]
        streams.columns, streams.recording = header.columns, header.recording
        streams.recalled = spare if header.recording else 0
        streams.history.rows = [] if header.rows is None else history
        streams.history.keep_at_least(fewest)


def _row(record: RowRecord) -> Row:
    return Row(**structs.asdict(record))


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
