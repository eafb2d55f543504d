"""Images and sounds among the arguments of a forward, or of a call: which may be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.compat import installed_shim
from sink_patch.compat.models import TYPES
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.entries import decoder_of, text_config
from sink_patch.models.families.masks import masks_of
from sink_patch.models.families.media import KINDS, PROMPT, media_of, media_tokens

_ENCODED = "mm_encoder_outputs"
_INPUTS = frozenset(name for kind in KINDS for name in kind.inputs) | {"audio_values", _ENCODED}
"""Also of models that declare nothing."""
_OF_TEXT = frozenset(
    {"inputs_embeds", "attention_mask", "position_ids", "second_per_grid_ts"}
)  # numbers that are no images
_OF_PROMPT = "image_hidden_states"  # of the images of a prompt, which some versions hand on with each token behind it
_USUAL = {kind.name: kind.inputs[0] for kind in KINDS}
_INSTEAD = "Leave them out, or use another cache."


def media_among(module: nn.Module, named: Mapping[str, Any]) -> Sequence[str]:
    """The arguments that hold images or sounds.

    They are what has a known name, and all numbers that are no embeddings of text, given to a model whose config
    declares more than one part (vision, audio: `sub_configs`).
    """
    many = _has_parts(getattr(module, "config", None))
    if not many and _INPUTS.isdisjoint(named):
        return []
    return [
        name
        for name, value in named.items()
        if (name in _INPUTS and _is_given(value)) or (many and name not in _OF_TEXT and _has_numbers(value))
    ]


def without_media(module: nn.Module, named: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call for the text behind a prompt with images: without those, and all that tells of them."""
    given = media_among(module, named)
    return {name: value for name, value in named.items() if name not in given and name not in TYPES} if given else named


def check_media(module: nn.Module, named: Mapping[str, Any], read: int) -> Sequence[str]:
    """The images and sounds among the arguments of a forward, or of a call, none of which is refused.

    Args:
        read: columns that the cache has read before.

    Raises:
        UnsupportedGenerationError: the model is not known to stream with them, or not in a later turn; or there
            are none, and positions are said to be those of images.
    """
    given = [one for one in media_among(module, named) if not (read and one == _OF_PROMPT)]
    if not given:
        _check_places(module, named, read)
        return given
    name, media = type(module).__name__, media_of(getattr(module, "config", None))
    ids = media_tokens(getattr(module, "config", None))  # without them nobody knows where images stand
    known = media.inputs if media is not None and ids else frozenset()
    unknown = [one for one in given if not known.issuperset(_meant(one, named[one]))]
    if unknown:
        raise UnsupportedGenerationError(
            f"{name} was given {', '.join(unknown)} with a SinkCache, which streams "
            f"{'text alone' if media is None else 'no such inputs'} with this model. {_INSTEAD}"
        )
    if media is not None and media.coordinates and not _puts_images_in_place(module):
        raise UnsupportedGenerationError(
            f"{name} was given {', '.join(given)} with a SinkCache, and in this transformers nothing tells at which "
            f"positions it puts them. {_INSTEAD}"
        )
    if read:
        _check_later(module, given, read)
    if named.get("inputs_embeds") is not None:
        raise UnsupportedGenerationError(
            f"{name} was given {', '.join(given)} together with inputs_embeds and a SinkCache, which must see the ids "
            "of the tokens that stand for them. Pass input_ids instead."
        )
    return given


def _check_later(module: nn.Module, given: Sequence[str], read: int) -> None:
    """Refuse images in a later turn of models that cannot be right there; `read` columns are cached.

    Raises:
        UnsupportedGenerationError: as it says.
    """
    asked = f"{type(module).__name__} was given {', '.join(given)} with a SinkCache that has read {read} columns, and "
    if sees_both_ways(module) and masks_of(module) is None:
        raise UnsupportedGenerationError(
            f"{asked}in this transformers it makes the masks by which an image sees itself in both directions for its "
            "first prompt alone. Upgrade transformers, give the whole text to a new SinkCache, or use another cache."
        )
    model_type = getattr(module.config, "model_type", None)
    if not _puts_images_in_place(module) or model_type in installed_shim().first_media.split():
        raise UnsupportedGenerationError(
            f"{asked}in this transformers nothing tells whether it puts images of a later turn in their place. Upgrade "
            "transformers, give the whole text to a new SinkCache, or use another cache."
        )


