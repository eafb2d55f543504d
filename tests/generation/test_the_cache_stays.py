"""The cache that goes into `generate` is the cache that decodes: models that throw it away, or take another.

Phi-3 and its kin throw it away where the text comes to the end of the original context, as transformers makes all keys
anew there. Whatever else does so is refused before it computes.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, LogitsProcessorList

from sink_patch import SinkCache, SinkPatchError, UnsupportedGenerationError, UnsupportedModelError
from sink_patch.compat import installed_shim
from sink_patch.compat.shim import Role
from sink_patch.generation.compiled import graph as compiled
from sink_patch.models.entries import cache_argument
from tests.support import zoo
from tests.support.oracle import relative_error, visible_tokens
from tests.support.tiny import tiny, tokens

WINDOW, SINKS, ORIGINAL = 12, 3, 32
SINK = {"cache_implementation": "sink", "window_length": WINDOW, "num_sink_tokens": SINKS}
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": 500, "pad_token_id": 0}  # no end
KIN = ("phi3", "phimoe", "phi4_multimodal")
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
    "long_factor": [4.0 + pair for pair in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
MSCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
GIVEN = {"max_position_embeddings": 192, "original_max_position_embeddings": ORIGINAL}
BEFORE_ITS_END = GIVEN | {"original_max_position_embeddings": 192}


def kin(family, rope="default", **settings):
    """A model with one layer of Phi-3 or its kin."""
    scaled = {} if rope == "default" else {"rope_parameters": LONGROPE | (MSCALES if family == "phimoe" else {})}
    settings = {**GIVEN, **scaled, **settings}
    try:
        if family == "phi3":
            model = tiny("phi3", **settings)
        else:
            size = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
            model = zoo.one_layer(family, "full_attention", **size, **settings)
    except zoo.CannotBuild as why:
        pytest.skip(str(why))
    try:
        with torch.no_grad():
            model(tokens(2), use_cache=False)
    except AttributeError as fault:  # 5.0: 'PhimoeRotaryEmbedding' object has no attribute 'short_mscale'
        pytest.skip(f"transformers itself cannot run {family} with {rope}: {fault}")
    return model


def streamed(model, *args, **kwargs):
    """`generate`; skips where this version refuses the whole family."""
    try:
        return model.generate(*args, **GREEDY, **kwargs)
    except UnsupportedModelError as refusal:
        pytest.skip(str(refusal))


def check_with_oracle(model, out, prompt):
    for count, found in enumerate(out.logits):
        seen, new = (0, prompt) if count == 0 else (prompt + count - 1, 1)
        visible = visible_tokens(out.sequences, seen, new, WINDOW, SINKS)
        with torch.no_grad():
            wanted = model(visible, use_cache=False).logits[:, -1]
        assert relative_error(found, wanted) < 1e-4, f"token {prompt + count}"


@pytest.mark.parametrize("rope", ["default", "longrope"])
@pytest.mark.parametrize("family", KIN)
def test_a_text_goes_on_past_the_original_context(family, rope):
    model = kin(family, rope)
    out = streamed(model, tokens(6), max_new_tokens=60, output_logits=True, **SINK)
    assert isinstance(out.past_key_values, SinkCache)
    assert out.past_key_values.get_seq_length() == 65
    check_with_oracle(model, out, prompt=6)


@pytest.mark.parametrize("rope", ["default", "longrope"])
@pytest.mark.parametrize("family", KIN)
@pytest.mark.parametrize("first", [5, ORIGINAL - 9, ORIGINAL - 8, ORIGINAL - 7])
def test_a_second_turn_switch_to_graph_the_end_of_the_original_context(family, rope, first):
    model = kin(family, rope)
    out = streamed(model, tokens(6), max_new_tokens=first, **SINK)
    history = torch.cat((out.sequences, tokens(9, seed=9)), dim=1)
    cache = out.past_key_values
    again = streamed(model, history, past_key_values=cache, max_new_tokens=30, output_logits=True)
    assert again.past_key_values is cache
    assert cache.get_seq_length() == history.shape[1] + 29
    with torch.no_grad():
        visible = visible_tokens(again.sequences, history.shape[1] - 10, 10, WINDOW, SINKS)
        assert relative_error(again.logits[0], model(visible, use_cache=False).logits[:, -1]) < 1e-4


WAYS = {
    "beams": {"num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 2},
    "pieces": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", KIN)
def test_the_text_is_that_of_a_model_whose_context_has_no_end(family, way):
    """The same weights with a longer original context: without longrope the frequencies are the same."""
    ids = tokens(15)
    out = streamed(kin(family), ids, max_new_tokens=50, **SINK, **WAYS[way])
    wanted = streamed(kin(family, **BEFORE_ITS_END), ids, max_new_tokens=50, **SINK, **WAYS[way])
    assert isinstance(out.past_key_values, SinkCache)
    assert torch.equal(out.sequences, wanted.sequences)


def test_other_caches_are_thrown_away_as_before():
    model = kin("phi3", "longrope")
    out = model.generate(tokens(6), max_new_tokens=60, **GREEDY)
    assert isinstance(out.past_key_values, DynamicCache)
    assert not isinstance(out.past_key_values, SinkCache)


def methods_that_throw_the_cache_away():
    """(module, class) of each model of transformers that sets its cache to None where it makes its inputs."""
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_[!tf]*.py"):
        source = path.read_text(encoding="utf-8")
        if "def prepare_inputs_for_generation" not in source:
            continue
        for owner in ast.walk(ast.parse(source)):
            for method in owner.body if isinstance(owner, ast.ClassDef) else ():
                if getattr(method, "name", "") == "prepare_inputs_for_generation" and sets_cache_to_none(method):
                    yield f"transformers.models.{path.parent.name}.{path.stem}", owner.name


def sets_cache_to_none(method: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.value) == "None"
        and any(ast.unparse(target) in ("cache", "past_key_values", "cache_params") for target in node.targets)
        for node in ast.walk(method)
    )


def test_every_model_that_throws_its_cache_away_is_known():
    known = {(one.module, one.owner) for one in installed_shim().methods if one.role is Role.KEEP_CACHE}
    found = set(methods_that_throw_the_cache_away())
    assert found == known
    assert len(found) == 3


# the guard: models, and changes to models, that leave the cache out


def without_cache(make, self, *args, **kwargs):
    """Past the third token, as a model that makes all keys anew would."""
    name = cache_argument(self)
    ends = kwargs.get(name) is not None and kwargs[name].get_seq_length() >= 8
    return make(*args, **{**kwargs, name: None} if ends else kwargs)


def with_another(make, self, *args, **kwargs):
    name, inputs = cache_argument(self), make(*args, **kwargs)
    ends = inputs[name].get_seq_length() >= 8
    return {**inputs, name: DynamicCache()} if ends else inputs


def by_itself(_make, self, input_ids, **kwargs):
    """Without transformers' own method; the first forward is right."""
    name = cache_argument(self)
    seen = kwargs[name].get_seq_length()
    return {"input_ids": input_ids[:, seen:], name: kwargs[name] if seen < 8 else None, "use_cache": True}


