"""`sink_patch.stream`: text without end, piece by piece."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import CacheStateError, SinkArgumentError, UnsupportedGenerationError
from sink_patch.generation.endless.loop import Loop, Steps
from sink_patch.generation.endless.text import Decoder
from sink_patch.models.entries import input_device, unwrapped

if TYPE_CHECKING:
    from typing_extensions import Self

Messages = Sequence[Mapping[str, Any]]

_OF_THE_TEXT = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
_OF_THE_CALL = (
    *("streamer", "max_length", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    *("output_hidden_states", "custom_generate", "assistant_model", "keep_streams", "synced_gpus"),
)
_ENDLESS = 1 << 30
_NO_STREAM = {"num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None, "penalty_alpha": None}
"""Options, and the value with which there is one text that grows by a token a step."""


def stream(
    model: nn.Module,
    tokenizer: Any,
    messages_or_text: str | Messages | torch.Tensor,
    *,
    past_key_values: SinkCache | None = None,
    skip_special_tokens: bool = True,
    **arguments: Any,
) -> TextStream:
    """Text that goes on until the caller stops, at constant memory and constant time a token.

        for text in sink_patch.stream(model, tokenizer, "Once upon a time", window_length=1024, do_sample=True):
            print(text, end="", flush=True)

    The tokens are those of one endless `generate` with a sink cache, but for this: what looks back over the text
    (`repetition_penalty`, `no_repeat_ngram_size`, stopping criteria) sees the ids that are in the window. An eos token
    ends it only if `eos_token_id` is passed. The arguments are checked, and the cache is made, before it returns; the
    prompt is read when the first piece is asked for.

    Args:
        model, tokenizer: of transformers.
        messages_or_text: a chat, for the chat template, with its generation prompt; a text; or ids [tokens] or
            [1, tokens].
        past_key_values: a cache to go on in, such as that of a stream before. A text is then new text, which follows on
            all that was read; a chat, or ids, as in `generate`: the whole history, or what is new if that is shorter.
        skip_special_tokens: whether special tokens have no text.
        arguments: as of `generate`, in arguments or in a `generation_config`: `window_length`, `num_sink_tokens` and
            the other settings of the sink cache, sampling, `max_new_tokens`, `eos_token_id`, `stopping_criteria`, ...

    Returns:
        An iterator with one piece of text for each token. A piece may be empty: special tokens, parts of a character.

    Raises:
        SinkArgumentError: no tokens, a chat template that cannot be applied, or arguments that a stream does not take.
        Else what `generate` raises: the model, or an option, is refused.
    """
    config = copy.deepcopy(arguments.pop("generation_config", None))
    _check(model, arguments, config, past_key_values)
    follows = past_key_values is not None and past_key_values.get_seq_length() > 0
    ids = _ids(tokenizer, messages_or_text, follows=follows).to(input_device(unwrapped(model)))  # [1, tokens]
    loop = Loop(
        _asked("max_new_tokens", arguments, config),
        ends_with_eos=_asked("eos_token_id", arguments, config) is not None,
        own_criteria=tuple(arguments.get("stopping_criteria") or ()),
        is_new=follows and isinstance(messages_or_text, str),
    )
    arguments["max_new_tokens"] = _ENDLESS if loop.max_new_tokens is None else loop.max_new_tokens
    if past_key_values is None:
        arguments |= {"cache_implementation": CACHE_IMPLEMENTATION, "keep_streams": 0}  # the caller has the cache
    else:
        arguments["past_key_values"] = past_key_values
    if _asked("stop_strings", arguments, config) is not None:
        arguments.setdefault("tokenizer", tokenizer)
    if config is not None:  # beside which transformers does not like options
        arguments |= {"generation_config": config, **config.update(**_taken(arguments))}
    model.generate(input_ids=ids, streamer=loop, **arguments)  # type: ignore[operator]
    if loop.steps is None:
        raise UnsupportedGenerationError(
            f"generate of this {type(model).__name__} does not decode as transformers' own does, so nothing can be "
            "streamed from it. Use model.generate."
        )
    return TextStream(loop.steps, Decoder(tokenizer, skip_special_tokens=skip_special_tokens))


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
                raise CacheStateError("A stream was asked for a piece by what runs in its own step. Use another stream.")
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


def _ids(tokenizer: Any, given: Any, *, follows: bool) -> torch.Tensor:
    """Ids [1, tokens] of what is to be read.

    Raises:
        SinkArgumentError: as for `stream`.
    """
    if isinstance(given, torch.Tensor):
        ids = given if given.ndim == 2 else given[None]
    elif isinstance(given, str):
        ids = tokenizer(given, return_tensors="pt", add_special_tokens=not follows)["input_ids"]
    elif isinstance(given, Sequence) and given and all(isinstance(message, Mapping) for message in given):
        ids = _ids_of_chat(tokenizer, given)
    else:
        raise SinkArgumentError(
            f"A {type(given).__name__} was given to stream. Give a text, a chat (a list of messages, each a dict with "
            "role and content), or ids [1, tokens]; of several texts make several streams."
        )
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point():
        raise SinkArgumentError(
            f"A stream was to begin with ids of shape {list(ids.shape)}. It needs one token at least, and has one row: "
            "give a text that is not empty; of several texts make several streams."
        )
    return ids.long()


def _ids_of_chat(tokenizer: Any, messages: Messages) -> torch.Tensor:
    try:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except Exception as failure:  # templates are programs, and raise what they like
        raise SinkArgumentError(
            f"The chat template of this {type(tokenizer).__name__} cannot be applied to the messages: {failure} Pass "
            "messages that it takes, or a text."
        ) from failure
    return ids["input_ids"]  # type: ignore[no-any-return]


def _asked(name: str, arguments: Mapping[str, Any], config: Any) -> Any:
    """What was passed, as an argument or in the passed config; what the model's own config says is for `generate`."""
    return arguments[name] if name in arguments else getattr(config, name, None)


