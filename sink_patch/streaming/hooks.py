"""The one place where absolute coordinates become those of the cache: hooks around the model's forward.

Outside, everything is absolute and means what transformers means by it. The model's forward alone receives RoPE
positions (absolute - base) and a mask over the columns that it sees. The hooks hold no state; they do nothing without a
sink cache. Both the model and its decoder get them, as some callers enter at the decoder (PEFT calls the model's
`forward`, past its hooks): the first hooked module that a forward reaches begins it, and ends it (forward.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.errors import UnboundCacheError
from sink_patch.models.entries import CACHE_NAMES, decoder_of
from sink_patch.rules.positions import check_of_forward
from sink_patch.rules.rows import Row
from sink_patch.streaming.bound import StreamingCache, streams_of
from sink_patch.streaming.calls.guard import check_given
from sink_patch.streaming.inputs import accepted, named_arguments, without_columns
from sink_patch.streaming.media.beginning import (
    begun_by_pieces,
    check_decoder,
    next_piece,
    replaced_for_images,
    with_mask,
)
from sink_patch.streaming.media.given import check_media
from sink_patch.streaming.streams import Streams

_installing = threading.Lock()


def install(model: nn.Module) -> tuple[nn.Module, ...]:
    """Put the hooks on a model and its decoder, once; returns the hooked modules."""
    for module in (modules := entrances(model)):
        _install(module)
    return modules


def _install(module: nn.Module) -> None:
    with _installing:
        _keep_out_of_graphs()
        if _before_forward not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before_forward, with_kwargs=True)
        # may be missing alone: torch numbers hooks by process, so a new one may replace one that was unpickled
        if _after_forward not in module._forward_hooks.values():
            module.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)


def entrances(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules at which a forward over the cache may begin: the model, and its decoder if that is another one."""
    decoder = decoder_of(model)
    return (model,) if decoder is model else (model, decoder)


def _before_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]] | None:
    if not torch.compiler.is_dynamo_compiling():  # `is_compiling` is true in other threads as well
        if _after_forward not in module._forward_hooks.values():  # somebody has cleared them: no forward would end
            _install(module)
        return _begin(module, args, kwargs)
    cache = _first_cache((*args, *kwargs.values()))
    # mostly it was begun before the graph runs; in `torch.compile(model)` it is begun in a break of the graph
    if cache is None or (cache._streams is not None and cache._streams.forward.has_begun_before(module)):
        return None
    return _begin_outside_graphs(module, args, kwargs)


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if not torch.compiler.is_dynamo_compiling():
        _end(module, args, kwargs, output)
        return
    cache = _first_cache((*args, *kwargs.values()))
    if cache is not None and cache._streams is not None and cache._streams.forward.ends_with(module):
        _end_outside_graphs(module, args, kwargs, output)


def _begin(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_graph: bool = False
) -> tuple[tuple[()], dict[str, Any]] | None:
    named = named_arguments(module, args, kwargs)
    check_given(module, named)
    cache = _cache_among(named)
    if cache is None:
        return None
    name = "inputs_embeds" if named.get("input_ids") is None else "input_ids"
    if named.get(name) is None:
        return None  # the model itself says what it misses
    streams = streams_of(cache, type(module).__name__)
    if not streams.is_bound_to(module):
        raise UnboundCacheError.elsewhere(repr(cache), type(module).__name__)
    if streams.forward.includes(module, named[name].shape[1], named.get("position_ids")):
        streams.coordinates.note(module, named)
        if streams.coordinates.masks.are_due:
            return (), named | _masks(streams, module, named)
        return None  # the model has handed on what it was given
    call = streams.call
    cut = None if call is None else call.cut
    if cut is None or not cut.is_begun:
        runs, is_model = streams.forward.is_running(called=module), module is streams.entrances[0]()
        check_decoder(streams.coordinates, module, named.get("position_ids"), runs=runs, is_model=is_model)
    named = named if call is None else call.with_media(module, named)
    media, inputs = check_media(module, named, streams.columns), named[name]
    streams.coordinates.forget()
    if call is None:
        _check_positions(streams, module, named, inputs)
    elif cut is not None and cut.is_begun and cut.whole is not None:
        inputs, named = next_piece(streams.coordinates, module, named, call, cut, cut.whole)
    else:
        count = call.read_again(inputs, named.get("attention_mask"), streams.columns)
        named = without_columns(named, inputs, count)
        if media and cut is not None:
            return (), begun_by_pieces(cut, module, named, _rows_read(streams), call)
        inputs = named[name]
    return (), _begun(streams, module, named, inputs, bool(media), in_graph)


