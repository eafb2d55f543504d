"""Images through the doors of transformers: a pipeline and a server that know only the directory."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import pipeline

from sink_patch import SinkArgumentError, SinkCache, count_sink_tokens
from tests.support.server import needs_server

pytest.importorskip("PIL", reason="needs pillow")
from tests.support.media import TOKEN, directory

SIZES = {"window_length": 28, "num_sink_tokens": 18}  # the image is among the sinks
NEW = 48  # more than the window and the model's context
PICTURE = directory.picture()
TEMPLATE = {"chat_template": directory.TEMPLATE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return directory.write(tmp_path_factory.mktemp("llava"), cache_implementation="sink", **SIZES)


def chat(image: dict) -> list[dict]:
    return [{"role": "user", "content": [image, {"type": "text", "text": "w5 w6"}]}]


def answer(**asked) -> str:
    """The text of `generate`."""
    processor = directory.processor()
    messages = chat({"type": "image", "image": PICTURE})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    made = directory.model().generate(**inputs, do_sample=False, max_new_tokens=NEW, **asked)
    return processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def streamed() -> str:
    text = answer(cache_implementation="sink", **SIZES)
    assert text != answer(), "the text with the default cache must differ, else the test shows nothing"
    return text


def test_a_pipeline_that_knows_only_the_directory_streams(folder, streamed):
    see = pipeline("image-text-to-text", model=str(folder))
    asked = {"max_new_tokens": NEW, "do_sample": False}
    (made,) = see(text=chat({"type": "image", "image": PICTURE}), generate_kwargs=asked, return_full_text=False)
    assert made["generated_text"].strip() == streamed


def test_the_tokens_of_an_image_in_the_instructions_are_counted_by_the_processor():
    """The words around it are w1, w7 and w2."""
    processor, image = directory.processor(), {"type": "image", "image": PICTURE}
    system = {"role": "system", "content": [image, {"type": "text", "text": "w7"}]}
    user = {"role": "user", "content": [{"type": "text", "text": "w5 w6"}, image]}
    for messages in ([system, user], [system]):
        assert count_sink_tokens(processor, messages) == 1 + 16 + 1 + 1
    assert count_sink_tokens(processor, [{**system, "content": [image, *system["content"]]}, user]) == 35
    assert count_sink_tokens(processor, [{**system, "content": system["content"][1:]}, user]) == 3
    assert count_sink_tokens(processor, [user]) == count_sink_tokens(processor.tokenizer, [user], **TEMPLATE) == 1
    with pytest.raises(SinkArgumentError, match="Pass the processor instead of its tokenizer"):
        count_sink_tokens(processor.tokenizer, [system, user], **TEMPLATE)


def test_an_image_in_the_instructions_is_among_the_sinks_of_a_call():
    processor, image = directory.processor(), {"type": "image", "image": PICTURE}
    system = {"role": "system", "content": [image, {"type": "text", "text": "w7"}]}
    user = {"role": "user", "content": [{"type": "text", "text": "w5 w6"}]}
    inputs = processor.apply_chat_template([system, user], tokenize=True, return_dict=True, return_tensors="pt")
    starts = {"turn_start": [[1]], "system_start": [[1, TOKEN]]}
    asked = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    sizes = {"cache_implementation": "sink", "window_length": 28, "num_sink_tokens": "system"}
    out = directory.model().generate(**inputs, **asked, **sizes, **starts)
    (cache,) = (value for value in out.values() if isinstance(value, SinkCache))
    assert cache.num_sink_tokens == count_sink_tokens(processor, [system, user])


@needs_server
def test_a_server_that_knows_only_the_directory_streams(folder, streamed):
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=str(folder), device="cpu", port=port, non_blocking=True)
    try:
        end = time.monotonic() + 60
        while not server.server.started:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.05)
        messages = chat({"type": "image_url", "image_url": {"url": directory.url(PICTURE)}})
        data = json.dumps({"messages": messages, "max_tokens": NEW}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", data, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            body = json.loads(reply.read())
    finally:
        server.kill_server()
    assert body["choices"][0]["message"]["content"].strip() == streamed
