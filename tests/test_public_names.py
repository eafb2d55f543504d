"""The public names: one that goes or changes breaks what users have written, and one that comes is a promise."""

from __future__ import annotations

import inspect

import pytest
from transformers.cache_utils import Cache

import sink_patch

ERRORS = {
    "AdapterMismatchError": NotImplementedError,
    "CacheFileError": ValueError,
    "CacheStateError": RuntimeError,
    "FamilyClashError": ValueError,
    "HistoryMismatchError": ValueError,
    "SinkArgumentError": ValueError,
    "UnboundCacheError": RuntimeError,
    "UnpicklableCacheError": TypeError,
    "UnsupportedGenerationError": NotImplementedError,
    "UnsupportedModelError": NotImplementedError,
    "UnsupportedTransformersError": ImportError,
}
"""Our errors, and the built-in one by which each may be caught as well."""

NAMES = {
    *("stream", "chat_settings", "configure", "unconfigure", "kept_streams"),
    *("SinkCache", "Window", "count_sink_tokens", "patch", "unpatch", "is_patched", "inspect", "Report"),
    *("register_family", "families", "Family", "PositionLimit", "coverage", "Coverage", "Verdict"),
    *("Adapter", "Rotation", "rope", "no_positions", "sinusoidal_table"),
    *("SinkPatchError", "SinkPatchWarning", *ERRORS),
}
OF_THE_CACHE = {
    *("window_length", "num_sink_tokens", "evict", "turn_start", "nbytes", "window", "bind", "is_bound_to", "check"),
    *("save", "load", "clone", "activate_past_recording", "deactivate_past_recording", "is_croppable"),
    *("batch_size", "get_max_length", "get_mask_sizes", "update_indexer", "is_compileable", "is_initialized"),
    *("batch_repeat_interleave", "batch_select_indices", "join", "crop", "reset", "is_sliding"),
}
"""Beside transformers' own `Cache`; some of them are in that too, from some version on."""
OF_OLD_VERSIONS = {"get_query_offset", "is_linear", "get_max_cache_shape", "no_end"}
"""What only some versions of transformers ask for (compat/bases.py)."""


def public(owner):
    return {name for name in dir(owner) if not name.startswith("_")}


def test_the_package():
    assert set(sink_patch.__all__) == NAMES
    assert set(dir(sink_patch)) >= NAMES
    assert all(getattr(sink_patch, name) is not None for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sink_patch.nothing


def test_the_cache():
    ours = public(sink_patch.SinkCache)
    assert ours >= OF_THE_CACHE
    assert ours - public(Cache) <= OF_THE_CACHE | OF_OLD_VERSIONS


@pytest.mark.parametrize("name", ERRORS)
def test_the_errors(name):
    error = getattr(sink_patch, name)
    assert issubclass(error, sink_patch.SinkPatchError)
    assert issubclass(error, ERRORS[name])


SIGNATURES = {
    "SinkCache": "(window_length: 'int' = 256, num_sink_tokens: 'int' = 4, *, evict: 'str' = 'tokens', "
    "turn_start: 'Any' = (), model: 'nn.Module | None' = None)",
    "inspect": "(model: 'nn.Module', window_length: 'int' = 256, num_sink_tokens: 'int' = 4) -> 'Report'",
    "patch": "() -> 'None'",
    "unpatch": "() -> 'None'",
    "is_patched": "() -> 'bool'",
    "families": "() -> 'Mapping[str, Family]'",
    "coverage": "() -> 'Coverage'",
    "no_positions": "() -> 'Adapter'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_they_take(name):
    assert str(inspect.signature(getattr(sink_patch, name))) == SIGNATURES[name]
