"""Compiled decoding: one graph for all tokens of all streams, with the right logits."""

from __future__ import annotations

import copy
import shutil
import threading

import pytest
import torch
import torch._dynamo

import sink_patch
from sink_patch import SinkCache
from sink_patch.streaming.fixed import layout
from tests.support import tiny as shared
from tests.support import zoo
from tests.support.chats import Window
from tests.support.graphs import counted, graph_config, graphs
from tests.support.known_gaps import is_newest, skip_if_model_is_newer
from tests.support.oracle import relative_error, visible_tokens
from tests.support.replay import cache_name
from tests.support.tiny import tokens

# torch warns when it traces the masks of transformers 4.53 to 4.57
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
W, S = 12, 3
CONTEXT = 48  # short, so that the clock is set back
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
MODELS = {
    "llama": {},
    "cohere": {},  # interleaved
    "gptj": {"n_positions": CONTEXT, "n_ctx": CONTEXT},  # a table of angles
    "phi": {},  # partial
    "mistral": {"sliding_window": 128},
    # two kinds of layers, each with columns of its own in the mask
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7},
    "gpt_oss": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7},
}
NO_SDPA = {"gptj": "eager", "gpt_oss": "eager"}


@pytest.fixture(autouse=True)
def fresh_graphs():
    with counted():
        yield


def tiny(*asked, **settings):
    """A model of the test's own: transformers keeps what it compiles on the model."""
    return copy.deepcopy(shared.tiny(*asked, **settings))


def run(model, ids, **settings):
    asked = {"do_sample": False, "max_new_tokens": 5 * W, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **{**asked, **SINK, **settings})


def assert_same(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "attention"),
    # both where layers share one mask, and where they have masks of two kinds
    [("llama", "eager"), ("gemma3_text", "eager"), *((name, NO_SDPA.get(name, "sdpa")) for name in MODELS)],
)
def test_one_graph_serves_all_tokens_of_three_streams(model_type, attention):
    context = {} if model_type == "gptj" else {"max_position_embeddings": CONTEXT}
    model = tiny(model_type, layers=2, attention=attention, **context, **MODELS[model_type])
    for prompt in (1, 6, 2 * W):
        ids = tokens(prompt, seed=prompt)
        found = run(model, ids, compile_config=graph_config())
        assert_same(found, run(model, ids))
        assert graphs() == (1, 0)
        assert not found.past_key_values.is_compileable  # else transformers would make masks outside the graph
    assert sink_patch.inspect(model, W, S).why_not_compiled is None


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text", "lfm2", "bamba", "falcon_h1"])
def test_recurrent_states_go_through_the_graph(model_type):
    skip_if_model_is_newer(model_type)
    model = zoo.build(model_type)
    # older versions lay states out as they come with a prompt, and a graph knows one such layout
    with torch._dynamo.config.patch(error_on_recompile=is_newest()):
        for prompt in (S, 6, 2 * W):
            ids = tokens(prompt, seed=prompt)
            assert_same(run(model, ids, compile_config=graph_config()), run(model, ids))
    made, breaks = graphs()
    assert 0 < made < (2 if is_newest() else 4)
    assert not breaks
    assert sink_patch.inspect(model, W, S).why_not_compiled is None


@pytest.mark.parametrize("how", ["rows with padding", "second turn of a copy"])
def test_recurrent_states_in_a_graph_follow_their_rows(how):
    skip_if_model_is_newer("qwen3_next")
    model, ids, asked = zoo.build("qwen3_next"), tokens(8, rows=2), {}
    if how == "rows with padding":
        asked["attention_mask"] = torch.ones_like(ids)
        asked["attention_mask"][0, :3] = 0
    with torch._dynamo.config.patch(error_on_recompile=is_newest()):
        found, wanted = (run(model, ids, **asked, **more) for more in ({"compile_config": graph_config()}, {}))
    assert torch.equal(found.sequences, wanted.sequences)
    if how == "second turn of a copy":
        copies = [one.past_key_values.clone() for one in (found, wanted)]
        history = torch.cat((found.sequences, tokens(4, rows=2)), dim=1)
        both = [
            run(model, history, past_key_values=one, cache_implementation=None, **more)
            for one, more in zip(copies, ({"compile_config": graph_config()}, {}), strict=True)
        ]
        assert_same(*both)
    assert graphs() == (1, 0)


