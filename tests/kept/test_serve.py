"""`transformers serve` and pipelines, of which none knows of kept streams: a turn costs its new tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import pipeline

import sink_patch
from tests.kept.clients import NEW, Client, Messages, Talk, user, written
from tests.kept.talk import W, counted
from tests.support.server import needs_server

TURNS = 25


def test_a_pipeline_reads_the_new_tokens_of_each_turn(folder):
    generator = pipeline("text-generation", model=str(folder))
    messages: Messages = []
    with counted(generator.model) as forwards:
        known = 0
        for turn in range(TURNS):
            messages.append(user(0, turn))
            prompt = generator.tokenizer.apply_chat_template(messages, tokenize=False)
            length = len(generator.tokenizer(prompt)["input_ids"])
            forwards.clear()
            messages = generator(messages, max_new_tokens=NEW, do_sample=False)[0]["generated_text"]
            assert sum(forwards) - (NEW - 1) == length - known
            known = length + NEW - 1
    assert known > 10 * W
    assert len(sink_patch.kept_streams) == 1


@pytest.mark.slow
@needs_server
@pytest.mark.parametrize(
    "way", ["chat streamed", "chat", "responses streamed", "responses", "completions streamed", "completions"]
)
def test_each_turn_over_http_reads_its_new_tokens_alone(server, folder, way):
    talk, known, number = Talk(), 0, len(way) + 13 * way.count("e")
    for turn in range(TURNS if way == "chat streamed" else 4):
        talk.messages.append(user(number, turn))
        with Client(server, way) as client:
            answer = client.ask(talk.messages)
        length = len(written(talk.messages).split())
        assert talk.check(server, answer) == length - known
        known = length + NEW - 1
        talk.messages.append({"role": "assistant", "content": answer})


@pytest.mark.slow
@needs_server
def test_two_clients_at_once(server, folder):
    def run(number: int) -> list[tuple[Messages, str]]:
        messages, said = [], []
        with Client(server, "chat streamed") as client:
            for turn in range(6):
                messages = [*messages, user(number, turn)]
                said.append((messages, client.ask(messages)))
                messages = [*messages, {"role": "assistant", "content": said[-1][1]}]
        return said

    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(run, (201, 302)))
    for said in both:
        talk, known = Talk(), 0
        for messages, answer in said:
            talk.messages, length = messages, len(written(messages).split())
            assert talk.check(server, answer) == length - known
            known = length + NEW - 1


@pytest.mark.slow
@needs_server
def test_a_client_that_goes_away_leaves_the_stream_whole(server, folder):
    talk = Talk([user(404, 3)])
    with Client(server, "chat streamed") as client:
        answer = client.ask(talk.messages)
    talk.check(server, answer)
    before = list(talk.calls)
    talk.messages += [{"role": "assistant", "content": answer}, user(404, 4)]
    for pieces in (1, 3):
        with Client(server, "chat streamed") as client:
            stream = client.start(talk.messages, 200)
            for _ in range(pieces):
                next(iter(stream))
            stream.close()
        server.wait_until_quiet()
    talk.messages[-1] = user(404, 9)  # the user says something else
    length = len(written(talk.messages).split())
    talk.calls = before
    with Client(server, "chat streamed") as client:
        answer = client.ask(talk.messages)
    assert talk.check(server, answer) == length - (before[-1][0].shape[1] + NEW - 1)
