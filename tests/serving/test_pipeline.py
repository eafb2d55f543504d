"""Callers of `generate`: a pipeline that is told to use the sink cache by generation_config.json alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer

import sink_patch
from tests.support import directory
from tests.support.fresh import fresh

W, S, NEW = 12, 3, 100  # 100 new tokens are more than the window and the model's context (64)
SIZES = {"window_length": W, "num_sink_tokens": S}
FORMS = {"entries": SIZES, "cache_config": {"cache_config": SIZES}}
PROMPT = "w5 w6 w7 w8"
CHAT = [{"role": "system", "content": "w9 w10"}, {"role": "user", "content": "w11 w12 w13"}]


@pytest.fixture(scope="module", params=FORMS)
def folder(request, tmp_path_factory) -> Path:
    """A model directory whose generation_config.json asks for the sink cache, in either form."""
    where = tmp_path_factory.mktemp(request.param)
    return directory.write(where, cache_implementation="sink", **FORMS[request.param])


def answer(prompt: str | list[dict[str, str]], **asked) -> str:
    """The text of `generate` with all arguments passed by hand."""
    tokenizer = directory.tokenizer()
    if isinstance(prompt, list):
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    made = directory.model().generate(**inputs, do_sample=False, max_new_tokens=NEW, **asked)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def streamed(prompt: str | list[dict[str, str]]) -> str:
    text = answer(prompt, cache_implementation="sink", **SIZES)
    assert text != answer(prompt), "the text with the default cache must differ, else the test shows nothing"
    return text


PIPELINE = """
import json, threading
from transformers import TextIteratorStreamer, pipeline
generator = pipeline("text-generation", model={folder!r})
asked = dict(max_new_tokens={new}, do_sample=False)  # until 5.16, a pipeline samples whatever the directory says
used = []
def record_cache(_, __, given):
    cache = given.get("cache", given.get("past_key_values"))
    if getattr(cache, "window_length", None) is not None:  # else the probe runs the model, once
        used.append(cache)
generator.model.register_forward_pre_hook(record_cache, with_kwargs=True)
texts = [
    generator({prompt!r}, **asked, return_full_text=False)[0]["generated_text"],
    generator({chat!r}, **asked)[0]["generated_text"][-1]["content"],
]
streamer = TextIteratorStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
thread = threading.Thread(target=generator, args=({prompt!r},), kwargs=dict(**asked, streamer=streamer))
thread.start()
texts.append("".join(streamer))
thread.join()
caches = list(dict.fromkeys(used))
held = [max(layer.keys.shape[-2] for layer in cache.layers) for cache in caches]
print(json.dumps([texts, list(map(repr, caches)), held]))
"""


def test_a_pipeline_that_knows_only_the_directory_streams(folder):
    code = PIPELINE.format(folder=str(folder), prompt=PROMPT, chat=CHAT, new=NEW)
    texts, caches, held = json.loads(fresh(code).out.splitlines()[-1])
    assert [text.strip() for text in texts] == [streamed(PROMPT), streamed(CHAT), streamed(PROMPT)]
    seen = [4 + NEW - 1, 10 + NEW - 1, 4 + NEW - 1]
    assert len(caches) == 3
    for cache, fed in zip(caches, seen, strict=True):
        assert cache.startswith(f"SinkCache(window_length={W}, num_sink_tokens={S}, ")
        assert cache.endswith(f"seen={fed})")
    assert max(held) == W


def test_without_the_patch_the_directory_is_refused_by_transformers_itself(tmp_path):
    folder = directory.write(tmp_path, cache_implementation="sink")
    fresh(
        f"""
        from transformers import pipeline
        try:
            pipeline("text-generation", model={str(folder)!r})("w5", max_new_tokens=3)
        except Exception as refusal:
            assert "Invalid `cache_implementation` (sink)" in str(refusal), refusal
        else:
            raise AssertionError("it must raise")
        """,
        SINK_PATCH_AUTOLOAD="0",
    )


def test_a_streamer_gets_the_text_piece_by_piece():
    tokenizer = directory.tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    asked = {"do_sample": False, "max_new_tokens": NEW, "cache_implementation": "sink", **SIZES}
    inputs = tokenizer(PROMPT, return_tensors="pt")
    thread = threading.Thread(target=directory.model().generate, kwargs={**inputs, **asked, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len([piece for piece in pieces if piece]) > NEW // 2
    assert "".join(pieces) == streamed(PROMPT)


@pytest.mark.parametrize("form", FORMS)
def test_a_generation_config_keeps_its_entries_in_files(form, tmp_path):
    entries = {"cache_implementation": "sink", **FORMS[form]}
    config = GenerationConfig(**entries)
    config.save_pretrained(tmp_path)
    for kept in (config, GenerationConfig.from_pretrained(tmp_path), GenerationConfig.from_dict(config.to_dict())):
        assert entries.items() <= kept.to_dict().items()
        assert entries.items() <= json.loads(kept.to_json_string()).items()


def test_a_model_keeps_the_entries_after_load_generate_and_save(folder, tmp_path):
    model = directory.model().from_pretrained(folder)
    before = model.generation_config.to_dict()
    made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=NEW, return_dict_in_generate=True)
    assert isinstance(made.past_key_values, sink_patch.SinkCache)
    assert model.generation_config.to_dict() == before, "a stream must not write into the model's config"
    model.save_pretrained(tmp_path)
    entries = {name: value for name, value in read(folder).items() if name != "do_sample"}  # 4.x omits defaults
    assert read(tmp_path).items() >= entries.items()


def read(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def test_cache_config_works_if_transformers_drops_unknown_entries(tmp_path):
    """It drops them from a file with `_from_model_config`, which was made from a model's config."""
    asked = {"cache_implementation": "sink", **FORMS["cache_config"]}
    model = directory.model().from_pretrained(directory.write(tmp_path, _from_model_config=True, **asked))
    made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, return_dict_in_generate=True)
    assert (made.past_key_values.window_length, made.past_key_values.num_sink_tokens) == (W, S)
