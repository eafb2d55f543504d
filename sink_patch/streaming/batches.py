"""The rows of a cache as its user sees them: which of them stay, in what order, and which come in."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import torch

from sink_patch.arguments import Sizes, whole_number
from sink_patch.errors import CacheStateError, SinkArgumentError, UnboundCacheError
from sink_patch.rules.turns import seen_by_sliding_windows
from sink_patch.streaming.bound import StreamingCache
from sink_patch.streaming.streams import Streams


class BatchedCache(StreamingCache):
    """A cache whose rows come and go."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was.

        Raises:
            SinkArgumentError, CacheStateError: as for `batch_select_indices`.
        """
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times.

        Raises:
            SinkArgumentError: no integer, or a negative one.
            CacheStateError: a forward is in progress.
        """
        repeats = whole_number("repeats", repeats, 2, "of copies")
        if self._streams is not None:
            rows = torch.arange(len(self._streams.rows or ()), device="cpu")
            self._streams.select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order; a boolean mask over the rows will do too.

        Where none are kept, the cache is as after `reset()`.

        Raises:
            SinkArgumentError: no numbers of rows that there are, or a mask over another number of rows. (Numbers on
                another device than the CPU are not looked at, as that would wait for it; there torch raises.)
            CacheStateError: a forward is in progress.
        """
        if self._streams is not None:
            self._streams.select_rows(_chosen(indices, len(self._streams.rows or ())))

    def join(self, other: BatchedCache) -> None:
        """Put copies of the rows of another cache of the same model and sizes below the rows of this one.

        Each row goes on as it would alone, however much each has read. `other` stays as it is, and no tensor is shared;
        a cache that has read nothing has no rows. While the rows are copied, this cache takes its memory twice.

        `get_seq_length()` becomes the longer one of the two: in a mask over the whole stream, the columns that the
        other rows do not have are padding to their left. Whether the past is recorded is said by this cache; rows of
        one that did not record it can give back what they read from now on.

        Raises:
            SinkArgumentError: `other` is no `SinkCache`, or one of other sizes.
            UnboundCacheError: one of the two has no model.
            CacheStateError: they belong to different models; their tensors have another dtype or device; one is in the
                middle of a forward, or has lost tokens; or this one is in a call of `generate`. With `evict="turns"`
                and sliding windows: a row holds fewer tokens than those see. Neither cache is changed then.
        """
        join(*_checked(self, other))


def _chosen(indices: Any, count: int) -> torch.Tensor:
    """Which of `count` rows are meant, as integers [rows chosen]; count 0: there are no rows, and nothing to choose.

    Raises:
        SinkArgumentError: as `BatchedCache.batch_select_indices` says.
    """
    try:
        chosen = indices if isinstance(indices, torch.Tensor) else torch.tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_rows(indices, count, f"{type(indices).__name__} is no list of numbers") from error
    if chosen.dim() != 1:
        raise _no_rows(indices, count, f"it has {chosen.dim()} dimensions and not one")
    if not len(chosen) or not count:
        return chosen.new_empty(0, dtype=torch.long)
    if chosen.dtype == torch.bool:
        if len(chosen) != count:
            raise _no_rows(indices, count, f"it is a mask over {len(chosen)} rows")
        return chosen.nonzero()[:, 0]
    if chosen.is_floating_point() or chosen.is_complex():
        raise _no_rows(indices, count, f"it holds numbers of type {chosen.dtype}")
    chosen = chosen.long()
    if chosen.device.type == "cpu":
        try:
            torch.empty(count, device="cpu").index_select(0, chosen)
        except IndexError as error:
            raise _no_rows(indices, count, "not all of them are there") from error
    return chosen


def _no_rows(indices: Any, count: int, matter: str) -> SinkArgumentError:
    return SinkArgumentError(
        f"The rows {indices!r} of a SinkCache with {count} rows were asked for, but {matter}. Give the numbers of rows "
        f"from 0 to {count - 1}, or a boolean mask over all of them."
    )


def join(ours: Streams, theirs: Streams) -> None:
    """Put copies of the rows of other streams below ours, if they fit (`BatchedCache.join` looks)."""
    if not theirs.rows:
        return
    have, have_theirs = ours.store.slots.spare, theirs.store.slots.spare
    spare = max(have, have_theirs) if ours.recording else have
    if have_theirs != spare:
        theirs = copy.deepcopy(theirs)
        theirs.lay_out(spare)
    ours.lay_out(spare)
    rows = ours.rows or []
    joined = ours.store.joined(theirs.store, (len(rows), len(theirs.rows or ())))
    with ours.forward.broken_unless_finished("Rows could not be joined to this cache to the end."):
        ours.store.take(joined)
        ours.history.join(theirs.history)
        ours.rows, ours.columns = [*rows, *(theirs.rows or ())], max(ours.columns, theirs.columns)
    if ours.recording and theirs.recording:
        ours.recalled = max(ours.recalled, theirs.recalled)


def _checked(cache: BatchedCache, other: object) -> tuple[Streams, Streams]:
    """The streams of two caches, if rows of the other one can join.

    Raises:
        SinkArgumentError, UnboundCacheError, CacheStateError: as `BatchedCache.join` says.
    """
    if not isinstance(other, BatchedCache):
        raise SinkArgumentError(f"{cache!r} was asked to join a {type(other).__name__}. Give another SinkCache.")
    ours, theirs = _bound(cache), _bound(other)
    _check_sizes(cache.sizes, other.sizes)
    model = ours.entrances[0]()
    if model is None or theirs.entrances[0]() is not model or not ours.facts.same_as(theirs.facts):
        raise CacheStateError(
            f"{cache!r} was asked to join {other!r}, which belongs to another model, or to what this one was before it "
            "was changed. Bind both to one model that is still there, by SinkCache(..., model=model)."
        )
    for streams in (ours, theirs):
        streams.check_between_forwards("joined")
        streams.forward.check_whole(f"{cache!r} cannot join {other!r}. ")
    if ours.call is not None:
        raise CacheStateError(
            f"{cache!r} cannot be joined in the middle of a call of generate, which counts its rows. Wait for its end."
        )
    _check_tensors(ours, theirs)
    _check_messages(ours, theirs)
    return ours, theirs


def _bound(cache: BatchedCache) -> Streams:
    if cache._streams is None:
        raise UnboundCacheError(
            f"{cache!r} cannot be joined: it has no model, and so holds nothing. Make it with SinkCache(..., "
            "model=model)."
        )
    return cache._streams


def _check_sizes(here: Sizes, there: Sizes) -> None:
    names = [field.name for field in fields(here) if getattr(here, field.name) != getattr(there, field.name)]
    if names:
        differ = ", ".join(f"{name}={getattr(here, name)!r} and {name}={getattr(there, name)!r}" for name in names)
        raise SinkArgumentError(
            f"Caches of {differ} were asked to join. Make both with the same arguments: rows of one batch are kept and "
            "turned alike."
        )


def _check_tensors(ours: Streams, theirs: Streams) -> None:
    found = ours.store.difference(theirs.store) if ours.rows and theirs.rows else None
    if found is not None:
        raise CacheStateError(
            f"These caches cannot be joined, as they hold {found}. Feed the texts again with the model as it is now; "
            "it was moved or cast in between."
        )


def _check_messages(ours: Streams, theirs: Streams) -> None:
    """One mask serves all rows, so where there are sliding windows each row must hold what those see (leaving.py)."""
    rows = [*(ours.rows or ()), *(theirs.rows or ())]
    if not any(row.dropped for row in rows) or not theirs.rows or len(rows) == 1:
        return
    missing = [seen_by_sliding_windows(row, ours.store.kinds) - (row.seen - row.dropped) for row in rows]
    if max(missing) > 0:
        raise CacheStateError(
            f"These caches cannot be joined yet: messages or images have left row {missing.index(max(missing))} of "
            f"them (counted through both), and it holds {max(missing)} tokens fewer than the sliding windows of this "
            "model see. Feed that row so many tokens first."
        )
