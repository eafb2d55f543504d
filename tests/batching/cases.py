"""Requests that come and go, drawn by hypothesis, and whether each gets the text of `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from sink_patch.batching.managers import service_of
from tests.batching.serving import Asked, Driven, asked, batching, check, config, driven
from tests.support.tiny import tiny

UNTIED = {"tie_word_embeddings": False}  # else the next token is always the same one
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "mistral, a long window of its own": {"sliding_window": 128},
    "qwen3": {},
    "gemma3_text": {**UNTIED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
    "phi": {},
    "smollm3": {**UNTIED, "no_rope_layers": [1, 0]},
    "glm": {},
    "cohere2": {**UNTIED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
}
"""Settings of models of two layers: partial rotary, other pairs, windows of their own, layers without positions."""
CONTEXT = 40  # tokens; clocks are set back where a request comes there


def model(name: str, attention: str = "eager") -> Any:
    """One of `MODELS`."""
    context = {"max_position_embeddings": CONTEXT}
    return tiny(name.split(",", maxsplit=1)[0], layers=2, attention=attention, **{**context, **MODELS[name]})


@dataclass(frozen=True)
class Case:
    """Requests to one manager; the i-th comes before batch `joins[i]`, and `budget` is above what must be."""

    window_length: int
    num_sink_tokens: int
    piece: int | None
    page_size: int
    budget: int
    lengths: tuple[tuple[int, int], ...]
    joins: tuple[int, ...]
    room: int
    seed: int

    def requests(self) -> list[Asked]:
        return asked(self.lengths, self.seed)

    def config(self) -> Any:
        return config(self.window_length, self.num_sink_tokens, prefill_chunk_size=self.piece)

    def managers(self, tested: Any) -> Iterator[Driven]:
        """One, with so much room in a batch and in the cache that some requests wait for others."""
        longest, ring = max(prompt for prompt, _ in self.lengths), self.window_length - self.num_sink_tokens
        pieces = self.piece or max(ring, min(longest, CONTEXT))
        pages = -(-self.window_length // self.page_size)
        entries = {"page_size": self.page_size, "num_blocks": 2 * pages * self.room + 4}
        sizes = batching(max_batch_tokens=max(pieces, 4) + self.budget, **entries)
        with driven(tested, self.config(), sizes) as manager:
            yield manager


def cases(requests: int, windows: tuple[int, int] = (16, 64), longest: int = 3) -> st.SearchStrategy[Case]:
    """Cases of so many requests, of up to `longest` windows each."""

    @st.composite
    def drawn(draw: Any) -> Case:
        window_length = draw(st.integers(*windows))
        lengths = st.tuples(st.integers(1, longest * window_length), st.integers(1, longest * window_length))
        return Case(
            window_length=window_length,
            num_sink_tokens=draw(st.integers(0, 6)),
            piece=draw(st.none() | st.integers(4, 40)),
            page_size=draw(st.sampled_from([4, 5, 16])),
            budget=draw(st.sampled_from([0, 3, 400])),
            lengths=tuple(draw(st.lists(lengths, min_size=requests, max_size=requests))),
            joins=tuple(draw(st.lists(st.integers(0, 60), min_size=requests, max_size=requests))),
            room=draw(st.integers(1, requests)),
            seed=draw(st.integers(0, 99)),
        )

    return drawn()


def run(tested: Any, case: Case) -> tuple[list[Any], Driven]:
    """What a manager gives for each request, and the manager."""
    for manager in case.managers(tested):
        names = _run(manager, case)
        return [manager.done[names[index]] for index in range(len(case.joins))], manager
    raise AssertionError("there was no manager")


def _run(manager: Driven, case: Case) -> dict[int, str]:
    """The names of the requests, by their index."""
    coming = sorted(zip(case.joins, range(len(case.joins)), case.requests(), strict=True), key=lambda one: one[:2])
    names: dict[int, str] = {}

    def join(number: int) -> None:
        while coming and (coming[0][0] <= number or manager.is_idle):
            _, index, one = coming.pop(0)
            names[index] = manager.add(one)

    manager.run(join)
    return names


def check_case(tested: Any, case: Case) -> None:
    """Each text is that of `generate`; no request has more blocks than a window needs, and all are free in the end."""
    results, manager = run(tested, case)
    for one, result in zip(case.requests(), results, strict=True):
        check(tested, one, result, case.config())
    assert service_of(manager.manager) is not None
    assert manager.most <= -(-case.window_length // case.page_size)
    assert manager.free == 1.0
