"""The text of a stream, a piece for each token: whole characters, and all pieces together are the text of all ids."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sink_patch.generation.endless.text import Decoder
from tests.support.tokenizer import tiny_tokenizer

TEXT = "Grüße, 世界! 🌍🚀 e\u0301 \u200d\n\n  end — ครับ 👩‍👩‍👧"


def byte_level() -> PreTrainedTokenizerFast:
    """One byte, one token (as in GPT-2, Llama 3, Qwen)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    letters.update({byte: chr(256 + place) for place, byte in enumerate(others)})
    made = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Words that begin with a space, and bytes for all else (as in Llama 2, Gemma)."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁sea", "s", "▁"]
    made = Tokenizer(models.BPE({word: token for token, word in enumerate(words)}, [], unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def pieces_of(decoder: Decoder, ids: list[int]) -> list[str]:
    return [*(decoder.piece(token) for token in ids), decoder.rest()]


def whole(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_characters_of_several_bytes_come_whole():
    pieces = pieces_of(Decoder(byte_level()), list(TEXT.encode()))
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if piece] == list(TEXT), "one character a piece, each with its last byte"


def test_spaces_before_words_and_bytes_between_them():
    tokenizer = byte_fallback()
    ids = [257, 258, 259, *(1 + byte for byte in "é🌍".encode()), 260, *(1 + byte for byte in "世".encode()), 257, 259]
    pieces = pieces_of(Decoder(tokenizer), ids)
    assert "".join(pieces) == whole(tokenizer, ids) == "the seasé🌍 世 thes"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("make", [byte_level, tiny_tokenizer])
def test_any_ids(make):
    tokenizer, generator = make(), random.Random(0)
    special, count = tokenizer.eos_token_id, len(tokenizer)
    for _ in range(20):
        ids = [generator.choice([special, generator.randrange(min(count, 128))]) for _ in range(80)]
        assert "".join(pieces_of(Decoder(tokenizer), ids)) == whole(tokenizer, ids)


def test_special_tokens_are_shown_where_that_is_asked_for():
    pieces = pieces_of(Decoder(byte_level(), skips=False), [65, 256, 66])
    assert pieces == ["A", "<end>", "B", ""]


def test_a_beginning_of_a_character_that_nothing_follows_is_shown_at_the_end():
    assert pieces_of(Decoder(byte_level()), [65, 0xF0, 0x9F]) == ["A", "", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("token", [256, 0xF0, 65])
def test_few_ids_are_kept_whatever_comes(token):
    """Special tokens alone, beginnings of characters alone, letters."""
    decoder = Decoder(byte_level())
    pieces = [decoder.piece(token) for _ in range(500)]
    assert len(decoder._ids) < 40
    if token == 0xF0:
        assert 450 < len("".join(pieces)) <= 500


def test_a_word_after_many_special_tokens_keeps_its_space():
    tokenizer = tiny_tokenizer()
    ids = [5, *[tokenizer.eos_token_id] * 40, 6]
    assert "".join(pieces_of(Decoder(tokenizer), ids)) == whole(tokenizer, ids) == "word2 word3"
