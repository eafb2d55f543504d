"""The decoding of one call of `generate` as an object that is asked for one token after the other.

`generate` settles all arguments and makes the processors, the criteria and the cache; where it would come to its own
loop, ours takes over (`Loop.take_over`, from the wrapper around `_sample`), and `generate` returns at once. A step is
what a step of transformers' loop is, but for what grows there with the text: ids, masks and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import EosTokenCriteria, MaxLengthCriteria

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import CacheStateError, SinkArgumentError
from sink_patch.generation.inputs.pieces import PieceInputs
from sink_patch.generation.prompt import Prompt
from sink_patch.rules.plans import held
from sink_patch.rules.rows import Row
from sink_patch.streaming.calls.guard import guarded
from sink_patch.streaming.streams import streams_of

_COUNTING = {
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
}
"""Processors that count the ids which they are given, and the arguments that ask for them."""
_BLIND = {
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper"),
    *("EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper", "InfNanRemoveLogitsProcessor", "MaxTimeCriteria"),
    *("LogitNormalization", "SuppressTokensLogitsProcessor", "EosTokenCriteria"),
}
"""Processors and criteria that do not look at ids, or at the newest ones alone."""


@dataclass
class Loop:
    """What takes the place of the loop: it goes through `generate` as its streamer, which all versions hand on.

    Args:
        max_new_tokens: how many tokens come; None: without end.
        ends_with_eos: whether an eos token ends it.
        own_criteria: the caller's own stopping criteria.
        is_new: whether all ids that are given are new to the cache.
    """

    max_new_tokens: int | None
    ends_with_eos: bool
    own_criteria: Sequence[Any] = ()
    is_new: bool = False
    steps: Steps | None = field(default=None, init=False)

    def put(self, value: Any) -> None:
        """Pass over what a streamer is given."""

    def end(self) -> None:
        """Likewise."""

    def take_over(self, model: nn.Module, cache: SinkCache, prompt: Prompt, given: Mapping[str, Any]) -> torch.Tensor:
        """Keep all that is needed to decode.

        Args:
            given: the arguments of `_sample` by name.

        Raises:
            SinkArgumentError: an option that counts the tokens of the text.
        """
        names = (type(processor).__name__ for processor in given["logits_processor"])
        if counting := [_COUNTING[name] for name in names if name in _COUNTING]:
            raise SinkArgumentError(
                f"{' and '.join(counting)} would count the tokens of the whole text, and a stream keeps those of the "
                "window alone. Leave that out; where the model's generation config has it, pass None in its place."
            )
        criteria = [one for one in given["stopping_criteria"] if self._counts(one)]
        self.steps = Steps(model, cache, prompt, given, criteria, self.max_new_tokens)
        ids: torch.Tensor = given["input_ids"]
        return ids

    def _counts(self, criterion: Any) -> bool:
        if any(criterion is one for one in self.own_criteria):
            return True
        return not isinstance(criterion, MaxLengthCriteria) and (
            self.ends_with_eos or not isinstance(criterion, EosTokenCriteria)
        )


class Steps:
    """Reads the prompt, then gives one token after the other. What it has given, the cache has read.

    Args:
        model: of the call.
        cache: of the call, bound to the model.
        prompt: of the call.
        given: the arguments of `_sample` by name.
        criteria: those of its stopping criteria that count.
        most: how many tokens are given; None: there is no end.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: SinkCache,
        prompt: Prompt,
        given: Mapping[str, Any],
        criteria: Sequence[Any],
        most: int | None,
    ):
        self.cache = cache
        self._model, self._criteria, self._left = model, criteria, most
        self._processors, config = given["logits_processor"], given["generation_config"]
        self._samples = bool(config.do_sample)
        self._prompt: Prompt | None = prompt
        self._has_begun = self._has_ended = False
        self._ids = given["input_ids"]  # [1, columns]; once the prompt is in, those of the window
        self._logits = torch.empty(0)  # of the next token, float32 [1, vocabulary]
        self._token: torch.Tensor | None = None  # [1, 1], chosen and not read yet
        kwargs = {**given["model_kwargs"], "attention_mask": None}
        self._inputs = PieceInputs(model, self._ids[:, -1:], 1, kwargs)
        self._forward = _forward(model, config, given["model_kwargs"])

    @torch.no_grad()
    def next(self) -> int | None:
        """The next token; None: it is the end.

        A forward that fails may be asked for again, if the cache has not lost tokens by it.

        Raises:
            CacheStateError: the prompt was not read to its end; the cache has lost tokens, or was fed by somebody else.
        """
        with guarded(self.cache):
            if self._prompt is not None:
                self._read_prompt(self._prompt)
            elif self.cache.get_seq_length() != self._read:
                raise CacheStateError(
                    f"The cache of this stream has read {self.cache.get_seq_length()} columns, and {self._read} of them "
                    "are the stream's: it was used elsewhere. Begin another stream with past_key_values=cache, or use "
                    "a clone() elsewhere."
                )
            if self._has_ended or self._left == 0:
                return None
            if self._token is None:
                self._token = self._chosen()
            token = self._token
            output = self._forward(**self._inputs.of(token, self._read))
        self._token = None
        self._note(output)
        self._ids = self._window(torch.cat((self._ids, token), dim=1))
        self._left = None if self._left is None else self._left - 1
        self._has_ended = any(bool(criterion(self._ids, None).any()) for criterion in self._criteria)
        return int(token)

    def _read_prompt(self, prompt: Prompt) -> None:
        if self._has_begun:
            raise CacheStateError(
                "The prompt of this stream was not read to its end, as its first step says. Begin another stream."
            )
        self._has_begun = True
        self._note(prompt.read())
        self._ids = self._ids_of_window()
        self._prompt = None

    def _note(self, output: Any) -> None:
        self._read = self.cache.get_seq_length()
        self._logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=self._ids.device)

    def _chosen(self) -> torch.Tensor:
        """As in `_sample` of transformers, with the ids of the window in place of those of the text."""
        scores = self._processors(self._ids, self._logits)  # [1, vocabulary]
        if self._samples:
            return torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1)
        return torch.argmax(scores, dim=-1, keepdim=True)

    def _window(self, ids: torch.Tensor) -> torch.Tensor:
        """Those of the ids [1, columns], of which the first ones are the sinks, that the window holds."""
        sinks, newest = self._held()
        return torch.cat((ids[:, :sinks], ids[:, ids.shape[1] - newest :]), dim=1)

    def _held(self) -> tuple[int, int]:
        rows = streams_of(self.cache).rows or (Row(),)
        return held(rows[0], self.cache.window_length, self.cache.num_sink_tokens)

    def _ids_of_window(self) -> torch.Tensor:
        """The ids of the window [1, columns] when the prompt is in, also of what was read before it.

        Raises:
            CacheStateError: they are not known, and something looks at them.
        """
        if self._ids.shape[1] == self._read:  # all of the text was given
            return self._window(self._ids)
        sinks, newest = self._held()
        rows = streams_of(self.cache).history.rows
        ids = rows[0].ends(sinks, newest) if rows else None
        if ids is not None:
            return torch.tensor([[*ids[0], *ids[1]]], device=self._ids.device)
        looking = [type(one).__name__ for one in (*self._processors, *self._criteria)]
        looking = [name for name in looking if name not in _BLIND]
        if looking:
            raise CacheStateError(
                f"{', '.join(looking)} looked back over the text in a stream that goes on with {self.cache!r}, and its "
                "window holds tokens whose ids are not known any more (embeddings, or more sinks than are remembered). "
                "Leave the option out, or begin without past_key_values."
            )
        return torch.zeros(1, sinks + newest, dtype=torch.long, device=self._ids.device)


def _forward(model: nn.Module, config: Any, model_kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """What runs the model for single tokens: as it is, or compiled where that was asked for."""
    model_of_transformers: Any = model
    if model_of_transformers._valid_auto_compile_criteria(model_kwargs, config):
        compiled: Callable[..., Any] = model_of_transformers.get_compiled_call(config.compile_config)
        return compiled
    return model