def _check(model: Any, arguments: Mapping[str, Any], config: Any, cache: Any) -> None:
    """Refuse what has no meaning in a stream.

    Raises:
        SinkArgumentError: as it says.
    """
    if cache is not None and not isinstance(cache, SinkCache):
        raise SinkArgumentError(
            f"A {type(cache).__name__} was given to stream as past_key_values. Pass a SinkCache, or none."
        )
    for name in _OF_THE_TEXT:
        if arguments.get(name) is not None:
            raise SinkArgumentError(f"{name} was given to stream. Give the ids in place of the text.")
    for name in _OF_THE_CALL:
        if arguments.get(name) is not None:
            raise SinkArgumentError(
                f"{name} was given to stream, where it has no meaning: text comes piece by piece, and ends with "
                "max_new_tokens if at all. Leave it out, or use model.generate."
            )
    asked = _asked("cache_implementation", arguments, config)
    if asked not in (None, CACHE_IMPLEMENTATION):
        raise SinkArgumentError(f"cache_implementation={asked!r} was given to stream, which needs a sink cache.")
    _check_options(arguments, config, model.generation_config)


def _check_options(arguments: Mapping[str, Any], config: Any, own: Any) -> None:
    most = _asked("max_new_tokens", arguments, config)
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise SinkArgumentError(f"max_new_tokens={most!r} was given to stream. Give a number of tokens, or leave it out.")
    for name, value in _NO_STREAM.items():
        asked = _asked(name, arguments, config)
        asked = getattr(own, name, None) if asked is None else asked
        if asked not in (None, value):
            raise SinkArgumentError(
                f"{name}={asked!r} is asked for in a stream, which has one text that grows token by token. Pass "
                f"{name}={value!r}, or use model.generate."
            )


def _taken(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take from the arguments those that are no objects of a call, for a generation config."""
    of_calls = ("past_key_values", "logits_processor", "stopping_criteria", "tokenizer", "prefix_allowed_tokens_fn")
    return {name: arguments.pop(name) for name in list(arguments) if name not in of_calls}
