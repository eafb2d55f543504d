"""What comes beside the ids of a call: positions, which must be those that the cache counts; masks of healed ids."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.rules.positions import check_of_call
from sink_patch.streaming.bound import streams_of

_GIVEN_POSITIONS = "_positions_are_given"  # on the generation config of a call, until its cache is there


def note_positions(generation_config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Remember that position_ids are the caller's own: from some version on transformers makes them if there are none.

    Those of an assistant are transformers' own.
    """
    if model_kwargs.get("position_ids") is not None and not getattr(generation_config, "is_assistant", None):
        setattr(generation_config, _GIVEN_POSITIONS, True)


def check_positions(generation_config: Any, model_kwargs: MutableMapping[str, Any], cache: SinkCache | None) -> None:
    """The caller's own position_ids, which must be those that the cache counts; then they are given for all columns.

    Args:
        cache: of the caller; None: a new one.
    """
    if not vars(generation_config).pop(_GIVEN_POSITIONS, False):
        return
    given, mask = model_kwargs["position_ids"], model_kwargs.get("attention_mask")
    if mask is None:
        columns = getattr(generation_config, "_mask_length", None) or given.shape[-1]
        mask = torch.ones(1, columns, dtype=torch.long, device="cpu")
    fed = 0 if cache is None else cache.get_seq_length()
    seen = [row.seen for row in streams_of(cache).rows or ()] if cache is not None and fed else []
    counted = check_of_call(given, mask, seen, fed)
    if given.shape[-1] < mask.shape[-1] > fed:
        model_kwargs["position_ids"] = counted.to(given.device)


def leave_out_healed(generation_config: Any, input_ids: torch.Tensor, model_kwargs: MutableMapping[str, Any]) -> None:
    """Let what tells of ids [rows, columns] be as long as they are, where they are fewer since they were healed.

    transformers makes a mask and positions before that, or notes the length of a mask of ones, by its version.
    """
    mask, columns = model_kwargs.get("attention_mask"), input_ids.shape[1]
    if not getattr(generation_config, "token_healing", None) or model_kwargs.get("inputs_embeds") is not None:
        return
    if mask is not None and not bool((mask != 0).all()):
        return  # of padding nobody knows where it is now
    for name in ("attention_mask", "position_ids"):
        if model_kwargs.get(name) is not None:
            model_kwargs[name] = model_kwargs[name][..., :columns]
    if (getattr(generation_config, "_mask_length", None) or 0) > columns:
        generation_config._mask_length = columns
