"""The probe calls a model as a user would, and asks for nothing that a model need not have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

import sink_patch
from sink_patch import UnsupportedModelError
from sink_patch.compat import installed_shim
from tests.support import zoo
from tests.support.oracle import worst_error
from tests.support.tiny import VOCAB, tiny, tokens

W, S = 12, 3
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
STEPS = [7, 3, 1, 1, W - S, 1, 1, W, *[1] * 3 * W]


def llama(layers: int = 1, **settings: Any) -> PreTrainedModel:
    """A model that a test may change, and that was never probed."""
    return copy.deepcopy(tiny("llama", layers=layers, **settings))


def error(model: PreTrainedModel, vocab: int = VOCAB) -> float:
    """The worst error of a stream by a one-layer model against fresh forwards of this model."""
    return worst_error(model, tokens(sum(STEPS)) % vocab, STEPS, W, S)


def generated(model: PreTrainedModel, rows: int = 1, **asked: Any) -> torch.Tensor:
    return model.generate(tokens(5, rows), do_sample=False, max_new_tokens=2 * W, **SINK, **asked)


# What the model is entered by.


def test_it_enters_by_the_models_own_call():
    model, calls = llama(), []
    model.register_forward_pre_hook(lambda *args: calls.append(args[2]["input_ids"].shape), with_kwargs=True)
    sink_patch.SinkCache(W, S, model=model)
    assert calls == [(4, 1), (4, 1)]


class Toned(LlamaForCausalLM):
    """A model whose own call asks for a vector of each row, which shifts all logits."""

    def forward(self, input_ids, tone, past_key_values=None, **kwargs):
        out = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        out.logits = out.logits + self.lm_head(tone)[:, None]
        return out


def of_class(model_class: type, model: PreTrainedModel) -> PreTrainedModel:
    made = model_class(model.config).eval()
    made.load_state_dict(model.state_dict())
    return made


def test_a_model_whose_own_call_asks_for_more_is_entered_at_its_decoder():
    model = of_class(Toned, llama())
    with torch.no_grad(), pytest.raises(TypeError, match="tone"):
        model(tokens(3))
    sink_patch.inspect(model)


class Bare(LlamaForCausalLM):
    """A model whose call lets everything through, and names no cache."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


NAMES_A_CACHE = "up to 5.4, a model whose forward names no cache keeps its past in a form of its own"


def test_a_model_whose_own_call_names_no_cache_is_entered_with_what_its_decoder_calls_it():
    if installed_shim().own_cache(Bare) is not None:
        pytest.skip(NAMES_A_CACHE)
    sink_patch.inspect(of_class(Bare, llama()))


class WithoutPositions(LlamaForCausalLM):
    """A model that lets its decoder count the positions."""

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, use_cache=None):
        return super().forward(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask, use_cache=use_cache
        )


def test_a_model_that_takes_no_positions_is_refused_before_it_runs():
    model, calls = of_class(WithoutPositions, llama()), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(UnsupportedModelError, match="WithoutPositions takes no position_ids.*pass them on"):
        generated(model)
    assert not calls


class LosesPositions(LlamaForCausalLM):
    """A model that takes positions and does not pass them on."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)


def test_a_model_that_loses_positions_on_the_way_is_refused():
    """Its decoder turns keys as it should; what the model's own call makes of the positions decides."""
    with pytest.raises(sink_patch.AdapterMismatchError, match="layer 0 its keys are off"):
        sink_patch.inspect(of_class(LosesPositions, llama()))


# What is compiled runs as it was written.


def by_forward(model: nn.Module, backend: Any) -> None:
    model.forward = torch.compile(model.forward, backend=backend)


def by_method(model: nn.Module, backend: Any) -> None:
    model.compile(backend=backend)


@pytest.mark.parametrize("which", ["model", "model.layers.0"])
@pytest.mark.parametrize("compile_", [by_forward, by_method])
def test_it_compiles_nothing(compile_, which):
    model, graphs = llama(), []
    compile_(model.get_submodule(which), lambda graph, _: graphs.append(graph) or graph.forward)
    sink_patch.inspect(model)
    assert not graphs


# Rows: what stands around a model may be made for those of a call.

ROWS = [1, 2, 3, 4, 6]


def steered(model: PreTrainedModel, vectors: torch.Tensor) -> PreTrainedModel:
    """With a hook that adds a vector of [rows, 1, hidden] to the states before the last layer, row by row."""
    model.model.layers[-1].register_forward_pre_hook(lambda _, args: (_each_its_own(args[0], vectors), *args[1:]))
    return model


