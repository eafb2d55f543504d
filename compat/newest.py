"""transformers 5.23: what is wrapped in generation/utils.py and generation/configuration_utils.py."""

from __future__ import annotations

from sink_patch.compat.shim import Constant, Method, Shim

_UTILS = "transformers.generation.utils"

SHIM = Shim(
    constants=(Constant("transformers.generation.configuration_utils", "ALL_CACHE_IMPLEMENTATIONS", "sink"),),
    methods=(
        Method(
            *(_UTILS, "GenerationMixin", "_prepare_generation_config"),
            parameters=("generation_config", "kwargs"),
            role="prepare_generation_config",
        ),
        Method(
            *(_UTILS, "GenerationMixin", "_prepare_cache_for_generation"),
            parameters=("generation_config", "model_kwargs", "generation_mode"),
            role="prepare_cache",
        ),
        Method(
            "transformers.generation.continuous_batching.continuous_api",
            *("ContinuousMixin", "init_continuous_batching"),
            parameters=("generation_config",),
            role="refuse_continuous_batching",
        ),
    ),
)
