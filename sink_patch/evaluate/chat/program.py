"""The program: lines are read, answered, or are commands."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from sink_patch.errors import SinkArgumentError, SinkPatchError
from sink_patch.evaluate.chat import files, picture, show
from sink_patch.evaluate.chat.conversation import Conversation
from sink_patch.evaluate.chat.settings import Settings
from sink_patch.evaluate.chat.template import Template
from sink_patch.evaluate.models import Loaded

PROMPT = "> "
HELP = """\
/window        what the window holds, and what has left it
/window FILE   the same as a picture: a .png, .svg or .pdf
/save FILE     keep the chat, to go on with it another time
/load FILE     go on with a chat that was kept
/reset         begin anew, with the same system prompt
/help          these lines
/exit          end (so does Ctrl-D); Ctrl-C ends an answer
"""


def run(loaded: Loaded, template: Template, settings: Settings, out: TextIO | None = None) -> None:
    """Talk until the user leaves.

    Raises:
        UnsupportedModelError: the model cannot stream.
        SinkArgumentError: the window does not fit the model.
    """
    program = Program(Conversation(loaded, template, settings), out or sys.stdout)
    cache = program.conversation.state.cache
    program.tell(
        f"{loaded.name}, a window of {cache.window_length:,} tokens of which the first {cache.num_sink_tokens:,} stay. "
        "/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat."
    )
    if template.told is not None:
        program.tell(template.told)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on all systems; it edits the line that is typed
            __import__("readline")
    if isinstance(sys.stdin, io.TextIOWrapper):  # so that a line that is not UTF-8 takes no other lines with it
        sys.stdin.reconfigure(errors="surrogateescape")
    while program.goes_on:
        with contextlib.suppress(KeyboardInterrupt):  # one more, while one is told of
            _take_one(program)


def _take_one(program: Program) -> None:
    """One line. Ctrl-D ends the chat, and Ctrl-C what is typed, or the answer."""
    try:
        line = input(PROMPT if sys.stdin.isatty() else "")
        line.encode()  # bytes that are not UTF-8 are surrogates in it, of which no tokenizer knows
    except EOFError:
        program.tell("")
        program.goes_on = False
        return
    except KeyboardInterrupt:
        program.tell("\nCtrl-D or /exit ends the chat.")
        return
    except UnicodeError:
        program.tell("sink-patch: That line is not UTF-8 and was left out. Check the encoding of your terminal.")
        return
    answers = program.conversation.state.answers
    try:
        program.take(line)
    except KeyboardInterrupt:
        is_answered = line.strip().startswith("/") or program.conversation.state.answers > answers
        program.tell("\nStopped." if is_answered else "\nStopped; that message was not answered.")
    except SinkPatchError as failure:
        program.tell(f"sink-patch: {' '.join(str(failure).split())}")


class Program:
    """What lines do; `goes_on` until one ends the chat.

    Args:
        conversation: with the model.
        out: where answers go.
    """

    def __init__(self, conversation: Conversation, out: TextIO):
        self.conversation, self._out, self.goes_on = conversation, out, True
        self._commands: dict[str, Callable[[str], None]] = {
            "/window": self._window,
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
            "/help": lambda _: self._say(HELP),
            "/exit": self._exit,
        }

    def tell(self, line: str) -> None:
        """Write a line."""
        self._say(f"{line}\n")

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            SinkPatchError: it cannot be done; the chat is as it was, or reads its text again.
        """
        name, _, rest = line.strip().partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/"):
            raise SinkArgumentError(f"There is no command {name}. /help lists them.")
        elif name:
            with interruptible() as is_over:
                self.conversation.answer(line.strip(), self._say, is_over)
            self.tell("")

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _window(self, file: str) -> None:
        if not file:
            show.write(self.conversation, self._out)
            return
        picture.draw(Path(file), self.conversation)
        self.tell(f"Drawn: {file}")

    def _save(self, file: str) -> None:
        files.save(_path(file, "/save"), self.conversation)
        self.tell(f"Saved: {file}")

    def _load(self, file: str) -> None:
        self.conversation.state = files.load(_path(file, "/load"), self.conversation)
        cache, said = self.conversation.state.cache, self.conversation.state.messages
        self.tell(f"Loaded: {file}, {len(said):,} messages, a window of {cache.window_length:,} tokens.")
        if said:
            self.tell(f"The last one: {said[-1]['content']}")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.tell("Forgotten; the system prompt stays." if self.conversation.state.messages else "Forgotten.")

    def _exit(self, _: str) -> None:
        self.goes_on = False


def _path(file: str, command: str) -> Path:
    if not file:
        raise SinkArgumentError(f"{command} needs the name of a file: {command} FILE")
    return Path(file)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is noted, and the second one interrupts; yields whether there was one.

    An answer ends between two tokens, since a forward that is broken off may lose what the cache holds. From the third
    one on they are let pass, as the talk is being put back to what it was.
    """
    pressed: list[bool] = []

    def note(number: int, frame: Any) -> None:
        pressed.append(True)
        if len(pressed) == 2:
            signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():  # which alone hears of it
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
