"""The stream of StreamEval (StreamingLLM, arXiv 2309.17453, section 4.3): lines with facts, and questions about them.

The paper asks after every 10 lines what line 20 lines back said; its code is not published. Its lines are of the form
"line 7: REGISTER_CONTENT is <12345>", which a model of 135M parameters cannot look up even in a dense cache. So a line
here is a key of three words and a word ("Anna baker Paris = tiger"), and a question begins with other keys and their
words, which shows what is asked for. SmolLM2-135M then writes about half of the words right 5 lines back, and a fifth
to a third 20 lines back, in a dense cache as in a window; without the examples it writes hardly any.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.recall.scripts.script import Part, Question, ask, beginning, following
from sink_patch.evaluate.recall.scripts.words import CITIES, JOBS, NAMES, WORDS, short, without_end

CHOICES = 4
_HEADER = "Now read them again:\n"
_EXAMPLES = (0, 6, 1)  # lines back
ENOUGH = CHOICES + len(_EXAMPLES)
"""So many lines there are before anything is asked."""


@dataclass(frozen=True)
class Line:
    """A fact: a key, and the word that is asked for."""

    key: str
    word: str

    @property
    def text(self) -> str:
        return f"{self.key} = {self.word}\n"


@dataclass(frozen=True)
class Plan:
    """What is asked in the stream.

    Args:
        tokens: how long the stream is at least.
        distances: how many lines back the facts are that are asked for; 0 is the newest line.
        every: after every so many lines there are questions, one for each distance.
        seed: of the choice of words.

    Raises:
        SinkArgumentError: nothing would be asked.
    """

    tokens: int
    distances: tuple[int, ...] = (5, 20, 50, 100)
    every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SinkArgumentError(f"every={self.every}: give how many lines stand between two questions, 1 or more.")
        if not self.distances or min(self.distances) < 0:
            raise SinkArgumentError(f"distance={_list(self.distances)}: give one or more numbers of lines, 0 or more.")
        if self.tokens < 1:
            raise SinkArgumentError(f"The stream would have {self.tokens} tokens. Ask for 1 window or more.")


def lines(seed: int, words: Sequence[str] = WORDS) -> Iterator[Line]:
    """Lines without end.

    No name, job or city comes twice within 29 lines, no two of them within 800, and no word within three quarters of
    their number: in a window, neither a key nor a word is there twice.
    """
    rng = random.Random(seed)
    parts = [rng.sample(one, len(one)) for one in (NAMES, JOBS, CITIES)]
    for number, word in enumerate(without_end(rng, words)):
        yield Line(" ".join(one[number % len(one)] for one in parts), word)


def parts(tokenizer: Any, plan: Plan) -> list[Part]:
    """The stream in ids: each line is a part.

    Raises:
        SinkArgumentError: the stream ends before anything is asked.
    """
    found: list[Part] = []
    said: list[Line] = []
    places: list[tuple[int, int]] = []
    read = 0
    for line in lines(plan.seed, short(tokenizer, "Anna baker Paris =", WORDS)):
        ids = (() if said else beginning(tokenizer)) + following(tokenizer, "\n", line.text)
        said.append(line)
        places.append((read, read + len(ids)))
        read += len(ids)
        due = plan.distances if len(said) % plan.every == 0 and len(said) >= ENOUGH else ()
        found.append(Part(ids, tuple(_question(tokenizer, said, places, one) for one in due if one < len(said))))
        if read >= plan.tokens:
            break
    if not any(part.questions for part in found):
        raise SinkArgumentError(
            f"The stream has {len(found)} lines, and nothing is asked in it: every={plan.every}, "
            f"distance={_list(plan.distances)}. Ask for more windows, or for facts that are fewer lines back."
        )
    return found


def _question(tokenizer: Any, said: Sequence[Line], places: Sequence[tuple[int, int]], distance: int) -> Question:
    """About the line so many lines back, behind three others that are read again, the newest ones but that line.

    The wrong answers stand next to the right one, so that all are in the window or none is; but not those that are read
    again.
    """
    asked = len(said) - 1 - distance
    again = [len(said) - 1 - back for back in _EXAMPLES if back != distance and back < len(said)]
    nearest = sorted(range(len(said)), key=lambda number: (abs(number - asked), number))
    others = [number for number in nearest if number != asked and number not in again][: CHOICES - 1]
    prompt = _HEADER + "".join(said[number].text for number in again) + f"{said[asked].key} ="
    words = [said[asked].word, *(said[number].word for number in others)]
    return ask(tokenizer, prompt, [f" {word}" for word in words], distance, places[asked])


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
