"""A chat of many turns: however the turns are fed, the answers are those of one uninterrupted stream."""

from __future__ import annotations

import copy
import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TextIteratorStreamer, pipeline

from sink_patch import SinkCache
from tests.support import directory
from tests.support.oracle import relative_error, visible_tokens
from tests.support.tiny import VOCAB, tiny, tokens

W, S = 24, 4
TURNS, WINDOWS = 40, 20
TOLERANCE = 1e-5

# lengths in tokens of the user's message and of the answer in each turn; the first turn is longer than any other, so
# that new tokens alone are always fewer than the tokens seen, and cannot be mistaken for the whole history
_rng = random.Random(0)
TURN_LENGTHS = [(21, 6), *((_rng.randint(1, 12), _rng.randint(1, 11)) for _ in range(TURNS - 1))]
TURN_LENGTHS[10], TURN_LENGTHS[25] = (W - S + 3, 5), (W + 9, 1)  # longer than the ring; longer than the window


def one_layer(context: int) -> PreTrainedModel:
    return tiny("llama", max_position_embeddings=context)


def user_tokens(turn: int) -> torch.Tensor:
    """The message of the user, [1, columns]."""
    return tokens(TURN_LENGTHS[turn][0], seed=turn)


Turn = tuple[torch.Tensor, list[torch.Tensor]]  # the text up to its end [1, columns]; the logits of its answer


@torch.no_grad()
def by_loop(model: PreTrainedModel, cache: SinkCache, text: torch.Tensor, new: int, *, masked: bool) -> Turn:
    """A turn by forwards of the model: all tokens that the cache has not read, and then token by token."""
    logits = []
    for _ in range(new):
        mask = {"attention_mask": torch.ones_like(text)} if masked else {}
        unread = text[:, cache.get_seq_length() :]
        # as `generate` does: the output layer may round differently for one column and for many
        logits.append(model(unread, past_key_values=cache, logits_to_keep=1, **mask).logits[:, -1])
        text = torch.cat((text, logits[-1].argmax(-1, keepdim=True)), dim=1)
    return text, logits


def by_generate(model: PreTrainedModel, cache: SinkCache, text: torch.Tensor, new: int, *, fed: str, mask: str) -> Turn:
    """A turn by `generate`, which gets the whole history or the tokens that the cache has not read, and a mask."""
    seen = cache.get_seq_length()
    ids = text if fed == "history" else text[:, seen:]
    masks = {"none": {}, "whole": {"attention_mask": torch.ones_like(text)}, "own": {"attention_mask": ids * 0 + 1}}
    asked = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, past_key_values=cache, **asked, **masks[mask])
    return torch.cat((text, out.sequences[:, ids.shape[1] :]), dim=1), list(out.logits)


def chat(take_turn: Callable[..., Turn], model: PreTrainedModel) -> list[Turn]:
    cache, text, turns = SinkCache(W, S, model=model), tokens(0), []
    for turn, (_, new) in enumerate(TURN_LENGTHS):
        text, logits = take_turn(model, cache, torch.cat((text, user_tokens(turn)), dim=1), new)
        turns.append((text, logits))
    return turns


@functools.cache
def plain_chat(context: int) -> list[Turn]:
    """By a loop without a mask: the reference for all other ways."""
    return chat(functools.partial(by_loop, masked=False), one_layer(context))


WAYS: dict[str, Callable[..., Turn]] = {
    "a loop with a mask": functools.partial(by_loop, masked=True),
    "the history": functools.partial(by_generate, fed="history", mask="none"),
    "the history and its mask": functools.partial(by_generate, fed="history", mask="whole"),
    "new tokens alone": functools.partial(by_generate, fed="new", mask="none"),
    "new tokens and the mask of all": functools.partial(by_generate, fed="new", mask="whole"),
    "new tokens and their own mask": functools.partial(by_generate, fed="new", mask="own"),
}
CONTEXTS = {"never set back": 4096, "set back": 48}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_each_turn_equals_the_oracle(context):
    model, worst, seen = one_layer(context), 0.0, 0
    turns = plain_chat(context)
    stream = turns[-1][0]
    assert stream.shape[1] > WINDOWS * W - W
    for text, logits in turns:
        start = text.shape[1] - len(logits)  # of the answer
        for place, found in enumerate(logits):
            new = start + place - seen
            with torch.no_grad():
                wanted = model(visible_tokens(stream, seen, new, W, S), use_cache=False).logits[:, -1]
            worst = max(worst, relative_error(found, wanted))
            seen += new
    assert worst <= TOLERANCE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_all_ways_to_feed_turns_give_the_same_logits_bit_for_bit(context, way):
    turns = chat(WAYS[way], one_layer(context))
    for number, ((text, logits), (wanted_text, wanted)) in enumerate(zip(turns, plain_chat(context), strict=True)):
        assert torch.equal(text, wanted_text), number
        assert all(map(torch.equal, logits, wanted)), number


