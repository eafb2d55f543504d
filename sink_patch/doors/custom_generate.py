"""`custom_generate="transformers-community/sink_cache"`: how transformers itself names the sink cache that it removed.

What stands there is Python code on the hub, of the old `SinkCache`. It is served by us instead: nothing is downloaded,
no remote code runs, and `trust_remote_code` is not needed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sink_patch.arguments import CACHE_IMPLEMENTATION, CUSTOM_GENERATE
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat.shim import Role
from sink_patch.errors import SinkArgumentError

logger = logging.getLogger("sink_patch")

_OF_THE_CALL = ("self", "custom_generate", "trust_remote_code", "global_keys_to_exclude")

_has_told = False


def generate(*inputs: Any, model: Any, **given: Any) -> Any:
    """`generate` with a sink cache.

    Args:
        inputs: of `generate`: at most one, if it is given by place.
        model: of transformers.
        given: all other arguments of `generate`, `window_length` and `num_sink_tokens` among them. A `SinkCache` may be
            passed as in `generate`.

    Returns:
        What `generate` returns.

    Raises:
        SinkArgumentError: another `cache_implementation` is given.
    """
    given = {name: value for name, value in given.items() if name not in _OF_THE_CALL}  # some versions pass them on
    asked = given.pop("cache_implementation", None)
    if asked not in (None, CACHE_IMPLEMENTATION):
        raise SinkArgumentError(
            f"custom_generate={CUSTOM_GENERATE!r}, which is the sink cache, was asked for together with "
            f"cache_implementation={asked!r}. Leave one of them out."
        )
    if not any(isinstance(value, SinkCache) for value in given.values()):
        given["cache_implementation"] = CACHE_IMPLEMENTATION
    return type(model).generate(model, *inputs, **given)  # the method of an object may be this very function


def load_custom_generate(
    wrapped: Callable[..., Any], _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `load_custom_generate`: ours for that one name, unless there is a directory of this name."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    if given.get("pretrained_model_name_or_path") != CUSTOM_GENERATE or Path(CUSTOM_GENERATE).is_dir():
        return wrapped(*args, **kwargs)
    _tell()
    return generate


def _tell() -> None:
    global _has_told
    if not _has_told:
        _has_told = True
        logger.info(
            "custom_generate=%r is served by sink_patch: nothing is downloaded, no remote code runs.", CUSTOM_GENERATE
        )


WRAPPERS: dict[Role, Callable[..., Any]] = {Role.LOAD_CUSTOM_GENERATE: load_custom_generate}
"""Which wrapper goes around the method that loads a `custom_generate`, by its role."""
