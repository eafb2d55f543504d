"""The ids that the window of a stream holds: what looks back over the text sees these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import CacheStateError
from sink_patch.rules.plans import held
from sink_patch.rules.rows import Row
from sink_patch.streaming.bound import streams_of

_BLIND = {
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper"),
    *("EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper", "InfNanRemoveLogitsProcessor", "MaxTimeCriteria"),
    *("LogitNormalization", "SuppressTokensLogitsProcessor", "EosTokenCriteria"),
}
"""Processors and criteria that do not look at ids, or at the newest ones alone."""


def newest(cache: SinkCache, ids: torch.Tensor) -> torch.Tensor:
    """Those of ids [1, columns] that are in the window; the first ones are its sinks, the last ones its newest."""
    sinks, others = _held(cache)
    return torch.cat((ids[:, :sinks], ids[:, ids.shape[1] - others :]), dim=1)


def read(cache: SinkCache, given: torch.Tensor, looking: Sequence[Any]) -> torch.Tensor:
    """Those of the window [1, columns] when a prompt is in, also of what was read before it.

    Args:
        given: ids of the prompt, [1, columns].
        looking: what may look at them: logits processors and stopping criteria.

    Raises:
        CacheStateError: they are not known, and something looks at them.
    """
    if given.shape[1] == cache.get_seq_length():  # all of the text
        return newest(cache, given)
    sinks, others = _held(cache)
    rows = streams_of(cache).history.rows
    ids = rows[0].ends(sinks, others) if rows else None
    if ids is not None:
        return torch.tensor([[*ids[0], *ids[1]]], device=given.device)
    names = [type(one).__name__ for one in looking if type(one).__name__ not in _BLIND]
    if names:
        raise CacheStateError(
            f"{', '.join(names)} would look back over the text in a stream that goes on with {cache!r}, and the ids of "
            "all that its window holds are not known any more (embeddings, or more sinks than are remembered). Leave "
            "the option out, or begin without past_key_values."
        )
    return torch.zeros(1, sinks + others, dtype=torch.long, device=given.device)


def _held(cache: SinkCache) -> tuple[int, int]:
    """How many of the first tokens are in the window, and how many of the newest ones."""
    rows = streams_of(cache).rows or (Row(),)
    return held(rows[0], cache.window_length, cache.num_sink_tokens)
