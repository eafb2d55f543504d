"""Stand-ins for towers that need libraries which the tests do not have; a text never reaches them."""

from __future__ import annotations

import functools

from transformers import AutoModel, PreTrainedModel

from tests.support.versions import ConfigClass, PreTrainedConfig
from tests.support.zoo.sizes import WIDTH


def no_vision_tower() -> dict[str, PreTrainedConfig]:
    """Settings by which gemma3n, whose vision tower is one of timm's, has none."""
    return {"vision_config": _no_vision_config()(hidden_size=WIDTH)}


@functools.cache
def _no_vision_config() -> ConfigClass:
    from transformers.models.gemma3n import Gemma3nVisionConfig  # not every version has it

    class NoVisionConfig(Gemma3nVisionConfig):
        model_type = "zoo_no_vision"

    class NoVision(PreTrainedModel):
        """Sees nothing."""

        config_class = NoVisionConfig
        _supports_sdpa = True  # it has no attention to stand in the way of any

    AutoModel.register(NoVisionConfig, NoVision, exist_ok=True)
    return NoVisionConfig
