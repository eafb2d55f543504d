"""`sink-patch configure DIR`: its generation_config.json asks for a sink cache, and can be put back to the letter."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, pipeline

import sink_patch
from sink_patch import SinkArgumentError, UnsupportedModelError, cli
from sink_patch.arguments import Settings
from sink_patch.doors.directories import files
from sink_patch.generation.request import Request
from tests.support import directory
from tests.support.templates import STYLES, byte_level
from tests.support.travels import TRAVELS
from tests.support.versions import make_config

ALL = ("--window-length", "40", "--keep-system", "--whole-turns", "--keep-streams", "8")
SETTINGS = Settings(40, "system", "turns", ((1,),), ((1, 2),), 8)
TEMPLATE = (
    "{% for m in messages %}w1 {{ {'system': 'w2', 'user': 'w3'}.get(m.role, 'w4') }} {{ m.content }} w5 {% endfor %}"
)
BEFORE = '{\n  "do_sample": false,\n\n  "eos_token_id": 96, "temperature": 1.0}\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    copy.deepcopy(directory.model()).save_pretrained(folder)
    tokenizer = directory.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(BEFORE)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def config_of(folder: Path) -> str | None:
    file = folder / "generation_config.json"
    return file.read_text() if file.exists() else None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(folder: Path, *arguments: str) -> int:
    return cli.main(["configure", str(folder), *arguments])


def settings_of(config: GenerationConfig) -> Settings:
    request = Request.read({}, None, config)
    assert request.implementation == "sink"
    return request.settings()


def test_all_settings_are_written_and_shown(folder, capsys):
    assert run(folder, *ALL) == 0
    out = capsys.readouterr().out
    assert '+  "cache_implementation": "sink",' in out
    assert '   "eos_token_id": 96' in out or '+  "eos_token_id": 96' in out
    written = json.loads(config_of(folder))
    assert written.items() >= {"do_sample": False, "eos_token_id": 96, "cache_implementation": "sink"}.items()
    assert settings_of(GenerationConfig.from_pretrained(folder)) == SETTINGS


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ((), Settings()),
        (("--window-length", "40"), Settings(40)),
        (("--window-length", "40", "--num-sink-tokens", "9"), Settings(40, 9)),
        (
            ("--window-length", "40", "--keep-system"),
            Settings(40, "system", turn_start=((1,),), system_start=((1, 2),)),
        ),
        (("--window-length", "40", "--whole-turns"), Settings(40, evict="turns", turn_start=((1,),))),
        (("--keep-streams", "3"), Settings(keep_streams=3)),
        (ALL, SETTINGS),
    ],
    ids=str,
)
def test_what_is_asked_for_is_what_a_model_has(folder, asked, settings):
    assert run(folder, *asked) == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert settings_of(model.generation_config) == settings
    assert model.generation_config.eos_token_id == 96


def updated(config: GenerationConfig, _: Path) -> GenerationConfig:
    made = GenerationConfig()
    assert made.update(cache_implementation="sink", cache_config=config.cache_config) == {}
    return made


WAYS = {**TRAVELS, "updated": updated}


@pytest.mark.parametrize("travel", WAYS)
def test_all_settings_go_through_copies_and_files(folder, travel, tmp_path):
    run(folder, *ALL)
    arrived = WAYS[travel](GenerationConfig.from_pretrained(folder), tmp_path)
    assert settings_of(arrived) == SETTINGS


@pytest.mark.parametrize("travel", WAYS)
def test_settings_beside_the_cache_do_too(travel, tmp_path):
    """As arguments say them, and not in `cache_config`."""
    if travel == "updated":
        pytest.skip("it updates the other")
    config = GenerationConfig(cache_implementation="sink", **SETTINGS.as_dict())
    assert settings_of(WAYS[travel](config, tmp_path)) == SETTINGS


def test_a_model_that_is_saved_keeps_them(folder, tmp_path):
    run(folder, *ALL)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert settings_of(model.generation_config) == SETTINGS
    assert cli.main(["configure", str(tmp_path / "again"), "--remove"]) == 0, "with no record of what was before"
    left = json.loads(config_of(tmp_path / "again"))
    assert not {"cache_implementation", "cache_config"} & set(left)
    assert left["eos_token_id"] == 96


def test_from_then_on_a_pipeline_and_generate_stream(folder):
    assert run(folder, "--window-length", "12", "--num-sink-tokens", "3") == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, asked = torch.tensor([[5, 6, 7, 8]]), {"max_new_tokens": 90, "eos_token_id": None, "do_sample": False}
    made = model.generate(ids, return_dict_in_generate=True, **asked)
    assert repr(made.past_key_values).startswith("SinkCache(window_length=12, num_sink_tokens=3, ")
    sizes = {"window_length": 12, "num_sink_tokens": 3, "do_sample": False}
    wanted = directory.model().generate(ids, cache_implementation="sink", max_new_tokens=90, **sizes)
    assert made.sequences.tolist() == wanted.tolist()
    text = pipeline("text-generation", str(folder))("w5 w6 w7 w8", **asked)[0]["generated_text"]
    assert text.replace(" ", "") == "".join(f"w{token}" for token in wanted[0].tolist())


# --- putting back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [BEFORE, "{}", None], ids=["a file", "an empty one", "none"])
@pytest.mark.parametrize("times", [1, 3])
def test_what_was_there_comes_back_to_the_letter(folder, before, times):
    """However often it was configured."""
    file = folder / "generation_config.json"
    file.unlink() if before is None else file.write_text(before)
    was = contents(folder)
    for time in range(times):
        assert run(folder, "--window-length", str(20 + time), *ALL[2:]) == 0
    assert run(folder, "--remove") == 0
    assert contents(folder) == was


def test_a_file_that_is_new_says_what_the_models_config_says(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 77}))
    (folder / "generation_config.json").unlink()
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 77
    assert run(folder) == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.generation_config.eos_token_id, settings_of(model.generation_config)) == (77, Settings())


def test_what_else_was_changed_since_then_stays(folder):
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "use_cache": false, "cache_implementation": "static"}'
    )
    run(folder, *ALL)
    changed = json.loads(config_of(folder))
    assert "use_cache" not in changed
    (folder / "generation_config.json").write_text(json.dumps({**changed, "do_sample": False, "top_k": 5}))
    assert run(folder, "--remove") == 0
    wanted = {"do_sample": False, "top_k": 5, "use_cache": False, "cache_implementation": "static"}
    assert json.loads(config_of(folder)) == wanted
    assert len(list(folder.glob("*before*"))) == 0


def test_settings_that_were_there_by_hand_come_back(folder):
    by_hand = '{"cache_implementation": "sink", "window_length": 9, "num_sink_tokens": 2}'
    (folder / "generation_config.json").write_text(by_hand)
    run(folder, "--window-length", "33")
    assert settings_of(GenerationConfig.from_pretrained(folder)) == Settings(33), "not what stood beside it"
    run(folder, "--remove")
    assert config_of(folder) == by_hand


def test_an_old_record_is_not_taken_for_a_new_one(folder):
    """The file was put back, or written anew, by hand."""
    run(folder, *ALL)
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    run(folder, *ALL)
    run(folder, "--remove")
    assert config_of(folder) == '{"top_k": 7}'


def test_a_dry_run_writes_nothing(folder, capsys):
    was = contents(folder)
    assert run(folder, *ALL, "--dry-run") == 0
    assert '+  "cache_implementation": "sink",' in capsys.readouterr().out
    assert contents(folder) == was
    run(folder, *ALL)
    was = contents(folder)
    capsys.readouterr()
    assert run(folder, "--remove", "--dry-run") == 0
    assert '-  "cache_implementation": "sink",' in capsys.readouterr().out
    assert contents(folder) == was


def test_to_ask_for_the_same_again_changes_nothing(folder, capsys):
    run(folder, *ALL)
    was = contents(folder)
    assert run(folder, *ALL) == 0
    assert capsys.readouterr().out.endswith("asks for this already.\n")
    assert contents(folder) == was


def test_rights_of_the_file_stay(folder):
    (folder / "generation_config.json").chmod(0o640)
    run(folder)
    assert (folder / "generation_config.json").stat().st_mode & 0o777 == 0o640


# --- bad input -------------------------------------------------------------------------------------------------------


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)


def style(name: str):
    def put(folder: Path) -> None:
        no_tokenizer(folder)
        byte_level(STYLES[name].template).save_pretrained(folder)

    return put


def other_model(model_type: str, **entries):
    def put(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, **entries}))

    return put


LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 97,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
BAD = {
    "no directory": (shutil.rmtree, (), "is no directory"),
    "no model": (lambda folder: (folder / "config.json").unlink(), (), "no config.json"),
    "no JSON": (lambda folder: (folder / "generation_config.json").write_text("{,"), (), "is no JSON"),
    "no object": (lambda folder: (folder / "generation_config.json").write_text("[1]"), (), "holds a list"),
    "no text": (lambda folder: (folder / "generation_config.json").write_bytes(b"\xff\xfe"), (), "cannot be read"),
    "a config of nothing": (lambda folder: (folder / "config.json").write_text("{}"), (), "that transformers can load"),
    "no template, whole turns": (no_template, ("--whole-turns",), "chat template of this .* cannot be applied"),
    "no template, the system message": (no_template, ("--keep-system",), "chat template of this .* cannot be applied"),
    "no tokenizer": (no_tokenizer, ("--whole-turns",), "holds no tokenizer|chat_template is not set"),
    "no system messages": (style("Gemma"), ("--keep-system",), "does not mark system messages"),
    "no room": (lambda _: None, ("--window-length", "4"), "leaves no room"),
    "no number of streams": (lambda _: None, ("--keep-streams", "-1"), "negative"),
    "a model that cannot stream": (
        other_model("t5", architectures=["T5ForConditionalGeneration"]),
        (),
        "encoder-decoder",
    ),
    "a model with learned positions": (other_model("gpt2", vocab_size=97), (), "learned"),
    "a window past the positions": (
        other_model("phi3", **LONGROPE),
        ("--window-length", "60"),
        "that transformers can",
    ),
    "nothing to put back": (lambda _: None, ("--remove",), "asks for no sink cache"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case, folder, capsys):
    put, arguments, match = BAD[case]
    put(folder)
    was = contents(folder) if folder.exists() else None
    assert run(folder, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sink-patch: ")
    with pytest.raises((SinkArgumentError, UnsupportedModelError), match=match):
        cli._parser().parse_args(["configure", str(folder), *arguments]).run(
            cli._parser().parse_args(["configure", str(folder), *arguments])
        )
    assert (contents(folder) if folder.exists() else None) == was


def test_a_window_that_does_not_fit_is_found_on_the_weights(tmp_path):
    """Near the limit of a model's positions; below it the config is enough, and there need not be any weights."""
    config = make_config(type(AutoConfig.for_model("phi3")), {**LONGROPE})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(SinkArgumentError, match=r"window_length=60 does not fit .* Use window_length=44 or less"):
        sink_patch.configure(tmp_path, window_length=60)
    sink_patch.configure(tmp_path, window_length=44, tell=lambda _: None)
    (tmp_path / "model.safetensors").unlink()
    sink_patch.configure(tmp_path, window_length=40, tell=lambda _: None)
    assert settings_of(GenerationConfig.from_pretrained(tmp_path)) == Settings(40)


@pytest.mark.parametrize("remove", [False, True])
def test_no_right_to_write(folder, monkeypatch, capsys, remove):
    if remove:
        run(folder)
    was = contents(folder)

    def refuse(self, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    assert run(folder, *(["--remove"] if remove else [])) == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.undo()
    assert contents(folder) == was, "and no partial file is left"


def test_a_write_that_is_cut_off_leaves_the_whole_file(folder, monkeypatch):
    """A crash between the record and the file: nothing is lost, and it can be done again."""
    was, replace = config_of(folder), Path.replace

    def crash(self, target):
        if target.name == files.NAME:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        sink_patch.configure(folder, tell=lambda _: None)
    monkeypatch.undo()
    assert config_of(folder) == was
    run(folder)
    run(folder, "--remove")
    assert config_of(folder) == was
    assert not list(folder.glob("*before*"))