LEAVING_OUT = [without_cache, with_another, by_itself]


def leave_out(model, how, place):
    """Give a model a `prepare_inputs_for_generation` that leaves the cache out, in its class or on itself."""
    owner = type(model)
    if place == "class":
        body = {
            "prepare_inputs_for_generation": lambda self, *args, **kwargs: how(
                functools.partial(owner.prepare_inputs_for_generation, self), self, *args, **kwargs
            )
        }
        model.__class__ = type(owner.__name__, (owner,), body)
    else:
        made = model.prepare_inputs_for_generation
        changed = types.MethodType(lambda self, *args, **kwargs: how(made, self, *args, **kwargs), model)
        model.prepare_inputs_for_generation = changed


def counted(model: nn.Module) -> list[int]:
    """Of each forward that computes anything, how many tokens it brings."""
    lengths: list[int] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    return lengths


def counted_after_the_probe(model: nn.Module) -> list[int]:
    SinkCache(WINDOW, SINKS, model=model)
    return counted(model)


@pytest.mark.parametrize("place", ["class", "object"])
@pytest.mark.parametrize("how", LEAVING_OUT)
@pytest.mark.parametrize("family", ["llama", "mistral", "falcon", "phi3"])
def test_a_forward_without_the_cache_of_its_call_is_refused_before_it_computes(family, how, place):
    model = copy.deepcopy(tiny(family, layers=2))
    cache = SinkCache(WINDOW, SINKS, model=model)
    leave_out(model, how, place)
    lengths = counted(model)
    other = "DynamicCache" if how is with_another else "without a cache"
    with pytest.raises(UnsupportedGenerationError, match=other):
        model.generate(tokens(5), past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert lengths == [5, 1, 1, 1], "the refused forward has run"
    assert cache.get_seq_length() == 8
    assert model(tokens(1), past_key_values=cache).logits.isfinite().all()  # and the cache goes on


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("how", LEAVING_OUT)
def test_all_ways_of_decoding_are_watched(how, options):
    model = copy.deepcopy(tiny("llama", layers=2))
    leave_out(model, how, "class")
    with pytest.raises(SinkPatchError):
        model.generate(tokens(5), max_new_tokens=20, **{**GREEDY, **SINK, **options})


def test_a_cache_that_is_changed_after_a_forward_is_refused():
    model = copy.deepcopy(tiny("llama", layers=2))

    def update(self, outputs, model_kwargs, **kwargs):
        model_kwargs = type(model)._update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs)
        return {**model_kwargs, cache_argument(self): DynamicCache()}

    model._update_model_kwargs_for_generation = types.MethodType(update, model)
    lengths = counted_after_the_probe(model)
    with pytest.raises(UnsupportedGenerationError, match="DynamicCache"):
        model.generate(tokens(5), max_new_tokens=20, **GREEDY, **SINK)
    assert lengths == [5]


