"""What `/window` says: which messages are in the window, and what has left, in words."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TextIO

from sink_patch import Window
from sink_patch.evaluate.chat.conversation import Conversation

KEPT, WHOLE, PART, LEFT = "kept", "whole", "in part", "left"
_COLOURS = {KEPT: "magenta", WHOLE: "green", PART: "yellow"}


@dataclass(frozen=True)
class Line:
    """One message of which tokens are in the window.

    Args:
        place: of the message, as it was read.
        held: how many of its tokens are in the window.
        state: "kept": all of them are sinks; "whole"; "in part".
        text: how it begins.
    """

    place: range
    held: int
    state: str
    text: str


def lines(conversation: Conversation) -> tuple[Window, list[Line], int]:
    """What the window holds, message by message, and how many messages have left altogether."""
    window, messages = conversation.window()
    shown = [line for message in messages if (line := _line(conversation, window, message)).held]
    return window, shown, len(messages) - len(shown)


def _line(conversation: Conversation, window: Window, message: range) -> Line:
    sinks, recent = _common(message, window.sinks), _common(message, window.recent)
    held = sinks + recent
    state = PART if held < len(message) else KEPT if sinks == held else WHOLE
    return Line(message, held, state, conversation.text(message[:200]) if held else "")


def _common(one: range, other: range) -> int:
    return len(range(max(one.start, other.start), min(one.stop, other.stop)))


def write(conversation: Conversation, out: TextIO) -> None:
    """Write it, in colour where that can be and is of use."""
    window, shown, gone = lines(conversation)
    size = conversation.state.cache.window_length
    rows = [*_rows(window, shown, gone)]
    out.write(f"The window holds {len(window):,} of {size:,} tokens, and {len(window.left):,} have left it.\n")
    count, columns = max((len(row[1]) for row in rows), default=0), shutil.get_terminal_size().columns - 1
    colours = out.isatty() and find_spec("rich") is not None
    for state, tokens, text in rows:
        head = f"  {state:7}  {tokens:>{count}}  "
        body = _cut(text, max(10, columns - len(head)))
        if colours:
            _write_in_colour(state, head, body, out)
        else:
            out.write(f"{head}{body}".rstrip() + "\n")


def _rows(window: Window, shown: Sequence[Line], gone: int) -> Iterator[tuple[str, str, str]]:
    """(state, tokens, text) of each line, with one for all that has left."""
    has_told = not window.left
    for line in shown:
        if not has_told and line.place.stop > window.left.stop:
            yield _of_what_left(window, gone)
            has_told = True
        tokens = f"{line.held:,}" if line.held == len(line.place) else f"{line.held:,} of {len(line.place):,}"
        yield line.state, tokens, line.text
    if not has_told:
        yield _of_what_left(window, gone)


def _of_what_left(window: Window, gone: int) -> tuple[str, str, str]:
    messages = "parts of messages" if not gone else f"{gone:,} message{'s' if gone > 1 else ''}"
    return LEFT, f"{len(window.left):,}", f"({messages})"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _write_in_colour(state: str, head: str, body: str, out: TextIO) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((head, _COLOURS.get(state, "dim")), (body, "dim" if state == LEFT else ""))
    Console(file=out, highlight=False).print(line, soft_wrap=True)
