"""Calls that nobody has asked to compile switch to a graph from when that pays, and their text stays the same."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import wrapt
from transformers import GenerationMixin, PreTrainedModel

import sink_patch
from sink_patch.errors import SinkPatchWarning
from sink_patch.generation.compiled import by_itself, graph
from sink_patch.generation.wrappers import compiled_call, may_compile
from tests.support import directory, zoo
from tests.support import tiny as shared
from tests.support.graphs import counted, graph_config, graphs
from tests.support.known_gaps import is_newest
from tests.support.oracle import relative_error
from tests.support.tiny import tokens

pytestmark = pytest.mark.skipif(not is_newest(), reason="what a model compiles by default has no name yet")

W, S = 12, 3
SINK = {"window_length": W, "num_sink_tokens": S, "do_sample": False}
CONTEXT = 48  # short, so that the clock is set back
SOON, WORTH = 5, 40  # tokens, in place of the real ones
LONG, SHORT = 48, 30  # calls


@pytest.fixture(autouse=True)
def fresh_graphs():
    with counted():
        yield


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The CPU is a device on which transformers compiles static caches by itself; graphs are torch's eager ones."""
    criteria = inspect.unwrap(GenerationMixin._valid_auto_compile_criteria)

    def on_any_device(self, model_kwargs, generation_config):
        config = copy.copy(generation_config)
        config.compile_config = config.compile_config or graph_config()
        return criteria(self, model_kwargs, config)

    wrapped = wrapt.FunctionWrapper(on_any_device, may_compile)
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", wrapped)
    monkeypatch.setattr(PreTrainedModel, "_default_compile_config", lambda _: graph_config())
    monkeypatch.setattr(by_itself, "WORTH", WORTH)
    monkeypatch.setattr(by_itself, "SOON", SOON)


@pytest.fixture
def compiled_tokens(monkeypatch):
    """Counts the tokens that went through a graph; `take()` returns how many did since it was asked last."""
    counted, through = [0], by_itself.SwitchToGraph.through

    def counting(*args):
        counted[0] += 1
        return through(*args)

    monkeypatch.setattr(by_itself.SwitchToGraph, "through", counting)

    def take():
        found, counted[0] = counted[0], 0
        return found

    return take


def tiny(model_type="llama", **settings):
    """A model of the test's own: transformers keeps what it compiles on the model."""
    settings = {"attention": "sdpa", "max_position_embeddings": CONTEXT, **settings}
    return copy.deepcopy(shared.tiny(model_type, layers=2, **settings))


def run(model, ids=None, new=LONG, **settings):
    asked = {"cache_implementation": "sink", "return_dict_in_generate": True, "output_logits": True, **SINK}
    return model.generate(tokens(6) if ids is None else ids, max_new_tokens=new, **{**asked, **settings})


