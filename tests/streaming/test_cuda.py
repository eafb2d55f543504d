"""On a GPU: right logits, also through CUDA graphs, and no step that waits for the device.

The same is tested on a CPU in test_oracle, test_ragged, test_compiled (and by_itself), test_beams, test_drafts and
test_files.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import CompileConfig

from sink_patch import SinkCache
from sink_patch.generation.compiled import by_itself
from tests.support import zoo
from tests.support.known_gaps import skip_if_model_is_newer
from tests.support.oracle import relative_error, visible_tokens, worst_error
from tests.support.tiny import tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

W, S, CONTEXT = 12, 3, 48
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
TWO_KINDS = {"layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
SCHEDULE = (6, 1, 2, *[1] * 30, 5, 9, 20, *[1] * 40)


def on_gpu(model_type="llama", dtype=torch.float32, **settings):
    model = tiny(model_type, **{"attention": "sdpa", "max_position_embeddings": CONTEXT, **settings})
    return copy.deepcopy(model).to("cuda", dtype)


def text(count, rows=1, seed=0):
    return tokens(count, rows, seed).cuda()


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("model_type", ["llama", "cohere", "phi", "gptj"])
def test_the_logits_of_each_forward_equal_the_oracle(model_type, dtype, tolerance):
    settings = {"attention": "eager", "n_positions": CONTEXT, "n_ctx": CONTEXT} if model_type == "gptj" else {}
    model = on_gpu(model_type, dtype, **settings)
    assert worst_error(model, text(sum(SCHEDULE)), SCHEDULE, W, S) < tolerance


@torch.no_grad()
def test_rows_of_different_lengths_equal_each_row_alone():
    model, stream = on_gpu(layers=2), text(60, rows=2)
    mask = torch.ones(2, 20, dtype=torch.long, device="cuda")
    mask[1, :13] = 0
    together, alone = (SinkCache(W, S, model=model) for _ in range(2))
    found = [model(stream[:, :20], attention_mask=mask, past_key_values=together).logits[1:, -1]]
    wanted = [model(stream[1:, 13:20], past_key_values=alone).logits[:, -1]]
    for at in range(20, 60):
        found.append(model(stream[:, at : at + 1], past_key_values=together).logits[1:, -1])
        wanted.append(model(stream[1:, at : at + 1], past_key_values=alone).logits[:, -1])
    assert max(map(relative_error, found, wanted)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 9], ids=["rows in step", "rows of different lengths"])
@pytest.mark.parametrize("kinds", [{"layers": 2}, TWO_KINDS], ids=["one kind", "two kinds"])
def test_no_token_waits_for_the_device(kinds, padding):
    """The window fills, the ring wraps, the clock is set back. With sdpa, transformers' masks wait for the device."""
    model = on_gpu("gemma3_text" if kinds is TWO_KINDS else "llama", attention="eager", **kinds)
    cache, mask = SinkCache(W, S, model=model), torch.ones(2, 10, dtype=torch.long, device="cuda")
    mask[1, :padding] = 0
    token = model(text(10, rows=2), attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
    token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)  # some tensors are created once
    with no_synchronisation():
        for _ in range(3 * CONTEXT):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert cache.get_seq_length() == 11 + 3 * CONTEXT


@torch.no_grad()
def test_memory_is_that_of_a_full_window():
    model, stream = on_gpu(layers=2), text(200)
    cache, held = SinkCache(W, S, model=model), []
    for at in range(200):
        model(stream[:, at : at + 1], past_key_values=cache)
        held.append(torch.cuda.memory_allocated())
    assert max(held[2 * W :]) == min(held[2 * W :])


