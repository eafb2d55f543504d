"""A call with images goes on in a kept stream: those that it has read are left out before any encoder runs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.generation.inputs import later, system
from sink_patch.generation.refusals import check_call
from sink_patch.generation.request import Request
from sink_patch.kept.begun import Begun, is_copy, note
from sink_patch.models.entries import cache_argument
from sink_patch.streaming.media.given import media_among


def callers_cache(instance: nn.Module, generation_config: Any, model_kwargs: Mapping[str, Any]) -> Any:
    """The cache that was given to a call; None: there is none, but maybe a copy of a kept one."""
    cache = model_kwargs.get(cache_argument(instance))
    return None if is_copy(generation_config, cache) else cache


def leave_out_and_check(
    instance: nn.Module, request: Request, generation_config: Any, model_kwargs: MutableMapping[str, Any]
) -> None:
    """Leave those images to the model that its cache has not read, a kept one maybe, and check the call."""
    if not _goes_on_in_kept(instance, request, generation_config, model_kwargs):
        later.leave_out_read(instance, generation_config, model_kwargs)
        check_call(instance, request, generation_config, model_kwargs)


def _goes_on_in_kept(
    instance: nn.Module, request: Request, generation_config: Any, model_kwargs: MutableMapping[str, Any]
) -> bool:
    """Give a call the copy of a kept stream as if it were a cache of the caller's own, if one fits.

    A call of text alone finds its stream later (`KeptCall`). One that cannot go on, as its model takes no new images in
    a later turn, say, is read anew, and refused then if it cannot be read at all.

    Args:
        generation_config, model_kwargs: of the call, to be changed.

    Returns:
        Whether it goes on. Then what was read is left out, and the call is checked.
    """
    name = cache_argument(instance)
    if is_copy(generation_config, model_kwargs.get(name)):
        return True  # Janus prepares the config itself, and `generate` does it again
    note(generation_config, None)
    is_made_here = generation_config.cache_implementation == CACHE_IMPLEMENTATION and model_kwargs.get(name) is None
    if not is_made_here or not media_among(instance, model_kwargs) or model_kwargs.get("input_ids") is None:
        return False
    settings = request.settings()
    sizes = system.sizes_of_call(settings, model_kwargs["input_ids"], model_kwargs, generation_config)
    if not settings.keep_streams or sizes is None:
        return False
    begun = Begun.with_images(instance, generation_config, model_kwargs, sizes)
    note(generation_config, begun)
    if begun is None or begun.cache is None:
        return False
    changed = {**model_kwargs, name: begun.cache}
    try:
        later.leave_out_read(instance, generation_config, changed)
        check_call(instance, request, generation_config, changed)
    except UnsupportedGenerationError:
        note(generation_config, begun.anew())
        return False
    model_kwargs.clear()
    model_kwargs.update(changed)
    return True
