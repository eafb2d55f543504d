"""Random chats as token ids, and what of them whole-message eviction lets a forward see: plain Python over the ids.

It imports nothing of `sink_patch`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.support.tiny import VOCAB

ROLE, SYSTEM, USER = VOCAB - 1, VOCAB - 2, VOCAB - 3
TURN_START = ((ROLE,), (USER, ROLE), (USER, SYSTEM, USER))
"""Runs that begin a message; `USER` alone stands in texts too."""


def chat(
    seed: int, length: int, *, longest: int, runs: Sequence[Sequence[int]] = TURN_START, system: int = 3
) -> list[int]:
    """So many tokens of messages; the first one has `system` tokens, and the others up to `longest`."""
    rng = random.Random(seed)
    text = [*runs[0], *(rng.randint(2, VOCAB - 3) for _ in range(system - len(runs[0])))]
    while len(text) < length:
        text += [*rng.choice(runs), *(rng.randint(2, VOCAB - 3) for _ in range(rng.randint(0, longest)))]
    return text[:length]


def begins(text: Sequence[int], place: int, runs: Sequence[Sequence[int]]) -> bool:
    return any(list(text[place : place + len(run)]) == list(run) for run in runs)


@dataclass
class Window:
    """What is seen of one text, forward by forward.

    Args:
        text: ids of the stream.
        window_length, num_sink_tokens: of the cache.
        runs: that begin a message.
        floor: absolute index of the first token behind the sinks that has not left in a whole message.
        local: tokens that a sliding window of its own sees of the past, which must stay where it shares a mask.
        margin: of the newest tokens, in the forward and before it, those which must stay as they may be taken back.
        begins_inside: where a window began, behind the sinks, that did not begin with a message.
    """

    text: list[int]
    window_length: int
    num_sink_tokens: int
    runs: Sequence[Sequence[int]] = TURN_START
    floor: int = 0
    local: int = 0
    margin: int = 0
    begins_inside: list[int] = field(default_factory=list)

    def visible(self, seen: int, new: int) -> list[int]:
        """Absolute indices that a forward of `new` tokens after `seen` ones sees."""
        total, others, sinks = seen + new, self.window_length - self.num_sink_tokens, self.num_sink_tokens
        floor = max(self.floor, sinks)
        if seen == 0 or total <= sinks:
            return list(range(total))
        if sinks + total - floor > self.window_length:
            for start in range(floor, seen + 1):
                stays = sinks + seen - start >= min(seen, self.local) and total - start >= self.margin
                if total - start <= others and stays and begins(self.text[:total], start, self.runs):
                    floor = self.floor = start
                    break
        if new > others:
            first, sinks = seen, min(sinks, seen)
        else:
            first = max(floor, total - others)
            if first > sinks and not begins(self.text, first, self.runs):
                self.begins_inside.append(first)
        return [*range(sinks), *range(first, total)]