def _check_places(module: nn.Module, named: Mapping[str, Any], read: int) -> None:
    """Refuse a text with images in its embeddings, whose positions of several coordinates nobody makes."""
    if read and named.get("inputs_embeds") is None:  # `generate` hands grids on behind the prompt
        return
    if not has_coordinates(module):
        return
    positions = named.get("position_ids")
    told = [kind.grids for kind in KINDS if named.get(kind.grids) is not None]
    if isinstance(positions, torch.Tensor) and positions.ndim > 2 and not _are_equal(positions[-3:]):
        told.append("position_ids of several coordinates")
    if told:
        raise UnsupportedGenerationError(
            f"{type(module).__name__} was given {' and '.join(told)} with a SinkCache, and no images, which alone tell "
            "it where they stand. Pass all that the processor returns (pixel_values among it, input_ids and no "
            "inputs_embeds), or use another cache."
        )


def _are_equal(coordinates: torch.Tensor) -> bool:
    """Whether positions [coordinates, rows, columns] are those of text."""
    return bool((coordinates == coordinates[-1:]).all())


def check_cut(model: nn.Module, given: Sequence[str], columns: int) -> None:
    """Refuse a prompt with images that is to go in by pieces, where it cannot.

    Args:
        given: the arguments that hold images.
        columns: of the prompt.

    Raises:
        UnsupportedGenerationError: masks of the model are for whole prompts, or its decoder cannot be called by itself.
    """
    media = media_of(getattr(model, "config", None))
    if not _puts_images_in_place(model):
        why = f"{type(model).__name__} does not put images in their place before its decoder is called"
    elif media is not None and media.both_ways == PROMPT:
        why = f"in {type(model).__name__} a whole prompt sees itself in both directions, and its text with it"
    elif media is not None and media.both_ways and masks_of(model) is None:
        why = (
            f"in this transformers {type(model).__name__} makes the masks by which an image sees itself in both "
            "directions for whole prompts alone"
        )
    else:
        return
    raise UnsupportedGenerationError(
        f"A prompt of {columns} columns with {', '.join(given)} was to go into a sink cache by pieces, as it is longer "
        f"than prefill_chunk_size or than the model's context, and {why}. Give a prompt that goes in at once, or use "
        "another cache."
    )


def has_coordinates(module: nn.Module) -> bool:
    """Whether a model gives its images positions of several coordinates."""
    media = media_of(getattr(module, "config", None))
    return media is not None and media.coordinates


def sees_both_ways(module: nn.Module) -> bool:
    """Whether images of a model see themselves in both directions."""
    media = media_of(getattr(module, "config", None))
    return media is not None and bool(media.both_ways)


def _puts_images_in_place(model: nn.Module) -> bool:
    """Whether what a model calls its decoder is given embeddings, images among them, and their positions."""
    decoder: Any = decoder_of(model)
    return decoder is not model and isinstance(decoder.config, type(text_config(model)))


def _meant(name: str, value: Any) -> frozenset[str]:
    """The arguments that one stands for: what encoders have made of images stands for those."""
    if name != _ENCODED or not isinstance(value, dict):
        return frozenset({name})
    return frozenset(_USUAL.get(str(kind), str(kind)) for kind, made in value.items() if _is_given(made))


def _has_parts(config: Any) -> bool:
    """Whether a config declares parts beside that of the text."""
    return not {"text_config"}.issuperset(getattr(config, "sub_configs", ()))


def _is_given(value: Any) -> bool:
    """`generate` passes a dict of None for encoders that had nothing to do."""
    return any(map(_is_given, value.values())) if isinstance(value, dict) else value is not None


def _has_numbers(value: Any) -> bool:
    """Whether this is a tensor of floating point, or holds one."""
    if isinstance(value, (dict, list, tuple)):
        return any(map(_has_numbers, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor) and value.is_floating_point()
