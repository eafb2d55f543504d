"""The places in transformers that are added to and wrapped; most are the same in many versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sink_patch.arguments import CACHE_IMPLEMENTATION
from sink_patch.compat.shim import Constant, Method, Role

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


def given_mode(given: Mapping[str, Any]) -> str:
    """The decoding mode of `_prepare_cache_for_generation`, where that is one of its arguments."""
    mode = given.get("generation_mode")
    return str(getattr(mode, "value", mode))


def mode_of_config(given: Mapping[str, Any]) -> str:
    """The same where the assistant model is the argument, and the config tells the rest."""
    return str(given["generation_config"].get_generation_mode(given.get("assistant_model")).value)
