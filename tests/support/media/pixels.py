"""The tensors of so many images or sounds, as processors of the models make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = Callable[[int], dict[str, Any]]


def pixels(size: int = 32) -> Inputs:
    return lambda number: {"pixel_values": torch.randn(number, 3, size, size)}


def sized(size: int = 32) -> Inputs:
    return lambda number: {
        "pixel_values": torch.randn(number, 3, size, size),
        "image_sizes": torch.tensor([[size, size]] * number),
    }


def in_row(size: int = 32) -> Inputs:
    """All in one row of a batch."""
    return lambda number: {"pixel_values": torch.randn(1, number, 3, size, size)}


def tiles(number: int) -> dict[str, Any]:
    """A whole image and one part of it."""
    return {"pixel_values": torch.randn(number, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * number)}


def shapes(number: int) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(number, 16, 192),
        "spatial_shapes": torch.tensor([[4, 4]] * number),
        "pixel_attention_mask": torch.ones(number, 16, dtype=torch.long),
    }


def merged(number: int) -> dict[str, Any]:
    return {**patches(192)(number), "image_merge_sizes": torch.tensor([2] * number)}


def sounds(mask: str, frames: int = 64) -> Inputs:
    """Sounds of so many frames."""
    return lambda number: {
        "input_features": torch.randn(number, 16, frames),
        mask: torch.ones(number, frames, dtype=torch.long),
    }


def patches(*shape: int) -> Inputs:
    """Two rows of four merged patches, 2 x 2 each, of such a shape."""
    return lambda number: {
        "pixel_values": torch.randn(32 * number, *shape),
        "image_grid_thw": torch.tensor([[1, 4, 8]] * number),
    }


def two_sizes(number: int) -> dict[str, Any]:
    return {name: torch.randn(number, 3, 32, 32) for name in ("pixel_values", "high_res_pixel_values")}


def line(number: int) -> dict[str, Any]:
    """The patches of all images in one line."""
    return {"pixel_values": torch.randn(1, 4 * number, 192)}


def with_masks(number: int) -> dict[str, Any]:
    """All in one row of a batch."""
    mask = torch.ones(1, number, dtype=torch.bool)
    return {"pixel_values": torch.randn(1, number, 3, 32, 32), "pixel_attention_mask": mask}


def listed(number: int) -> dict[str, Any]:
    """Strips of 4 x 8 patches, one behind the other."""
    return {"pixel_values": torch.randn(1, 3, 8, 256 * number), "target_sizes": torch.tensor([[4, 8]] * number)}


def placed(side: int, width: int) -> Inputs:
    """Squares of patches, each with its place."""
    places = [[column, row] for row in range(side) for column in range(side)]
    return lambda number: {
        "pixel_values": torch.rand(number, side * side, width),
        "image_position_ids": torch.tensor([places] * number),
    }


def pooled(number: int) -> dict[str, Any]:
    """Four columns of four patches each."""
    return {
        "pixel_values": torch.randn(number, 16, 192),
        "image_token_pooling": torch.arange(16 * number).view(4 * number, 4),
        "image_grids": torch.tensor([[0, 0, 2, 2]] * number),
        "image_num_crops": torch.tensor([1] * number),
    }


def crops(number: int) -> dict[str, Any]:
    """A whole image and one part of it, each with a mask of its patches."""
    return {
        "image_pixel_values": torch.randn(number, 2, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]] * number),
        "image_attention_mask": torch.ones(number, 2, 4, 4),
    }


def frames(number: int) -> dict[str, Any]:
    """Sounds of 64 frames, time first."""
    mask = torch.ones(number, 64, dtype=torch.bool)
    return {"input_features": torch.randn(number, 64, 16), "input_features_mask": mask}


def spectra(number: int) -> dict[str, Any]:
    """Sounds of 16 frames, time first."""
    return {"input_features": torch.randn(number, 16, 16)}


def wave(samples: int) -> Inputs:
    return lambda number: {"input_values": torch.randn(number, 1, samples)}
