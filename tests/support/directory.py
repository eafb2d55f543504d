"""A model directory like that of a user: weights, a tokenizer with a chat template, a generation_config.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import VOCAB, tiny

CONTEXT = 64  # positions that the model was trained on
_TEMPLATE = (
    "{% for message in messages %}w1 {{ message.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
)


def model():
    return tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT)


def tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: "w5" is 5."""
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["input_ids", "attention_mask"]  # without this, 4.x returns token types, too
    settings = {"unk_token": "w0", "chat_template": _TEMPLATE, "model_input_names": names}
    return PreTrainedTokenizerFast(tokenizer_object=words, **settings)


def write(folder: Path, **entries: Any) -> Path:
    """Write the model, and a generation_config.json with `entries` alone."""
    copy.deepcopy(model()).save_pretrained(folder)  # it writes into the config
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, **entries}))
    return folder
