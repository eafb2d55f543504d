"""A tokenizer of a few words, made here, with a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = tuple(f"word{number}" for number in range(60))
CHAT_TEMPLATE = "{% for message in messages %}word1 {{ message['content'] }} word2 {% endfor %}"


def tiny_tokenizer(*, vocabulary: dict[str, int] | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """Words of a vocabulary, by default WORDS, and <unk> for all others."""
    vocabulary = vocabulary or {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        "model_input_names": ["input_ids", "attention_mask"],
        **options,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
