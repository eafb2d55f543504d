"""Chats with images in a pipeline and over `transformers serve`, which know nothing of kept streams."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import pipeline

import sink_patch
from tests.models.test_media import skip_without_later_images
from tests.support.server import needs_server

pytest.importorskip("PIL", reason="needs pillow")
from tests.support.media import directory

# the prompt of a turn ends in a way that no later one repeats: it goes on with a copy from before the answer
SIZES = {"window_length": 200, "num_sink_tokens": 4}
NEW = 6
TURNS = ["image", "text", "image", "text"]


@pytest.fixture(scope="module", autouse=True)
def later_images():
    skip_without_later_images()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return directory.write(tmp_path_factory.mktemp("llava"), cache_implementation="sink", keep_streams=4, **SIZES)


@contextlib.contextmanager
def watched() -> Iterator[dict[str, list[int]]]:
    """Inside, the columns of each forward of a decoder, and how many images its encoder is given."""
    seen: dict[str, list[int]] = {"columns": [], "images": []}

    def look(module, args):
        if type(module).__name__ == "LlamaDecoderLayer" and module.self_attn.layer_idx == 0:
            seen["columns"].append(args[0].shape[1])
        if type(module).__name__ == "CLIPVisionEmbeddings":
            seen["images"].append(len(args[0]))

    hook = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def message(turn: int, kind: str, of_picture) -> dict:
    words = {"type": "text", "text": f"w{20 + turn} w{40 + turn} w{60 + turn}"}
    return {"role": "user", "content": [of_picture(turn), words] if kind == "image" else [words]}


def right(messages: list[dict]) -> tuple[str, int]:
    """The answer of `generate` with the default cache, and how long the prompt is."""
    processor = directory.processor()
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    made = directory.model().generate(**inputs, do_sample=False, max_new_tokens=NEW)
    length = inputs["input_ids"].shape[1]
    return processor.decode(made[0, length:], skip_special_tokens=True), length


def check_talk(ask, of_picture) -> None:
    """Each turn reads its new tokens, the answer and the end of the prompt before; encoders see new images alone."""
    messages, shown, known = [], [], 0
    with watched() as seen:
        for turn, kind in enumerate(TURNS):
            messages.append(message(turn, kind, of_picture))
            shown.append(message(turn, kind, lambda seed: {"type": "image", "image": directory.picture(seed)}))
            wanted, length = right(shown)
            for values in seen.values():
                values.clear()
            answer = ask(messages).strip()
            assert answer == wanted
            assert sum(seen["images"]) == (kind == "image")
            assert turn == 0 or sum(seen["columns"]) - (NEW - 1) == length - known  # in the first one the probe runs
            known = length - 1  # "w3" is not repeated
            for one in (messages, shown):
                one.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    assert len(sink_patch.kept_streams) >= 1


def test_a_pipeline_reads_the_new_tokens_of_each_turn(folder):
    see = pipeline("image-text-to-text", model=str(folder))

    def ask(messages):
        (made,) = see(
            text=messages, generate_kwargs={"max_new_tokens": NEW, "do_sample": False}, return_full_text=False
        )
        return made["generated_text"]

    check_talk(ask, lambda seed: {"type": "image", "image": directory.picture(seed)})


@needs_server
def test_each_turn_over_http_reads_its_new_tokens_alone(folder):
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=str(folder), device="cpu", port=port, non_blocking=True)

    def ask(messages):
        data = json.dumps({"messages": messages, "max_tokens": NEW}).encode()
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())["choices"][0]["message"]["content"]

    try:
        end = time.monotonic() + 60
        while not server.server.started:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.05)
        check_talk(
            ask, lambda seed: {"type": "image_url", "image_url": {"url": directory.url(directory.picture(seed))}}
        )
    finally:
        server.kill_server()
