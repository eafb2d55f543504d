"""One record for each model type: what its tiny config needs, its pixels, and how many ids stand for an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """What is special about a model type.

    Args:
        columns: ids that stand for an image.
        inputs: from a number of images to the tensors of them.
        settings: of the config, nested for its parts.
        decoder: settings of the decoder's config.
        token: the name of the setting that holds the id.
        row_end: an id of text that follows each so many ids of an image (0: none), as in Pixtral.
    """

    columns: int
    inputs: Inputs
    settings: Mapping[str, Any] = field(default_factory=dict)
    decoder: Mapping[str, Any] = field(default_factory=dict)
    token: str = "image_token_id"

    def ids(self, token: int) -> list[int]:
        """Those of one image."""
        return [token] * self.columns


def _pixels(size: int = 32) -> Inputs:
    return lambda number: {"pixel_values": torch.randn(number, 3, size, size)}


def _sized(size: int = 32) -> Inputs:
    return lambda number: {
        "pixel_values": torch.randn(number, 3, size, size),
        "image_sizes": torch.tensor([[size, size]] * number),
    }


def _in_row(size: int = 32) -> Inputs:
    """All in one row of a batch."""
    return lambda number: {"pixel_values": torch.randn(1, number, 3, size, size)}


_FOUR = {"mm_tokens_per_image": 4}

SAMPLES: dict[str, Sample] = {
    "llava": Sample(16, _pixels(), token="image_token_index"),
    "vipllava": Sample(16, _pixels(), {"vision_feature_layers": [-1, -1, -1, -2, -2]}, token="image_token_index"),
    "aya_vision": Sample(4, _pixels(), token="image_token_index"),
    "got_ocr2": Sample(1, _pixels(), token="image_token_index"),
    "internvl": Sample(4, _pixels()),
    "deepseek_vl": Sample(16, _pixels()),
    "ovis2": Sample(16, _pixels()),
    "qianfan_ocr": Sample(4, _pixels()),
    "gemma3": Sample(4, _pixels(), _FOUR, token="image_token_index"),
    "paligemma": Sample(
        16, _pixels(), {"projection_dim": 64, "vision_config": {"projection_dim": 64}}, token="image_token_index"
    ),
    "idefics2": Sample(64, _in_row()),
    "idefics3": Sample(4, _in_row(), {"scale_factor": 2}),
    "smolvlm": Sample(4, _in_row(), {"scale_factor": 2}),
    "mistral3": Sample(4, _sized(), token="image_token_index"),
    "lighton_ocr": Sample(4, _sized()),
}
