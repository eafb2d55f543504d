"""What the tests of `sink-patch` share: a tiny model directory, a text, and the errors of a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sink_patch import cli
from tests.support.tokenizer import WORDS, tiny_tokenizer

TEXT = " ".join(WORDS[(7 * number * number + number) % 60] for number in range(200))


def tiny_model(num_layers: int = 2, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """By default it has a token for each word of the tiny tokenizer, and a context of 64."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    of_the_tokenizer = {"vocab_size": len(WORDS) + 3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    made = {"max_position_embeddings": 64, "initializer_range": 0.5, **sizes, **of_the_tokenizer, **settings}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **made)).eval()


def write_model(directory: Path, seed: int = 0) -> str:
    """A directory that the command line loads."""
    tiny_model(seed=seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that is refused."""
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("sink-patch: ")
    assert "Traceback" not in "".join(err)
    return err[-1]
