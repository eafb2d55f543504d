"""Whole messages leave a full window: a forward sees the sinks, and all from a floor on that begins a message."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import sink_patch
from sink_patch import CacheFileError, CacheStateError, SinkArgumentError, SinkCache
from sink_patch.errors import SinkPatchWarning
from sink_patch.history import leaving
from sink_patch.models.examine import examine as model_facts
from tests.support.chats import ROLE, TURN_START, Window, chat
from tests.support.naive import NaiveCache
from tests.support.oracle import relative_error
from tests.support.replay import cache_name
from tests.support.tiny import FAMILIES, tiny, tokens, variants

TOLERANCE = 1e-5
W, S = 24, 4
CONTEXT = 48  # short, so that the clock is set back in each stream; families with a table of angles keep their own
LOCAL = 7
MIXED = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"layers": 3}),
    "gptj": ("gptj", {"layers": 2, "n_positions": CONTEXT, "n_ctx": CONTEXT}),
    "gemma3, two thetas": ("gemma3_text", {"layers": 2, "layer_types": MIXED, "sliding_window": LOCAL}),
    "gemma3, long local": ("gemma3_text", {"layers": 2, "layer_types": MIXED, "sliding_window": W - 2}),
    "cohere2": ("cohere2", {"layers": 2, "layer_types": MIXED, "sliding_window": LOCAL}),
}
LETTERS = [ROLE, *range(10, 19), ROLE, *range(20, 31)]
"""Two messages, of 10 and 12 tokens."""
CASES = [(model_type, name, config) for model_type in FAMILIES for name, config in variants(model_type)]


def turns_cache(model: PreTrainedModel, window: int, sinks: int) -> SinkCache:
    return SinkCache(window, sinks, evict="turns", turn_start=TURN_START, model=model)


def schedule(seed: int, length: int, window: int, sinks: int, *, one_by_one: bool = False) -> list[int]:
    """A prompt, mostly single tokens, and pieces shorter and longer than the ring."""
    rng = random.Random(seed)
    steps = [rng.choice([1, 3, window, window + rng.randint(1, 9)])]
    while sum(steps) < length:
        some = rng.choice([1, 1, 1, 1, 2, 3, window - sinks, rng.randint(1, window + 5)])
        steps.append(1 if one_by_one else min(some, length - sum(steps)))
    return steps


@torch.no_grad()
def worst_error(
    model: PreTrainedModel, window: Window, steps: list[int], *, local: int | None = None, cache: Any = None
) -> float:
    """Largest relative error of the last logits of any forward, by the one-layer oracle.

    Args:
        window: tells what is seen.
        local: the layer's own sliding window, if it is shorter than the cache's: then it has no sinks.
    """
    cache = cache or turns_cache(model, window.window_length, window.num_sink_tokens)
    worst, seen, text = 0.0, cache.get_seq_length(), torch.tensor([window.text])
    for new in steps:
        found = model(text[:, seen : seen + new], **{cache_name(model): cache}).logits[:, -1]
        visible = window.visible(seen, new)
        seen += new
        if local is not None:
            visible = list(range(max(0, seen - local), seen))
        worst = max(worst, relative_error(found, model(text[:, visible], use_cache=False).logits[:, -1]))
    return worst


@pytest.mark.parametrize(("model_type", "name", "config"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_each_family_sees_whole_messages_alone(model_type, name, config):
    context = {} if "n_positions" in FAMILIES[model_type] else {"max_position_embeddings": CONTEXT}
    model = tiny(model_type, attention="sdpa" if model_type == "llama" else "eager", **context, **config)
    one_by_one = sink_patch.families()[model_type].whole_prompts  # with the installed transformers
    for seed, (window, sinks, longest) in enumerate([(14, 3, 7), (9, 0, 12)]):
        steps = schedule(seed, 6 * window, window, sinks, one_by_one=one_by_one)
        seen = Window(chat(seed, sum(steps), longest=longest), window, sinks)
        assert worst_error(model, seen, steps, local=LOCAL if "short" in name else None) <= TOLERANCE, window
        assert seen.floor > 0


def test_falcon_with_alibi():
    steps = schedule(3, 80, 14, 3)
    seen = Window(chat(3, sum(steps), longest=7), 14, 3)
    assert worst_error(tiny("falcon", alibi=True), seen, steps) <= TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "cohere", "mistral"])
def test_no_random_chat_is_a_counterexample(model_type):
    config = {"sliding_window": LOCAL} if model_type == "mistral" else {}
    for seed in range(15):
        rng = random.Random(seed)
        window, context = rng.randint(2, 30), rng.choice([4, 64, 192])
        sinks = rng.randint(0, window - 1)
        model = tiny(model_type, attention="sdpa", max_position_embeddings=context, **config)
        steps = schedule(seed, rng.randint(2, 5) * window, window, sinks)
        seen = Window(chat(seed, sum(steps), longest=rng.choice([1, window // 2, 2 * window])), window, sinks)
        local = LOCAL if model_type == "mistral" and window > LOCAL else None
        assert worst_error(model, seen, steps, local=local) <= TOLERANCE, seed


def test_the_window_never_begins_inside_a_message_that_fits():
    runs = TURN_START[:2]  # one token ahead is known; a run of three may be known too late
    for seed in range(6):
        seen = Window(chat(seed, 400, longest=W - S - 3, runs=runs), W, S, runs=runs)
        assert worst_error(tiny("llama"), seen, [5, *[1] * 100]) <= TOLERANCE
        assert (seen.floor, seen.begins_inside) == (max(seen.floor, 80), []), seed


@torch.no_grad()
def test_a_message_longer_than_the_window_loses_single_tokens_until_the_next_one_begins():
    model, text = tiny("llama"), [ROLE, 5, 6, 7, ROLE, *range(10, 60), ROLE, *range(30, 40), ROLE, *range(50, 60)]
    seen = Window(text, W, S)
    assert worst_error(model, seen, [4, *[1] * 60]) <= TOLERANCE
    assert seen.floor == text.index(ROLE, 5)
    assert len(seen.begins_inside) == 55 - W  # until the long one has left


@torch.no_grad()
def test_only_new_ids_are_looked_at_while_single_tokens_leave(monkeypatch):
    looked_at = []

    def first_beginning(ids, runs, within):
        looked_at.append(len(within))
        return found(ids, runs, within)

    found = leaving.first_beginning
    monkeypatch.setattr(leaving, "first_beginning", first_beginning)
    seen = Window([ROLE, *[5] * 100, ROLE], W, S)
    assert worst_error(tiny("llama"), seen, [W, *[1] * 40]) <= TOLERANCE
    assert max(looked_at[3:]) <= 4  # the longest run has three ids


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_many_layers_equal_the_naive_cache_with_the_same_floors(name):
    """Rows of different lengths; pieces by rule 3, and of a model without sliding windows by rule 4."""
    model_type, settings = MODELS[name]
    model = tiny(model_type, max_position_embeddings=CONTEXT, **settings)
    local = settings.get("sliding_window", 0)
    for seed, padding in enumerate([(0,), (11, 2)]):
        rng, steps = random.Random(seed), [13]
        while sum(steps) < 6 * W:
            chunk = rng.randint(2, local or W + 5)
            steps.append(chunk if rng.random() < 0.1 else 1)
        texts = [chat(10 * seed + row, sum(steps) - count, longest=W - 8) for row, count in enumerate(padding)]
        windows = [Window(text, W, S, local=local - 1 if len(padding) > 1 else 0) for text in texts]
        cache, naive = turns_cache(model, W, S), [NaiveCache(model, W, S) for _ in texts]
        ids = torch.tensor([[0] * count + text for count, text in zip(padding, texts, strict=True)])
        mask = torch.stack([torch.arange(sum(steps)) >= count for count in padding]).long()
        fed = 0
        for columns in steps:
            inputs = {"input_ids": ids[:, fed : fed + columns], "attention_mask": mask[:, : fed + columns]}
            found = model(**inputs, past_key_values=cache).logits.double()
            fed += columns
            for row, (one, window, count) in enumerate(zip(naive, windows, padding, strict=True)):
                window.visible(one.seen, fed - count - one.seen)
                one.floor = window.floor
                wanted = one.forward(torch.tensor([window.text[one.seen : fed - count]]))[0]
                assert relative_error(found[row, -wanted.shape[0] :], wanted) <= TOLERANCE, (seed, fed, row)
        if len(padding) == 1 or local < W // 2:  # else a batch keeps so much for its sliding windows
            assert all(window.floor > 4 * W for window in windows)


@torch.no_grad()
def test_a_stream_goes_on_in_a_copy_and_in_a_file(tmp_path):
    model, text = tiny("llama", max_position_embeddings=CONTEXT), chat(0, 300, longest=12)
    steps, file = schedule(0, 100, W, S), tmp_path / "cache.safetensors"
    for stop in range(5, len(steps), 7):
        seen, cache = Window(text, W, S), turns_cache(model, W, S)
        assert worst_error(model, seen, steps[:stop], cache=cache) <= TOLERANCE
        cache.save(file)
        loaded, clone, rest = SinkCache.load(file, model=model), cache.clone(), steps[stop:]
        assert (loaded.evict, loaded.turn_start) == ("turns", TURN_START)
        for one in (loaded, clone, cache):
            assert worst_error(model, replace(seen), rest, cache=one) <= TOLERANCE
        assert loaded.nbytes == cache.nbytes


@torch.no_grad()
def test_rows_that_change_places_keep_their_floors():
    model, steps = tiny("llama", max_position_embeddings=CONTEXT), 90
    windows = [Window(chat(seed, steps, longest=W - 6), W, S) for seed in range(3)]
    cache, rng = turns_cache(model, W, S), random.Random(0)
    for at in range(steps):
        ids = torch.tensor([[window.text[at]] for window in windows])
        found = model(ids, past_key_values=cache).logits[:, -1]
        for row, window in enumerate(windows):
            visible = torch.tensor([window.text])[:, window.visible(at, 1)]
            assert relative_error(found[row], model(visible, use_cache=False).logits[0, -1]) <= TOLERANCE
        if at % 5 == 4:
            places = [rng.randrange(3) for _ in range(3)]
            cache.reorder_cache(torch.tensor(places))
            texts = [chat(at + row, steps, longest=W - 6) for row in range(3)]
            windows = [
                replace(windows[place], text=windows[place].text[: at + 1] + text[at + 1 :])
                for place, text in zip(places, texts, strict=True)
            ]
    assert cache.get_seq_length() == steps


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "falcon", "mistral"])
@pytest.mark.parametrize("margin", [0, 6])
def test_tokens_are_taken_back_as_far_as_the_message_behind_the_sinks(model_type, margin):
    config = {"falcon": {"alibi": True}, "mistral": {"sliding_window": LOCAL}}.get(model_type, {})
    model = tiny(model_type, max_position_embeddings=CONTEXT, **config)
    for seed in range(3):
        rng, text, cache = random.Random(seed), chat(seed, 1000, longest=W - 8), turns_cache(model, W, S)
        cache.activate_past_recording(margin)
        seen, read, fed, low = Window([], W, S), 0, 0, 1
        for number in range(50):
            columns = rng.choice([1, 1, 2, 4, 6, W + 3]) if number else 7
            seen.text, read = seen.text[:fed] + text[read : read + columns], read + columns
            seen.margin = max(margin, columns)
            low = max(low, fed + columns - seen.margin)
            found = model(torch.tensor([seen.text[fed:]]), past_key_values=cache).logits[:, -1]
            visible = seen.visible(fed, columns)
            fed += columns
            visible = seen.text[max(0, fed - LOCAL) :] if model_type == "mistral" else [seen.text[i] for i in visible]
            wanted = model(torch.tensor([visible]), use_cache=False).logits[:, -1]
            assert relative_error(found, wanted) <= TOLERANCE, (seed, number)
            back = rng.randint(0, fed - low)
            if back:
                cache.crop(-back)
                fed -= back
        assert seen.floor > 2 * W


@torch.no_grad()
def test_a_message_that_has_left_does_not_come_back():
    model, text = tiny("llama"), chat(0, 100, longest=W - 8)
    cache, seen = turns_cache(model, W, S), Window(text, W, S)
    fed = next(at for at in range(1, 100) if worst_error(model, seen, [1], cache=cache) <= TOLERANCE and seen.floor)
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-(fed + 1 - seen.floor))
    assert cache.get_seq_length() == fed
    cache.crop(-(fed - seen.floor))  # the sinks alone are left
    assert worst_error(model, seen, [1] * 20, cache=cache) <= TOLERANCE


@torch.no_grad()
def test_what_was_overwritten_before_a_message_left_is_no_longer_missed():
    model, cache = tiny("llama"), turns_cache(tiny("llama"), W, S)
    seen = Window([ROLE, *[5] * 40, ROLE, *range(10, 20), ROLE, *range(20, 60)], W, S)
    assert worst_error(model, seen, [1] * 40, cache=cache) <= TOLERANCE
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-1)  # single tokens have left
    assert worst_error(model, seen, [1] * 18, cache=cache) <= TOLERANCE
    assert seen.floor == 41
    cache.crop(-5)
    seen.text = seen.text[:53] + [7] * 40
    assert worst_error(model, seen, [1] * 10, cache=cache) <= TOLERANCE


@torch.no_grad()
def test_what_sliding_windows_have_lost_is_missed_all_the_same():
    """Their own window moves on with each token; here it is nearly as long as the cache's."""
    model = tiny("gemma3_text", layers=2, layer_types=MIXED, sliding_window=W - 2)
    pieces = [[20, 6]] if model_facts(model).one_by_one is None else []
    for steps in (*pieces, [1] * 30):
        cache = turns_cache(model, W, S)
        for at, new in zip([sum(steps[:number]) for number in range(len(steps))], steps, strict=True):
            model(torch.tensor([(LETTERS * 2)[at : at + new]]), past_key_values=cache)
        with pytest.raises(CacheStateError, match="is gone"):
            cache.crop(-1)


