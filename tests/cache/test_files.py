"""A cache that is copied, saved and loaded goes on to the bit; what cannot go on is refused, and changes nothing."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import sink_patch
from sink_patch import CacheFileError, CacheStateError, SinkCache
from sink_patch.cache import files as storage
from sink_patch.cache.packing import tensors_in
from tests.support import saved as saved_files
from tests.support import zoo
from tests.support.caches import pristine_sinks
from tests.support.replay import cache_name
from tests.support.saved import FORMAT_1, header_of, hooks, steady_model, steady_text, without_hooks
from tests.support.tiny import tiny, tokens

W, S = 12, 3
SHORT_CONTEXT = {"max_position_embeddings": 32}
AFTER = [1, 4, 1, 12, 1, 1]  # forwards after the cache was kept
STREAM = 120


def llama(**settings):
    return tiny("llama", layers=2, **{**SHORT_CONTEXT, **settings})


def gemma3_text():
    types = ["sliding_attention", "full_attention"]
    return tiny("gemma3_text", layers=2, layer_types=types, sliding_window=7, query_pre_attn_scalar=16, **SHORT_CONTEXT)


@torch.no_grad()
def feed(model, cache, stream, schedule, mask=None):
    """All logits of the forwards of a schedule, which go on where the cache stands."""
    logits = []
    for new in schedule:
        start = cache.get_seq_length()
        more = {} if mask is None else {"attention_mask": mask[:, : start + new]}
        logits.append(model(stream[:, start : start + new], **{cache_name(model): cache}, **more).logits)
    return logits


def same(found, wanted):
    return all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def file_of(cache, path):
    cache.save(path)
    return path


def rewrite(path, **changes):
    """Say other things in the header of a file."""
    saved_files.rewrite(path, json.dumps({**header_of(path), **changes}))


def by_file(cache, model, path):
    return SinkCache.load(file_of(cache, path), model=model)


def by_clone(cache, model, path):
    return cache.clone()


KEPT = pytest.mark.parametrize("keep", [by_file, by_clone])
BEFORE = {"nothing": [], "not full": [5], "full": [9, 1, 1, 4], "clock set back": [20, *[1] * 40]}


@KEPT
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("make", [llama, gemma3_text])
def test_it_goes_on_to_the_bit(make, before, keep, tmp_path):
    model, stream = make(), tokens(STREAM, rows=2)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream, before)
    kept = keep(cache, model, tmp_path / "cache")
    assert repr(kept) == repr(cache)
    assert [layer.kind for layer in kept.layers] == [layer.kind for layer in cache.layers]
    wanted = feed(model, cache, stream, AFTER)
    assert same(feed(model, kept, stream, AFTER), wanted)  # the other has gone on meanwhile, and shares nothing
    assert kept.get_seq_length() == cache.get_seq_length()


def test_the_clock_of_these_streams_is_set_back_before_and_after(tmp_path):
    model, bases = llama(), []
    cache = SinkCache(W, S, model=model)
    for steps in (BEFORE["clock set back"], AFTER):
        feed(model, cache, tokens(STREAM), steps)
        bases.append(header_of(file_of(cache, tmp_path / "cache"))["rows"][0]["base"])
    assert 0 < bases[0] < bases[1]


@KEPT
def test_rows_of_different_lengths_go_on_to_the_bit(keep, tmp_path):
    model, stream = llama(), tokens(STREAM, rows=3)
    mask = torch.ones(3, STREAM, dtype=torch.long)
    mask[1, :4], mask[2, :9] = 0, 0
    for before in ([10], [20, *[1] * 30]):
        cache = SinkCache(W, S, model=model)
        feed(model, cache, stream, before, mask)
        kept = keep(cache, model, tmp_path / "cache")
        assert same(feed(model, kept, stream, AFTER, mask), feed(model, cache, stream, AFTER, mask))


def values_of(cache):
    """What layers hold beside tensors."""
    plain = (bool, int, torch.dtype, torch.device, dict)
    return [
        {
            name: value
            for name, value in vars(layer).items()
            if isinstance(value, plain) and not name.endswith("_states")
        }
        for layer in cache.layers
    ]


@KEPT
@pytest.mark.parametrize("model_type", ["falcon_h1", "lfm2", "qwen3_next"])
def test_states_go_on_to_the_bit(model_type, keep, tmp_path):
    model, stream = zoo.build(model_type), tokens(STREAM, rows=2)
    after = [1] * 6 if sink_patch.families()[model_type].whole_prompts else AFTER
    for before in ([], [20, 1, 1]):
        cache = SinkCache(W, S, model=model)
        with torch.inference_mode():
            feed(model, cache, stream, before)
        kept = keep(cache, model, tmp_path / "cache")
        assert values_of(kept) == values_of(cache)
        with torch.inference_mode():
            wanted = feed(model, cache, stream, after)
        assert same(feed(model, kept, stream, after), wanted)


@KEPT
def test_layers_that_share_the_keys_of_others_hold_nothing(keep, tmp_path):
    model, stream = zoo.build("gemma3n_text"), tokens(STREAM, rows=2)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream, [20, 1, 1])
    kept = keep(cache, model, tmp_path / "cache")
    assert same(feed(model, kept, stream, AFTER), feed(model, cache, stream, AFTER))


@KEPT
def test_states_that_hang_on_a_graph_are_kept_without_it(keep, tmp_path):
    model, stream = zoo.build("lfm2"), tokens(30)
    cache = SinkCache(W, S, model=model)
    model(stream[:, :20], **{cache_name(model): cache})
    kept = keep(cache, model, tmp_path / "cache")
    assert not any(tensor.requires_grad for tensor in tensors_in(vars(kept.layers[0])))
    assert same(feed(model, kept, stream, [1] * 5), feed(model, cache, stream, [1] * 5))


@KEPT
def test_bfloat16_and_rings_that_do_not_turn_stay_as_they_are(keep, tmp_path):
    model, stream = copy.deepcopy(llama()).bfloat16(), tokens(STREAM)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream, [20, *[1] * 40])
    kept = keep(cache, model, tmp_path / "cache")
    assert kept.layers[0].keys.dtype == torch.bfloat16
    assert pristine_sinks(kept, 1)[0] is None
    assert same(feed(model, kept, stream, AFTER), feed(model, cache, stream, AFTER))


@KEPT
def test_grad_modes_may_change_afterwards(keep, tmp_path):
    model, stream = llama(), tokens(STREAM)
    cache = SinkCache(W, S, model=model)
    with torch.inference_mode():
        feed(model, cache, stream, [20])
        kept = keep(cache, model, tmp_path / "cache")
    feed(model, kept, stream, AFTER)


@KEPT
def test_spare_slots_are_kept(keep, tmp_path):
    """Where what leaves the window is recorded, so that it can come back."""
    model, stream = llama(), tokens(STREAM)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream, [9])
    cache.activate_past_recording(4)
    feed(model, cache, stream, [1] * 30)
    kept = keep(cache, model, tmp_path / "cache")
    for one in (cache, kept):
        one.crop(-3)
    assert kept.is_croppable
    assert kept.layers[0].kind.spare >= 4
    assert same(feed(model, kept, stream, AFTER), feed(model, cache, stream, AFTER))


def test_an_equal_model_of_another_process_will_do(tmp_path):
    model, stream = llama(), tokens(STREAM)
    other = without_hooks(model)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream, [20, *[1] * 40])
    loaded = by_file(cache, other, tmp_path / "cache")
    assert loaded.is_bound_to(other)
    assert not loaded.is_bound_to(model)
    assert same(feed(other, loaded, stream, AFTER), feed(model, cache, stream, AFTER))


def test_a_file_of_the_first_release_goes_on():
    """See `FORMAT_1`; in whatever version of transformers, as it holds keys and values alone."""
    model, stream = steady_model(), steady_text(50 + sum(AFTER))
    loaded = SinkCache.load(FORMAT_1, model=model)
    anew = SinkCache(W, S, model=model)
    feed(model, anew, stream, [20, *[1] * 30])
    for found, wanted in zip(feed(model, loaded, stream, AFTER), feed(model, anew, stream, AFTER), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)  # other machines round otherwise


def test_what_is_written_is_what_the_first_release_wrote(tmp_path):
    model = steady_model()
    cache = SinkCache(W, S, model=model)
    feed(model, cache, steady_text(50), [20, *[1] * 30])
    now, then = header_of(file_of(cache, tmp_path / "cache")), header_of(FORMAT_1)
    for layer in then["layers"]:
        layer["held"]["dict"].remove(["kind_index", 0])  # follows from the kinds of the layers
    for rotation in (rotation for turning in then["model"]["rotations"] for rotation in turning if rotation):
        rotation[3] = pytest.approx(rotation[3], rel=1e-6)
    differ = {"sink_patch", "transformers"}
    assert now.pop("history") == [[], []]  # of later releases; so are the ids
    assert list(now) == list(then)
    assert {key for key in now if now[key] != then[key]} <= differ
    shapes = [
        {name: (one.shape, one.dtype) for name, one in load_file(file).items()}
        for file in (tmp_path / "cache", FORMAT_1)
    ]
    assert [shapes[0].pop(f"history.{row}") for row in range(2)] == [((50,), torch.int64)] * 2
    assert shapes[0] == shapes[1]


def test_it_goes_on_in_generate(tmp_path):
    model = llama()
    asked = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(tokens(9), **asked, cache_implementation="sink", window_length=W, num_sink_tokens=S)
    cache = first.past_key_values
    kept = [by_file(cache, model, tmp_path / "cache"), cache.clone()]
    history = torch.cat((first.sequences, tokens(5, seed=1)), dim=1)
    wanted, *found = (model.generate(history, **asked, past_key_values=one) for one in (cache, *kept))
    assert all(same(one.logits, wanted.logits) for one in found)


def test_a_second_save_replaces_the_first_and_one_that_fails_leaves_it(tmp_path, monkeypatch):
    model, path = llama(), tmp_path / "cache"
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(STREAM), [5])
    cache.save(path)
    feed(model, cache, tokens(STREAM), [5])
    cache.save(str(path))
    assert SinkCache.load(path, model=model).get_seq_length() == 10

    def interrupted(tensors, unfinished, metadata):
        Path(unfinished).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path)
    assert SinkCache.load(path, model=model).get_seq_length() == 10
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "cache")
    SinkCache(W, S, model=llama()).save(link)
    assert link.is_symlink()
    assert (tmp_path / "cache").is_file()


def test_each_layer_is_loaded_to_where_the_model_has_it(tmp_path, monkeypatch):
    model = llama()
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(STREAM), [20])
    cache.save(tmp_path / "cache")
    places = {0: "cpu", 1: "meta"}  # stands for a second device
    monkeypatch.setattr(storage, "_device_of", lambda module: torch.device(places[getattr(module, "layer_idx", 0)]))
    loaded = SinkCache.load(tmp_path / "cache", model=model)
    assert [layer.keys.device.type for layer in loaded.layers] == ["cpu", "meta"]


def test_a_loaded_cache_does_not_need_its_file(tmp_path):
    model, stream, path = llama(), tokens(STREAM), tmp_path / "cache"
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream, [20])
    loaded = by_file(cache, model, path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(feed(model, loaded, stream, AFTER), feed(model, cache, stream, AFTER))


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CacheFileError, match=r"nowhere.cache could not be written"):
        SinkCache(W, S, model=llama()).save(tmp_path / "nowhere" / "cache")


@pytest.mark.parametrize("holds", [[], ["file"]], ids=["empty", "not empty"])
def test_a_directory_is_no_file(saved, tmp_path, holds):
    _, model = saved
    target = tmp_path / "directory"
    target.mkdir()
    for name in holds:
        (target / name).write_text("")
    refuses(target, model, r"directory could not be read: it is a directory\. Give the path of a file")
    with pytest.raises(CacheFileError, match=r"directory could not be written: it is a directory\. Give the path of a"):
        SinkCache(W, S, model=model).save(target)
    assert sorted(path.name for path in target.iterdir()) == holds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "directory"]


def test_a_file_is_no_directory(saved):
    path, model = saved
    with pytest.raises(CacheFileError, match=r"could not be written: .* Give the path of a file in a directory"):
        SinkCache(W, S, model=model).save(path / "below")
    assert SinkCache.load(path, model=model).get_seq_length() == 20


def test_only_a_sound_cache_between_forwards_is_saved(tmp_path):
    model, path = copy.deepcopy(llama()), tmp_path / "cache"
    with pytest.raises(sink_patch.UnboundCacheError, match="cannot be saved: it has no model"):
        SinkCache(W, S).save(path)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(STREAM), [20])
    errors = []

    def keep(*_):
        for act in (lambda: cache.save(path), cache.clone, lambda: copy.deepcopy([cache])):
            with pytest.raises(CacheStateError, match=r"cannot be (saved|copied) in the middle of a forward") as caught:
                act()
            errors.append(caught.value)

    handle = model.model.layers[1].register_forward_pre_hook(keep)
    feed(model, cache, tokens(STREAM), [1])
    assert len(errors) == 3
    handle.remove()

    def fail(*_):
        raise MemoryError

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        feed(model, cache, tokens(STREAM), [4])
    handle.remove()
    with pytest.raises(CacheStateError, match=r"cannot be saved\. A forward .* failed half-way.*reset"):
        cache.save(path)
    cache.reset()
    cache.save(path)


def test_a_cache_whose_model_is_gone_is_not_saved(tmp_path):
    model = copy.deepcopy(llama())
    cache = SinkCache(W, S, model=model)
    del model
    gc.collect()
    with pytest.raises(CacheStateError, match="its model is gone"):
        cache.save(tmp_path / "cache")


@pytest.mark.parametrize("value", [torch.Generator(), 1])
def test_what_it_does_not_know_in_a_layer_is_not_saved(tmp_path, value):
    """It would not be loaded either."""
    model = zoo.build("lfm2")
    cache = SinkCache(W, S, model=model)
    cache.layers[0].ready = value
    with pytest.raises(CacheStateError, match=rf"layers\.0\.ready is a {type(value).__name__}"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A file, and the model of its cache without any hooks."""
    model = without_hooks(llama())
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(STREAM), [20])
    cache.save(tmp_path / "cache")
    return tmp_path / "cache", without_hooks(model)


