"""Replacements for vision towers that need libraries which are not installed; text never runs through them."""

from __future__ import annotations

import functools

from transformers import AutoModel, PreTrainedModel

from tests.support.versions import ConfigClass, PreTrainedConfig
from tests.support.zoo.sizes import WIDTH


def no_vision_tower() -> dict[str, PreTrainedConfig]:
    """Settings with which gemma3n, whose vision tower comes from timm, has no vision tower."""
    return {"vision_config": _no_vision_config()(hidden_size=WIDTH)}


@functools.cache
def _no_vision_config() -> ConfigClass:
    from transformers.models.gemma3n import Gemma3nVisionConfig  # not every version has it

    class NoVisionConfig(Gemma3nVisionConfig):
        model_type = "zoo_no_vision"

    class NoVision(PreTrainedModel):
        """An empty vision tower."""

        config_class = NoVisionConfig
        _supports_sdpa = True  # it has no attention, so it supports any

    AutoModel.register(NoVisionConfig, NoVision, exist_ok=True)
    return NoVisionConfig
