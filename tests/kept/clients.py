"""Clients of `transformers serve` with kept streams: what they ask, and how their text is checked."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kept.talk import Replay
from tests.support import directory
from tests.support.server import TIMEOUT

# the prompt of a turn begins with all messages and answers before it
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}w1 {{ message.content }} w2 {% else %}"
    "{{ message.content }} w3 {% endif %}{% endfor %}"
)
NEW = 8
Messages = list[dict[str, str]]


def user(talk: int, turn: int) -> dict[str, str]:
    """A message of its own."""
    words = [20 + (7 * talk + 5 * turn + place) % 70 for place in range(2 + (3 * turn + talk) % 19)]
    return {"role": "user", "content": " ".join(f"w{word}" for word in words)}


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

    def __post_init__(self) -> None:
        self._characters, self._calls = 0, {}

    def calls(self) -> list[list[list[int]]]:
        """The ids of the forwards of each call so far."""
        new = self.log.read_text()[self._characters :]
        self._characters += len(new)
        for line in new.splitlines():
            number, ids = json.loads(line)
            self._calls.setdefault(number, []).append(ids)
        return list(self._calls.values())

    def wait_until_quiet(self) -> None:
        """Until no forward has come to its end for a while."""
        size = -1
        while size != (size := self.log.stat().st_size):
            time.sleep(0.3)


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