def refuses(path, model, match):
    with pytest.raises(CacheFileError, match=match) as caught:
        SinkCache.load(path, model=model)
    assert hooks(model) == 0
    return str(caught.value)


def test_a_file_that_is_none_of_ours_is_refused(saved):
    path, model = saved
    save_file({"weight": torch.zeros(2)}, path)
    refuses(path, model, r"holds no SinkCache\. Load a file")
    for content in (b"", b"hello", b"hello, I am a longer text than that"):
        path.write_bytes(content)
        refuses(path, model, "holds no SinkCache, or has been cut short")
    with pytest.raises(FileNotFoundError):
        SinkCache.load(path.with_name("nowhere"), model=model)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(saved, part):
    path, model = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refuses(path, model, "cut short")


def test_another_format_is_refused(saved):
    path, model = saved
    rewrite(path, format=storage.FORMAT + 1, sink_patch="9.9")
    refuses(path, model, r"is of format 2, written by sink_patch 9\.9; .* reads format 1")


@pytest.mark.parametrize("what", ["Row", "LayerKind", "Ring"])
def test_a_file_of_a_sink_patch_that_holds_other_things_is_refused(saved, what):
    path, model = saved
    header = header_of(path)
    place = {"Row": header["rows"][0], "LayerKind": header["layers"][1]["kind"]}.get(what)
    if place is None:
        header["layers"][1]["keys"]["dict"].append(["news", 1])
    else:
        place["news"] = 1
    rewrite(path, **header)
    found = {"Ring": r"Expected `array` of length 2.* - at `\$\.layers\[1\]\.keys\.dict`"}
    refuses(path, model, rf"cannot read its header: {found.get(what, 'Object contains unknown field `news`')}")