def _each_its_own(states: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    assert states.shape[0] == vectors.shape[0]
    return states + vectors


@pytest.mark.parametrize("asked", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_it_has_the_rows_of_the_call_that_it_runs_in(rows, asked):
    vectors = torch.randn(rows * asked.get("num_beams", 1), 1, 64, generator=torch.Generator().manual_seed(0))
    bound = llama(layers=2)
    sink_patch.inspect(bound)  # proven before the hook is there
    wanted = generated(steered(bound, vectors), rows, **asked)
    assert torch.equal(generated(steered(llama(layers=2), vectors), rows, **asked), wanted)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "bloom", "deepseek_v3", "gemma3_text"])
def test_any_number_of_rows_proves_the_same(model_type, rows):
    model = copy.deepcopy(zoo.build(model_type))
    wanted = generated(copy.deepcopy(model), 1)
    assert torch.equal(generated(model, rows)[:1], wanted)


def test_a_wrong_family_is_found_in_one_row_too():
    model = copy.deepcopy(zoo.build("cohere"))
    model.config.model_type = "mine"
    sink_patch.register_family("mine")(sink_patch.rope("half"))
    with pytest.raises(sink_patch.AdapterMismatchError, match="family 'mine'.*In layer 0 its keys are off"):
        generated(model)


def test_a_model_that_no_family_claims_is_found_out_in_the_rows_of_the_call():
    vectors = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    wanted = generated(steered(llama(layers=2), vectors), 3)
    model = llama(layers=2)
    model.config.model_type = "nobody_knows"
    assert torch.equal(generated(steered(model, vectors), 3), wanted)


def probed_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens of the probe's forwards in a call of one row, two forwards for each."""
    found: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["input_ids"].flatten().tolist()), with_kwargs=True
    )
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, **SINK)
    hook.remove()
    return [one for (one,) in found[:-1]]


def test_one_row_costs_two_forwards_and_more_only_where_its_token_tells_nothing():
    (first, again) = probed_tokens(llama())
    assert first == again
    model = llama()
    model.get_input_embeddings().weight.data[first] = 0  # then its keys are zero
    seen = probed_tokens(model)
    assert len(seen) == 4  # of two tokens one is enough
    assert set(seen) > {first}
    model = llama()
    model.get_input_embeddings().weight.data[list(set(seen))] = 0
    assert len(set(probed_tokens(model))) == 4


# Embeddings.


class Around(nn.Module):
    """A module of somebody's own around the embedding."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.inner = embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids)


class Packed(nn.Embedding):
    """Two values in a byte of a weight of another shape, as bitsandbytes has it."""

    def __init__(self, embedding: nn.Embedding, shape: tuple[int, int]):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim)
        self.table = embedding.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.table)


class OfNoSize(nn.Module):
    """A weight, and no number of rows beside it."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


def cut(embedding: nn.Embedding) -> nn.Embedding:
    """A table of fewer rows than it and the config say."""
    embedding.weight = nn.Parameter(embedding.weight[:20].detach().clone())
    return embedding


def bitsandbytes(name: str) -> Any:
    def made(embedding: nn.Embedding) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        quantised = getattr(bnb.nn, name)(embedding.num_embeddings, embedding.embedding_dim)
        quantised.load_state_dict(embedding.state_dict())
        return quantised.to("cpu")

    return made


EMBEDDINGS: dict[str, Any] = {
    "a module around it": Around,
    "two values in a byte": lambda embedding: Packed(embedding, (VOCAB * embedding.embedding_dim // 2, 1)),
    "packed into one row": lambda embedding: Packed(embedding, (1, VOCAB * embedding.embedding_dim // 2)),
    "a weight alone": OfNoSize,
    "fewer rows than are said": cut,
    "bitsandbytes, 4 bits": bitsandbytes("Embedding4bit"),
    "bitsandbytes, 8 bits": bitsandbytes("Embedding8bit"),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embedding_need_not_be_one_of_torch(kind):
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.set_input_embeddings(EMBEDDINGS[kind](model.get_input_embeddings()))
    assert error(model, vocab=20) < 1e-5


class SaysNoVocabulary:
    """A config of somebody's own, without a size of the vocabulary."""

    def __init__(self, config: Any):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name in ("vocab_size", "config"):
            raise AttributeError(name)
        return getattr(self.config, name)

    def get_text_config(self, **kwargs: Any) -> Any:
        return self


def test_the_size_of_the_vocabulary_need_not_be_known():
    model = llama()
    model.set_input_embeddings(Around(model.get_input_embeddings()))
    model.get_input_embeddings = nn.Identity
    model.config = SaysNoVocabulary(model.config)
    assert error(model) < 1e-5


class Nowhere(LlamaForCausalLM):
    """A model that does not tell where its embedding is."""

    def get_input_embeddings(self):
        raise NotImplementedError


def test_where_the_embedding_is_need_not_be_known():
    model = llama()
    lost = of_class(Nowhere, model)
    assert error(lost) < 1e-5
