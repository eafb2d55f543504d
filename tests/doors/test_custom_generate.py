"""`custom_generate`: the repository of transformers' old SinkCache is served by us, and others go on as they did."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, pipeline
from transformers.generation import utils

import sink_patch
from sink_patch import SinkArgumentError, SinkCache, SinkPatchError, cli
from sink_patch.doors import custom_generate
from tests.support import directory
from tests.support.fresh import fresh
from tests.support.modules import no_module_runs
from tests.support.tiny import tiny, tokens
from tests.support.tokenizer import tiny_tokenizer

NAME = "transformers-community/sink_cache"
W, S, NEW = 12, 3, 30
SIZES = {"window_length": W, "num_sink_tokens": S}
GIVEN = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
PROMPT = tokens(6)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def asked(*_args, **_kwargs):
        raise AssertionError("the hub was asked")

    names = {"has_file", "cached_file", "get_cached_module_file", "resolve_trust_remote_code"} & set(vars(utils))
    assert names
    for name in names:
        monkeypatch.setattr(utils, name, asked)


@pytest.fixture
def model():
    return directory.model()


def wanted(model, **asked):
    return model.generate(PROMPT, cache_implementation="sink", **{**GIVEN, **SIZES, **asked}).sequences


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
@pytest.mark.parametrize("place", ["inputs", "input_ids", "by place"])
def test_the_name_is_served(model, trust, place):
    inputs = (PROMPT,) if place == "by place" else ()
    named = {} if place == "by place" else {place: PROMPT}
    out = model.generate(*inputs, **named, **GIVEN, **SIZES, custom_generate=NAME, **trust)
    assert repr(out.past_key_values).startswith(f"SinkCache(window_length={W}, num_sink_tokens={S}, ")
    assert torch.equal(out.sequences, wanted(model))
    out = model.generate(*inputs, **named, **GIVEN, custom_generate=NAME, **trust)
    assert (out.past_key_values.window_length, out.past_key_values.num_sink_tokens) == (256, 4)


@pytest.mark.parametrize(
    "more", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3, "eos_token_id": 96}, {"prefill_chunk_size": 2}], ids=str
)
def test_all_else_is_that_of_generate(model, more):
    out = model.generate(PROMPT, **GIVEN, **SIZES, **more, custom_generate=NAME)
    assert torch.equal(out.sequences, wanted(model, **more))


def test_a_cache_goes_on(model):
    def turns(**asked):
        first = model.generate(PROMPT, past_key_values=SinkCache(W, S), **GIVEN, **asked)
        history = torch.cat((first.sequences, tokens(4, seed=1)), dim=1)
        second = model.generate(history, past_key_values=first.past_key_values, **GIVEN, **asked)
        assert second.past_key_values is first.past_key_values
        return second.sequences

    assert torch.equal(turns(custom_generate=NAME), turns())


def test_what_contradicts_it_is_refused(model):
    for more, match in (
        ({"cache_implementation": "static"}, "custom_generate=.*'static'"),
        ({"window_length": 3}, "leaves no room"),
        ({"past_key_values": SinkCache(20), "window_length": 12}, "has window_length=20"),
        ({"use_cache": False}, "use_cache=False"),
    ):
        with no_module_runs(), pytest.raises(SinkArgumentError, match=match):
            model.generate(PROMPT, max_new_tokens=3, custom_generate=NAME, **more)


def test_it_is_said_once(model, caplog, monkeypatch):
    monkeypatch.setattr(custom_generate, "_has_told", False)
    with caplog.at_level(logging.INFO, logger="sink_patch"):
        for _ in range(2):
            model.generate(PROMPT, max_new_tokens=2, do_sample=False, custom_generate=NAME)
    (record,) = [record for record in caplog.records if record.name == "sink_patch"]
    assert record.levelname == "INFO"
    assert NAME in record.getMessage()


@pytest.mark.parametrize("when", ["made", "called"])
def test_a_pipeline_passes_it_on(model, when):
    asked = {**SIZES, "custom_generate": NAME}
    made, called = (asked, {}) if when == "made" else ({}, asked)
    generator = pipeline("text-generation", model=model, tokenizer=directory.tokenizer(), **made)
    text = generator("w5 w6 w7", max_new_tokens=NEW, do_sample=False, return_full_text=False, **called)
    ids = torch.tensor([[5, 6, 7]])
    right = model.generate(ids, max_new_tokens=NEW, do_sample=False, cache_implementation="sink", **SIZES)[0, 3:]
    assert text[0]["generated_text"].split() == [f"w{token}" for token in right.tolist()]


def test_a_model_that_was_loaded_from_there(model):
    """Its `generate` is then a partial of what is loaded."""
    held = custom_generate.generate
    partial = functools.partial(held, model=model)
    assert torch.equal(partial(PROMPT, **GIVEN, **SIZES).sequences, wanted(model))


README = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", device_map="auto")
messages = [{"role": "user", "content": "Tell me a story about a cat."}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
model_inputs = tokenizer([text], return_tensors="pt").to(model.device)

for sizes in ({}, {"window_length": 50}):
    gen_out = model.generate(
        **model_inputs,
        do_sample=False,
        max_new_tokens=100,
        return_dict_in_generate=True,
        custom_generate="transformers-community/sink_cache",
        trust_remote_code=True,
        **sizes,
    )
    print(tokenizer.batch_decode(gen_out.sequences, skip_special_tokens=True))
    assert "sinkcache" in str(type(gen_out.past_key_values)).lower()
"""


