"""Every entry of transformers' table of causal language models has a tiny model, or a reason why it has none."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import PreTrainedModel

from tests.support import zoo
from tests.support.oracle import relative_error
from tests.support.tiny import FAMILIES, tiny, tokens

BUILT = [model_type for model_type in zoo.entries() if model_type not in zoo.NOT_BUILT]
MOST_PARAMETERS = 1_000_000  # of a model whose config was made small in every place


def built(*model_types: str) -> list[str]:
    """Those of them that the installed transformers has."""
    return [model_type for model_type in model_types if model_type in BUILT]


def logits_of(model_type: str, model: PreTrainedModel, stream: torch.Tensor) -> torch.Tensor:
    return model(stream, **({"use_cache": False} if model_type in zoo.NO_DEFAULT_CACHE else {})).logits


@pytest.mark.parametrize("model_type", BUILT)
@torch.no_grad()
def test_each_entry_runs_and_its_last_token_heeds_another(model_type):
    model = zoo.build(model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) < MOST_PARAMETERS
    stream, other = tokens(5), tokens(5)
    other[0, 2] += 1 if other[0, 2] < 90 else -1
    logits = logits_of(model_type, model, stream)
    assert torch.isfinite(logits).all()
    assert relative_error(logits_of(model_type, model, other)[:, -1], logits[:, -1]) > 0.02


@pytest.mark.parametrize(
    "model_type", built("bert", "deepseek_v3", "gemma3_text", "gpt2", "llama", "qwen3_next", "zaya")
)
@torch.no_grad()
def test_attention_is_far_from_uniform(model_type):
    for weights in zoo.build(model_type)(tokens(7), output_attentions=True).attentions:
        last = weights[:, :, -1]
        spread = torch.special.entr(last).sum(-1).exp()  # over so many tokens, as it were
        assert spread.mean() < 0.8 * (last > 0).sum(-1).min()


@pytest.mark.parametrize(("model_type", "reason"), zoo.NOT_BUILT.items())
def test_what_cannot_be_built_is_an_entry_and_says_why(model_type, reason):
    assert model_type in zoo.entries()
    with pytest.raises(zoo.CannotBuild, match=f"{model_type}: {re.escape(reason)}"):
        zoo.build(model_type)


@pytest.mark.parametrize("model_type", BUILT)
@torch.no_grad()
def test_each_kind_of_layer_runs_with_as_few_others_as_can_be(model_type):
    for layer in zoo.layer_types_of(model_type):
        assert torch.isfinite(logits_of(model_type, zoo.one_layer(model_type, layer), tokens(5))).all(), layer


def test_a_config_that_makes_no_sense_cannot_be_built():
    with pytest.raises(zoo.CannotBuild, match=r"llama: .*no such activation"):
        zoo.build("llama", hidden_act="no such activation")


@pytest.mark.parametrize("model_type", built("mixtral", "gpt_oss"))
@torch.no_grad()
def test_a_model_is_made_by_its_seed_alone_and_leaves_the_random_numbers_of_others(model_type):
    before = torch.get_rng_state()
    first = zoo.build(model_type, seed=3)(tokens(5)).logits
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(zoo.build(model_type, seed=3)(tokens(5)).logits, first)
    assert not torch.equal(zoo.build(model_type, seed=4)(tokens(5)).logits, first)


@pytest.mark.parametrize("model_type", built("gemma3", "llama4", "musicgen"))
def test_overrides_and_stacks_reach_the_decoder_inside_a_composite_config(model_type):
    decoder = zoo.build(model_type, vocab_size=50).config.get_text_config(decoder=True)
    assert decoder.vocab_size == 50
    layer = zoo.layer_types_of(model_type)[0]
    assert zoo.one_layer(model_type, layer).config.get_text_config(decoder=True).num_hidden_layers == 1


# Norms of all logits of a stream of 9 tokens: the same on every version of transformers.
SAME_EVERYWHERE = {"llama": 36.993, "mistral": 36.993, "gemma": 289.554, "phi": 38.873, "glm": 35.477, "gptj": 43.668}


@pytest.mark.parametrize("model_type", [name for name in SAME_EVERYWHERE if name in FAMILIES])
@torch.no_grad()
def test_a_tiny_model_is_the_same_on_every_version(model_type):
    assert tiny(model_type, layers=2)(tokens(9)).logits.norm().item() == pytest.approx(
        SAME_EVERYWHERE[model_type], rel=1e-4
    )
