"""Where the demo shows itself: a terminal, whose last line stays in place (rich), or plain text for all else."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from typing_extensions import Self

Row = Sequence[str]


class Screen(Protocol):
    """Text and figures go to it inside a `with`, which leaves a terminal in order however it ends."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...

    def line(self, words: str) -> None:
        """A line, or several, outside of a `with`."""

    def text(self, piece: str) -> None:
        """The next piece of a running text."""

    def figures(self, words: str, *, is_window: bool) -> None:
        """The newest figures of the running text; `is_window`: those of a whole window."""

    def table(self, rows: Sequence[Row], *, is_window: bool) -> None:
        """A table as it stands, the line of headings first; `is_window`: its last row is there to stay."""


def screen_on(out: TextIO) -> Screen:
    """The screen for an output: plain where it is no terminal, or rich is not installed."""
    if not out.isatty():
        return Plain(out)
    try:
        rich_console: Any = importlib.import_module("rich.console")
    except ImportError:
        return Plain(out)
    console = rich_console.Console(file=out, highlight=False, markup=False, emoji=False)
    return Plain(out) if console.is_dumb_terminal else Terminal(console)


class Plain:
    """Plain text without control codes, so that it can go to a file: figures stand between two words, once a window."""

    def __init__(self, out: TextIO):
        self._out = out
        self._waiting = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.line("")

    def line(self, words: str) -> None:
        self._out.write(f"{words}\n")
        self._out.flush()

    def text(self, piece: str) -> None:
        if self._waiting and piece[:1].isspace():
            self._out.write(f"\n\n{self._waiting}\n\n")
            self._waiting = ""
        self._out.write(piece)
        self._out.flush()

    def figures(self, words: str, *, is_window: bool) -> None:
        if is_window:
            self._waiting = words

    def table(self, rows: Sequence[Row], *, is_window: bool) -> None:
        for row in rows[0 if len(rows) == 2 else -1 :] if is_window else ():
            self.line("  ".join(f"{words:>{len(head)}}" for words, head in zip(row, rows[0], strict=True)))


class Terminal:
    """A terminal: the text is broken between words, and the figures stay below it.

    Args:
        console: of rich.
    """

    def __init__(self, console: Any):
        self._console = console
        self._live: Any = None
        self._begun, self._figures = "", ""  # the line of the text that is not full yet, and what stands below

    def __enter__(self) -> Self:
        live: Any = importlib.import_module("rich.live")
        self._begun = self._figures = ""
        self._live = live.Live(console=self._console, auto_refresh=False)
        self._live.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._live.stop()  # leaves what stood there last, and shows the cursor again

    def line(self, words: str) -> None:
        self._console.print(words)

    def text(self, piece: str) -> None:
        self._begun += "".join(one for one in piece.replace("\t", " ") if one.isprintable() or one == "\n")
        width = self._console.width  # which may change
        while (end := self._end_of_line(width)) is not None:
            self._console.print(self._words(self._begun[: end[0]]))
            self._begun = self._begun[end[1] :]
        self._show()

    def figures(self, words: str, *, is_window: bool) -> None:  # noqa: ARG002 - both kinds
        self._figures = words
        self._show()

    def table(self, rows: Sequence[Row], *, is_window: bool) -> None:  # noqa: ARG002 - both kinds
        rich_table: Any = importlib.import_module("rich.table")
        shown = rich_table.Table(*rows[0], box=None, padding=(0, 2, 0, 0))
        for column in shown.columns:
            column.justify = "right"
        for row in rows[1:]:
            shown.add_row(*row)
        self._live.update(shown, refresh=True)

    def _show(self) -> None:
        console: Any = importlib.import_module("rich.console")
        figures = self._words(self._figures, style="reverse")
        self._live.update(console.Group(self._words(self._begun), self._words(""), figures), refresh=True)

    def _words(self, words: str, style: str = "") -> Any:
        text: Any = importlib.import_module("rich.text")
        return text.Text(words, style=style, no_wrap=True, overflow="ellipsis")

    def _end_of_line(self, width: int) -> tuple[int, int] | None:
        """Where the first line of the text ends, and where the next begins; None: it may go on."""
        cells: Any = importlib.import_module("rich.cells")
        line, newline, _ = self._begun.partition("\n")
        if cells.cell_len(line) <= width:
            return (len(line), len(line) + 1) if newline else None
        full = len(cells.chop_cells(line, width)[0])
        end = full if line[full] == " " else line.rfind(" ", 0, full)
        if end <= 0:  # one word that is wider
            return full, full
        return end, end + 1