OTHERS = {
    "class": (lambda: llama().model, r"same: class \(LlamaForCausalLM then, LlamaModel now\), weights"),
    "model_type": (lambda: tiny("qwen3", layers=2, **SHORT_CONTEXT), r"model_type \(llama then, qwen3 now\)"),
    "positions": (
        lambda: llama(max_position_embeddings=64),
        r"same: positions \(\[32, None\] then, \[64, None\] now\)\.",
    ),
    "layers": (lambda: tiny("llama", layers=3, **SHORT_CONTEXT), r"number of layers \(2 then, 3 now\)"),
    "weights": (lambda: llama(seed=1), r"same: weights\."),
    "dtype": (lambda: copy.deepcopy(llama()).bfloat16(), r"rotations, weights"),
}


@pytest.mark.parametrize(("make", "difference"), OTHERS.values(), ids=OTHERS)
def test_another_model_is_refused_with_what_differs(saved, make, difference):
    refuses(saved[0], without_hooks(make()), rf"cache was saved with another model .*not the {difference}|{difference}")


def test_one_layer_of_other_weights_is_another_model(saved):
    path, model = saved
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    refuses(path, model, r"same: weights\.")


def test_other_weights_in_buffers_are_another_model(tmp_path):
    """Quantised ones are packed into buffers, with their scales beside them (GPTQ, AWQ, BitNet)."""
    model = without_hooks(llama())
    packed = model.model.layers[0].mlp
    packed.register_buffer("qweight", torch.arange(64, dtype=torch.int32).reshape(8, 8))
    packed.register_buffer("scales", torch.ones(8))
    SinkCache(W, S, model=model).save(tmp_path / "cache")
    assert SinkCache.load(tmp_path / "cache", model=without_hooks(model)).get_seq_length() == 0
    for buffer in (packed.qweight, packed.scales):
        buffer[3] += 1
        refuses(tmp_path / "cache", without_hooks(model), r"same: weights\.")
        buffer[3] -= 1
    packed.register_buffer("made_here", torch.ones(2), persistent=False)  # not a weight
    assert SinkCache.load(tmp_path / "cache", model=without_hooks(model)).get_seq_length() == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
