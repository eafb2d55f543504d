"""The inputs of a piece of a prompt: all that `generate` was given reaches each piece, as it reaches each token.

transformers' own `prepare_inputs_for_generation` makes them, as for its own forwards. A prompt of 6 columns, of which
the cache has read 2, with these arguments of a model's own, gives this to a piece of 3 columns:

    input_ids       [1, 6]       columns 2, 3, 4
    token_type_ids  [1, 6]       columns 2, 3, 4: the method gives a forward its own columns of it
    tone            [1, 1, 64]   whole: the method hands it on, and would to each token that follows
    weights         [1, 6]       refused: it has a value for each column, and the method hands it on whole
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.compat import models as transformers_models
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.entries import CACHE_NAMES, given_to_hooks

logger = logging.getLogger("sink_patch")

_has_told = False
_MADE_HERE = frozenset({"attention_mask", "position_ids", "inputs_embeds", "cache_position", *CACHE_NAMES})

_AT_ONCE = (
    "pass a prompt that goes in at once: within the model's context, without prefill_chunk_size, without an assistant "
    "or prompt lookup."
)


class PieceInputs:
    """What makes the inputs of all pieces of one prompt.

    Args:
        model: of the call.
        inputs: all that the call was given, ids [rows, columns] or embeddings [rows, columns, hidden].
        stream: columns of the stream, once they are in; they are the last ones of it.
        model_kwargs: of the call.
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor, stream: int, model_kwargs: Mapping[str, Any]):
        self._model, self._inputs, self._stream = model, inputs, stream
        self._mask = model_kwargs.get("attention_mask")
        self._cache = {name: model_kwargs[name] for name in CACHE_NAMES if name in model_kwargs}
        self._others = {name: value for name, value in model_kwargs.items() if name not in _MADE_HERE}

    def check(self) -> None:
        """Look at what the last column would be given, before any piece goes in.

        Raises:
            UnsupportedGenerationError: an argument has a value for each column, and is handed on whole; or an adapter
                was told where in the prompt it begins.
        """
        if any("alora_offsets" in given_to_hooks(module) for module in self._model.modules()):
            raise UnsupportedGenerationError(
                "An adapter that begins within a prompt (Activated LoRA) was asked for, and PEFT counts its place from "
                f"the end of a forward, while this prompt goes into a sink cache in pieces. Instead {_AT_ONCE}"
            )
        rows = self._inputs.shape[0]
        whole = [
            name
            for name, value in self._others.items()
            if name not in {*self._columns, *transformers_models.TYPES}
            and _goes_by_columns(value, rows, (self._inputs.shape[1], self._stream))
        ]
        if whole:
            raise UnsupportedGenerationError(
                f"{', '.join(whole)} was given for each token of a prompt that goes into a sink cache in pieces, and "
                f"prepare_inputs_for_generation of {type(self._model).__name__} hands it on whole. Cut it there, or "
                f"{_AT_ONCE}"
            )

    def of(self, piece: torch.Tensor, read: int) -> dict[str, Any]:
        """The arguments of a forward of a piece, ids [rows, columns] or embeddings, after so many columns.

        Raises:
            UnsupportedGenerationError: the model puts columns of its own before it.
        """
        end = read + piece.shape[1]
        others = dict(self._others)
        for name, columns in self._columns.items():
            others[name] = others[name][..., : end - (self._stream - columns)]
        made = self._made(piece, read, others)
        name = "inputs_embeds" if made.get("input_ids") is None else "input_ids"
        if made[name].shape[1] != piece.shape[1]:
            raise UnsupportedGenerationError(
                f"{type(self._model).__name__} puts columns of its own before a prompt (prompt tuning), and this one "
                f"goes into a sink cache in pieces. Instead {_AT_ONCE}"
            )
        made.pop("position_ids", None)  # the cache counts them (streaming/hooks.py)
        made |= self._types(made, read, end)
        made |= {"use_cache": True, "return_dict": True}
        if self._keeps_last_logits:
            made["logits_to_keep"] = 1
        return made

    def _types(self, made: Mapping[str, Any], read: int, end: int) -> dict[str, torch.Tensor]:
        """The types of columns `read` to `end` of the stream, which some versions hand on whole."""
        types = dict[str, torch.Tensor]()
        for name in transformers_models.TYPES:
            if made.get(name) is not None and _length(made[name]) != end - read:
                value = self._others[name]  # [rows, columns], the last ones of the stream
                missing = self._stream - _length(value)
                types[name] = value[:, max(0, read - missing) : end - missing]
        return types

    @functools.cached_property
    def _keeps_last_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self._model.forward).parameters

    @functools.cached_property
    def _columns(self) -> dict[str, int]:
        """Arguments of which a forward of one column is given one column, and how many columns they have."""
        lengths = {self._inputs.shape[1], self._stream}
        candidates = {name: value for name, value in self._others.items() if _length(value) in lengths - {1}}
        if not candidates:
            return {}
        made = self._made(self._inputs[:, -1:], self._stream - 1, self._others)
        return {name: _length(value) for name, value in candidates.items() if _length(made.get(name)) == 1}

    def _made(self, piece: torch.Tensor, read: int, others: Mapping[str, Any]) -> dict[str, Any]:
        end, is_embeds = read + piece.shape[1], piece.ndim == 3
        made: dict[str, Any] = self._model.prepare_inputs_for_generation(  # type: ignore[operator]
            piece.new_zeros(piece.shape[0], 0, dtype=torch.long) if is_embeds else piece,
            attention_mask=None if self._mask is None else self._mask[:, :end],
            inputs_embeds=piece if is_embeds else None,
            **transformers_models.arguments_of_a_prompt(read, end, piece.device),
            **self._cache,
            **others,
        )
        return made


