"""Stand-ins for towers that need libraries which the tests do not have; a text never reaches them."""

from __future__ import annotations

from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.gemma3n import Gemma3nVisionConfig

from tests.support.zoo.sizes import WIDTH


class NoVisionConfig(Gemma3nVisionConfig):
    """For gemma3n, whose vision tower is one of timm's."""

    model_type = "zoo_no_vision"


class NoVision(PreTrainedModel):
    """Sees nothing."""

    config_class = NoVisionConfig
    _supports_sdpa = True  # it has no attention to stand in the way of any


def no_vision_tower() -> dict[str, PreTrainedConfig]:
    """Settings by which a composite config has no vision tower."""
    AutoModel.register(NoVisionConfig, NoVision, exist_ok=True)
    return {"vision_config": NoVisionConfig(hidden_size=WIDTH)}
