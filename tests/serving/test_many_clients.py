"""`transformers serve --continuous-batching` over a directory that stores the sink cache: many clients at once."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import sink_patch
from sink_patch.compat import installed_shim
from tests.support import directory
from tests.support.chat_program import talk_in_a_terminal
from tests.support.server import TIMEOUT, needs_server, serving

pytestmark = [
    pytest.mark.slow,
    needs_server,
    pytest.mark.skipif(not installed_shim().batching, reason="its paged cache takes no sinks"),
]
SIZES = {"window_length": 12, "num_sink_tokens": 3}
NEW, CLIENTS, TURNS = 40, 8, 3
OPTIONS = ["--continuous-batching", "--cb-num-blocks", "24", "--cb-max-batch-tokens", "64", "--cb-block-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return directory.write(tmp_path_factory.mktemp("model"), cache_implementation="sink", cache_config=SIZES)


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory) -> Iterator[str]:
    with serving(folder, tmp_path_factory.mktemp("server"), options=OPTIONS) as found:
        yield found


def ask(url: str, messages: list[dict[str, str]], **others: Any) -> Any:
    data = json.dumps({"messages": messages, "max_tokens": NEW, **others}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def answer(messages: list[dict[str, str]], **settings: Any) -> str:
    """The text of `generate`."""
    tokenizer, model = directory.tokenizer(), directory.model()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    asked = {"cache_implementation": "sink", **SIZES, **settings}
    made = model.generate(**ids, do_sample=False, max_new_tokens=NEW, **asked)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def talk(url: str, client: int) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"w{10 + client} w{30 + turn} w{50 + client * turn}"})
        with ask(url, messages) as reply:
            (choice,) = json.loads(reply.read())["choices"]
        messages.append({"role": "assistant", "content": choice["message"]["content"]})
    return messages


def test_many_clients_and_one_that_goes_away(url):
    """Each gets the text of `generate`; prompts grow longer than the context, and go in by pieces."""
    gone = ask(url, [{"role": "user", "content": "w7"}], stream=True, max_tokens=3000)
    gone.readline()
    with ThreadPoolExecutor(CLIENTS) as pool:
        talks = pool.map(lambda client: talk(url, client), range(CLIENTS))
        gone.close()
        told = list(talks)
    for messages in told:
        for place in range(1, 2 * TURNS, 2):
            assert messages[place]["content"] == answer(messages[:place])


def test_turns_go_on_in_what_was_kept(tmp_path):
    """Of several clients at once, whose template writes answers anew; texts are those of `generate`, turn by turn."""
    sizes, options = {**SIZES, "keep_streams": 8}, [*OPTIONS, "--cb-num-blocks", "120"]
    folder = directory.write(tmp_path / "model", cache_implementation="sink", cache_config=sizes)
    with serving(folder, tmp_path, options=options) as url, ThreadPoolExecutor(CLIENTS) as pool:
        told = list(pool.map(lambda client: talk(url, client), range(3)))
    others = 0
    for messages in told:
        sink_patch.kept_streams.clear()
        for place in range(1, 2 * TURNS, 2):
            assert messages[place]["content"] == answer(messages[:place], keep_streams=8)
            others += messages[place]["content"] != answer(messages[:place])
    sink_patch.kept_streams.clear()
    assert others > 0, "nothing shows that anything was kept"


def test_a_talk_in_a_terminal(folder, url, tmp_path):
    """`transformers chat` streams, and sends the whole talk each time."""
    messages: list[dict[str, str]] = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"w{20 + turn} w{60 - turn}"})
        messages.append({"role": "assistant", "content": answer(messages)})
    said = [message["content"] for message in messages[::2]]
    assert talk_in_a_terminal(folder, url, said, tmp_path, f"max_new_tokens={NEW}") == messages
