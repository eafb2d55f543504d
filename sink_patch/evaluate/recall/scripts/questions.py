"""A stream of questions from a file, as those of ARC in table 5 of StreamingLLM (arXiv 2309.17453).

Each is read with its right answer before the next one is asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.measures import records
from sink_patch.evaluate.recall.scripts.script import Part, ask, beginning, following

GROUP = "questions"
_EXAMPLE = '{"question": "What do bees make?", "choices": ["honey", "milk"], "answer": "honey"}'


@dataclass(frozen=True)
class Item:
    """A question of the file; the right answer is the first of the choices."""

    question: str
    choices: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        """What goes into the stream once it has been asked."""
        return f"{self.prompt} {self.choices[0]}\n\n"


def read(path: Path) -> list[Item]:
    """The questions of a file: JSON lines with `question`, `choices`, and `answer` (one of the choices, or its number).

    Raises:
        SinkArgumentError: the file cannot be read, holds no question, or a line is none; it says which.
    """
    lines = records.read_text(path).splitlines()
    items = [_item(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise SinkArgumentError(f"{path} holds no question. Give a line such as {_EXAMPLE} for each.")
    return items


def _item(path: Path, number: int, line: str) -> Item:
    try:
        found = json.loads(line)
    except ValueError as failure:
        raise _no_question(path, number, f"is no JSON ({failure})") from failure
    if not isinstance(found, dict) or not isinstance(found.get("question"), str):
        raise _no_question(path, number, 'has no "question"')
    choices = found.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise _no_question(path, number, 'has no "choices", a list of two texts or more')
    if len(set(choices)) < len(choices):
        raise _no_question(path, number, "has the same choice twice")
    right = _right(found.get("answer"), choices)
    if right is None:
        raise _no_question(path, number, 'has no "answer", one of the choices or its number from 0 on')
    return Item(found["question"], (right, *(choice for choice in choices if choice != right)))


def _right(answer: Any, choices: Sequence[str]) -> str | None:
    """The right choice; None: there is none such."""
    if isinstance(answer, bool):
        return None
    if isinstance(answer, int):
        return choices[answer] if 0 <= answer < len(choices) else None
    return answer if answer in choices else None


def _no_question(path: Path, number: int, what: str) -> SinkArgumentError:
    return SinkArgumentError(f"Line {number} of {path} {what}. Give lines such as {_EXAMPLE}")


def parts(tokenizer: Any, items: Sequence[Item]) -> list[Part]:
    """The stream in ids: before each question all older ones stand with their answers."""
    found: list[Part] = []
    ids = beginning(tokenizer)
    for item in items:
        question = ask(tokenizer, item.prompt, [f" {choice}" for choice in item.choices], GROUP, None)
        found.append(Part(ids, (question,)))
        ids = following(tokenizer, "\n", item.text)
    return found
