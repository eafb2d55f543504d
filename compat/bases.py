"""The classes that `SinkCache` derives from: transformers' `Cache`, whose calls they map to ours.

A class for each call that versions ask differently (`GetMaskSizesByLength`, `CropByCount`, ...), on top of
`SinkAnswers`, which says what a sink cache answers in words of ours; at the end, one class for each range of versions
puts them together.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.cache_utils import Cache

from sink_patch.arguments import whole_number


class SinkAnswers:
    """What a sink cache answers, in the words of sink_patch."""

    def _mask_sizes(self, columns: int, layer_idx: int) -> tuple[int, int]:
        """(visible columns, mask coordinate of the first of them) of a layer, in a forward of so many new columns."""
        raise NotImplementedError

    def _past_columns(self) -> int:
        """Mask coordinate of the first new token."""
        raise NotImplementedError

    def _states_alone(self) -> list[bool]:
        """Of each layer, whether it holds a recurrent or convolution state and no attention."""
        raise NotImplementedError

    def _take_back(self, count: int, asked: str) -> None:
        """Take back the newest `count` tokens; `asked` is how that was said."""
        raise NotImplementedError


class GetMaskSizesByLength(SinkAnswers):
    """5.4 and newer (masking_utils.py): `get_mask_sizes(query_length, layer_idx)`."""

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, offset of the keys) of the mask of a layer."""
        return self._mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers share one coordinate
        """Mask coordinate of the first new token (asked for by 5.14 and newer)."""
        return self._past_columns()


class IsLinearByLayer(SinkAnswers):
    """5.24 and newer (cache_utils.py): a cache says which of its layers hold states alone."""

    @property
    def is_linear(self) -> list[bool]:
        """None of them where all do: of such a cache `generate` believes that it does not know its length."""
        alone = self._states_alone()
        return [False] * len(alone) if all(alone) else alone


class GetMaskSizesByPosition(SinkAnswers):
    """4.53 to 5.3 (masking_utils.py): `get_mask_sizes(cache_position, layer_idx)`."""

    def get_mask_sizes(self, cache_position: torch.Tensor, layer_idx: int) -> tuple[int, int]:
        """(key length, offset of the keys) of the mask of a layer; `cache_position` has shape [columns]."""
        return self._mask_sizes(cache_position.shape[0], layer_idx)


class CropByCount(SinkAnswers):
    """5.15 and newer (cache_utils.py): `crop` takes minus the number of tokens to remove."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; what had left the window for them comes back.

        Raises:
            SinkArgumentError: no integer.
            CacheStateError: tokens that would have to come back are gone.
        """
        count = -whole_number("tokens_to_remove", tokens_to_remove, -2, "of tokens", may_be_negative=True)
        self._take_back(count, f"tokens_to_remove={tokens_to_remove}")


class CropToLength(SinkAnswers):
    """Up to 5.14 (cache_utils.py): `crop` takes the length that remains, or minus the number of tokens to remove."""

    def crop(self, max_length: int) -> None:
        """Forget all but the first `max_length` columns, or the newest `-max_length`; what left for them comes back.

        Raises:
            SinkArgumentError: no integer.
            CacheStateError: tokens that would have to come back are gone.
        """
        remains = whole_number("max_length", max_length, -2, "of tokens", may_be_negative=True)
        length: int = cast(Any, self).get_seq_length()
        count = -remains if remains < 0 else max(0, length - remains)
        self._take_back(count, f"max_length={max_length}")


class GetMaxCacheShape(SinkAnswers):
    """Up to 5.14 (cache_utils.py): a cache is asked for the length at which it ends."""

    no_end: int | None = -1
    """What a `DynamicCache` says."""

    def get_max_cache_shape(self, layer_idx: int = 0) -> int | None:  # noqa: ARG002 - as in transformers
        """`no_end`: there is no length at which a stream ends. In a graph, the width of its mask."""
        this = cast(Any, self)
        return this.get_max_length() if this.is_compileable else self.no_end


class CacheOfLayers(Cache):
    """4.56 and newer: a cache is made of layers that it is given."""

    def __init__(self) -> None:
        super().__init__(layers=[])


class CacheOfLayerClasses(Cache):
    """4.54 and 4.55: a cache makes its layers from a class; ours are put in their place."""

    def __init__(self) -> None:
        from transformers.cache_utils import DynamicLayer

        super().__init__(layer_classes=DynamicLayer)  # type: ignore[call-arg, unused-ignore]
        self.layers = []


class CacheOfLists(Cache):
    """4.52 and 4.53: a cache is what its subclass makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Any] = []

    def __len__(self) -> int:
        return len(self.layers)


class CacheBase515(GetMaskSizesByLength, IsLinearByLayer, CropByCount, CacheOfLayers):
    """5.15 and newer."""


class CacheBase504(GetMaskSizesByLength, CropToLength, GetMaxCacheShape, CacheOfLayers):
    """5.4 to 5.14."""


class CacheBase456(GetMaskSizesByPosition, CropToLength, GetMaxCacheShape, CacheOfLayers):  # type: ignore[misc] # checked with the newest
    """4.56 to 5.3."""


class CacheBase454(GetMaskSizesByPosition, CropToLength, GetMaxCacheShape, CacheOfLayerClasses):  # type: ignore[misc]
    """4.54 and 4.55."""


class CacheBase452(GetMaskSizesByPosition, CropToLength, GetMaxCacheShape, CacheOfLists):  # type: ignore[misc]
    """4.53, and 4.52, where models build their masks themselves."""

    no_end = None