def test_the_logits_of_each_token_equal_the_oracle():
    model, ids = tiny("llama", attention="sdpa", max_position_embeddings=CONTEXT), tokens(6)
    out = run(model, ids, compile_config=graph_config())
    for step, logits in enumerate(out.logits[1:]):
        seen = ids.shape[1] + step
        with torch.no_grad():
            wanted = model(visible_tokens(out.sequences, seen, 1, W, S), use_cache=False).logits[:, -1]
        assert relative_error(logits, wanted) < 1e-5


TURNS = {"evict": "turns", "turn_start": [[token] for token in range(0, 97, 8)], "do_sample": True}


@pytest.mark.parametrize("model_type", ["llama", "cohere", "gemma3_text"])
def test_the_graph_stays_the_same_when_whole_messages_leave(model_type, monkeypatch):
    monkeypatch.setattr(layout, "HAVE_GRAPHS", ("cpu",))
    model = tiny(model_type, layers=2, attention="sdpa", max_position_embeddings=CONTEXT, **MODELS[model_type])
    for prompt in (1, 6, 2 * W):
        ids, found = tokens(prompt, seed=prompt), []
        for compiled in ({"compile_config": graph_config()}, {}):
            torch.manual_seed(prompt)
            found.append(run(model, ids, **TURNS, **compiled))
        assert_same(*found)
    assert graphs() == (1, 0)


def test_the_logits_of_each_token_equal_the_oracle_when_whole_messages_leave():
    model, ids = tiny("llama", attention="sdpa", max_position_embeddings=CONTEXT), tokens(6)
    torch.manual_seed(0)
    out = run(model, ids, compile_config=graph_config(), top_k=0, **TURNS)
    window = Window(out.sequences[0].tolist(), W, S, runs=TURNS["turn_start"])
    for step, logits in enumerate(out.logits[1:]):
        with torch.no_grad():
            visible = out.sequences[:, window.visible(ids.shape[1] + step, 1)]
            wanted = model(visible, use_cache=False).logits[:, -1]
        assert relative_error(logits, wanted) < 1e-5
    assert window.floor > 3 * W
    assert graphs() == (1, 0)


def test_rows_of_different_lengths_lose_whole_messages_of_their_own():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    ids, mask = tokens(14, rows=2), torch.ones(2, 14, dtype=torch.long)
    mask[1, :9] = 0
    found = []
    for compiled in ({"compile_config": graph_config()}, {}):
        torch.manual_seed(0)
        found.append(run(model, ids, attention_mask=mask, pad_token_id=0, **TURNS, **compiled))
    assert_same(*found)
    assert graphs() == (1, 0)


def test_rows_of_different_lengths_and_a_second_turn():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    ids, mask = tokens(14, rows=2), torch.ones(2, 14, dtype=torch.long)
    mask[1, :9] = 0
    more = {"attention_mask": mask, "pad_token_id": 0}
    found, wanted = (run(model, ids, **more, **compiled) for compiled in ({"compile_config": graph_config()}, {}))
    assert_same(found, wanted)
    history = torch.cat((found.sequences, tokens(5, rows=2, seed=1)), dim=1)
    more["attention_mask"] = torch.cat((mask, torch.ones(2, history.shape[1] - 14, dtype=torch.long)), dim=1)
    turns = []
    for first, compiled in ((found, {"compile_config": graph_config()}), (wanted, {})):
        resumed = {"past_key_values": first.past_key_values, "cache_implementation": None, **compiled}
        turns.append(run(model, history, **more, **resumed))
    assert_same(*turns)
    assert graphs() == (1, 0)


