"""The places in transformers that are added to and wrapped; most are the same in many versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sink_patch.arguments import CACHE_IMPLEMENTATION
from sink_patch.compat.shim import Constant, Method, Place, Role

_UTILS = "transformers.generation.utils"
_CONFIG = "transformers.generation.configuration_utils"
_MODEL_KWARGS = ("input_ids", "generation_config", "model_kwargs")

CHOICES = Constant(_CONFIG, "ALL_CACHE_IMPLEMENTATIONS", CACHE_IMPLEMENTATION)

CONFIGS = (
    Method(_CONFIG, "GenerationConfig", "__init__", ("kwargs",), Role.MAKE_CONFIG),
    Method(_CONFIG, "GenerationConfig", "update", ("kwargs",), Role.UPDATE_CONFIG),
)

CUSTOM_GENERATE = Method(
    *(_UTILS, "GenerationMixin", "load_custom_generate"),
    parameters=("pretrained_model_name_or_path",),
    role=Role.LOAD_CUSTOM_GENERATE,
)

PREPARE_CONFIG = Method(
    *(_UTILS, "GenerationMixin", "_prepare_generation_config"),
    parameters=("generation_config", "kwargs"),
    role=Role.PREPARE_GENERATION_CONFIG,
)


def prepare_cache(third: str) -> Method:
    """`_prepare_cache_for_generation`, whose third argument is not the same in all versions."""
    return Method(
        *(_UTILS, "GenerationMixin", "_prepare_cache_for_generation"),
        parameters=("generation_config", "model_kwargs", third, "batch_size"),
        role=Role.PREPARE_CACHE,
    )


SAMPLE = Method(_UTILS, "GenerationMixin", "_sample", parameters=_MODEL_KWARGS, role=Role.DECODE)
BEAM_SEARCH = Method(_UTILS, "GenerationMixin", "_beam_search", parameters=_MODEL_KWARGS, role=Role.DECODE)
ASSISTED = Method(
    _UTILS, "GenerationMixin", "_assisted_decoding", parameters=_MODEL_KWARGS, role=Role.DECODE_WITH_DRAFTS
)

COMPILE = (
    Method(
        *(_UTILS, "GenerationMixin", "_valid_auto_compile_criteria"),
        parameters=("model_kwargs", "generation_config"),
        role=Role.MAY_COMPILE,
    ),
    Method(
        "transformers.modeling_utils", "PreTrainedModel", "get_compiled_call", ("compile_config",), Role.COMPILED_CALL
    ),
)

INITIAL_CACHE_POSITION = Method(
    *(_UTILS, "GenerationMixin", "_get_initial_cache_position"),
    parameters=("seq_length", "device", "model_kwargs"),
    role=Role.INITIAL_CACHE_POSITION,
)


def _throws_cache_away(model_type: str, model_class: str) -> Method:
    """The method of a model that throws the cache away at the end of the original context."""
    return Method(
        *(f"transformers.models.{model_type}.modeling_{model_type}", model_class, "prepare_inputs_for_generation"),
        parameters=("input_ids",),
        role=Role.KEEP_CACHE,
    )


INPUTS = (
    Method(
        _UTILS, "GenerationMixin", "prepare_inputs_for_generation", parameters=("input_ids",), role=Role.PREPARE_INPUTS
    ),
    _throws_cache_away("phi3", "Phi3ForCausalLM"),
    _throws_cache_away("phimoe", "PhimoeForCausalLM"),
    _throws_cache_away("phi4_multimodal", "Phi4MultimodalForCausalLM"),
)


def _continuous_batching(module: str) -> tuple[Method, ...]:
    """All ways to continuous batching, which has moved."""
    place, config = f"transformers.generation.{module}", ("generation_config",)
    return (
        Method(place, "ContinuousMixin", "init_continuous_batching", config, Role.INIT_CONTINUOUS_BATCHING),
        Method(place, "ContinuousMixin", "generate_batch", ("inputs", *config, "kwargs"), Role.GENERATE_BATCH),
        Method(place, "ContinuousBatchingManager", "__init__", ("model", *config), Role.MAKE_MANAGER),
    )


BATCHING_IN_FILE = _continuous_batching("continuous_batching")
BATCHING_IN_PACKAGE = _continuous_batching("continuous_batching.continuous_api")

SERVE = Method(
    *("transformers.cli.serving.utils", "BaseHandler", "__init__"),
    parameters=("model_manager", "generation_state"),
    role=Role.MAKE_HANDLER,
    optional=True,
)


_CB = "transformers.generation.continuous_batching"
_OF_TOKENS = ("request_id", "past_length", "query_length")
_STORED = ("key_states", "value_states", "layer_idx", "read_index", "write_index")


def _places_of_allocators() -> tuple[Place, ...]:
    full = (f"{_CB}.cache_allocators", "FullAttentionCacheAllocator")
    return (
        Place(*full, "_compute_blocks_needed", ("allocated_blocks", "past_length", "query_length")),
        Place(*full, "get_seqlen_k", ("past_length", "query_length")),
        Place(*full, "get_read_indices", _OF_TOKENS),
        Place(*full, "get_write_indices", _OF_TOKENS),
        Place(*full, "supports_block_sharing"),
        Place(*full, "supports_block_table"),
        Place(*full, "update", _STORED),
        Place(*full, "free_blocks", ("request_id",)),
        Place(*full, "copy_blocks", ("source_block_ids", "dest_block_ids")),
        Place(f"{_CB}.cache_allocators", "SlidingAttentionCacheAllocator", "update", _STORED),
    )


BATCHING = (
    Place(f"{_CB}.continuous_api", "ContinuousBatchingManager", "_create_batch_processor"),
    Place(f"{_CB}.continuous_api", "ContinuousBatchProcessor", "_generation_step", ("model",)),
    Place(f"{_CB}.input_outputs", "ContinuousBatchingIOs", "prepare_batch_tensors", ("requests_in_batch",)),
    Place(f"{_CB}.scheduler", "Scheduler", "add_waiting_request", ("state",)),
    Place(f"{_CB}.scheduler", "Scheduler", "set_request_cancellation", ("request_id",)),
    Place(f"{_CB}.scheduler", "Scheduler", "_process_candidates", ("candidates", "token_budget")),
    Place(f"{_CB}.scheduler", "Scheduler", "_schedule_request", ("state", "request_tokens", "token_budget")),
    Place(f"{_CB}.continuous_api", "ContinuousBatchProcessor", "prepare_next_batch"),
    Place(f"{_CB}.continuous_api", "ContinuousBatchProcessor", "_handle_request_error", ("error", "state")),
    Place(f"{_CB}.continuous_api", "ContinuousBatchProcessor", "fail_all_requests", ("error",)),
    Place(f"{_CB}.input_outputs", "ContinuousBatchingIOs", "get_model_kwargs"),
    Place(f"{_CB}.scheduler", "Scheduler", "finish_request", ("request_id",)),
    Place(f"{_CB}.scheduler", "Scheduler", "reset"),
    Place(f"{_CB}.scheduler", "Scheduler", "_try_to_meet_safety_margin"),
    Place(f"{_CB}.cache_allocators", "CachePool", "try_to_free_sectors"),
    Place(f"{_CB}.requests", "RequestState", "create_equivalent_initial_request"),
    Place(f"{_CB}.requests", "RequestState", "current_len"),
    Place(f"{_CB}.cache", "PagedAttentionCache", "can_store_request_tokens", ("state", "request_len", "dry_run")),
    Place(f"{_CB}.cache", "PagedAttentionCache", "free_blocks", ("request_id",)),
    Place(f"{_CB}.cache", "PagedAttentionCache", "compute_free_capacity"),
    Place(f"{_CB}.cache", "", "group_layers_by_attn_type", ("config",)),
    Place(f"{_CB}.utils", "", "find_head_dim", ("config",)),
    Place(f"{_CB}.utils", "", "find_num_key_value_heads", ("config",)),
    *_places_of_allocators(),
)
"""What sinks in continuous batching build on (sink_patch/batching/)."""

BATCHING_ATTRIBUTES = {
    "manager": "continuous_batching_config _use_prefix_sharing _original_attn_impl",
    "config": "safety_margin allow_block_sharing max_blocks_per_request decode_compile_config",
    "processor": "cache scheduler use_async_batching model_runner.pad_inputs inputs_and_outputs.compute_stream "
    "scheduler.active_requests scheduler.waiting_requests scheduler.safety_margin scheduler.max_requests_per_batch",
    "cache": "cache_allocators pool max_batch_tokens num_sectors num_blocks read_cache_limit use_prefix_sharing "
    "allow_block_sharing max_decode_fast_path_length",
    "inputs": "position_ids requests_in_batch",
    "allocator": "block_table block_physical_stride tokens_per_page blocks_per_sector layer_indices cache_tensor "
    "sentinel_index write_trash_index use_block_sharing",
    "request": "request_id initial_tokens generated_tokens remaining_prefill_tokens tokens_to_process position_offset "
    "num_children status _new_tokens_limit _true_initial_tokens",
    "future request": "state query_length has_new_token",
}
"""The attributes of their objects that are read or set there, in words; `test_private_places.py` looks at them."""


def given_mode(given: Mapping[str, Any]) -> str:
    """The decoding mode of `_prepare_cache_for_generation`, where that is one of its arguments."""
    mode = given.get("generation_mode")
    return str(getattr(mode, "value", mode))


def mode_of_config(given: Mapping[str, Any]) -> str:
    """The same where the assistant model is the argument, and the config tells the rest."""
    return str(given["generation_config"].get_generation_mode(given.get("assistant_model")).value)
