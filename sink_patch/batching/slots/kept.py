"""Slots that outlive their request: a prompt that begins with all that one has read goes on in it.

They hold only room that nobody else asks for.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from sink_patch.batching.service import Service
from sink_patch.batching.slots.blocks import Blocks, Holder
from sink_patch.batching.slots.entries import Entry, Found, Slot, search, tokens_of
from sink_patch.batching.slots.readings import ModelNow, Readings
from sink_patch.batching.slots.streams import prompt_of, stream_of
from sink_patch.history.rows import RowHistory


@dataclass(frozen=True)
class Slots:
    """All that is known of the slots of one manager."""

    model: ModelNow
    readings: Readings
    kept: KeptSlots

    @classmethod
    def of(cls, service: Service, blocks: Blocks, model: ModelNow, batch_tokens: int) -> Slots:
        readings = Readings(service, model, batch_tokens)
        return cls(model, readings, KeptSlots(service, blocks, model, readings))


class KeptSlots:
    """The kept slots of one manager, the least recently used one first.

    Args:
        service: what is served.
        blocks: of its paged cache.
        model: as it is.
        readings: how requests are read.
    """

    def __init__(self, service: Service, blocks: Blocks, model: ModelNow, readings: Readings):
        self._service, self._blocks, self._model, self._readings = service, blocks, model, readings
        self._entries: dict[Entry, None] = {}
        self._running: dict[str, Slot] = {}  # copies from before the answers of requests that run
        self._version = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._entries and not self._running

    # ---- requests that come and begin
    def expect(self, state: Any) -> None:
        """A request has come; what it may go on in counts as used."""
        if self._entries:
            text = array("q", state.initial_tokens)
            for entry in [one for one in self._entries if any(tokens_of(slot, text) for slot in one.slots)]:
                self._entries[entry] = self._entries.pop(entry)

    def find(self, state: Any) -> Found | None:
        """The slot in which a request can begin."""
        stream = stream_of(state)
        if not self._entries or stream.is_one_of_many or state._true_initial_tokens:
            return None
        model = self._model.look()
        if model is None:
            return None
        for entry in [one for one in self._entries if one.model[0] != model[0]]:
            self._drop(entry)  # weights never become again what they were
        if stream.sought is None or stream.sought[0] != (self._version, model):
            same = [entry for entry in self._entries if entry.model == model]
            found = search(same, array("q", state.initial_tokens))
            if found and self._readings.too_long(self._readings.of(state, found).text):
                found = None
            stream.sought = (self._version, model), found
        known: Found | None = stream.sought[1]
        return known

    def take(self, state: Any, found: Found) -> None:
        """Give a request a slot; what else is kept of the talk goes."""
        found.entry.let_go(found.slot)
        self._drop(found.entry)
        self._blocks.hand_over(found.slot.key, state.request_id)

    def forget(self, found: Found) -> None:
        """Its room is needed for the request that was to begin in it."""
        self._drop(found.entry)

    # ---- requests that run and end
    def copy_before_answer(self, state: Any) -> None:
        """Copy the slot of a request where that is due, if there is room left."""
        stream, request_id = stream_of(state), state.request_id
        tokens = None if stream.reading is None else stream.reading.copy_at
        if tokens is None or tokens != state.position_offset or request_id in self._running:
            return
        key = object()
        if self._blocks.give(Holder(key, 0), tokens):
            self._blocks.copy(request_id, key)
            self._running[request_id] = self._slot(key, state.initial_tokens[:tokens], state)

    def keep(self, state: Any) -> None:
        """A request has ended well: its slot is kept, and not freed with it."""
        reading = stream_of(state).reading
        if reading is None or reading.model is None or not self._blocks.has(state.request_id):
            return
        # the last token is not read; if a batch that was prepared ahead has read it, it is read again in its place
        read = [*state.initial_tokens, *state.generated_tokens][:-1]
        if state.position_offset < len(read) or self._model.settings() != reading.model[1]:
            return
        before, key = self._running.pop(state.request_id, None), object()
        self._blocks.hand_over(state.request_id, key)
        ended = self._slot(key, read, state)
        begins_at_end = reading.begins_at_end and before is not None
        entry = Entry(reading.model, prompt_of(state), ended.read, begins_at_end, reading.goes_back, ended, before)
        for other in [one for one in self._entries if one.is_same_as(entry)]:
            self._drop(other)
        self._entries[entry] = None
        self._version += 1
        while len(self._entries) > self._service.keep:
            self._drop(next(iter(self._entries)))

    def ended(self, request_id: str) -> None:
        """A request is there no more, or has lost its blocks."""
        if (before := self._running.pop(request_id, None)) is not None:
            self._free(before)

    def _slot(self, key: object, read: list[int], state: Any) -> Slot:
        history = RowHistory().extended(read, self._service.sizes.window_length)
        return Slot.of(key, history, stream_of(state), is_complete=state.position_offset <= self._service.fewest)

    # ---- room
    def give_up(self, but: Entry | None = None) -> bool:
        """Give up one slot, the least needed one; returns whether there was one.

        Args:
            but: what is to stay, with both of its slots.
        """
        others = [entry for entry in self._entries if entry is not but]
        for entry in others:
            if (spare := entry.spare) is not None:
                entry.let_go(spare)
                self._free(spare)
                return True
        if self._running:
            self.ended(next(iter(self._running)))
            return True
        if others:
            self._drop(others[0])
        return bool(others)

    def give_up_beside(self, found: Found) -> bool:
        """Give up the other slot of the talk that a request goes on in; returns whether there was one."""
        others = [slot for slot in found.entry.slots if slot is not found.slot]
        for slot in others:
            found.entry.let_go(slot)
            self._free(slot)
        return bool(others)

    def clear(self) -> None:
        while self.give_up():
            pass

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry]
        for slot in entry.slots:
            self._free(slot)
        self._version += 1

    def _free(self, slot: Slot) -> None:
        self._blocks.free(slot.key)
        self._version += 1
