"""The decoding of one call of `generate` as an object that is asked for one token after the other.

`generate` settles all arguments and makes the processors, the criteria and the cache; where it would come to its own
loop, ours takes over (`Loop.take_over`, from the wrapper around `_sample`), and `generate` returns at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import EosTokenCriteria, MaxLengthCriteria

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import SinkArgumentError
from sink_patch.generation.endless.steps import Steps
from sink_patch.generation.prompt import Prompt

_COUNTING = {
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
}
"""Processors that count the ids which they are given, and the arguments that ask for them."""


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
