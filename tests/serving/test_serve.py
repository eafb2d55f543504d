"""`transformers serve` imports nothing of sink_patch, and uses the sink cache if the directory asks for it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import directory
from tests.support.server import TIMEOUT, needs_server, serving

pytestmark = [pytest.mark.slow, needs_server]
SIZES, OTHER_SIZES = ({"window_length": window, "num_sink_tokens": 3} for window in (12, 20))
MESSAGES, PROMPT = [{"role": "user", "content": "w11 w12"}], "w1 w11 w12 w2 w3"
NEW = 100


@pytest.fixture(scope="module")
def ask(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """A function that posts a chat completion to a server on loopback and returns the body of the answer."""
    folder = directory.write(tmp_path_factory.mktemp("model"), cache_implementation="sink", cache_config=SIZES)
    with serving(folder, tmp_path_factory.mktemp("server")) as server:

        def post(**body: Any) -> str:
            data = json.dumps({"messages": MESSAGES, "max_tokens": NEW, **body}).encode()
            request = urllib.request.Request(
                f"{server}/v1/chat/completions", data, {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return answer.read().decode()

        yield post


def answer(**asked: Any) -> str:
    """The text of `generate`."""
    tokenizer = directory.tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    made = directory.model().generate(**inputs, do_sample=False, max_new_tokens=NEW, **asked)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def streamed(sizes: dict[str, int]) -> str:
    text = answer(cache_implementation="sink", **sizes)
    assert text != answer(), "the text with the default cache must differ, else the test shows nothing"
    return text


def test_a_completion_is_streamed_with_the_sink_cache_of_the_directory(ask):
    completion = json.loads(ask())["choices"][0]
    assert completion["finish_reason"] == "length"
    assert completion["message"]["content"] == streamed(SIZES)


def test_events_are_streamed_with_the_sink_cache_of_the_directory(ask):
    lines = [line.removeprefix("data: ") for line in ask(stream=True).splitlines() if line]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    assert len([delta for delta in deltas if delta]) > NEW // 2
    assert "".join(deltas) == streamed(SIZES)


def test_a_request_may_ask_for_another_window(ask):
    asked = {"cache_implementation": "sink", "cache_config": OTHER_SIZES, "do_sample": False}
    completion = json.loads(ask(generation_config=json.dumps(asked)))["choices"][0]["message"]["content"]
    assert completion == streamed(OTHER_SIZES) != streamed(SIZES)
