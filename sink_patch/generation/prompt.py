"""Prompts that go into a sink cache piece by piece, before transformers runs its own first forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.models.entries import CACHE_NAMES, cache_argument
from sink_patch.rules.padding import check_left_padded
from sink_patch.streaming.inputs import Call
from sink_patch.streaming.streams import streams_of

_OF_STATES = CACHE_NAMES[-1]
"""Where a cache has this name (models of states alone, up to 5.23) `generate` does not ask it for its length."""


@contextlib.contextmanager
def fed_in_pieces(
    model: nn.Module,
    cache: SinkCache,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: Mapping[str, Any],
    *,
    drafting: bool = False,
) -> Iterator[None]:
    """Feed all of a prompt but its last piece; inside, the first forward of transformers feeds just that.

    transformers splits prompts as well, but most of its versions start again at the first token where the cache is not
    empty, and none splits embeddings.

    Args:
        input_ids: the whole history, or the new tokens alone, [rows, columns].
        generation_config: its `prefill_chunk_size` says how many columns a piece has; None: all go in at once.
        drafting: leave the last token alone to transformers, whatever the pieces are.
    """
    size, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    inputs = input_ids if embeds is None else embeds  # [rows, columns] or [rows, columns, hidden]
    fed = cache.get_seq_length()
    length = stream_length(generation_config, model_kwargs) or inputs.shape[1]
    new = inputs[:, inputs.shape[1] - (length - fed) :]
    if mask is not None:
        check_left_padded(mask[:, mask.shape[1] - new.shape[1] :] != 0)
    for piece in _ahead(new, size, drafting=drafting):
        seen = cache.get_seq_length() + piece.shape[1]
        _feed(model, cache, piece, None if mask is None else mask[:, :seen])
    call, streams = Call(length), streams_of(cache)
    if drafting:  # some versions feed all of a history, others from where the cache has got to
        call = Call(length, cache.get_seq_length(), of_history=True)
    elif inputs.shape[1] < length:  # new tokens alone: transformers feeds all of them
        call = Call(length, cache.get_seq_length() - fed)
    elif cache_argument(model) == _OF_STATES:  # a history: all of it as well
        call = Call(length, cache.get_seq_length())
    streams.call = call
    try:
        yield
    finally:
        streams.call = None


def _ahead(new: torch.Tensor, size: int | None, *, drafting: bool) -> Sequence[torch.Tensor]:
    """The pieces of new columns [rows, columns, ...] that go in ahead of what is left to transformers."""
    if not drafting:
        return () if size is None else torch.split(new, size, dim=1)[:-1]
    head = new[:, :-1]
    return torch.split(head, size or head.shape[1], dim=1) if head.shape[1] else ()


def stream_length(generation_config: Any, model_kwargs: Mapping[str, Any]) -> int:
    """Columns of the stream, the prompt counted in; 0 where nothing tells (then the prompt is all there is)."""
    for name in ("attention_mask", "position_ids"):
        if model_kwargs.get(name) is not None:
            return int(model_kwargs[name].shape[-1])
    return int(getattr(generation_config, "_mask_length", 0) or 0)


def _feed(model: nn.Module, cache: SinkCache, piece: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    parameters = inspect.signature(model.forward).parameters
    name = "input_ids" if piece.ndim == 2 else "inputs_embeds"
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    model(
        **{name: piece, cache_argument(model): cache},
        attention_mask=attention_mask,
        use_cache=True,
        return_dict=True,
        **fewer,
    )