@torch.no_grad()
def test_a_message_that_begins_where_tokens_were_taken_back_is_found():
    model, cache = tiny("llama"), turns_cache(tiny("llama"), W, S)
    cache.activate_past_recording(8)
    seen = Window([ROLE, *[5] * 40], W, S, margin=8)
    assert worst_error(model, seen, [1] * 35, cache=cache) <= TOLERANCE
    cache.crop(-5)
    seen.text = [*seen.text[:30], ROLE, *range(10, 40)]
    assert worst_error(model, seen, [1] * 20, cache=cache) <= TOLERANCE
    assert seen.floor == 30


@torch.no_grad()
def test_a_buffer_that_never_grew_to_the_whole_window_is_saved(tmp_path):
    model, cache = tiny("llama"), turns_cache(tiny("llama"), W, S)
    seen = Window(LETTERS * 3, W, S)
    assert worst_error(model, seen, [20, 6], cache=cache) <= TOLERANCE
    assert (seen.floor, cache.layers[0].keys.shape[2]) == (10, 20)
    cache.save(tmp_path / "cache")
    loaded = SinkCache.load(tmp_path / "cache", model=model)
    assert worst_error(model, seen, [1] * 30, cache=loaded) <= TOLERANCE


WRONG = {
    "more has left than was read": lambda header: header["rows"][0].update(dropped=50),
    "messages have left, and single tokens leave": lambda header: header.pop("evict"),
    "no ids": lambda header: header.update(turn_start=[]),
    "no history": lambda header: header.pop("history"),
}


