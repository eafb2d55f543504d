"""Calls of a server that break off: no later answer is wrong, and what was whole is still there."""

from __future__ import annotations

import contextlib
import json
import os
import random

import pytest
import torch

from tests.kept.clients import NEW, Client, Messages, Server, written
from tests.kept.lineages import Forwards, Lineages, columns_of, replayed
from tests.kept.server import FAULTS, fault_file
from tests.support import directory
from tests.support.server import needs_server
from tests.support.tiny import VOCAB

TIMES = int(os.environ.get("SINK_PATCH_FAULTS", "36"))  # 201 were seen
TALKS = 3
CLIENT_GONE = "the client is gone"


class Talk:
    """A talk whose calls break off now and then.

    Args:
        client: asks.
        server: is asked.
        lineages: of all talks, which may begin with each other's streams.
        rng: chooses what happens.
    """

    def __init__(self, client: Client, server: Server, lineages: Lineages, rng: random.Random):
        self.client, self.server, self.lineages, self.rng = client, server, lineages, rng
        self.messages: Messages = []
        self.known = 0

    def say(self) -> None:
        """The user's next message."""
        words = self.rng.choices(range(20, VOCAB), k=self.rng.randint(2, 20))
        self.messages.append({"role": "user", "content": " ".join(f"w{word}" for word in words)})

    def answer(self) -> None:
        """Comes for the new tokens alone, and is right."""
        calls = len(self.server.calls())
        answer = self.client.ask(self.messages)
        prompt, text = self._ids(), self._ids(answer)
        (forwards,) = self._new_calls(calls)
        known, ahead = text.shape[1] - 1 - columns_of(forwards), forwards[: len(forwards) - (NEW - 1)]
        assert known >= self.known, "a stream that was whole is lost"
        beginnings = self.lineages.beginnings(prompt, known)
        assert any(torch.equal(replayed(directory.model(), [*one, *ahead], prompt, NEW), text) for one in beginnings)
        self.lineages.add(prompt, known, forwards)
        self.known = text.shape[1] - 1
        self.messages.append({"role": "assistant", "content": answer})

    def break_off(self) -> None:
        """Ask, and something happens in the middle; the message may be another one afterwards."""
        calls, kind = len(self.server.calls()), self.rng.choice([*FAULTS, CLIENT_GONE])
        if kind == CLIENT_GONE:
            self._go_away(self.rng.randint(0, NEW))
        else:
            self._fail(kind, self.rng.randint(1, NEW * directory.model().config.num_hidden_layers))
        for forwards in self._new_calls(calls):
            self._note(forwards)
        if self.rng.random() < 0.5:
            self.messages.pop()
            self.say()

    def _go_away(self, pieces: int) -> None:
        stream = self.client.start(self.messages, 100)
        for _ in range(pieces):
            next(iter(stream))
        stream.close()
        self.server.wait_until_quiet()

    def _fail(self, kind: str, layer: int) -> None:
        from openai import APIError

        file = fault_file(self.server.log)
        file.write_text(json.dumps([kind, layer]))
        with contextlib.suppress(APIError):
            self.client.ask(self.messages)
        assert not file.exists(), "the fault was not reached"

    def _note(self, forwards: Forwards) -> None:
        """A call has read something after the beginning of the prompt: wherever in it that may be."""
        prompt, read = self._ids(), torch.cat(forwards, dim=1)
        for known in range(prompt.shape[1]):
            both = min(prompt.shape[1] - known, read.shape[1])
            if torch.equal(prompt[:, known : known + both], read[:, :both]):
                self.lineages.add(prompt, known, forwards)

    def _new_calls(self, before: int) -> list[Forwards]:
        return [[torch.tensor([ids]) for ids in forwards] for forwards in self.server.calls()[before:]]

    def _ids(self, answer: str = "") -> torch.Tensor:
        """Of the messages and what is answered, [1, tokens]."""
        return directory.tokenizer()(f"{written(self.messages)}{answer}", return_tensors="pt")["input_ids"]


@pytest.mark.slow
@needs_server
def test_after_a_fault_no_answer_is_wrong_and_no_stream_is_lost(server):
    rng, lineages = random.Random(0), Lineages()
    with Client(server, "chat streamed") as client:
        for fault in range(TIMES):
            if fault % (TIMES // 6) == 0:
                talks = [Talk(client, server, lineages, rng) for _ in range(TALKS)]
            talk = rng.choice(talks)
            talk.say()
            talk.break_off()
            talk.answer()