def test_beams_drafts_and_saved_streams(tmp_path):
    model = on_gpu(layers=2)
    same = copy.deepcopy(model).cpu()
    for mode in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        asked = {**SINK, **mode, "max_new_tokens": 4 * W, "do_sample": False, "return_dict_in_generate": True}
        found, wanted = model.generate(text(8), **asked), same.generate(text(8).cpu(), **asked)
        assert torch.equal(found.sequences.cpu(), wanted.sequences)
    found.past_key_values.save(tmp_path / "stream.safetensors")
    loaded, token = SinkCache.load(tmp_path / "stream.safetensors", model=model), text(1)
    with torch.no_grad():
        one, other = (model(token, past_key_values=cache).logits for cache in (loaded, found.past_key_values))
    assert torch.equal(one, other)


@pytest.fixture
def fresh_graphs():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield counters
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor", "ignore:.*TensorFloat32:UserWarning")
@pytest.mark.parametrize("kinds", [{"layers": 2}, TWO_KINDS], ids=["one kind", "two kinds"])
def test_cuda_graphs_are_compiled_once_and_right(kinds, fresh_graphs):
    from torch._inductor import cudagraph_trees

    model = on_gpu("gemma3_text" if kinds is TWO_KINDS else "llama", **kinds)
    config = CompileConfig(mode="reduce-overhead", fullgraph=True, dynamic=False)
    asked = {"do_sample": False, "max_new_tokens": 5 * W, "return_dict_in_generate": True, "output_logits": True}
    for seed in range(3):
        ids = text(6 + seed, seed=seed)
        wanted = model.generate(ids, **asked, **SINK)
        found = model.generate(ids, **asked, **SINK, compile_config=config)
        assert torch.equal(found.sequences, wanted.sequences)
        assert max(map(relative_error, found.logits, wanted.logits)) < 1e-5
    assert fresh_graphs["stats"]["unique_graphs"] == 1
    assert not fresh_graphs["graph_break"]
    assert fresh_graphs["inductor"]["cudagraph_skips"] == 0
    assert cudagraph_trees.get_manager(0, create_if_none_exists=False).roots  # a CUDA graph was recorded


@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor", "ignore:.*TensorFloat32:UserWarning")
@pytest.mark.parametrize("model_type", ["llama", "qwen3_next"])
def test_a_long_call_switch_to_graph_to_a_cuda_graph_by_itself(model_type, fresh_graphs, monkeypatch):
    from torch._inductor import cudagraph_trees

    monkeypatch.setattr(by_itself, "WORTH", 4 * W)
    monkeypatch.setattr(by_itself, "SOON", 5)
    skip_if_model_is_newer(model_type)
    model = on_gpu() if model_type == "llama" else zoo.build(model_type).cuda()
    asked = {"do_sample": False, "max_new_tokens": 5 * W, "return_dict_in_generate": True, "output_logits": True}
    for seed in range(2):
        ids = text(6, seed=seed)
        wanted = model.generate(ids, **asked, **SINK, disable_compile=True)
        found = model.generate(ids, **asked, **SINK)
        assert torch.equal(found.sequences, wanted.sequences)
        assert max(map(relative_error, found.logits, wanted.logits)) < 1e-5
    assert fresh_graphs["stats"]["unique_graphs"] == 1
    assert cudagraph_trees.get_manager(0, create_if_none_exists=False).roots


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor", "ignore:.*TensorFloat32:UserWarning")
def test_each_replay_of_a_cuda_graph_equals_the_oracle(fresh_graphs):
    model, stream = on_gpu(), text(8 * W)
    cache = SinkCache(W, S, model=model)
    with torch._dynamo.config.patch(error_on_recompile=False):  # fresh forwards have shapes of their own
        graph = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        model(stream[:, :W], past_key_values=cache)
        for at in range(W, 8 * W):
            model.forward = graph
            found = model(stream[:, at : at + 1], past_key_values=cache).logits[:, -1].clone()
            del model.forward
            wanted = model(visible_tokens(stream, at, 1, W, S), use_cache=False).logits[:, -1]
            assert relative_error(found, wanted) < 1e-5
    assert fresh_graphs["stats"]["unique_graphs"] == 1
    assert fresh_graphs["inductor"]["cudagraph_skips"] == 0
