"""patch and unpatch: what they change, that they undo it, and that nothing else in transformers notices."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import configuration_utils

import sink_patch
from tests.support.fresh import STREAM, fresh
from tests.support.layers import METHODS, ours
from tests.support.tiny import tiny, tokens

ASKED = {"cache_implementation": "sink", "window_length": 12, "num_sink_tokens": 3}
GREEDY = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
NO_SINK = r"((?!'sink').)*"
REFUSAL = rf"^Invalid `cache_implementation` \(sink\)\. Choose one of: .'static', {NO_SINK}'quantized'{NO_SINK}$"


def pickled(one):
    return pickle.loads(pickle.dumps(one))


def assert_on() -> None:
    assert sink_patch.is_patched()
    assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("sink") == 1
    made = tiny("llama").generate(tokens(5), **ASKED, **GREEDY)
    assert isinstance(made.past_key_values, sink_patch.SinkCache)
    assert made.past_key_values.get_seq_length() == 44


def assert_off() -> None:
    assert not sink_patch.is_patched()
    assert "sink" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    with pytest.raises(ValueError, match=REFUSAL):
        GenerationConfig(cache_implementation="sink")
    model = tiny("llama")
    with pytest.raises(ValueError, match=REFUSAL):
        model.generate(tokens(5), cache_implementation="sink", **GREEDY)
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['window_length'\]"):
        model.generate(tokens(5), window_length=12, **GREEDY)


def test_patch_and_unpatch_step_by_step():
    sink_patch.unpatch()
    assert_off()
    for step, check in [("patch", assert_on)] * 2 + [("unpatch", assert_off)] * 2 + [("patch", assert_on)]:
        getattr(sink_patch, step)()
        check()
        assert [ours(name) for name in METHODS] == [1, 1], f"after {step}"


def test_a_cache_that_exists_goes_on_working_after_unpatch():
    model, stream = tiny("llama"), tokens(60)
    caches = [sink_patch.SinkCache(12, 3, model=model) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(stream[:, :9], past_key_values=cache)
        on = [model(stream[:, step : step + 1], past_key_values=caches[0]).logits for step in range(9, 40)]
        sink_patch.unpatch()
        off = [model(stream[:, step : step + 1], past_key_values=caches[1]).logits for step in range(9, 40)]
    assert torch.equal(torch.cat(on), torch.cat(off))
    made = model.generate(stream[:, :41], past_key_values=caches[1], **GREEDY)
    assert made.past_key_values is caches[1]
    assert caches[1].get_seq_length() == 80


@pytest.mark.parametrize("name", [None, "static", "dynamic", "offloaded_static", "offloaded", "quantized", "no"])
@pytest.mark.filterwarnings("ignore")
def test_other_caches_do_the_same_patched_and_unpatched(name):
    def outcome() -> tuple:
        try:
            model = copy.deepcopy(tiny("llama"))  # some versions keep a static cache on the model
            made = model.generate(tokens(5), cache_implementation=name, **GREEDY)
        except Exception as failure:  # whatever transformers says here, it says it either way
            return type(failure), str(failure).replace("'sink', ", "").replace(", 'sink'", "")
        return type(made.past_key_values), made.sequences.tolist()

    on = outcome()
    sink_patch.unpatch()
    assert on == outcome()
    expected = {None: "DynamicCache", "dynamic": "DynamicCache", "static": "StaticCache"}
    assert on[0].__name__ == expected.get(name, on[0].__name__)


DESCRIBE = """
import inspect, json
import transformers.modeling_utils
from transformers import GenerationMixin
told = {}
for name in ("_prepare_generation_config", "_prepare_cache_for_generation", "generate"):
    method = getattr(GenerationMixin, name)
    facts = (inspect.signature(method), method.__doc__, method.__name__, method.__qualname__, method.__module__)
    told[name] = [*map(str, facts), str(method.__annotations__), inspect.getsource(method)]
print(json.dumps(told))
"""


def test_signatures_and_docs_are_those_of_an_unpatched_transformers():
    off = json.loads(fresh(DESCRIBE, "assert ours() == [0, 0]", SINK_PATCH_AUTOLOAD="0").out)
    on = json.loads(fresh(DESCRIBE, "assert ours() == [1, 1]").out)
    assert on == off


@pytest.mark.parametrize("first", ["import sink_patch", "import transformers, sink_patch"])
def test_unpatch_before_transformers_is_loaded_holds_until_patch(first):
    fresh(
        first,
        """
        sink_patch.unpatch()
        import transformers.modeling_utils
        from transformers import GenerationMixin
        assert not sink_patch.is_patched() and refused() and ours() == [0, 0]
        sink_patch.patch()
        """,
        STREAM,
    )


def test_patch_takes_back_an_unpatch_before_transformers_is_loaded():
    fresh("import sink_patch; sink_patch.unpatch(); sink_patch.patch()", STREAM)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_model_that_has_streamed_can_be_copied_and_pickled(duplicate):
    # of no other test: where attentions were asked for, transformers leaves hooks that cannot be pickled
    model = tiny("llama", layers=2, seed=1)
    made = model.generate(tokens(5), **ASKED, **GREEDY)
    twin = duplicate(model)
    again = twin.generate(tokens(5), **ASKED, **GREEDY)
    assert again.past_key_values.is_bound_to(twin)
    assert not again.past_key_values.is_bound_to(model)
    assert torch.equal(again.sequences, made.sequences)
    for module in (twin, twin.get_decoder()):
        assert len(module._forward_pre_hooks) == len(module._forward_hooks) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("form", ["entries", "cache_config"])
def test_a_generation_config_can_be_copied_and_pickled(duplicate, form):
    sizes = {"window_length": 12, "num_sink_tokens": 3}
    sizes = sizes if form == "entries" else {"cache_config": sizes}
    config = GenerationConfig(cache_implementation="sink", max_new_tokens=40, **sizes)
    twin = duplicate(config)
    assert twin.to_dict() == config.to_dict()
    made = tiny("llama").generate(tokens(5), generation_config=twin, return_dict_in_generate=True)
    assert (made.past_key_values.window_length, made.past_key_values.num_sink_tokens) == (12, 3)
    assert twin.to_dict() == config.to_dict(), "generate must not write into the config that it was given"