def test_the_example_of_its_readme(monkeypatch):
    model, tokenizer = tiny("qwen3", layers=2, vocab_size=300), tiny_tokenizer()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _name: tokenizer)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _name, **_: model)
    names: dict = {}
    exec(README, names)
    assert names["gen_out"].past_key_values.window_length == 50
    assert names["gen_out"].past_key_values.get_seq_length() > 100


@pytest.mark.parametrize("name", ["someone/else", f"{NAME}_2", "sink_cache"])
def test_other_names_are_left_alone(model, name):
    with pytest.raises((AssertionError, OSError)):
        model.generate(PROMPT, max_new_tokens=3, custom_generate=name, trust_remote_code=True)


def test_a_directory_of_this_name_is_left_alone(model, tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, OSError)):
        model.generate(PROMPT, max_new_tokens=3, custom_generate=NAME, trust_remote_code=True)


def test_without_the_patch_it_is_left_alone(model):
    sink_patch.unpatch()
    with pytest.raises((AssertionError, OSError)):
        model.generate(PROMPT, max_new_tokens=3, custom_generate=NAME, trust_remote_code=True)


def loop(model, input_ids, *, generation_config, **model_kwargs):
    """Greedy decoding, as a user may write it."""
    used.append(next((value for value in model_kwargs.values() if hasattr(value, "get_seq_length")), None))
    ids, name = input_ids, next(key for key, value in model_kwargs.items() if value is used[-1])
    for _ in range(generation_config.max_new_tokens):
        logits = model(ids[:, used[-1].get_seq_length() :], **{name: used[-1]}).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


def their_own(model, input_ids, **given):
    """What transformers' documentation begins with: its own method."""
    used.append(next((value for value in given.values() if hasattr(value, "get_seq_length")), None))
    return GenerationMixin._sample(model, input_ids, **given)


used: list = []


@pytest.mark.parametrize("function", [loop, their_own])
def test_a_function_gets_the_sink_cache_where_that_is_asked_for(model, function):
    if "Callable" not in str(inspect.signature(GenerationMixin.generate).parameters["custom_generate"].annotation):
        pytest.skip("generate takes no function here")
    given = {"max_new_tokens": NEW, "do_sample": False, "custom_generate": function}
    assert torch.equal(model.generate(PROMPT, cache_implementation="sink", **SIZES, **given), wanted(model))
    assert isinstance(used.pop(), SinkCache)
    model.generate(PROMPT, **given)
    assert type(used.pop()) is transformers.DynamicCache


USE = """
import json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
given = dict(max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
out = model.generate(torch.tensor([[5, 6, 7]]), custom_generate={made!r}, trust_remote_code=True, **given, {sizes})
print(json.dumps([repr(out.past_key_values), out.sequences[0].tolist()]))
"""


@pytest.mark.parametrize("sizes", ["window_length=12, num_sink_tokens=3", ""])
def test_an_exported_directory_loads(model, sizes, tmp_path, capsys):
    made, folder = tmp_path / "made", directory.write(tmp_path / "model")
    assert cli.main(["export-custom-generate", str(made)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {path.relative_to(made).as_posix() for path in paths} == {
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "README.md",
    }
    assert f"sink-patch>={sink_patch.__version__}" in (made / "custom_generate" / "requirements.txt").read_text()
    out = fresh(
        USE.format(folder=str(folder), made=str(made), sizes=sizes),
        flags=(),
        SINK_PATCH_AUTOLOAD="0",
        HF_HOME=str(tmp_path / "home"),
    ).out
    cache, text = json.loads(out.splitlines()[-1])
    given = eval(f"dict({sizes})")
    assert cache.startswith("SinkCache(window_length=12, " if given else "SinkCache(window_length=256, ")
    right = model.generate(torch.tensor([[5, 6, 7]]), **{**GIVEN, **given}, cache_implementation="sink").sequences
    assert text == right[0].tolist()


def test_a_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["export-custom-generate", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert issubclass(SinkArgumentError, SinkPatchError)
