"""Sizes that are said elsewhere than in the arguments of `generate`, and go through copies and files: all are kept."""

from __future__ import annotations

import copy
import functools
import json
from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, pipeline

import sink_patch
from tests.support import directory
from tests.support.fresh import NO_ENTRY_POINT, fresh
from tests.support.tiny import tokens
from tests.support.travels import TRAVELS

W, S, NEW = 12, 3, 20
SIZES = {"window_length": W, "num_sink_tokens": S}
SINK = {"cache_implementation": "sink", **SIZES}
IN_DICT = {"cache_implementation": "sink", "cache_config": SIZES}
PROMPT = tokens(6)


@pytest.fixture
def model():
    return copy.deepcopy(directory.model())


def text_and_cache(model, **asked) -> tuple[list[int], Any]:
    made = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **asked)
    return made.sequences[0].tolist(), made.past_key_values


@functools.cache
def wanted() -> list[int]:
    """The text where the sizes are arguments."""
    text, other = (text_and_cache(directory.model(), **asked)[0] for asked in (SINK, {"cache_implementation": "sink"}))
    assert text != other, "else the tests show nothing"
    return text


def check(model, **asked) -> None:
    """The model streams with the sizes, to the text that arguments give."""
    text, cache = text_and_cache(model, **asked)
    assert (cache.window_length, cache.num_sink_tokens) == (W, S)
    assert text == wanted()


def filled(config: GenerationConfig, way: str) -> GenerationConfig:
    """A config that asks for the sink cache with the sizes, said in one of several ways."""
    if way == "constructor":
        others = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
        return GenerationConfig(**{**others, **SINK})
    if way == "update":
        assert config.update(**SINK, of_nobody=1) == {"of_nobody": 1}
    elif way == "update of the sizes first":
        assert config.update(**SIZES) == {}
        config.update(cache_implementation="sink")
    elif way == "update of the sizes last":
        config.update(cache_implementation="sink")
        assert config.update(**SIZES) == {}
    elif way == "update of other sizes":
        config.update(cache_implementation="sink", window_length=99)
        config.update(**SIZES)
    elif way == "cache_config":
        assert config.update(**IN_DICT) == {}
    else:
        config.cache_implementation, config.window_length, config.num_sink_tokens = "sink", W, S
    return config


WAYS = (
    *("constructor", "update", "update of the sizes first", "update of the sizes last", "update of other sizes"),
    *("cache_config", "attributes"),
)


@pytest.mark.parametrize("travel", TRAVELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_config_keeps_its_sizes(model, way, travel, tmp_path):
    config = filled(GenerationConfig(max_new_tokens=NEW, do_sample=False), way)
    arrived = TRAVELS[travel](config, tmp_path)
    assert model.generate(PROMPT, generation_config=arrived)[0].tolist() == wanted()
    model.generation_config = arrived
    check(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_keeps_its_sizes_in_files(model, way, tmp_path):
    """Its config was made from that of the model, and says so: from its file, transformers drops what it knows not."""
    assert model.generation_config._from_model_config
    model.generation_config = filled(model.generation_config, way)
    check(model)
    model.save_pretrained(tmp_path)
    check(LlamaForCausalLM.from_pretrained(tmp_path))
    check(LlamaForCausalLM.from_pretrained(tmp_path, generation_config=GenerationConfig(**SINK)))


def test_a_file_that_says_that_it_was_made_from_a_models_config(tmp_path):
    check(LlamaForCausalLM.from_pretrained(directory.write(tmp_path, _from_model_config=True, **SINK)))


def test_a_models_config_that_asks_for_it():
    """As its own generation config is made from it."""
    model = LlamaForCausalLM(LlamaConfig(**{**directory.model().config.to_dict(), **SINK})).eval()
    model.load_state_dict(directory.model().state_dict())
    check(model)


def test_a_models_config_that_comes_to_ask_for_it(model):
    """In some versions another entry, set by hand, makes the generation config anew in the middle of a call."""
    if not hasattr(model.config, "_get_non_default_generation_parameters"):
        pytest.skip("nothing reads it")
    for name, value in {**SINK, "max_length": 99}.items():
        setattr(model.config, name, value)
    with pytest.warns(UserWarning, match="modified the pretrained model configuration"):
        check(model)


def test_names_of_a_models_config_are_no_sizes():
    config = GenerationConfig.from_model_config(LlamaConfig(**SIZES))
    assert not set(SIZES) & set(vars(config))
    assert config.cache_config is None


@pytest.mark.parametrize(
    ("made", "called"),
    [(SINK, None), (IN_DICT, None), (None, SINK), (None, IN_DICT), (None, "config"), (SINK, "config"), (SINK, SIZES)],
    ids=str,
)
def test_a_pipeline_takes_them(model, made, called):
    made, called = made or {}, {"generation_config": GenerationConfig(**SINK)} if called == "config" else called or {}
    generator = pipeline("text-generation", model=model, tokenizer=directory.tokenizer(), **made)
    given = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    text = generator("w5 w6 w7 w8", **given, **called)[0]["generated_text"]
    inputs = torch.tensor([[5, 6, 7, 8]])
    wanted = directory.model().generate(inputs, max_new_tokens=NEW, do_sample=False, **SINK)[0, 4:]
    assert text.split() == [f"w{token}" for token in wanted.tolist()]


def test_flags_of_the_chat_command(model):
    """`transformers chat MODEL cache_implementation=sink ...`: read there, sent, and taken by `serve`."""
    try:
        chat = import_module("transformers.cli.chat")
    except ImportError:
        pytest.skip("its functions are methods of a command here, which updates a config as well")
    config = chat.load_generation_config(None)
    flags = [f"{name}={value}" for name, value in {**SINK, "do_sample": False}.items()]
    config.update(**chat.parse_generate_flags(flags))
    model.generation_config = GenerationConfig(**json.loads(config.to_json_string()))
    check(model)


def test_without_the_patch_a_config_is_as_ever():
    sink_patch.unpatch()
    config = GenerationConfig(_from_model_config=True, **SIZES)
    assert config.update(**SIZES) == SIZES
    assert not set(SIZES) & set(vars(config))


def test_a_process_that_makes_configs_alone_imports_torch_no_sooner():
    use = """
        import sys
        from transformers import GenerationConfig
        config = GenerationConfig()
        """
    ours = """
        assert config.update(cache_implementation="sink", window_length=12) == {} and config.window_length == 12
        """
    tell = "print('torch' in sys.modules)"
    without = fresh(use, tell, SINK_PATCH_AUTOLOAD="0", **NO_ENTRY_POINT).out
    assert fresh("import sink_patch", use, ours, tell, **NO_ENTRY_POINT).out == without