def test_a_cache_that_is_lost_before_the_first_forward_is_refused():
    model = copy.deepcopy(tiny("llama", layers=2))
    owner = type(model)

    def sample(self, *args, **kwargs):
        return owner._sample(self, *args, **{**kwargs, cache_argument(self): None})

    model.__class__ = type(owner.__name__, (owner,), {"_sample": sample})
    lengths = counted_after_the_probe(model)
    with pytest.raises(UnsupportedGenerationError, match="no cache"):
        model.generate(tokens(5), max_new_tokens=20, **GREEDY, **SINK)
    assert not lengths


@pytest.mark.parametrize("inner", ["no cache", "another cache", "generate", "generate with sinks"])
def test_what_looks_at_a_text_may_run_the_model_for_itself(inner):
    """A logits processor is not a part of the decoding: whatever cache it has is its own affair."""
    model = tiny("llama", layers=2)

    def run(ids, scores):
        if inner == "no cache":
            model(ids, use_cache=False)
        elif inner == "another cache":
            model(ids, use_cache=True, past_key_values=DynamicCache())
        else:
            model.generate(ids, max_new_tokens=3, **GREEDY, **(SINK if "sinks" in inner else {}))
        return scores

    plain = model.generate(tokens(5), max_new_tokens=20, **GREEDY, **SINK)
    watched = LogitsProcessorList([run])
    out = model.generate(tokens(5), max_new_tokens=20, logits_processor=watched, **GREEDY, **SINK)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.past_key_values.get_seq_length() == 24


def test_after_a_call_nothing_is_watched():
    model = tiny("llama", layers=2)
    model.generate(tokens(5), max_new_tokens=3, **GREEDY, **SINK)
    model(tokens(5), use_cache=False)
    out = model.generate(tokens(5), max_new_tokens=3, **GREEDY)
    assert not isinstance(out.past_key_values, SinkCache)


def test_a_compiled_forward_is_watched():
    """It begins outside the hooks: the graph would not tell."""
    from sink_patch.streaming.calls.guard import guarded

    model = tiny("llama", layers=2)
    with pytest.raises(UnsupportedGenerationError):
        guarded(SinkCache(WINDOW, SINKS, model=model), lambda: compiled.decode(model, pytest.fail, input_ids=tokens(1)))
