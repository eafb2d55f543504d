"""Tiny models that see or hear, and tiny prompts for them: random pixels, with as many ids as the model wants."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from tests.support.known_gaps import skip_if_model_is_newer
from tests.support.media.samples import SAMPLES
from tests.support.weights import seeded
from tests.support.zoo.configs import tiny_config
from tests.support.zoo.families import Stack

__all__ = ["SAMPLES", "TOKEN", "build", "images", "prompt"]

_MAPPINGS = ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING")
TOKEN = 90


def build(model_type: str, stack: Stack | None = None, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model with an encoder; `stack` and `overrides` are those of its decoder (tests/support/zoo)."""
    if model_type not in CONFIG_MAPPING:
        skip_if_model_is_newer(model_type)
        pytest.skip(f"{model_type} is not in this transformers")
    sample = SAMPLES[model_type]
    config_class = CONFIG_MAPPING[model_type]
    model_class = _class_of(config_class)
    if config_class.model_type != model_type:
        pytest.skip(f"{model_type} has another name in this transformers, and is refused under that")
    config = tiny_config(config_class, stack, **{**sample.decoder, **overrides})
    _set(config, sample.settings)
    part, _, token = sample.token.rpartition(".")
    setattr(getattr(config, part) if part else config, token, TOKEN)
    return seeded(model_class, config, overrides.pop("attn_implementation", "eager"), seed)


def _class_of(config_class: Any) -> Any:
    for name in _MAPPINGS:
        mapping = getattr(transformers, name, None)
        if mapping is not None and config_class in mapping:
            found = mapping[config_class]
            return found[0] if isinstance(found, tuple) else found
    pytest.skip(f"{config_class.__name__} has no model that sees in this transformers")


def _set(config: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, dict) and name.endswith("_config"):
            if getattr(config, name) is None:  # optional
                setattr(config, name, tiny_config(type(config).sub_configs[name]))
            _set(getattr(config, name), value)
        else:
            setattr(config, name, value)


def prompt(model: PreTrainedModel, rows: Sequence[Sequence[int | str]], seed: int = 0) -> dict[str, Any]:
    """The arguments of a forward, padded to the left.

    Args:
        rows: of each row its parts: a number of tokens of text, or "image".
    """
    sample = SAMPLES[model.config.model_type]
    generator = torch.Generator().manual_seed(seed + 1)
    texts = []
    for parts in rows:
        ids: list[int] = []
        for part in parts:
            if part == "image":
                ids += sample.ids(TOKEN)
            else:
                ids += torch.randint(2, 80, (part,), generator=generator).tolist()
        texts.append(ids)
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])  # [rows, columns]
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    accepted = inspect.signature(type(model).forward).parameters
    kinds = {name: (ids == TOKEN).long() for name in ("token_type_ids", "mm_token_type_ids") if name in accepted}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **kinds,
        **images(model, sum("image" in p for p in _flat(rows)), seed),
    }


def _flat(rows: Sequence[Sequence[int | str]]) -> list[str]:
    return [str(part) for parts in rows for part in parts]


def images(model: PreTrainedModel, number: int, seed: int = 0) -> dict[str, Any]:
    """The tensors of so many images."""
    if not number:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SAMPLES[model.config.model_type].inputs(number)
