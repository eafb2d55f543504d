"""Talks of several users at once in a manager that keeps slots, and the same talks turn by turn in `generate`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sink_patch
from tests.batching.serving import Asked, Driven, check, config
from tests.kept.talk import counted
from tests.support.tiny import tokens


def keeping(window_length: int, num_sink_tokens: int, keep: int = 8, **entries: Any) -> Any:
    """A generation config that asks for sinks and kept streams."""
    made = config(window_length, num_sink_tokens, **entries)
    made.cache_config["keep_streams"] = keep
    return made


@dataclass
class Talk:
    """One user: what was asked and answered so far.

    Args:
        news: tokens of each message that follows, and of each answer.
        seed: of the ids.
        strips: of how many first tokens of an answer the next prompt knows nothing.
    """

    news: Sequence[tuple[int, int]]
    seed: int
    strips: int = 0
    turns: list[tuple[Asked, Any, int]] = field(default_factory=list)
    name: str | None = None
    history: list[int] = field(default_factory=list)

    def prompt(self) -> Asked | None:
        """The next one; None: it is over."""
        number = len(self.turns)
        if number == len(self.news):
            return None
        length, new = self.news[number]
        message = tokens(length, seed=1000 * self.seed + number)[0].tolist()
        opening = tokens(5, seed=77)[0].tolist() if self.strips else []
        return Asked([*self.history, *message, *opening], new)

    def go_on(self, manager: Driven) -> None:
        """Note an answer that has come, and ask what is next."""
        if self.name is not None:
            if self.name not in manager.done:
                return
            self._note(manager.done[self.name], manager.read[self.name])
            self.name = None
        if (asked := self.prompt()) is not None:
            self.asked, self.name = asked, manager.add(asked)

    def _note(self, result: Any, read: int) -> None:
        self.turns.append((self.asked, result, read - len(result.generated_tokens) + 1))
        kept = self.asked.prompt[: -5 if self.strips else None]
        self.history = [*kept, *result.generated_tokens[self.strips :]]


def talks(count: int, turns: int, seed: int = 0, least: int = 2, strips: int = 0) -> list[Talk]:
    """Users whose messages and answers have random lengths; the second message of each is a long one."""
    rng, made = random.Random(seed), []
    for user in range(count):
        news = [(rng.randint(1, 20) + (30 if turn == 1 else 0), rng.randint(least, 14)) for turn in range(turns)]
        made.append(Talk(news, 100 * seed + user, strips))
    return made


def hold(manager: Driven, users: Sequence[Talk], each: Callable[[int], None] = lambda number: None) -> None:
    """All talks, at once."""

    def go_on(number: int) -> None:
        each(number)
        for user in users:
            user.go_on(manager)

    manager.run(go_on)
    assert all(user.prompt() is None for user in users)


def check_talks(model: Any, users: Sequence[Talk], asked_for: Any) -> int:
    """Each text, and how many tokens were read for it, is that of `generate` with kept streams, turn by turn.

    Returns:
        How many turns were read anew, as there what was kept is forgotten before them.
    """
    lost = 0
    with counted(model) as forwards:  # a hook is a setting of the model: there is one for all calls
        for user in users:
            sink_patch.kept_streams.clear(model)
            for number, (one, result, read) in enumerate(user.turns):
                if number and read == len(one.prompt):
                    sink_patch.kept_streams.clear(model)
                    lost += 1
                forwards.clear()
                check(model, one, result, asked_for)
                assert read == sum(forwards) - (one.new - 1)
    sink_patch.kept_streams.clear(model)
    return lost


def blocks_of(manager: Driven) -> int:
    """Blocks that are held, by requests and by what is kept."""
    return blocks_of_cache(manager.processor.cache)


def blocks_of_cache(cache: Any) -> int:
    allocators = cache.cache_allocators.values()
    return sum(len(held) for one in allocators for held in one.block_table.values())