def split_ahead(new: torch.Tensor, size: int | None, *, drafting: bool) -> Sequence[torch.Tensor]:
    """The pieces of new columns [rows, columns, ...] that go in ahead of what is left to transformers."""
    if not drafting:
        return () if size is None else torch.split(new, size, dim=1)[:-1]
    head = new[:, :-1]
    return torch.split(head, size or head.shape[1], dim=1) if head.shape[1] else ()


def stream_length(generation_config: Any, model_kwargs: Mapping[str, Any], *, is_whole: bool) -> int | None:
    """Columns that a mask or positions tell of, or the length of a mask of ones that transformers has dropped.

    Args:
        is_whole: whether it is known that all of the stream is given. Then only a mask tells more; the rest may be of
            the prompt before its tokens were healed.
    """
    for name in ("attention_mask",) if is_whole else ("attention_mask", "position_ids"):
        if model_kwargs.get(name) is not None:
            return int(model_kwargs[name].shape[-1])
    return None if is_whole else getattr(generation_config, "_mask_length", None) or None


def _length(value: Any) -> int:
    """The last dimension of a tensor; 0 of anything else."""
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) and value.ndim > 1 else 0


def _goes_by_columns(value: Any, rows: int, lengths: tuple[int, ...]) -> bool:
    """Whether this is a tensor [rows, columns, ...]."""
    is_tensor = isinstance(value, torch.Tensor) and value.ndim > 1
    return is_tensor and value.shape[0] == rows and value.shape[1] in lengths


def with_types_of(given: Mapping[str, Any], new: int, ahead: int) -> dict[str, Any]:
    """Arguments with the types of the first `ahead` of the `new` columns alone; not all versions cut them so."""
    types = {name: given[name] for name in transformers_models.TYPES if given.get(name) is not None}
    return {**given, **{name: value[:, -new:][:, :ahead] for name, value in types.items()}}  # [rows, ahead]


def tell_of_pieces(length: int, size: int) -> None:
    """Say once that a prompt goes in by pieces of its own accord."""
    global _has_told
    if not _has_told:
        _has_told = True
        logger.info(
            "A prompt of %d tokens is longer than the model's context: it goes into the sink cache in pieces of %d.",
            length,
            size,
        )