@torch.no_grad()
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_file_that_contradicts_itself_is_refused(change, tmp_path):
    model, cache = tiny("llama"), turns_cache(tiny("llama"), W, S)
    assert worst_error(model, Window(LETTERS * 3, W, S), [20, 6], cache=cache) <= TOLERANCE
    cache.save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["sink_patch"])
    assert header["rows"][0]["dropped"] == 6
    change(header)
    if "history" not in header:
        del tensors["history.0"]
    save_file(tensors, tmp_path / "cache", {"sink_patch": json.dumps(header)})
    with pytest.raises(CacheFileError):
        SinkCache.load(tmp_path / "cache", model=model)


@torch.no_grad()
def test_a_model_that_takes_tokens_one_by_one_is_given_no_piece_when_a_message_has_left():
    """Its sliding window still sees as much as before."""
    model = tiny("gemma3_text", layers=2, layer_types=MIXED, sliding_window=LOCAL)
    if model_facts(model).one_by_one is None:
        pytest.skip("it takes pieces")
    cache, text = turns_cache(model, W, S), LETTERS * 3
    for at in range(25):
        model(torch.tensor([text[at : at + 1]]), past_key_values=cache)
    with pytest.raises(CacheStateError, match="one by one"):
        model(torch.tensor([text[25:27]]), past_key_values=cache)


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_cache_whole():
    model = tiny("llama", layers=2, max_position_embeddings=CONTEXT)
    text, cache = chat(0, 100, longest=W - 8), turns_cache(model, W, S)
    plain = turns_cache(model, W, S)
    for at in range(90):
        ids = torch.tensor([text[at : at + 1]])
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
        handle.remove()
        found, wanted = (model(ids, past_key_values=one).logits for one in (cache, plain))
        assert relative_error(found, wanted) <= 1e-6, at