def test_another_adapter_is_another_model(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(llama()), config)
    adapted.add_adapter("other", config)
    SinkCache(W, S, model=adapted.get_base_model()).save(tmp_path / "cache")

    def model():
        return without_hooks(adapted.get_base_model())

    assert SinkCache.load(tmp_path / "cache", model=model()).get_seq_length() == 0
    with adapted.disable_adapter():
        refuses(tmp_path / "cache", model(), r"same: weights\.")
    adapted.set_adapter("other")
    refuses(tmp_path / "cache", model(), r"same: weights\.")


def test_other_rotations_are_another_model(saved):
    path, model = saved
    for buffer in (model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq):
        buffer.mul_(0.9)
    refuses(path, model, r"same: rotations\.")


def test_rotations_may_differ_in_the_last_bit(saved):
    path, model = saved
    for buffer in (model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq):
        buffer.mul_(1 + 1e-7)
    assert SinkCache.load(path, model=model).get_seq_length() == 20


def test_other_sliding_windows_are_another_model(tmp_path):
    model = without_hooks(gemma3_text())
    SinkCache(W, S, model=gemma3_text()).save(tmp_path / "cache")
    model.config.sliding_window = 8
    refuses(tmp_path / "cache", model, r"same: kinds of layers\.")


def test_a_model_that_cannot_stream_is_refused_as_ever(saved):
    with pytest.raises(sink_patch.UnsupportedModelError):
        SinkCache.load(saved[0], model=tiny("opt"))


