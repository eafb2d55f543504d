"""How far a text goes on with what a kept stream has read, whatever the stream is kept in: ids alone."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from sink_patch.history.rows import RowHistory

MARGIN = 16
"""So many of the last tokens of a prompt begin the answer at most, in a way that the next turn may not repeat.

Qwen3 writes "<think>\\n\\n</think>\\n\\n" there, or leaves it out. Also the fewest tokens for which a part of another
stream is worth a copy.
"""
_FEW = 256
"""So few tokens are soon read again; to read the last of them apart costs a forward, as much as a token."""
_END_OF_ANSWER = 4


def is_whole_beginning(read: RowHistory, text: array[int]) -> bool:
    """Whether a text begins with all that was read, and goes on."""
    return read.seen < len(text) and read.difference(text) is None


def is_continued_by(ended: RowHistory, prompt: int, text: array[int], *, in_ended: bool) -> bool:
    """Whether a text is this talk, some turns later, so that the stream is not needed any more.

    Args:
        ended: what was read in the end.
        prompt: tokens of the prompt that the answer followed.
        text: ids of a prompt that went on in the stream.
        in_ended: whether it went on at its end. From before the answer: a longer text that holds the old prompt, or the
            end of the old answer (thoughts are stripped from its beginning); others are branches of the talk.
    """
    if in_ended and is_whole_beginning(ended, text):
        return True
    same = ended.common(text)
    if same >= prompt:
        return len(text) > prompt
    end = ended.newest[-_END_OF_ANSWER:]
    places = range(max(0, same - MARGIN), len(text) - len(end) + 1)
    return ended.seen - prompt >= len(end) and any(text[place : place + len(end)] == end for place in places)


def tokens_to_use(read: RowHistory, text: array[int], can_lose: Callable[[int], bool]) -> int:
    """How many of the first tokens of a text need not be read again, where a stream has read some.

    All that was read, or less of it where the newest tokens can be taken back; 0: the text has another beginning, or
    its beginning cannot be got at any more. At least one token of the text is left to be read.

    Args:
        can_lose: whether so many of the newest tokens can be taken back.
    """
    same = min(read.common(text), len(text) - 1)
    back = read.seen - same
    if back == 0:
        return same
    if same < MARGIN or back > len(read.newest):
        return 0
    return same if can_lose(back) else 0


def tokens_ahead(new: int, *, begins_at_end: bool) -> int:
    """How many of the new tokens of a prompt go in before a copy is made from before its answer.

    Args:
        begins_at_end: whether it goes on where an answer ended, so that answers seem to be repeated as they were.

    Returns:
        0: none is made there.
    """
    return 0 if new <= MARGIN or (new <= _FEW and begins_at_end) else new - MARGIN