def _begun(
    streams: Streams, module: nn.Module, named: dict[str, Any], inputs: torch.Tensor, has_images: bool, in_graph: bool
) -> dict[str, Any]:
    """What the model receives in the forward that begins here; `inputs` are its new columns, [rows, columns, ...]."""
    # `model.forward = torch.compile(model.forward)`: then what is in the graph begins below us
    is_compiled = hasattr(module.forward, "_torchdynamo_orig_callable")
    fixed = (in_graph or is_compiled) and inputs.shape[1] == 1 and streams.can_be_fixed_now
    for_images = replaced_for_images(
        streams.coordinates, module, named, inputs, _rows_read(streams), streams.call, has_images=has_images
    )
    replaced = streams.begin(module, inputs, named.get("attention_mask"), fixed=fixed)
    if not streams.forward.is_fixed:  # then they are the same tensor each time
        streams.forward.position_ids = replaced.get("position_ids")
    replaced |= for_images | streams.coordinates.placed(streams.forward.step, streams.planner.horizon)
    if streams.coordinates.masks.are_due:
        replaced |= _masks(streams, module, named | replaced)
    if has_images and not streams.columns:
        replaced = with_mask(module, replaced, inputs)
    return named | accepted(module, replaced, named)


def _rows_read(streams: Streams) -> Sequence[Row]:
    return (streams.rows or ()) if streams.columns else ()


def _masks(streams: Streams, module: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
    """The masks that a decoder is given where there are images that see themselves in both directions."""
    model, masks, step = streams.entrances[0](), streams.coordinates.masks, streams.forward.step
    return {} if model is None or model is module else masks.made(model, named, _cache_among(named), step)


def _check_positions(streams: Streams, module: nn.Module, named: dict[str, Any], inputs: torch.Tensor) -> None:
    """Positions that were given to a forward outside of `generate`, whose own are always right.

    Raises:
        SinkArgumentError: they are not those that the cache counts.
    """
    position_ids, (rows, columns) = named.get("position_ids"), inputs.shape[:2]
    if position_ids is None or not streams.counts_positions:
        return
    if getattr(position_ids, "ndim", 0) > 2 and module is not streams.entrances[0]():
        return  # which a model has made for its decoder: see above
    seen = [row.seen for row in streams.rows or [Row()] * rows]
    if len(seen) == rows:
        check_of_forward(position_ids, named.get("attention_mask"), seen, streams.columns, columns)


def _end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_among(named_arguments(module, args, kwargs))
    if cache is not None and cache._streams is not None:
        cache._streams.end(module, completed=output is not None)


_begin_outside_graphs: Callable[..., tuple[tuple[()], dict[str, Any]] | None] = functools.partial(_begin, in_graph=True)
_end_outside_graphs: Callable[..., None] = _end
_are_kept_out = False


def _keep_out_of_graphs() -> None:
    """Keep dynamo out of both; not at import, as that would load dynamo where nobody has."""
    global _begin_outside_graphs, _end_outside_graphs, _are_kept_out
    if not _are_kept_out:
        _begin_outside_graphs = torch.compiler.disable(_begin_outside_graphs)  # type: ignore[no-untyped-call]
        _end_outside_graphs = torch.compiler.disable(_end_outside_graphs)  # type: ignore[no-untyped-call]
        _are_kept_out = True


def _cache_among(named: dict[str, Any]) -> StreamingCache | None:
    return _first_cache(map(named.get, CACHE_NAMES))


def _first_cache(values: Iterable[Any]) -> StreamingCache | None:
    for value in values:  # a loop, as a graph goes through here: torch up to 2.7 traces no `next` with a default
        if isinstance(value, StreamingCache):
            return value
    return None