def test_keys_and_values_go_on_in_another_version_of_transformers(saved):
    path, model = saved
    rewrite(path, transformers="4.99.9")
    assert SinkCache.load(path, model=model).get_seq_length() == 20


@pytest.mark.parametrize("model_type", ["falcon_h1", "lfm2"])
def test_states_do_not_go_on_in_another_version_of_transformers(model_type, tmp_path):
    model = without_hooks(zoo.build(model_type))
    used = copy.deepcopy(model)
    SinkCache(W, S, model=used).save(tmp_path / "cache")
    rewrite(tmp_path / "cache", transformers="4.99.9")
    refuses(tmp_path / "cache", model, r"states of transformers 4\.99\.9, and this is")


def test_a_copy_does_not_copy_the_model(monkeypatch):
    model, stream = llama(), tokens(STREAM)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream, [20])
    monkeypatch.setattr(type(model), "__deepcopy__", lambda *_: pytest.fail("the model was copied"), raising=False)
    cache.owner = held = {"cache": cache, "again": cache}
    twin = copy.deepcopy(held)
    assert twin["cache"] is twin["again"]
    clone = cache.clone()
    assert clone.owner["cache"] is clone
    assert twin["cache"].is_bound_to(model)
    third = copy.copy(cache)
    wanted = feed(model, cache, stream, AFTER)
    assert same(feed(model, twin["cache"], stream, AFTER), wanted)
    assert same(feed(model, third, stream, AFTER), wanted)
    assert SinkCache(W, S).clone().window_length == W  # unbound


