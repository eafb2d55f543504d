"""The prompt of a call of `generate`: which of its columns are new, and how they go into a sink cache."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.generation.inputs.brought import brought
from sink_patch.generation.inputs.later import check_is_text
from sink_patch.generation.inputs.pieces import PieceInputs, split_ahead, stream_length, tell_of_pieces, with_types_of
from sink_patch.generation.turns import Turn
from sink_patch.kept.calls import KeptCall
from sink_patch.models.entries import input_device
from sink_patch.rules.columns import Columns
from sink_patch.rules.padding import check_left_padded, is_left_padded
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.inputs import Call
from sink_patch.streaming.media.cut import Cut
from sink_patch.streaming.media.given import check_cut, media_among, without_media


class Prompt:
    """The prompt of one call, from the arguments of `_sample` and its kin.

    With `prefill_chunk_size=400`, `feed_ahead` runs the model over 400 and 400 of 1000 tokens; transformers then runs
    its first forward over all or over what it takes for new, and the hooks drop what the cache has read: 200 are left.

    Args:
        model: of the call.
        cache: of the call, bound to the model.
        input_ids: the whole history, or the new tokens alone, [rows, columns].
        generation_config, model_kwargs: of the call; changed where transformers must be told what is new.
        is_new: whether it is known that all that is given is new, and real, whatever a mask says.
        is_whole: whether it is known that all of the stream is given.

    Raises:
        HistoryMismatchError: the ids do not go on with what the cache has read.
        SinkArgumentError: what `Columns.of_call` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: SinkCache,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: MutableMapping[str, Any],
        *,
        is_new: bool = False,
        is_whole: bool = False,
    ):
        embeds = model_kwargs.get("inputs_embeds")
        self._model, self._cache, self._streams = model, cache, streams_of(cache)
        self._inputs = input_ids if embeds is None else embeds  # [rows, columns] or [rows, columns, hidden]
        told = (generation_config, model_kwargs)
        self.columns = self._new_columns(model_kwargs) if is_new else self._told(*told, is_whole=is_whole)
        self._mask = model_kwargs.get("attention_mask")
        self._piece_inputs = PieceInputs(model, self._inputs, self.columns.stream, model_kwargs)
        self._turn = Turn.of_call(self._streams, self.columns, self._inputs, self._mask, generation_config)
        self.columns = self._turn.columns
        self._piece_size = self._size_of_pieces(generation_config)
        self._media, self._positions = media_among(model, model_kwargs), model_kwargs.get("position_ids")
        self._brought = brought(model, generation_config, input_ids if self._media else None)
        if self._media and (self._piece_size or 0) >= self.columns.new:
            self._piece_size = None
        if self._media and self._piece_size is not None:
            check_cut(model, self._media, self.columns.new)
        generation_config.prefill_chunk_size = None  # else transformers would cut the rest once more

    def _told(self, generation_config: Any, model_kwargs: MutableMapping[str, Any], *, is_whole: bool) -> Columns:
        read, given = self._cache.get_seq_length(), self._inputs.shape[1]
        told = stream_length(generation_config, model_kwargs, is_whole=is_whole or not read)
        columns = Columns.of_call(read, given, told)
        if columns.stream != (told or given):
            self._mask_whole_stream(columns, model_kwargs)
        return columns

    def _new_columns(self, model_kwargs: MutableMapping[str, Any]) -> Columns:
        """Without a mask over the whole stream, which may be millions of columns."""
        model_kwargs["attention_mask"] = None
        return Columns.of_new(self._cache.get_seq_length(), self._inputs.shape[1])

    def read(self) -> Any:
        """Feed all of the prompt; returns what the model returned for its last piece."""
        try:
            self.feed_ahead()
            unread = self.columns.stream - self._cache.get_seq_length()
            last = self._inputs[:, self._inputs.shape[1] - unread :]
            inputs = self._piece_inputs.of(last, self._cache.get_seq_length())
            return self._model(**inputs, **({"position_ids": self._positions} if self._media else {}))
        finally:
            self._streams.call = None

    def feed_ahead(self, *, drafting: bool = False, kept: KeptCall | None = None) -> None:
        """Feed all of the prompt but its last piece; the first forward of transformers is to feed just that.

        transformers splits prompts as well, but most of its versions start again at the first token where the cache is
        not empty, and none splits embeddings.

        Args:
            drafting: leave the last token alone to transformers, whatever the pieces are: it is followed by drafts.
            kept: a copy of its cache is made in between, if it wants one.
        """
        ahead = 0 if kept is None or not self._media else kept.columns_ahead
        if self._media:  # its pieces are cut where images are in their places
            self._feed_text_before()
        else:
            self._feed_ahead(drafting, kept)
        if kept is not None and ahead:
            self._feed_images_ahead(ahead)
            kept.copy_before_answer()
            self._streams.call = Call(self.columns, drafting, without_images=True)
        else:
            self._streams.call = self._call_with_images(self.columns, drafting)

    def _call_with_images(self, columns: Columns, drafting: bool = False) -> Call:
        cut = Cut(self._piece_size) if self._media and self._piece_size is not None else None
        return Call(columns, drafting, cut, self._brought.digests, self._brought.media)

    def _feed_images_ahead(self, ahead: int) -> None:
        """So many of the new columns, all images among them: what is behind them is text."""
        new, read = self.columns.new, self.columns.read
        first, end = self._inputs[:, self._inputs.shape[1] - new :][:, :ahead], read + ahead
        self._streams.call = call = self._call_with_images(Columns(read, ahead, end))
        call.media = with_types_of(call.media, new, ahead)
        inputs = self._piece_inputs.of(first, read)
        positions = self._positions
        if isinstance(positions, torch.Tensor) and positions.ndim > 2:  # of several coordinates, for all columns
            inputs["position_ids"] = positions[..., positions.shape[-1] - new :][..., :ahead]
        self._model(**inputs)

    def _feed_ahead(self, drafting: bool, kept: KeptCall | None) -> None:
        unread, new = self._parts(self._inputs[:, self._inputs.shape[1] - self.columns.new :])
        size, ahead = self._piece_size, 0 if kept is None else kept.columns_ahead
        first = [unread, *torch.split(new[:, :ahead], size or max(ahead, 1), dim=1)]
        second = split_ahead(new[:, ahead:], size, drafting=drafting)
        if any(piece.shape[1] for piece in (*first, *second)):
            self._piece_inputs.check()
        self._turn.take_back(self._streams)
        self._feed_all(first)
        if kept is not None and ahead:
            kept.copy_before_answer()
        self._feed_all(second)

    def _feed_text_before(self) -> None:
        """In a later turn with images: what the cache has not read of the answer, where padding stands behind it."""
        if not self._cache.get_seq_length():
            return
        text, _ = self._parts(self._inputs[:, self._inputs.shape[1] - self.columns.new :])
        self._turn.take_back(self._streams)
        if text.shape[1]:
            check_is_text(self._model, text)
            inputs = self._piece_inputs.of(text, self._cache.get_seq_length())
            self._model(**without_media(self._model, inputs))

    def _parts(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns that the cache has not read in two parts, each padded to the left: the first is mostly empty.

        Where rows that ended at different times go on with texts of different lengths, padding stands before the new
        text, behind what was not read yet of the answer: its last token, and what is taken back.

        Raises:
            SinkArgumentError: padding to the right of a token.
        """
        if self._mask is None:
            return columns[:, :0], columns
        real, end = self._mask[:, self._mask.shape[1] - columns.shape[1] :] != 0, self._turn.end_of_answer
        place = 0 if end is None or is_left_padded(real) else end - self.columns.read
        check_left_padded(real[:, :place])
        check_left_padded(real[:, place:])
        return columns[:, :place], columns[:, place:]

    def _feed_all(self, pieces: Sequence[torch.Tensor]) -> None:
        for piece in pieces:
            if piece.shape[1]:
                self._model(**self._piece_inputs.of(piece, self._cache.get_seq_length()))

    def _mask_whole_stream(self, columns: Columns, model_kwargs: MutableMapping[str, Any]) -> None:
        """Transformers takes ids that are as long as their mask for the whole history; tell it that these are new."""
        past, mask = self._streams.mask_of_past(), model_kwargs.get("attention_mask")  # [rows, read], [rows, new]
        new = past.new_ones(past.shape[0], columns.new) if mask is None else mask.to(past)
        device = input_device(self._model)
        model_kwargs["attention_mask"] = torch.cat((past, new), dim=1).to(device)  # [rows, stream]
        model_kwargs["position_ids"] = torch.arange(columns.stream, device=device)[None, :]

    def _size_of_pieces(self, generation_config: Any) -> int | None:
        """Columns of a piece; None: all go in at once.

        A prompt that would run past the positions that the model was trained on goes in by pieces of its own accord.
        """
        asked: int | None = generation_config.prefill_chunk_size
        if asked is not None or self._streams.planner.fits_in_one_forward(self._streams.rows or (), self.columns.new):
            return asked
        size = self._cache.window_length - self._cache.num_sink_tokens
        tell_of_pieces(self.columns.stream, size)
        return size