def test_the_ways_may_change_from_turn_to_turn():
    ways = list(WAYS.values())

    def any_way(model: PreTrainedModel, cache: SinkCache, text: torch.Tensor, new: int) -> Turn:
        return random.Random(text.shape[1]).choice(ways)(model, cache, text, new)

    turns = chat(any_way, one_layer(48))
    assert all(torch.equal(text, wanted) for (text, _), (wanted, _) in zip(turns, plain_chat(48), strict=True))


@pytest.mark.parametrize("way", ["the history", "new tokens alone"])
def test_two_answers_continue_copies_of_one_cache(way):
    """Each is independent of the other, also if they run alternately."""
    model, take_turn = tiny("llama", layers=2, max_position_embeddings=48), WAYS[way]
    cache = SinkCache(W, S, model=model)
    text, _ = take_turn(model, cache, tokens(30), 40)
    questions = [torch.cat((text, tokens(9, seed=seed)), dim=1) for seed in (1, 2)]
    copies = [copy.deepcopy(cache) for _ in range(3)]
    wanted = [take_turn(model, one, question, 60) for one, question in zip(copies[:2], questions, strict=True)]
    found = [take_turn(model, one, question, 20) for one, question in zip((cache, copies[2]), questions, strict=True)]
    for _ in range(2):
        more = [take_turn(model, one, text, 20) for one, (text, _) in zip((cache, copies[2]), found, strict=True)]
        found = [(text, [*logits, *new]) for (_, logits), (text, new) in zip(found, more, strict=True)]
    for (text, logits), (wanted_text, wanted_logits) in zip(found, wanted, strict=True):
        assert torch.equal(text, wanted_text)
        assert all(map(torch.equal, logits, wanted_logits))
    assert not torch.equal(wanted[0][0], wanted[1][0])


# The prompt of a turn begins with all messages and answers before it.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}w1 {{ message.content }} w2 {% else %}"
    "{{ message.content }} w3 {% endif %}{% endfor %}"
)


def answers_of_six_turns(answer: Callable[[list[dict[str, str]], torch.Tensor], str]) -> list[str]:
    """The answers of six turns; `answer` gets the chat as messages and as ids [1, columns]."""
    tokenizer, messages, answers = directory.tokenizer(), [], []
    for turn in range(6):
        content = " ".join(f"w{token}" for token in tokens(7, seed=turn)[0].tolist())
        messages.append({"role": "user", "content": content})
        prompt = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
        answers.append(answer(messages, tokenizer(prompt, return_tensors="pt")["input_ids"]).strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


ASKED: dict[str, Any] = {"do_sample": False, "max_new_tokens": 15}


@functools.cache
def expected_answers() -> list[str]:
    """The answers by new tokens alone, in a loop."""
    model, tokenizer, cache = directory.model(), directory.tokenizer(), SinkCache(W, S)
    cache.bind(model)

    def answer(_: Any, ids: torch.Tensor) -> str:
        text, _ = by_loop(model, cache, ids, ASKED["max_new_tokens"], masked=False)
        return tokenizer.decode(text[0, ids.shape[1] :])

    return answers_of_six_turns(answer)


def test_a_streamer_gets_each_turn_of_a_chat():
    model, tokenizer, cache = directory.model(), directory.tokenizer(), SinkCache(W, S)

    def answer(_: Any, ids: torch.Tensor) -> str:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        asked = {"input_ids": ids, "past_key_values": cache, "streamer": streamer, **ASKED}
        thread = threading.Thread(target=model.generate, kwargs=asked)
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert len([piece for piece in pieces if piece]) > 5
        return "".join(pieces)

    assert answers_of_six_turns(answer) == expected_answers()


def test_a_pipeline_continues_a_chat_with_a_cache_that_is_passed():
    tokenizer, cache = directory.tokenizer(), SinkCache(W, S)
    tokenizer.chat_template = TEMPLATE
    generator = pipeline("text-generation", model=directory.model(), tokenizer=tokenizer)

    def answer(messages: list[dict[str, str]], _: Any) -> str:
        chat_with_answer = generator(copy.deepcopy(messages), past_key_values=cache, **ASKED)[0]["generated_text"]
        assert chat_with_answer[:-1] == messages
        return chat_with_answer[-1]["content"]

    assert answers_of_six_turns(answer) == expected_answers()
    assert cache.get_seq_length() == 6 * (7 + 2 + 15) + 5 - 1


def test_the_texts_of_these_tests_depend_on_the_messages():
    """If the tiny model gave the same answer to everything, these tests would show nothing."""
    assert len({tuple(text[0, -3:].tolist()) for text, _ in plain_chat(48)}) > TURNS // 2
    assert len(set(expected_answers())) == 6
    assert all(len(set(text[0].tolist())) > VOCAB // 2 for text, _ in plain_chat(48)[-1:])