def test_a_copy_shares_no_tensor():
    model = llama()
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(STREAM), [20])
    addresses = [
        {tensor.data_ptr() for layer in one.layers for tensor in (layer.keys, layer.values)}
        | {tensor.data_ptr() for tensor in pristine_sinks(one, 0)}
        for one in (cache, cache.clone())
    ]
    assert len(addresses[0]) == 6
    assert not addresses[0] & addresses[1]


@pytest.mark.parametrize("act", [pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())])
def test_a_cache_is_not_pickled(act):
    with pytest.raises(sink_patch.UnpicklableCacheError, match=r"pickled: .* Use cache\.save\(path\)") as caught:
        act(SinkCache(W, S, model=llama()))
    assert isinstance(caught.value, TypeError)


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("take", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch])
def test_a_model_that_has_streamed_can_be_copied_and_pickled(take):
    model, stream = llama(), tokens(STREAM)
    cache = SinkCache(W, S, model=model)
    wanted = feed(model, cache, stream, [20, *AFTER])
    other = take(model)
    with pytest.raises(sink_patch.UnboundCacheError):
        feed(other, cache, stream, [1])
    assert same(feed(other, SinkCache(W, S, model=other), stream, [20, *AFTER]), wanted)
    assert hooks(other) == hooks(model)


def test_an_unpickled_model_may_have_lost_a_hook_to_another(monkeypatch):
    """In a new process torch counts hooks from 0 again, and puts them over those that a model brings."""
    model, stream = copy.deepcopy(llama()), tokens(STREAM)
    SinkCache(W, S, model=model)
    model = pickle.loads(pickle.dumps(model))
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", next(iter(model._forward_hooks)))
    model.register_forward_hook(lambda *_: None)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream, [5, 1])
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("take", [copy.deepcopy, copy.copy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_generation_config_that_asks_for_the_sink_cache_can_be_copied_and_pickled(take):
    asked = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    sizes = {"window_length": W, "num_sink_tokens": S}
    config = take(GenerationConfig(cache_implementation="sink", **sizes, **asked))
    out = llama().generate(tokens(9), generation_config=config)
    assert (out.past_key_values.window_length, out.past_key_values.num_sink_tokens) == (W, S)
