"""A tiny random model for each entry of transformers' table of causal language models, as a decoder of text."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.known_gaps import skip_if_model_is_newer
from tests.support.weights import seeded
from tests.support.zoo.configs import decoder_of, kinds_of, smallest_stack, tiny_config
from tests.support.zoo.families import Stack
from tests.support.zoo.reasons import NO_DEFAULT_CACHE, NOT_BUILT

__all__ = ["NOT_BUILT", "NO_DEFAULT_CACHE", "CannotBuild", "build", "entries", "layer_types_of", "one_layer"]


class CannotBuild(Exception):
    """No model of this type can be built; the message says why."""


def entries() -> list[str]:
    """All model types of the installed transformers that have a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str, *, attn_implementation: str = "eager", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model with each kind of layer of its family; `overrides` are settings of its decoder's config."""
    return _build(model_type, None, attn_implementation, seed, overrides)


def layer_types_of(model_type: str) -> Stack:
    """The kinds of layers that `build` puts into a model, for `one_layer`."""
    return kinds_of(decoder_of(CONFIG_MAPPING[model_type]))


def one_layer(
    model_type: str, layer: str, *, attn_implementation: str = "eager", seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A model with a single layer of this kind, or with as few layers as the family allows."""
    stack = smallest_stack(decoder_of(CONFIG_MAPPING[model_type]), layer)
    return _build(model_type, stack, attn_implementation, seed, overrides)


def _build(
    model_type: str, stack: Stack | None, attn_implementation: str, seed: int, overrides: dict[str, Any]
) -> PreTrainedModel:
    if reason := NOT_BUILT.get(model_type):
        raise CannotBuild(f"{model_type}: {reason}")
    skip_if_model_is_newer(model_type)
    try:
        config_class = CONFIG_MAPPING[model_type]
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        if model_class.config_class is decoder_of(config_class):
            config_class = model_class.config_class  # the decoder alone, without vision or audio towers
        config = tiny_config(config_class, stack, **overrides)
        return seeded(model_class, config, attn_implementation, seed)
    except Exception as error:
        raise CannotBuild(f"{model_type}: {type(error).__name__}: {error}") from error
