"""`transformers serve` and pipelines, of which none knows of kept streams: a turn costs its new tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

import sink_patch
from tests.kept.talk import Replay, S, W, counted
from tests.support import directory
from tests.support.server import TIMEOUT, needs_server, serving

# the prompt of a turn begins with all messages and answers before it
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}w1 {{ message.content }} w2 {% else %}"
    "{{ message.content }} w3 {% endif %}{% endfor %}"
)
TURNS, NEW = 25, 8
SIZES = {"window_length": W, "num_sink_tokens": S, "keep_streams": 8}
Messages = list[dict[str, str]]


def user(talk: int, turn: int) -> dict[str, str]:
    """A message of its own."""
    words = [20 + (7 * talk + 5 * turn + place) % 70 for place in range(2 + (3 * turn + talk) % 19)]
    return {"role": "user", "content": " ".join(f"w{word}" for word in words)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model directory that asks for all of it."""
    where = directory.write(tmp_path_factory.mktemp("model"), cache_implementation="sink", cache_config=SIZES)
    tokenizer = directory.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(where)
    return where


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


@dataclass
class Server:
    """A server on loopback.

    Args:
        url: of it.
        log: what its model has read (tests/kept/server.py).
        model: what it serves.
    """

    url: str
    log: Path
    model: str

    def calls(self) -> list[list[list[int]]]:
        """The ids of the forwards of each call so far."""
        found: list[tuple[int, list[list[int]]]] = []
        for line in self.log.read_text().splitlines():
            cache, ids = json.loads(line)
            if not found or found[-1][0] != cache:
                found.append((cache, []))
            found[-1][1].append(ids)
        return [forwards for _, forwards in found]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    logs = tmp_path_factory.mktemp("server")
    with serving(folder, logs, program=("tests.kept.server", str(logs / "read"))) as url:
        yield Server(url, logs / "read", str(folder))


class Client:
    """One talk with the server over the openai client.

    Args:
        server: asked.
        way: "chat", "responses" or "completions"; with " streamed" behind it, piece by piece.
    """

    def __init__(self, server: Server, way: str):
        from openai import OpenAI

        self._open = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT)
        self._server, (self._way, _, streamed) = server, way.partition(" ")
        self._streamed = bool(streamed)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def ask(self, messages: Messages, new: int = NEW) -> str:
        """The answer."""
        made = self.start(messages, new)
        if self._streamed:
            return "".join(filter(None, map(self.piece, made)))
        if self._way == "responses":
            return made.output_text
        return made.choices[0].text if self._way == "completions" else made.choices[0].message.content

    def start(self, messages: Messages, new: int) -> Any:
        asked = {"model": self._server.model, "stream": self._streamed}
        if self._way == "responses":
            return self._open.responses.create(input=messages, max_output_tokens=new, **asked)
        if self._way == "completions":
            return self._open.completions.create(prompt=written(messages), max_tokens=new, **asked)
        return self._open.chat.completions.create(messages=messages, max_tokens=new, **asked)

    def piece(self, event: Any) -> str | None:
        """The text in a piece of a streamed answer."""
        if self._way == "responses":
            return event.delta if event.type == "response.output_text.delta" else None
        if not event.choices:
            return None
        return event.choices[0].text if self._way == "completions" else event.choices[0].delta.content


def written(messages: Messages) -> str:
    """The prompt of some messages."""
    tokenizer = directory.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer.apply_chat_template(messages, tokenize=False)


@dataclass
class Talk:
    """What one client has said, and how the server has read it."""

    messages: Messages = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._replay = Replay(directory.model())

    def check(self, server: Server, answer: str, new: int = NEW) -> int:
        """The answer to the messages is right; how many tokens of them were read for it."""
        tokenizer = directory.tokenizer()
        prompt = tokenizer(written(self.messages), return_tensors="pt")["input_ids"]
        ids = prompt[0].tolist()
        said = tokenizer(answer)["input_ids"]
        assert len(said) == new
        wanted = [*ids, *said[:-1]]
        for forwards in reversed(server.calls()):  # the one that brought the end of the prompt, and the answer
            read = [token for one in forwards for token in one]
            if read == wanted[len(wanted) - len(read) :]:
                break
        else:
            raise AssertionError("the server has read no such text")
        self.calls = [*self.calls, (prompt, [len(one) for one in forwards])]
        text = self._replay.text(self.calls)
        assert answer == tokenizer.decode(text[0, len(ids) :])
        return len(read) - (new - 1)


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
        _wait_until_quiet(server)
    talk.messages[-1] = user(404, 9)  # the user says something else
    length = len(written(talk.messages).split())
    talk.calls = before
    with Client(server, "chat streamed") as client:
        answer = client.ask(talk.messages)
    assert talk.check(server, answer) == length - (before[-1][0].shape[1] + NEW - 1)


def _wait_until_quiet(server: Server) -> None:
    size = -1
    while size != (size := server.log.stat().st_size):
        time.sleep(0.3)
