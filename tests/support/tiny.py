"""Tiny random models of every family, seeded, with weights so large that attention is far from uniform."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.known_gaps import is_newest, skip_if_model_is_newer
from tests.support.versions import NotInThisVersion, layer_settings, make_config
from tests.support.weights import seeded

VOCAB = 97

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 192,
    "sliding_window": None,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_FULL, _SLIDING = ("full_attention",), ("sliding_attention",)
_GPTJ = {"n_embd": 64, "n_head": 4, "n_positions": 192, "n_ctx": 192, "rotary_dim": 8}

# model_type -> what differs from _COMMON; "layers": the layer types, if there are several, which are tested one by one
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"layers": (_FULL, _SLIDING), "use_sliding_window": True},
    "qwen2_moe": {
        "layers": (_FULL, _SLIDING),
        "use_sliding_window": True,
        **_EXPERTS,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {"layers": (_FULL, _SLIDING), "use_sliding_window": True},
    "qwen3_moe": _EXPERTS,
    "mistral": {"sliding": True},
    "mixtral": _EXPERTS,
    "gemma": {},
    "gemma2": {"layers": (_FULL, _SLIDING), "query_pre_attn_scalar": 16},
    "gemma3_text": {"layers": (_FULL, _SLIDING), "query_pre_attn_scalar": 16},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"original_max_position_embeddings": 192},
    "gpt_neox": {"rotary_pct": 0.25},
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "falcon": {"drop": ("head_dim",), "new_decoder_architecture": False, "multi_query": False, "alibi": False},
    "stablelm": {"partial_rotary_factor": 0.25},
    "starcoder2": {"sliding": True},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layers": (_FULL, _SLIDING)},
    "granite": {},
    "cohere": {},
    "cohere2": {"layers": (_FULL, _SLIDING)},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "nemotron": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope": (0, 1)},
    "gpt_oss": {
        **_EXPERTS,
        "layers": (_FULL, _SLIDING),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "persimmon": {"partial_rotary_factor": 0.5},
    "exaone4": {"layers": (_FULL, _SLIDING)},
    "ernie4_5": {},
    "helium": {},
    "seed_oss": {},
}

# only those that the installed transformers has
FAMILIES = {name: spec for name, spec in _FAMILIES.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def variants(model_type: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings of a one-layer config) for each kind of layer that a one-layer model of a family can have."""
    spec = FAMILIES[model_type]
    made = []
    for types in filter(functools.partial(can_have, model_type), spec.get("layers", ())):
        made.append((types[0], {"layer_types": list(types), "sliding_window": 128}))
        if types == _SLIDING:
            made.append(("short_sliding_attention", {"layer_types": list(types), "sliding_window": 7}))
    if spec.get("sliding"):
        made += [("sliding_attention", {"sliding_window": 128}), ("short_sliding_attention", {"sliding_window": 7})]
    for has_rope in spec.get("no_rope", ()):
        made.append((f"no_rope_layers={has_rope}", {"no_rope_layers": [has_rope]}))
    return made if made and not spec.get("sliding") else [("full_attention", {}), *made]


def can_have(model_type: str, types: Sequence[str]) -> bool:
    """Whether the installed transformers can make a model of this family with these layer types."""
    try:
        layer_settings(CONFIG_MAPPING[model_type], types)
    except NotInThisVersion:
        return False
    return True


_models: dict[tuple[str, str, str, int], PreTrainedModel] = {}  # those that all tests share
_in_use: dict[tuple[str, str, str, int], object] = {}  # those that this test file has asked for, and what they were


def _made(model_type: str, settings: str, attention: str, seed: int) -> PreTrainedModel:
    spec = _FAMILIES.get(model_type, {})
    given = {**_COMMON, **spec, **eval(settings)}  # a repr of ours
    left_out = ("layers", "sliding", "no_rope", "drop", *spec.get("drop", ()))
    given = {key: value for key, value in given.items() if key not in left_out}
    config = make_config(CONFIG_MAPPING[model_type], given)
    return seeded(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, attention, seed)


def _state(model: PreTrainedModel) -> object:
    """What a test can change of a model and another test would see; what our hooks and RoPE keep is not part of it."""
    weights = [
        (name, id(one), one.data_ptr(), one.dtype, one.device, one.requires_grad, one._version)
        for name, one in model.named_parameters()
    ]
    return (
        weights,
        model.config.to_json_string(use_diff=False),
        repr(vars(model.generation_config)),
        model.training,
        sorted(vars(model)),
    )


def tiny(
    model_type: str, *, layers: int = 1, attention: str = "eager", seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A tiny model, which is made once and shared by all tests: they must not change it (`unchanged`).

    Raises:
        NotInThisVersion: the installed transformers cannot make a model of these `layer_types`.
    """
    skip_if_model_is_newer(model_type)
    key = (model_type, repr({"num_hidden_layers": layers, **settings}), attention, seed)
    if key not in _models:
        _models[key] = _made(*key)
    model = _models[key]
    _in_use.setdefault(key, _state(model))
    return model


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Inside runs one test, or the fixtures of one file.

    Raises:
        AssertionError: a shared model was changed, which no later test is given.
    """
    outside = dict(_in_use)  # of fixtures of the file
    yield
    changed = [key for key, before in _in_use.items() if _state(_models[key]) != before]
    for key in changed:
        del _models[key], _in_use[key]
    if not is_newest():  # older versions of transformers write into the configs of models themselves
        changed = []
    for key in _in_use.keys() - outside:
        del _in_use[key]
    assert not changed, f"the test has changed models that all tests share; it must change copies: {changed}"


def tokens(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (rows, count), generator=generator)
