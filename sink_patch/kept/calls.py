"""One call of `generate` that may go on in a kept stream, and whose own stream is kept when it ends."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.kept.begun import Begun, noted_on
from sink_patch.kept.entry import KeptStream, history_of
from sink_patch.kept.sameness import settings_of
from sink_patch.kept.store import store
from sink_patch.kept.texts import tokens_ahead
from sink_patch.models.entries import unwrapped
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.forward import Phase
from sink_patch.streaming.media.given import sees_both_ways

_COUNT = "_keep_streams"  # on the generation config of a call, from when its cache is made until decoding begins


def note(generation_config: Any, keep_streams: int) -> None:
    """Remember how many streams are to be kept by a call whose cache is made by us."""
    setattr(generation_config, _COUNT, keep_streams)


class KeptCall:
    """A call whose stream is kept.

    Args:
        model: of transformers, unwrapped.
        begun: the prompt, what the model is now, and what was found. With images that was before encoders ran.
        fresh: an empty cache, with which the call goes on if nothing was found.
        most: tokens that the stream will have read when the call ends, at most.
        keep: how many streams of the model are kept.
        is_returned: whether the caller of `generate` gets the cache, so that what is kept must be another one.
    """

    def __init__(self, model: nn.Module, begun: Begun, fresh: SinkCache, most: int, keep: int, *, is_returned: bool):
        self._model, self._begun, self._prompt, self._found = model, begun, begun.prompt, begun.found
        self._most, self._keep, self._is_returned = most, keep, is_returned
        self._read = 0 if self._found is None else self._found.tokens
        self.cache = fresh if begun.cache is None else begun.cache
        self._before: SinkCache | None = None
        if self._found is not None and self._needs_copy:
            if self._is_whole:
                self._before = self._found.cache
            elif not self.columns_ahead:
                self._before = self.cache.clone()

    @classmethod
    def of(
        cls,
        instance: nn.Module,
        fresh: SinkCache,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: Mapping[str, Any],
    ) -> KeptCall | None:
        """From the arguments of `_sample` and its kin; None: nothing was asked for, or this call is none to be kept.

        Args:
            fresh: the cache that was made for the call.
            input_ids: [rows, columns].
        """
        keep: int = vars(generation_config).pop(_COUNT, 0)
        if getattr(generation_config, "is_assistant", None):  # its config is a copy of that of its target
            return None
        if not keep or streams_of(fresh).facts.one_by_one is not None:  # it could not go on with many tokens at once
            return None
        noted = noted_on(generation_config)
        if noted is not None:
            begun = noted.at_prompt(instance)
        else:
            begun = Begun.of_text(instance, input_ids, generation_config, model_kwargs, fresh.sizes)
        if begun is None:
            return None
        most = max(generation_config.max_length, input_ids.shape[1]) - begun.prompt.padding
        is_returned = bool(generation_config.return_dict_in_generate)
        return cls(unwrapped(instance), begun, fresh, most, keep, is_returned=is_returned)

    @functools.cached_property
    def columns_ahead(self) -> int:
        """How many of the columns that are new go in before the copy is made, all images among them; 0: none is made.

        A prompt whose images see themselves in both directions is one to its model, and goes in at once.
        """
        new, images = len(self._prompt.text) - self._read, self._prompt.images_end - self._read
        ahead = tokens_ahead(new, begins_at_end=self._begins_at_end) if self._needs_copy else 0
        if not ahead or images == new or (images > 0 and sees_both_ways(self._model)):
            return 0
        return max(ahead, images) + (0 if self._read else self._prompt.padding)

    def copy_before_answer(self) -> None:
        """Copy the cache, whose newest tokens may be overwritten soon."""
        self._before = self.cache.clone()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, the call decodes; however it ends, a stream that is whole by then is kept."""
        has_ended = False
        try:
            yield
            has_ended = True
        finally:
            self._put(has_ended=has_ended)

    def _put(self, *, has_ended: bool) -> None:
        """Keep the stream, if it is whole and the model is as it was.

        Args:
            has_ended: whether the call came to its end. A stream that was broken off takes no other one's place: the
                next call may go on in either.
        """
        streams = streams_of(self.cache)
        streams.check_between_forwards("kept")  # gives up a forward that was interrupted
        rows = streams.history.rows
        if streams.forward.phase is Phase.BROKEN or not rows or rows[0].seen <= self._read:
            return
        if settings_of(self._model) != self._begun.settings:
            return
        ended = self.cache.clone() if self._is_returned else self.cache
        is_shared = self._found is not None and self._before is self._found.cache
        entry = KeptStream(
            self.cache.sizes,
            self._begun.settings,
            len(self._prompt.text),
            ended,
            self._before,
            begins_at_end=is_shared and self._begins_at_end,
        )
        store.put(self._model, self._begun.weights, entry, self._keep, self._replaced() if has_ended else None)

    def _replaced(self) -> KeptStream | None:
        if self._found is None or not self._found.entry.is_continued_by(self._prompt, self._found.cache):
            return None
        return self._found.entry

    @property
    def _is_whole(self) -> bool:
        """Whether the call goes on in a whole kept stream, so that its cache can stand for this call's beginning."""
        return self._found is not None and history_of(self._found.cache).seen == self._found.tokens

    @functools.cached_property
    def _begins_at_end(self) -> bool:
        """Whether the call goes on where an answer ended, so that answers seem to be repeated as they were."""
        if self._found is None or not self._is_whole:
            return False
        entry, cache = self._found.entry, self._found.cache
        is_other = entry.begins_at_end and not entry.is_continued_by(self._prompt, cache)
        return cache is entry.ended or is_other

    @property
    def _needs_copy(self) -> bool:
        """Whether what is read before the answer may be overwritten in this call."""
        streams = streams_of(self.cache)
        return streams.facts.has_states or self._most > streams.store.slots.fewest
