"""Requests that come and go, drawn by hypothesis, and whether each gets the text of `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from sink_patch.batching.managers import service_of
from tests.batching.serving import Asked, Driven, asked, batching, check, config, driven
from tests.support.tiny import FAMILIES, tiny, variants

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


def stacks(model_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of models of two layers of a family of the oracle test, with each kind of layer that it has."""
    sliding, full = "sliding_attention", "full_attention"
    kinds = dict(variants(model_type))
    if full in kinds:
        types = {"layer_types": [full, full]} if "layer_types" in kinds[full] else {}
        yield model_type, {**kinds[full], **types}
    if sliding in kinds:
        for name, window in (("a short window of its own", 9), ("a long window of its own", 128)):
            types = {"layer_types": [sliding, full]} if "layer_types" in kinds[sliding] else {}
            yield f"{model_type}, {name}", {**types, "sliding_window": window}
    if "no_rope_layers=0" in kinds:
        yield f"{model_type}, one layer without positions", {"no_rope_layers": [1, 0]}


def model(name: str, attention: str = "eager", **settings: Any) -> Any:
    """A tiny one of two layers: one of `MODELS`, or with these settings."""
    context = {} if "n_positions" in FAMILIES.get(model_type_of(name), {}) else {"max_position_embeddings": CONTEXT}
    given = settings or MODELS[name]
    return tiny(model_type_of(name), layers=2, attention=attention, **{**context, **given})


def model_type_of(name: str) -> str:
    """Of one of `MODELS`, or of a stack."""
    return name.split(",", maxsplit=1)[0]


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
        pieces = self.piece or max(ring, min(longest, tested.config.max_position_embeddings))
        pages = -(-self.window_length // self.page_size)
        entries = {"page_size": self.page_size, "num_blocks": 2 * pages * self.room + 4}
        sizes = batching(max_batch_tokens=max(pieces, 4) + self.budget, **entries)
        with driven(tested, self.config(), sizes) as manager:
            yield manager


def cases(requests: int, windows: tuple[int, int] = (16, 64), longest: int = 3) -> st.SearchStrategy[Case]:
    """Cases of so many requests: prompts of up to `longest` windows, texts of up to one, but one text of `longest`."""

    @st.composite
    def drawn(draw: Any) -> Case:
        window_length = draw(st.integers(*windows))
        most = longest * window_length
        length = st.tuples(st.integers(1, most), st.integers(1, window_length))
        (first, _), *others = draw(st.lists(length, min_size=requests, max_size=requests))
        return Case(
            window_length=window_length,
            num_sink_tokens=draw(st.integers(0, 6)),
            piece=draw(st.none() | st.integers(4, 40)),
            page_size=draw(st.sampled_from([4, 5, 16])),
            budget=draw(st.sampled_from([0, 3, 400])),
            lengths=((first, most), *others),
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


@dataclass(frozen=True)
class Checked:
    """What a case has shown.

    Args:
        requests: how many there were.
        past_windows: of them, how many were longer than three windows.
        set_back: of them, how many had their clock set back.
        most_beside: of them, how many were in one batch at most.
        tokens: that were generated.
        off: by how much log-probabilities differ from those of `generate`, at most.
    """

    requests: int
    past_windows: int
    set_back: int
    most_beside: int
    tokens: int
    off: float


def check_case(tested: Any, case: Case) -> Checked:
    """Each text is that of `generate`; no request has more blocks than a window needs, and all are free in the end."""
    results, manager = run(tested, case)
    off = max(check(tested, one, result, case.config()) for one, result in zip(case.requests(), results, strict=True))
    service = service_of(manager.manager)
    assert service is not None
    assert manager.most <= -(-case.window_length // case.page_size)
    assert manager.free == 1.0
    totals = [prompt + new for prompt, new in case.lengths]
    return Checked(
        requests=len(totals),
        past_windows=sum(total > 3 * case.window_length for total in totals),
        set_back=sum(total > service.horizon for total in totals),
        most_beside=manager.beside,
        tokens=sum(new for _, new in case.lengths),
        off=off,
    )
