"""The architectures that stream exactly on the installed transformers, and tiny models of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import sink_patch
from tests.support import zoo
from tests.support.replay import cache_name

VERDICTS = {verdict.model_type: verdict for verdict in sink_patch.coverage().verdicts}
EXACT = [model_type for model_type, verdict in VERDICTS.items() if verdict.exact]

# what bounds the positions of some families: room for a window of ours
_ROOM = {"index_topk": 64, "attention_chunk_size": 64, "floor_scale": 65}


def room_in(config: PretrainedConfig) -> dict[str, int]:
    """Settings that leave room for a window of up to 64 tokens, of those that this config has."""
    decoder = config.get_text_config(decoder=True)
    return {name: value for name, value in _ROOM.items() if hasattr(decoder, name)}


def with_room(make, *args, **kwargs) -> PreTrainedModel:
    """What `zoo.build` or `zoo.one_layer` makes, with room for a window of ours."""
    model = make(*args, **kwargs)
    more = room_in(model.config)
    return make(*args, **kwargs, **more) if more else model


def built(model_type: str, **kwargs) -> PreTrainedModel:
    """A model with each kind of layer of its family; skips where none can be built."""
    if model_type in zoo.NOT_BUILT:
        pytest.skip(zoo.NOT_BUILT[model_type])
    return with_room(zoo.build, model_type, **kwargs)


def forward(model: nn.Module, cache: object, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """The last logits, [rows, vocab]."""
    return model(ids, use_cache=True, **{cache_name(model): cache}, **kwargs).logits[:, -1]