def assert_same(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5


GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
GPTJ = {"n_positions": CONTEXT, "n_ctx": CONTEXT, "attention": "eager", "max_position_embeddings": None}


@pytest.mark.parametrize(("model_type", "settings"), [("llama", {}), ("gemma3_text", GEMMA)])
def test_a_long_call_switch_to_graph_soon(model_type, settings, compiled_tokens):
    model = tiny(model_type, **settings)
    plain = run(model, disable_compile=True)
    assert graphs() == (0, 0)
    assert_same(run(model), plain)
    assert graphs() == (1, 0)
    assert compiled_tokens() == LONG - 1 - SOON  # the first token is of the prompt's forward
    run(model)
    assert compiled_tokens() == LONG - 1


def test_short_calls_go_over_once_all_of_them_are_worth_a_graph(compiled_tokens):
    model = tiny()
    plain = run(model, new=SHORT, disable_compile=True)
    for through in (0, 2 * (SHORT - 1) - WORTH, SHORT - 1):
        assert_same(run(model, new=SHORT), plain)
        assert compiled_tokens() == through
    assert graphs() == (1, 0)


def test_a_long_call_that_ends_early_stays_plain():
    stop = [lambda ids, _: torch.full((1,), ids.shape[1] >= 6 + SOON)]
    run(tiny(), stopping_criteria=stop)
    assert graphs() == (0, 0)


def test_sizes_have_graphs_of_their_own(compiled_tokens):
    model = tiny()
    run(model)
    compiled_tokens()
    for other in ({"ids": tokens(6).expand(2, -1)}, {"window_length": W + 1}):
        run(model, new=SHORT, **other)
        assert compiled_tokens() == 0


@pytest.mark.parametrize(
    "why_not",
    [
        "disabled",
        "another thread",
        "compiled by the user",
        "shared",
        "no Triton",
        "beams",
        "hidden states",
        "torch",
    ],
)
def test_nothing_is_compiled_by_itself_where_it_may_not(why_not, monkeypatch):
    model, asked = tiny(), {}
    if why_not == "disabled":
        asked["disable_compile"] = True
    if why_not == "compiled by the user":
        model.forward = torch.compile(model.forward, backend="eager", dynamic=False)
    if why_not == "shared":
        model.hf_device_map = {"model": 0, "lm_head": 1}
    if why_not == "no Triton":
        monkeypatch.setattr(by_itself, "can_compile_for", lambda _: False)
    if why_not == "beams":
        asked["num_beams"] = 2
    if why_not == "hidden states":
        asked["output_hidden_states"] = True
    if why_not == "torch":
        monkeypatch.setattr(by_itself, "why_not_traced", lambda: "torch is old")
    calls = []
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, _: calls.append(1) or self)
    with torch._dynamo.config.patch(error_on_recompile=False), ThreadPoolExecutor(1) as threads:
        if why_not == "another thread":
            threads.submit(run, model).result()
        else:
            run(model, **asked)
    assert not calls


@pytest.mark.parametrize(
    ("device", "triton", "can"), [("cpu", None, True), ("cuda", None, False), ("cuda", "spec", True)]
)
def test_a_gpu_needs_triton_to_compile(device, triton, can, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: triton)
    assert by_itself.can_compile_for(SimpleNamespace(device=torch.device(device))) is can


def test_a_model_that_torch_cannot_compile_stays_plain_with_a_warning(monkeypatch, compiled_tokens):
    def fails(*_):
        raise OSError("no C compiler was found")

    model = tiny()
    wanted = run(model, disable_compile=True)
    monkeypatch.setattr(PreTrainedModel, "_default_compile_config", lambda _: graph_config(fails))
    with pytest.warns(SinkPatchWarning, match="LlamaForCausalLM decodes without a graph.*no C compiler was found"):
        assert_same(run(model), wanted)
    assert compiled_tokens() == 1
    assert_same(run(model), wanted)
    assert compiled_tokens() == 0


