"""The decoding loop of one call, run from outside, a token at a time.

A step is what a step of transformers' loop is, but for what grows there with the text: ids, masks and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import CacheStateError
from sink_patch.generation.endless import window
from sink_patch.generation.inputs.pieces import PieceInputs
from sink_patch.generation.prompt import Prompt
from sink_patch.streaming.calls.guard import guarded
from sink_patch.streaming.media.given import without_media


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
        self._logits = torch.empty(0, device="cpu")  # of the next token, float32 [1, vocabulary]
        self._token: torch.Tensor | None = None  # [1, 1], chosen and not read yet
        kwargs = {**without_media(model, given["model_kwargs"]), "attention_mask": None}
        self._inputs = PieceInputs(model, self._ids[:, -1:], 1, kwargs)
        self._forward = _forward(model, config, given["model_kwargs"])

    @torch.no_grad()
    def next(self) -> int | None:
        """The next token; None: it is the end.

        A forward that fails may be asked for again, if the cache has not lost tokens by it.

        Raises:
            CacheStateError: the prompt was not read to its end; the cache has lost tokens, or was fed by somebody else.
        """
        read = guarded(self.cache, self._read_next)
        if read is None:
            return None
        token, output = read
        number, columns, logits = int(token), self.cache.get_seq_length(), self._logits_of(output)
        ids = window.newest(self.cache, torch.cat((self._ids, token), dim=1))
        has_ended = any(bool(criterion(ids, None).any()) for criterion in self._criteria)
        left = None if self._left is None else self._left - 1
        # with no call in between, so that Ctrl-C takes none of it or all; without it `_read` tells the next step
        self._token, self._logits, self._ids, self._left, self._has_ended = None, logits, ids, left, has_ended
        self._read = columns
        return number

    def _read_next(self) -> tuple[torch.Tensor, Any] | None:
        """The next token, [1, 1], and what the model returned for it; None: it is the end."""
        if self._prompt is not None:
            self._read_prompt(self._prompt)
        elif self.cache.get_seq_length() != self._read:
            raise CacheStateError(
                f"The cache of this stream has read {self.cache.get_seq_length()} columns, and the stream knows of "
                f"{self._read}: it was used elsewhere, or a step was broken off. Begin another stream with "
                "past_key_values=cache, or use a clone() elsewhere."
            )
        if self._has_ended or self._left == 0:
            return None
        if self._token is None:
            self._token = self._chosen()
        return self._token, self._forward(**self._inputs.of(self._token, self._read))

    def _read_prompt(self, prompt: Prompt) -> None:
        if self._has_begun:
            raise CacheStateError(
                "The prompt of this stream was not read to its end, as its first step says. Begin another stream."
            )
        self._has_begun = True
        self._logits = self._logits_of(prompt.read())
        self._read = self.cache.get_seq_length()
        self._ids = window.read(self.cache, self._ids, (*self._processors, *self._criteria))
        self._prompt = None

    def _logits_of(self, output: Any) -> torch.Tensor:
        """Of the next token, float32 [1, vocabulary]."""
        logits: torch.Tensor = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=self._ids.device)
        return logits

    def _chosen(self) -> torch.Tensor:
        """As in `_sample` of transformers, with the ids of the window in place of those of the text."""
        scores = self._processors(self._ids, self._logits)  # [1, vocabulary]
        if self._samples:
            return torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1)
        return torch.argmax(scores, dim=-1, keepdim=True)


def _forward(model: nn.Module, config: Any, model_kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """What runs the model for single tokens: as it is, or compiled where that was asked for."""
    model_of_transformers: Any = model
    if model_of_transformers._valid_auto_compile_criteria(model_kwargs, config):
        compiled: Callable[..., Any] = model_of_transformers.get_compiled_call(config.compile_config)
        return compiled
    return model
