"""Images and sounds of a forward: which may be given, and how a prompt that holds them goes in by pieces.

The first forward of a stream may bring them. They are columns like any others: the model puts them in the place of
tokens of their own before its decoder is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.entries import decoder_of, text_config
from sink_patch.models.families.media import media_of, media_tokens
from sink_patch.rules.media import pieces

_OTHER_INPUTS = {
    *("pixel_values", "pixel_values_videos", "pixel_values_images", "input_features", "input_values"),
    *("audio_values", "mm_encoder_outputs"),
}
"""Of models that declare nothing."""
_OF_TEXT = frozenset({"inputs_embeds", "attention_mask"})
_ENCODED = "mm_encoder_outputs"
_BY_KIND = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
_INSTEAD = "Leave them out, or use another cache."


def media_among(module: nn.Module, named: Mapping[str, Any]) -> Sequence[str]:
    """The arguments that hold images or sounds.

    They are what has a known name, and all numbers that are no embeddings of text, given to a model whose config
    declares more than one part (vision, audio: `sub_configs`).
    """
    many = _has_parts(getattr(module, "config", None))
    return [
        name
        for name, value in named.items()
        if (name in _OTHER_INPUTS and _is_given(value)) or (many and name not in _OF_TEXT and _has_numbers(value))
    ]


def check_media(module: nn.Module, named: Mapping[str, Any], read: int) -> Sequence[str]:
    """The images and sounds among the arguments of a forward, or of a call, none of which is refused.

    Args:
        read: columns that the cache has read before.

    Raises:
        UnsupportedGenerationError: the model is not known to stream with them, or they are in a later turn.
    """
    given = media_among(module, named)
    if not given:
        return given
    name, media = type(module).__name__, media_of(getattr(module, "config", None))
    unknown = [one for one in given if media is None or not media.inputs.issuperset(_meant(one, named[one]))]
    if unknown:
        raise UnsupportedGenerationError(
            f"{name} was given {', '.join(unknown)} with a SinkCache, which streams "
            f"{'text alone' if media is None else 'no such inputs'} with this model. {_INSTEAD}"
        )
    if read:
        raise UnsupportedGenerationError(
            f"{name} was given {', '.join(given)} with a SinkCache that has read {read} columns, and a stream takes "
            "images and sounds in its first prompt alone. Give the whole text to a new SinkCache, or use another cache."
        )
    if named.get("inputs_embeds") is not None:
        raise UnsupportedGenerationError(
            f"{name} was given {', '.join(given)} together with inputs_embeds and a SinkCache, which must see the ids "
            "of the tokens that stand for them. Pass input_ids instead."
        )
    return given


def check_cut(model: nn.Module, given: Sequence[str], columns: int) -> None:
    """Refuse a prompt with images that is to go in by pieces, where it cannot.

    Args:
        given: the arguments that hold images.
        columns: of the prompt.

    Raises:
        UnsupportedGenerationError: masks of the model are for whole prompts, or its decoder cannot be called by itself.
    """
    config, decoder = getattr(model, "config", None), decoder_of(model)
    media, text = media_of(config), type(text_config(model))
    if decoder is model or not isinstance(decoder.config, text):
        why = f"{type(model).__name__} does not put images in their place before its decoder is called"
    elif media is None or media.both_ways:
        why = f"in {type(model).__name__} an image sees itself in both directions, by a mask of the whole prompt"
    else:
        return
    raise UnsupportedGenerationError(
        f"A prompt of {columns} columns with {', '.join(given)} was to go into a sink cache by pieces, as it is longer "
        f"than prefill_chunk_size or than the model's context, and {why}. Give a prompt that goes in at once, or use "
        "another cache."
    )


class Cut:
    """A prompt with images that goes in by pieces, which are cut where the decoder is called: encoders run once.

    The forward of the whole prompt is none over the cache. Where it calls the decoder, each piece but the last is fed
    to the decoder by itself, and the call goes on with the last one.

    Args:
        size: columns of a piece; see `pieces`.
    """

    def __init__(self, size: int):
        self._size = size
        self._ids: torch.Tensor | None = None  # of the prompt, [rows, columns], once its forward has begun
        self._tokens: Sequence[int] = ()
        self._piece: torch.Tensor | None = None  # ids of the piece that goes in, [rows, columns]

    @property
    def is_begun(self) -> bool:
        """Whether what is called next is the decoder."""
        return self._ids is not None or self._piece is not None

    def begin(self, module: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
        """The forward of the whole prompt begins: what the model receives."""
        self._ids, self._tokens = named["input_ids"], sorted(media_tokens(module.config))
        return dict(named)

    def feed_ahead(self, decoder: nn.Module, named: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The decoder is called: with the whole prompt by the model, with a piece of it from here.

        Returns:
            The ids of the columns that are to go in now, [rows, columns], and the arguments of the decoder for them.

        Raises:
            UnsupportedGenerationError: the model gives its decoder something by columns that is not known.
        """
        if self._piece is None and self._ids is not None:
            *ahead, last = list(self._split(self._ids, named))
            self._ids = None
            for self._piece, part in ahead:
                decoder(**part)
            self._piece, named = last
        ids, self._piece = self._piece, None
        return named["inputs_embeds"] if ids is None else ids, named

    def _split(self, ids: torch.Tensor, named: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        of_image = torch.isin(ids, torch.tensor(self._tokens, dtype=ids.dtype, device=ids.device))  # [rows, columns]
        joined = (of_image[:, 1:] & of_image[:, :-1]).any(dim=0).tolist()
        for first, end in pieces([False, *joined], self._size):
            yield ids[:, first:end], {name: _cut(name, value, ids, first, end) for name, value in named.items()}


def _cut(name: str, value: Any, ids: torch.Tensor, first: int, end: int) -> Any:
    """The columns of a piece of an argument of the decoder."""
    columns = ids.shape[1]
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask" and value.shape == ids.shape:
        return value[:, :end]  # [rows, columns so far]
    if name in ("position_ids", "cache_position") and value.shape[-1] == columns:
        return value[..., first:end]
    if value.ndim > 1 and value.shape[:2] == ids.shape:
        return value[:, first:end]
    raise UnsupportedGenerationError(
        f"A prompt with images was to go into a sink cache by pieces, and the model gives its decoder {name} of shape "
        f"{list(value.shape)}, which cannot be cut. Give a prompt that goes in at once, or use another cache."
    )


def _meant(name: str, value: Any) -> frozenset[str]:
    """The arguments that one stands for: what encoders have made of images stands for those."""
    if name != _ENCODED or not isinstance(value, dict):
        return frozenset({name})
    return frozenset(_BY_KIND.get(kind, kind) for kind, made in value.items() if _is_given(made))


def _has_parts(config: Any) -> bool:
    """Whether a config declares parts beside that of the text."""
    return any(name != "text_config" for name in getattr(config, "sub_configs", ()))


def _is_given(value: Any) -> bool:
    """`generate` passes a dict of None for encoders that had nothing to do."""
    return any(map(_is_given, value.values())) if isinstance(value, dict) else value is not None


def _has_numbers(value: Any) -> bool:
    """Whether this is a tensor of floating point, or holds one."""
    if isinstance(value, (dict, list, tuple)):
        return any(map(_has_numbers, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor) and value.is_floating_point()
