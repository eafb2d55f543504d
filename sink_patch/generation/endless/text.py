"""From ids to text, one token at a time, with a few ids in memory."""

from __future__ import annotations

from typing import Any

_MOST_WAITING = 16  # tokens; a character has four bytes at most
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Gives the text of each token as it comes; a character of several tokens comes whole, with the last of them.

    A token is decoded together with the tokens of the piece before it, since many tokenizers write a space, or none,
    by what stands before. So the pieces together are the text of all ids.

    Args:
        tokenizer: of the model.
        skips: whether special tokens have no text.
    """

    def __init__(self, tokenizer: Any, *, skips: bool = True):
        self._tokenizer, self._skips = tokenizer, skips
        self._ids: list[int] = []
        self._given = 0  # of `_ids`, those whose text has been given

    def piece(self, token: int) -> str:
        """The text of one more token; empty where it has none, or is a part of a character."""
        self._ids.append(token)
        text, waiting = self._new_text(), len(self._ids) - self._given
        if text.endswith(_INCOMPLETE) and waiting < _MOST_WAITING:
            return ""
        if text:
            self._ids, self._given = self._ids[self._given :], waiting
        elif waiting >= _MOST_WAITING:
            del self._ids[self._given :]  # special tokens, say, without end
        return text

    def rest(self) -> str:
        """What has waited for more tokens."""
        text = self._new_text()
        self._given = len(self._ids)
        return text

    def _new_text(self) -> str:
        return self._decoded(self._ids)[len(self._decoded(self._ids[: self._given])) :]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False)
        return text