@torch.no_grad()
def test_after_a_long_forward_failed_a_short_one_keeps_what_it_has_room_for():
    model, text = tiny("llama"), [*LETTERS[:22], *[5] * 40]
    cache, seen = turns_cache(model, W, S), Window(text, W, S)
    assert worst_error(model, seen, [22], cache=cache) <= TOLERANCE
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.tensor([text[22:37]]), past_key_values=cache)  # for which the message at 10 is too long
    handle.remove()
    assert worst_error(model, seen, [3] * 3, cache=cache) <= TOLERANCE
    assert seen.floor == 10


@torch.no_grad()
def test_embeddings_are_refused_before_anything_is_computed():
    model = tiny("llama")
    cache, embeds = turns_cache(model, W, S), model.get_input_embeddings()(tokens(5))
    asked = {"cache_implementation": "sink", "evict": "turns", "turn_start": TURN_START, "max_new_tokens": 3}
    for run in (
        lambda: model.base_model(inputs_embeds=embeds, past_key_values=cache),
        lambda: model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=3),
        lambda: model.generate(inputs_embeds=embeds, **asked),
    ):
        with pytest.raises(SinkArgumentError, match="inputs_embeds .*Pass input_ids"):
            run()
    assert cache.get_seq_length() == 0


def test_ids_that_the_model_does_not_have_are_refused():
    model, cache = tiny("llama"), SinkCache(W, S, evict="turns", turn_start=[[5], [400, 3]])
    for bind in (cache.bind, cache.check):
        with pytest.raises(SinkArgumentError, match="Unknown ids: turn_start holds 400.*vocabulary of 97"):
            bind(model)
    with pytest.raises(SinkArgumentError, match="Unknown ids"):
        SinkCache(W, S, evict="turns", turn_start=[97], model=model)


@torch.no_grad()
def test_where_no_message_begins_single_tokens_leave_and_that_is_told_once():
    model, stream = tiny("llama"), tokens(80) % 90
    cache, plain = turns_cache(model, W, S), SinkCache(W, S, model=model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", SinkPatchWarning)
        for token in stream.T:
            found, wanted = (model(token[None], past_key_values=one).logits for one in (cache, plain))
            assert torch.equal(found, wanted)
    (only,) = (one.message for one in told if one.category is SinkPatchWarning)
    assert "turn_start=((96,), (94, 96), (94, 95, 94)) is not in it. Single tokens leave" in str(only)
