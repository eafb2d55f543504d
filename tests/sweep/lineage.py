"""What each row of a sink cache has been through: forwards, tokens taken back, rows that became others.

It is replayed, row by row, through the naive cache of tests/support/replay.py; each forward must give the same logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from sink_patch import SinkCache
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.rows import Rows
from tests.support.oracle import relative_error
from tests.support.replay import ReplayCache, cache_name, named_inputs


@dataclass(frozen=True)
class Fed:
    """Real tokens of one row in one forward: ids [tokens], or embeddings [tokens, hidden]; last logits [vocab]."""

    inputs: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class TakenBack:
    """The newest tokens of a row have been taken back."""

    count: int


Row = tuple[Fed | TakenBack, ...]


class Lineages:
    """Follows the sink caches of a model while it is watched."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._rows: dict[int, list[Row]] = {}  # by the identity of the streams of a cache
        self._kept: list[Any] = []  # so that no identity is used twice
        self._before: tuple[Any, torch.Tensor, list[int]] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, all forwards of the model and operations on rows are noted."""
        SinkCache(2, 1, model=self._model)  # its hooks come first, so that ours see what the model sees
        hooks = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end, with_kwargs=True),
        ]
        take_back, select_rows = Rows.take_back, Rows.select_rows

        def taken_back(rows: Rows, counts: Sequence[int], columns: int = 0) -> int | None:
            refused = take_back(rows, counts, columns)
            if refused is None and any(counts):
                held = self._rows.get(id(rows), [])
                self._change(rows, [(*row, TakenBack(count)) for row, count in zip(held, counts, strict=bool(held))])
            return refused

        def selected(rows: Rows, indices: torch.Tensor) -> None:
            select_rows(rows, indices)
            picked = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            if held := self._rows.get(id(rows)):
                self._change(rows, [held[row] for row in picked.tolist()])

        try:
            with mock.patch.object(Rows, "take_back", taken_back), mock.patch.object(Rows, "select_rows", selected):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def rows_of(self, cache: SinkCache) -> list[Row]:
        """The rows of a cache, in their order."""
        return self._rows[id(streams_of(cache))]

    def goes_on_in(self, cache: SinkCache, other: SinkCache) -> None:
        """`other` holds what `cache` held: it was saved and loaded, or copied."""
        self._change(streams_of(other), self.rows_of(cache))

    def _change(self, streams: Any, rows: list[Row]) -> None:
        self._kept.append(streams)
        self._rows[id(streams)] = rows

    def _begin(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get(cache_name(self._model))
        self._before = None
        if isinstance(cache, SinkCache):
            name = "inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"
            streams = streams_of(cache)
            rows = streams.rows or []
            self._before = streams, kwargs[name].detach().clone(), [row.seen for row in rows]

    def _end(self, _model: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        if self._before is None:
            return
        streams, inputs, seen = self._before
        held = self._rows.get(id(streams)) or [()] * len(inputs)
        new = [row.seen - before for row, before in zip(streams.rows, seen or [0] * len(inputs), strict=True)]
        logits = output.logits[:, -1].detach().clone()  # [rows, vocab]
        columns = inputs.shape[1]
        self._change(
            streams,
            [
                (*row, Fed(inputs[index, columns - count :], logits[index])) if count else row
                for index, (row, count) in enumerate(zip(held, new, strict=True))
            ],
        )


def tokens_of(row: Row) -> list[int]:
    """The ids that a row holds in the end; -1 for what was given as an embedding."""
    ids: list[int] = []
    for event in row:
        if isinstance(event, TakenBack):
            ids = ids[: len(ids) - event.count]
        else:
            ids += event.inputs.tolist() if event.inputs.ndim == 1 else [-1] * len(event.inputs)
    return ids


@torch.no_grad()
def worst_error(model: PreTrainedModel, row: Row, window: int, sinks: int) -> float:
    """How far the logits of any forward of a row are from those of the naive cache, relative to their size."""
    cache, worst = ReplayCache(model, window, sinks), 0.0
    for event in row:
        if isinstance(event, TakenBack):
            cache.crop(event.count)
            continue
        name = "input_ids" if event.inputs.ndim == 1 else "inputs_embeds"
        given = named_inputs(model, cache.start(len(event.inputs)))
        out = model(use_cache=True, **{name: event.inputs[None], cache_name(model): cache}, **given)
        cache.finish()
        worst = max(worst, relative_error(event.logits[None], out.logits[:, -1]))
    return worst