def test_two_kinds_of_layers_in_rows_of_different_lengths():
    model = tiny("gemma3_text", layers=2, attention="sdpa", max_position_embeddings=CONTEXT, **MODELS["gemma3_text"])
    ids, mask = tokens(10, rows=2), torch.ones(2, 10, dtype=torch.long)
    mask[1, :7] = 0
    more = {"attention_mask": mask, "pad_token_id": 0}
    found, wanted = (run(model, ids, **more, **compiled) for compiled in ({"compile_config": graph_config()}, {}))
    assert_same(found, wanted)
    assert graphs() == (1, 0)


@pytest.mark.parametrize("evict", ["tokens", "turns"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_graph_writes_only_to_static_inputs_at_fixed_addresses(model_type, evict, monkeypatch):
    """Otherwise torch does not use CUDA graphs (torch/_inductor/cudagraph_utils.py, on mutated inputs)."""
    monkeypatch.setattr(layout, "HAVE_GRAPHS", ("cpu",))
    model = tiny(model_type, layers=2, attention="sdpa", max_position_embeddings=CONTEXT, **MODELS[model_type])
    addresses = []

    def backend(graph, _):
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        static = ["_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) for node in inputs]
        held = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}

        def call(*given):
            before = [tensor._version for tensor in given]
            out = graph.forward(*given)
            written = [tensor._version != version for tensor, version in zip(given, before, strict=True)]
            assert sum(written) == 4  # keys and values of two layers
            assert all(is_static for is_static, is_written in zip(static, written, strict=True) if is_written)
            others = [tensor for tensor, is_static in zip(given, static, strict=True) if not is_static]
            others = [tensor for tensor in others if tensor.data_ptr() not in held]
            assert [tensor.shape for tensor in others] == [(1, 1)]  # the token
            addresses.append([tensor.data_ptr() for tensor, is_static in zip(given, static, strict=True) if is_static])
            return out

        return call

    run(model, tokens(6), compile_config=graph_config(backend), **(TURNS if evict == "turns" else {}))
    assert len(addresses) > 4 * W
    assert all(here == addresses[0] for here in addresses)


def test_not_every_window_and_batch_size_needs_a_new_graph():
    model = tiny("llama", layers=2, attention="sdpa")
    config = graph_config()
    config.dynamic = None  # torch's default: a size that has changed once becomes dynamic
    with torch._dynamo.config.patch(error_on_recompile=False):
        for rows, window in ((1, 12), (1, 16), (2, 14), (3, 20), (4, 24), (2, 28)):
            settings = {"window_length": window, "max_new_tokens": 40}
            ids = tokens(6, rows=rows)
            assert_same(run(model, ids, compile_config=config, **settings), run(model, ids, **settings))
    assert graphs()[0] <= 3


@torch.no_grad()
def test_compiled_and_plain_forwards_may_follow_each_other():
    """Between two compiled steps, the visible slots then change by more than one token."""
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    stream, caches = tokens(60), [SinkCache(W, S, model=model) for _ in range(2)]
    compiled, logits = torch.compile(model.forward, backend="eager", dynamic=False), []
    for cache, is_compiled in zip(caches, (False, True), strict=True):
        for count in (4, 1, 1, -1, 1, 1, 2, 1, -2, 1, 1, 1, 3, 1, 1, 5, *[1] * 12):
            if count < 0:
                cache.crop(count)  # negative numbers have one meaning in all versions
                continue
            seen = cache.get_seq_length()
            if is_compiled and count == 1:
                model.forward = compiled
            logits.append(model(stream[:, seen : seen + count], past_key_values=cache).logits[:, -1])
            vars(model).pop("forward", None)
    half = len(logits) // 2
    for found, wanted in zip(logits[half:], logits[:half], strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_beams_are_compiled_too():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    more = {"num_beams": 3, "output_scores": True}
    found, wanted = (run(model, tokens(6), **more, **compiled) for compiled in ({"compile_config": graph_config()}, {}))
    assert torch.equal(found.sequences, wanted.sequences)


def test_nothing_is_compiled_without_a_request():
    run(tiny("llama", layers=2, attention="sdpa"), tokens(6))
    assert graphs() == (0, 0)


def test_a_compiled_forward_has_a_graph_for_prompts_and_one_for_tokens():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    wanted = [run(model, tokens(6, seed=seed)) for seed in range(3)]
    with torch._dynamo.config.patch(error_on_recompile=False):  # prompts have another shape than tokens
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
        for seed in range(3):
            assert_same(run(model, tokens(6, seed=seed)), wanted[seed])
    assert graphs() == (2, 0)


@torch.no_grad()
def test_a_compiled_model_in_a_loop_without_generate_is_right():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    stream, plain, cache = tokens(5 * W), SinkCache(W, S, model=model), SinkCache(W, S, model=model)
    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled = torch.compile(model, backend="eager", dynamic=False)
        for start, count in ((0, 6), *((start, 1) for start in range(6, 5 * W))):
            new = stream[:, start : start + count]
            found = compiled(new, **{cache_name(model): cache}).logits
            assert relative_error(found, model(new, past_key_values=plain).logits) < 1e-5
    assert cache.get_seq_length() == 5 * W


@torch.no_grad()
def test_other_caches_of_a_bound_model_are_compiled_as_before():
    model = tiny("llama", layers=2, attention="sdpa")
    SinkCache(W, S, model=model)
    asked = {"cache_implementation": "static", "do_sample": False, "max_new_tokens": 20}
    wanted = model.generate(tokens(6), **asked)
    assert torch.equal(model.generate(tokens(6), **asked, compile_config=graph_config()), wanted)
    assert graphs() == (1, 0)


REFUSED = {
    "order of the keys": lambda: tiny("falcon", alibi=True),
    "keeps no keys": lambda: (skip_if_model_is_newer("mamba2"), zoo.build("mamba2"))[1],
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_one_graph_cannot_serve_are_not_compiled(name):
    model = REFUSED[name]()
    wanted = run(model, tokens(6))
    assert_same(run(model, tokens(6), compile_config=graph_config()), wanted)
    assert graphs() == (0, 0)
    assert name in sink_patch.inspect(model).why_not_compiled


def test_after_a_graph_failed_the_cache_refuses_forwards():
    model = tiny("llama", layers=2, attention="sdpa")
    first = run(model, tokens(6))
    cache, fails = first.past_key_values, [True]

    def backend(graph, _):
        def call(*inputs):
            out = graph.forward(*inputs)
            if fails:
                raise MemoryError
            return out

        return call

    history = torch.cat((first.sequences, tokens(1)), dim=1)
    resumed = {"past_key_values": cache, "cache_implementation": None, "compile_config": graph_config(backend)}
    with pytest.raises(MemoryError):
        run(model, history, **resumed)
    fails.clear()
    with pytest.raises(RuntimeError, match=r"failed half-way.*reset\(\)"):
        run(model, history, **resumed)
    cache.reset()
    assert torch.equal(run(model, tokens(6), **resumed).sequences, first.sequences)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: g++")
@pytest.mark.skipif(not is_newest(), reason="the result of inductor does not depend on transformers")
@pytest.mark.slow
def test_inductor_gives_the_same_text():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    for seed in range(3):
        ids = tokens(6, seed=seed)
        assert_same(run(model, ids, compile_config=graph_config("inductor")), run(model, ids))
    assert graphs() == (1, 0)


@torch.no_grad()
def test_a_compiled_model_continues_after_an_interrupt():
    """torch runs no hooks then, so the forward is still in progress when the model is called again."""
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    stream, plain, cache = tokens(40), SinkCache(W, S, model=model), SinkCache(W, S, model=model)
    interrupts = []

    def backend(graph, _):
        def call(*inputs):
            if interrupts:
                raise interrupts.pop()
            return graph.forward(*inputs)

        return call

    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled = torch.compile(model, backend=backend, dynamic=False)
        for start, count in ((0, 4), *((start, 1) for start in range(4, 30))):
            new = stream[:, start : start + count]
            if start == 7:  # the window is not full, so nothing is overwritten
                interrupts.append(KeyboardInterrupt())
                with pytest.raises(KeyboardInterrupt):
                    compiled(new, **{cache_name(model): cache})
                assert cache.get_seq_length() == 7
            found = compiled(new, **{cache_name(model): cache}).logits
            assert relative_error(found, model(new, past_key_values=plain).logits) < 1e-5


@pytest.mark.parametrize("how", ["compile_config", "forward"])
def test_the_text_is_the_same_if_torch_stops_compiling(how):
    """Torch does so after too many prompts of different lengths, for example."""
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    wanted = run(model, tokens(6))
    if how == "forward":
        model = copy.copy(model)
        model.forward = torch.compile(model.forward, backend="eager", dynamic=False)
    with torch.compiler.set_stance("force_eager"):
        settings = {"compile_config": graph_config()} if how == "compile_config" else {}
        assert_same(run(model, tokens(6), **settings), wanted)


def test_a_stream_compiled_in_inference_mode_continues_outside_it():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    wanted = run(model, tokens(6))
    with torch.inference_mode():
        first = run(model, tokens(6), compile_config=graph_config(), max_new_tokens=20)
    resumed = {"past_key_values": first.past_key_values, "cache_implementation": None, "max_new_tokens": 5 * W - 20}
    with torch._dynamo.config.patch(error_on_recompile=False):  # the mode has changed
        second = run(model, first.sequences.clone(), compile_config=graph_config(), **resumed)
    assert torch.equal(second.sequences, wanted.sequences)


@torch.no_grad()
def test_a_row_may_have_no_new_token():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    stream, caches = tokens(40, rows=2), [SinkCache(W, S, model=model) for _ in range(2)]
    steps = [(0, 20, [1, 1]), *((at, at + 1, [1, at % 2]) for at in range(20, 30))]
    compiled, logits = torch.compile(model.forward, backend="eager", dynamic=False), []
    with torch._dynamo.config.patch({"error_on_recompile": False, LIMIT: 32}):
        for cache, forward in zip(caches, (None, compiled), strict=True):
            mask = torch.empty(2, 0, dtype=torch.long)
            if forward is not None:
                model.forward = forward
            for start, end, real in steps:
                mask = torch.cat((mask, torch.tensor(real)[:, None].expand(2, end - start)), dim=1)
                logits.append(model(stream[:, start:end], attention_mask=mask, past_key_values=cache).logits[:, -1])
    for (*_, real), found, wanted in zip(steps, logits, logits[len(steps) :], strict=False):
        rows = torch.tensor(real, dtype=torch.bool)
        assert relative_error(found[rows], wanted[rows]) < 1e-5


def test_a_graph_that_is_called_by_hand_takes_its_usual_arguments():
    model = tiny("llama", layers=2, attention="sdpa")
    with torch.no_grad():
        assert torch.equal(model.get_compiled_call(graph_config())(tokens(3)).logits, model(tokens(3)).logits)


@torch.no_grad()
def test_a_thread_that_compiles_something_else_does_not_disturb_a_stream():
    """`torch.compiler.is_compiling` is then true in all threads."""
    model, started, done = tiny("llama", layers=2), threading.Event(), threading.Event()
    cache, plain, stream = SinkCache(W, S, model=model), SinkCache(W, S, model=model), tokens(8)

    def backend(graph, _):
        started.set()
        done.wait(60)
        return graph.forward

    def start(*_):
        if not thread.is_alive() and not started.is_set():
            thread.start()
            started.wait(60)

    thread = threading.Thread(target=lambda: torch.compile(torch.nn.Linear(4, 4), backend=backend)(torch.ones(1, 4)))
    handle = model.model.layers[1].mlp.register_forward_pre_hook(start)
    try:
        model(stream[:, :5], past_key_values=cache)
    finally:
        handle.remove()
        done.set()
        thread.join()
    assert cache.get_seq_length() == 5
    model(stream[:, :5], past_key_values=plain)
    found, wanted = (model(stream[:, 5:6], past_key_values=one).logits for one in (cache, plain))
    assert torch.equal(found, wanted)


def test_a_copy_of_a_compiled_model_decodes_with_its_own_weights():
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)
    run(model, tokens(6), compile_config=graph_config())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    torch._dynamo.reset()
    for one in (twin, model):
        assert_same(run(one, tokens(6), compile_config=graph_config()), run(one, tokens(6)))
