"""The system message stays (`num_sink_tokens="system"`), and whole messages leave, in calls of `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sink_patch import SinkArgumentError, SinkCache
from sink_patch.arguments import Settings
from sink_patch.generation.inputs import system
from tests.support.chats import ROLE, SYSTEM, Window, chat
from tests.support.modules import no_module_runs
from tests.support.oracle import relative_error
from tests.support.tiny import tiny, tokens

TOLERANCE = 1e-5
W = 24
BOS = 1
SINK: dict[str, Any] = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": "system"}
STARTS = {"turn_start": [[ROLE], [SYSTEM - 1, ROLE]], "system_start": [[ROLE, SYSTEM]]}
ASKED = {**SINK, **STARTS, "do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True}
SYSTEM_MESSAGE = [ROLE, SYSTEM, 5, 6, 7, 8, 9]
REST = [ROLE, 20, 21, 22, ROLE, 30, 31]


@pytest.fixture
def model():
    return tiny("llama", layers=1, max_position_embeddings=48)


def run(model, *rows: list[int], **settings: Any) -> Any:
    """`generate` with rows padded to the left."""
    columns = max(map(len, rows))
    ids = torch.tensor([[0] * (columns - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **{**ASKED, **settings})


@pytest.mark.parametrize(
    ("row", "starts", "sinks"),
    [
        pytest.param(SYSTEM_MESSAGE + REST, {}, 7, id="as in ChatML"),
        pytest.param([BOS, *SYSTEM_MESSAGE, *REST], {}, 8, id="BOS before it"),
        pytest.param([BOS, *SYSTEM_MESSAGE, *REST], {"system_start": [BOS, ROLE, SYSTEM]}, 8, id="BOS in its start"),
        pytest.param([SYSTEM, 5, 6, 7, *REST], {"system_start": [SYSTEM]}, 4, id="a system message begins otherwise"),
        pytest.param(SYSTEM_MESSAGE, {}, 7, id="no second message"),
        pytest.param(REST, {}, 4, id="no system message"),
        pytest.param([2, *SYSTEM_MESSAGE, *REST], {}, 4, id="a system message elsewhere"),
        pytest.param([BOS, *REST], {}, 4, id="BOS and no system message"),
    ],
)
def test_the_sinks_are_all_before_the_second_message(model, row, starts, sinks):
    found = run(model, row, **starts)
    assert found.past_key_values.num_sink_tokens == sinks
    wanted = run(model, row, num_sink_tokens=sinks)
    assert torch.equal(found.sequences, wanted.sequences)


def test_rows_with_system_messages_of_one_length_are_served_and_others_refused(model):
    rows = [SYSTEM_MESSAGE + REST, [*SYSTEM_MESSAGE[:-1], 50, *REST, 40, 41]]
    found = run(model, *rows)
    assert found.past_key_values.num_sink_tokens == 7
    assert torch.equal(found.sequences, run(model, *rows, num_sink_tokens=7).sequences)
    with pytest.raises(SinkArgumentError, match=r"different lengths, in tokens 7, none.*one by one"), no_module_runs():
        run(model, SYSTEM_MESSAGE + REST, REST)


def test_beams_keep_it_too(model):
    found = run(model, SYSTEM_MESSAGE + REST, num_beams=3, num_return_sequences=2)
    wanted = run(model, SYSTEM_MESSAGE + REST, num_beams=3, num_return_sequences=2, num_sink_tokens=7)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.past_key_values.num_sink_tokens == 7


def test_a_system_message_without_room_is_refused_before_anything_is_computed(model):
    run(model, REST)  # the model is proved once
    row = [ROLE, SYSTEM, *[5] * W, *REST]
    match = rf"has {W + 2} tokens.*window_length={W}.*{W + 3} at least"
    with pytest.raises(SinkArgumentError, match=match), no_module_runs():
        run(model, row)
    assert run(model, row, window_length=W + 8).past_key_values.num_sink_tokens == W + 2


def test_a_config_says_it_and_a_later_turn_with_the_cache_goes_on(model):
    config = model.generation_config.__class__(**ASKED, pad_token_id=0)
    first = model.generate(torch.tensor([SYSTEM_MESSAGE + REST]), generation_config=config)
    cache = first.past_key_values
    assert (cache.num_sink_tokens, cache.evict) == (7, "tokens")
    history = torch.cat((first.sequences, torch.tensor([[ROLE, 3, 4]])), dim=1)
    asked = {name: value for name, value in ASKED.items() if name != "cache_implementation"}
    second = model.generate(history, past_key_values=cache, **asked)
    assert second.past_key_values is cache
    assert cache.num_sink_tokens == 7


WRONG = {
    "embeddings": ({"evict": "tokens"}, r"inputs_embeds .*num_sink_tokens='system'.*a number of tokens"),
    "embeddings, turns": ({"num_sink_tokens": 4, "evict": "turns"}, r"inputs_embeds .*evict='turns'.*'tokens'"),
}


@pytest.mark.parametrize(("settings", "match"), WRONG.values(), ids=WRONG)
def test_embeddings_are_refused_before_anything_is_computed(model, settings, match):
    embeds = model.get_input_embeddings()(tokens(5)).detach()
    with pytest.raises(SinkArgumentError, match=match), no_module_runs():
        model.generate(inputs_embeds=embeds, **{**ASKED, **settings})


@pytest.mark.parametrize("name", ["turn_start", "system_start"])
def test_unknown_ids_are_refused_before_anything_is_computed(model, name):
    with pytest.raises(SinkArgumentError, match=f"Unknown ids: {name} holds 97.*vocabulary of 97"), no_module_runs():
        run(model, REST, **{name: [[3], [97]]})


KINDS = {
    "plain": {},
    "in pieces": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 500},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_forward_of_two_turns_sees_the_system_message_and_whole_messages(model, kind, forwards):
    """By the one-layer oracle; drafts that were rejected are taken back."""
    asked = {**KINDS[kind], "evict": "turns", "turn_start": [[token] for token in range(0, 97, 6)], "do_sample": True}
    text = [ROLE, SYSTEM, 5, 7, 8, *chat(0, 40, longest=9)]
    torch.manual_seed(0)
    first = run(model, text, **asked)
    cache = first.past_key_values
    assert (cache.num_sink_tokens, cache.evict) == (5, "turns")
    history = torch.cat((first.sequences, torch.tensor([chat(1, 20, longest=5)])), dim=1)
    more = {name: value for name, value in {**ASKED, **asked}.items() if name != "cache_implementation"}
    model.generate(history, past_key_values=cache, pad_token_id=0, **more)
    runs = [(token,) for token in range(0, 97, 6)]
    window, seen = Window([], W, 5, runs=runs), 0
    for what, logits in forwards:
        if logits is None:
            seen -= what
            continue
        window.text, new = window.text[:seen] + what, len(what)
        visible = window.visible(seen, new)
        seen += new
        with torch.no_grad():
            wanted = model(torch.tensor([[window.text[index] for index in visible]]), use_cache=False).logits[:, -1]
        assert relative_error(logits, wanted) <= TOLERANCE
    assert window.floor > W
    assert cache.get_seq_length() == seen


@pytest.fixture
def forwards(model, monkeypatch):
    """What happens: (ids, last logits) of a forward, or (tokens that are cropped, None)."""
    events, take_back = [], SinkCache._take_back

    def recording(cache, count, asked):
        events.append((int(count), None))
        take_back(cache, count, asked)

    def after(_, args, named, output):
        if named.get("use_cache") is not False:
            events.append((fed.pop(), output.logits[:, -1].clone()))  # sampling writes to it

    fed: list[Any] = []
    monkeypatch.setattr(SinkCache, "_take_back", recording)
    decoder = model.model.register_forward_pre_hook(
        lambda _, args, named: fed.append(named["input_ids"][0].tolist()), with_kwargs=True
    )
    whole = model.register_forward_hook(after, with_kwargs=True)
    yield events
    decoder.remove()
    whole.remove()


def test_an_assistant_keeps_the_system_message_too(model):
    assistant = tiny("llama", max_position_embeddings=48, seed=1)
    caches: dict[int, SinkCache] = {}
    hook = assistant.model.register_forward_pre_hook(
        lambda _, args, named: caches.update({0: named.get("past_key_values") or named.get("cache")}), with_kwargs=True
    )
    # longer than the window, so that a draft that is rejected brings back what has left for it
    row = SYSTEM_MESSAGE + 5 * REST
    found = run(model, row, assistant_model=assistant, evict="turns", eos_token_id=500)
    hook.remove()
    assert (found.past_key_values.num_sink_tokens, found.past_key_values.evict) == (7, "turns")
    assert (caches[0].num_sink_tokens, caches[0].evict, caches[0].window_length) == (7, "tokens", W)


def test_ids_of_its_target_may_mean_nothing_to_an_assistant(model):
    settings = Settings(W, "system", turn_start=[500], system_start=[501])
    system.check_settings(model, settings, GenerationConfig(is_assistant=True), {})
    with pytest.raises(SinkArgumentError, match="Unknown ids"):
        system.check_settings(model, settings, GenerationConfig(), {})
