"""`sink_patch.stream`: text without end, piece by piece."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import CacheStateError, UnsupportedGenerationError
from sink_patch.generation.endless.arguments import Messages, asked_for, check, inputs_of, taken
from sink_patch.generation.endless.loop import Loop
from sink_patch.generation.endless.steps import Steps
from sink_patch.generation.endless.text import Decoder
from sink_patch.models.entries import cache_argument, unwrapped
from sink_patch.streaming.media.given import media_among

if TYPE_CHECKING:
    from typing_extensions import Self

_ENDLESS = 1 << 30  # tokens, for transformers, which wants a number


def stream(
    model: nn.Module,
    tokenizer: Any,
    messages_or_text: str | Messages | torch.Tensor,
    *,
    past_key_values: SinkCache | None = None,
    skip_special_tokens: bool = True,
    **arguments: Any,
) -> TextStream:
    """Text that goes on until the caller stops, at constant memory and constant time a token: one piece a token.

    Args:
        model, tokenizer: of transformers; a processor in place of the tokenizer reads the images of a chat too.
        messages_or_text: a chat, for the chat template and its generation prompt; a text; or ids [1, tokens].
        past_key_values: a cache to go on in. A text is new text then; a chat, or ids, as in `generate`: the whole
            history, or what is new if that is shorter.
        skip_special_tokens: whether special tokens have no text.
        arguments: of `generate`: the settings of the sink cache, sampling, `max_new_tokens`, ... An eos token ends the
            text only if `eos_token_id` is passed. What looks back over the text sees the ids in the window.

    Raises:
        SinkArgumentError: no tokens, a chat that the template does not take, or what has no meaning in a stream.
        Else what `generate` raises: the model, or an option, is refused.
    """
    config = copy.deepcopy(arguments.pop("generation_config", None))
    check(model, tokenizer, arguments, config, past_key_values)
    read = 0 if past_key_values is None else past_key_values.get_seq_length()
    ids, more = inputs_of(unwrapped(model), tokenizer, messages_or_text, read)
    loop = Loop(
        asked_for("max_new_tokens", arguments, config),
        ends_with_eos=asked_for("eos_token_id", arguments, config) is not None,
        own_criteria=tuple(arguments.get("stopping_criteria") or ()),
        is_new=read > 0 and isinstance(messages_or_text, str),
    )
    if asked_for("stop_strings", arguments, config) is not None:
        arguments.setdefault("tokenizer", tokenizer)
    return TextStream(
        _begun(model, ids, loop, past_key_values, config, more | arguments),
        Decoder(tokenizer, skips=skip_special_tokens),
    )


def _begun(
    model: Any, ids: torch.Tensor, loop: Loop, cache: SinkCache | None, config: Any, arguments: dict[str, Any]
) -> Steps:
    """The steps that `generate` has prepared.

    Args:
        config: a copy of the generation config that was passed, or None.
        arguments: of `generate`, to be changed.
    """
    arguments["max_new_tokens"] = loop.max_new_tokens or _ENDLESS
    if loop.is_new and cache is not None and media_among(unwrapped(model), arguments):
        # by which it is seen that the images are new as well
        arguments["attention_mask"] = ids.new_ones(1, cache.get_seq_length() + ids.shape[1])
    if cache is None:
        arguments |= {"cache_implementation": CACHE_IMPLEMENTATION, "keep_streams": 0}  # the caller has the cache
    if config is not None:  # beside which transformers does not like options
        arguments |= {**config.update(**taken(arguments)), "generation_config": config}
    given = {} if cache is None else {cache_argument(unwrapped(model)): cache}
    model.generate(input_ids=ids, streamer=loop, **given, **arguments)
    if loop.steps is None:
        raise UnsupportedGenerationError(
            f"generate of this {type(model).__name__} does not decode as transformers' own does, so nothing can be "
            "streamed from it. Use model.generate."
        )
    return loop.steps


class TextStream(Iterator[str]):
    """Pieces of text, one for each token, from `sink_patch.stream`.

    After a `break` it can be iterated further, from where it stands. What it has given, its cache has read. Threads may
    share it: each piece goes to one of them. A forward that raises may be tried again by asking for the next piece.
    """

    def __init__(self, steps: Steps, decoder: Decoder):
        self._steps: Steps | None = steps
        self._decoder, self._cache = decoder, steps.cache
        self._lock, self._is_at_work = threading.RLock(), False

    @property
    def cache(self) -> SinkCache:
        """The cache of the stream: `stream(..., past_key_values=cache)` and `generate` go on in it; see its `clone`."""
        return self._cache

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        with self._lock:
            if self._is_at_work:
                raise CacheStateError(
                    "A stream was asked for a piece by what runs in its own step. Use another stream."
                )
            if self._steps is None:
                raise StopIteration
            self._is_at_work = True
            try:
                token = self._steps.next()
            finally:
                self._is_at_work = False
            if token is not None:
                return self._decoder.piece(token)
            self._steps = None
            if rest := self._decoder.rest():
                return rest
            raise StopIteration

    def close(self) -> None:
        """End it; the cache stays as it is."""
        with self._lock:
            self._steps = None