def test_recurrent_states_are_put_back_where_a_graph_could_not_be_made(monkeypatch):
    """All parts of a forward but its last have run, and that cannot be compiled."""
    made, parts = [], math.inf

    def backend(module, _):
        made.append(module)
        if len(made) == parts:
            raise OSError("no C compiler was found")
        return module.forward

    model = zoo.build("lfm2")
    wanted = run(model, disable_compile=True)
    layer = model.model.layers[-1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (torch._dynamo.graph_break(), forward(*args, **kwargs))[1]
    config = graph_config(backend)
    config.fullgraph = False
    monkeypatch.setattr(PreTrainedModel, "_default_compile_config", lambda _: config)
    again = torch._dynamo.config.patch(error_on_recompile=False)
    first = [lambda ids, _: torch.full((1,), ids.shape[1] >= 6 + SOON + 2)]
    with again:
        run(model, stopping_criteria=first)
    parts = len(made)
    made.clear()
    torch._dynamo.reset()
    by_itself._decoded.clear()
    with again, pytest.warns(SinkPatchWarning, match="decodes without a graph.*no C compiler was found"):
        assert_same(run(model), wanted)


def test_an_error_that_is_not_of_the_compiler_is_raised(monkeypatch):
    def backend(module, _):
        def call(*inputs):
            module.forward(*inputs)
            raise MemoryError

        return call

    model = tiny()
    monkeypatch.setattr(PreTrainedModel, "_default_compile_config", lambda _: graph_config(backend))
    with pytest.raises(MemoryError):
        run(model)
    run(model)  # without a graph


def test_states_that_have_changed_are_not_taken_for_those_of_before_and_the_next_call_is_plain(monkeypatch):
    def fails(*_):
        raise OSError("no C compiler was found")

    model = zoo.build("lfm2")
    wanted = run(model, disable_compile=True)
    assert_same(run(model), wanted)
    monkeypatch.setattr(PreTrainedModel, "_default_compile_config", lambda _: graph_config(fails))
    with torch._dynamo.config.patch(error_on_recompile=False):
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no C compiler was found"):
            run(model)
        assert_same(run(model), wanted)


@pytest.mark.parametrize("can_compile", [True, False])
def test_a_second_turn_may_be_under_autocast(can_compile, monkeypatch):
    def fails(*_):
        raise OSError("no C compiler was found")

    model = tiny()
    turns = []
    for more in ({"disable_compile": True}, {}):
        first = run(model, new=SHORT, disable_compile=True)
        if more == {} and not can_compile:
            monkeypatch.setattr(PreTrainedModel, "_default_compile_config", lambda _: graph_config(fails))
        resumed = {"past_key_values": first.past_key_values, "cache_implementation": None, **more}
        told = pytest.warns(SinkPatchWarning) if more == {} and not can_compile else contextlib.nullcontext()
        with torch.autocast("cpu", torch.bfloat16), told:
            turns.append(run(model, first.sequences, **resumed))
    assert turns[0].logits[-1].shape == turns[1].logits[-1].shape
    assert relative_error(turns[1].logits[SOON + 2], turns[0].logits[SOON + 2]) < 5e-2


def test_text_without_end_that_is_read_in_another_thread_is_plain_there(compiled_tokens):
    model, texts = tiny(), []
    for more in ({"disable_compile": True}, {}):
        stream = sink_patch.stream(model, directory.tokenizer(), tokens(6), **SINK, **more)
        with ThreadPoolExecutor(1) as threads:
            texts.append([threads.submit(next, stream).result() for _ in range(3 * W)])
    assert texts[0] == texts[1]
    assert compiled_tokens() == 0


def test_a_model_of_which_transformers_makes_no_graph_stays_plain(monkeypatch, compiled_tokens):
    """Llama 4."""
    model = tiny()

    def get_compiled_call(self, compile_config):
        return self.__call__

    wrapped = wrapt.FunctionWrapper(get_compiled_call, compiled_call)
    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", wrapped)
    assert_same(run(model), run(model, disable_compile=True))
    assert compiled_tokens() == 0


def test_a_call_that_asks_is_compiled_at_once_and_its_errors_are_raised(compiled_tokens):
    def fails(*_):
        raise OSError("no C compiler was found")

    model = tiny()
    run(model)
    compiled_tokens()
    again = torch._dynamo.config.patch(error_on_recompile=False)  # with another backend
    with again, pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no C compiler was found"):
        run(model, compile_config=graph_config(fails))
    assert compiled_tokens() == 0


def test_text_without_end_switch_to_graph_to_a_graph():
    model, texts = tiny(), []
    for more in ({"disable_compile": True}, {}):
        stream = sink_patch.stream(model, directory.tokenizer(), tokens(6), **SINK, **more)
        texts.append([next(stream) for _ in range(5 * W)])
        assert graphs() == ((1, 0) if not more else (0, 0))
    assert texts[0] == texts[1]


def test_a_copy_of_a_model_makes_a_graph_of_its_own():
    model = tiny()
    run(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    torch._dynamo.reset()
    wanted = run(twin, disable_compile=True)
    assert_same(run(twin), wanted)


def test_a_saved_and_a_second_turn_stay_the_same(tmp_path):
    model = tiny()
    plain = run(model, new=2 * LONG, disable_compile=True)
    first = run(model)
    first.past_key_values.save(tmp_path / "cache.safetensors")
    cache = sink_patch.SinkCache.load(tmp_path / "cache.safetensors", model=model)
    second = run(model, first.sequences, past_key_values=cache, cache_implementation=None)
    assert torch.equal(second.sequences, plain.sequences)


def test_a_plain_call_over_a_cache_that_went_over_is_plain(compiled_tokens):
    model = tiny()
    first = run(model)
    compiled_tokens()
    run(model, first.sequences, past_key_values=first.past_key_values, cache_implementation=None, disable_compile=True)
    assert compiled_tokens() == 0
    assert not graph.streams_of(first.past_key_values).offered_to_compiler
