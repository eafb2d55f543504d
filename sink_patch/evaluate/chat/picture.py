"""`/window FILE.png`: the window as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sink_patch import Window
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.chat.conversation import Conversation
from sink_patch.evaluate.chat.show import KEPT, PART, Line, lines

_SINKS, _LEFT, _PART = "#8e44ad", "#dddddd", "#e3a008"
_WHOLE = ("#2e86ab", "#7fb7d4")  # one message, and the next one
_MOST_LINES = 30


def draw(path: Path, conversation: Conversation) -> None:
    """Draw all that was read as one strip, and below it the messages in the window, one line each.

    Raises:
        SinkArgumentError: matplotlib is not installed, or the file cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise SinkArgumentError(
            f"To draw {path}, matplotlib is needed: pip install matplotlib. /window alone needs none."
        )
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    window, shown, _ = lines(conversation)
    total, size = len(conversation.state.ids), conversation.state.cache.window_length
    figure = Figure(figsize=(9, 2.4 + 0.3 * min(len(shown), _MOST_LINES)), dpi=110, layout="constrained")
    heights = [1.2, max(1.0, 0.45 * min(len(shown), _MOST_LINES))]
    strip, messages = figure.subplots(2, 1, gridspec_kw={"height_ratios": heights})
    figure.suptitle(f"{len(window):,} of {size:,} tokens in the window, {len(window.left):,} of {total:,} have left")
    _draw_strip(strip, window, total)
    _draw_messages(messages, window, shown)
    try:
        figure.savefig(path.expanduser())
    except (OSError, ValueError) as failure:  # of an ending that it does not know
        raise SinkArgumentError(
            f"{path} could not be written: {failure}. Give a file that ends with .png, .svg or .pdf, in a directory "
            "that is there."
        ) from failure


def _draw_strip(axes: Any, window: Window, total: int) -> None:
    for part, colour, label in (
        (window.sinks, _SINKS, "stays (sinks)"),
        (window.left, _LEFT, "has left"),
        (window.recent, _WHOLE[0], "newest, in the window"),
    ):
        axes.barh(0, len(part), left=part.start, color=colour, label=label)
    axes.set_xlim(0, max(total, 1))
    axes.set_yticks([])
    axes.set_xlabel("token of the chat")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _draw_messages(axes: Any, window: Window, shown: list[Line]) -> None:
    """The newest messages of the window, each where it lies in the window."""
    shown = shown[-_MOST_LINES:]
    for number, line in enumerate(shown):
        start = _place_in_window(window, line)
        colour = {KEPT: _SINKS, PART: _PART}.get(line.state, _WHOLE[number % 2])
        axes.barh(number, line.held, left=start, color=colour)
    axes.set_yticks(range(len(shown)), [_label(line) for line in shown])
    axes.set_xlim(0, max(len(window), 1))
    axes.invert_yaxis()
    axes.set_xlabel("place in the window (yellow: only a part of the message is in it)")


def _place_in_window(window: Window, line: Line) -> int:
    """How many tokens of the window stand before those of a message."""
    if line.place.start < window.sinks.stop:
        return line.place.start
    return len(window.sinks) + max(0, line.place.start - window.recent.start)


def _label(line: Line) -> str:
    words = line.text if len(line.text) <= 28 else f"{line.text[:27]}…"
    return words.replace("$", r"\$")  # else it would be taken for a formula
