"""Asking in a stream: the parts of a script go into a cache one by one, questions into copies of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

import sink_patch
from sink_patch.evaluate.measures.forwards import Forwards
from sink_patch.evaluate.recall.scripts.script import Ids, Part, Question


@dataclass(frozen=True)
class Answer:
    """How a question was answered.

    Args:
        question: that was asked.
        read: tokens that the stream had read before it.
        exact: whether greedy decoding writes the right answer.
        scores: log-probability of each choice, the mean over its tokens; the right one comes first.
    """

    question: Question
    read: int
    exact: bool
    scores: tuple[float, ...]

    @property
    def chosen(self) -> bool:
        """Whether the right choice is likelier than each other one."""
        return self.scores[0] > max(self.scores[1:])


class Stream:
    """A model that reads with a cache of some kind.

    Args:
        model: a causal language model of transformers.
        cache: a `SinkCache`, or None for the one that the model makes itself, which holds all tokens.
    """

    def __init__(self, model: Any, cache: Any = None):
        self._forward, self._cache, self.read = Forwards(model), cache, 0

    def feed(self, ids: Ids, last: int = 1) -> torch.Tensor:
        """Read tokens, one or more; the logits of the last of them, shape [last, vocabulary]."""
        logits, self._cache = self._logits(self._cache, ids, last)
        self.read += len(ids)
        return logits

    def ask(self, question: Question) -> Answer:
        """The answer to a question; the stream stays as it was."""
        first, asked = self._logits(copy.deepcopy(self._cache), question.prompt, 1)  # [1, vocabulary]
        scores: list[float] = []
        exact = False
        for number, choice in enumerate(question.choices):
            logits = first
            if len(choice) > 1:
                rest, _ = self._logits(copy.deepcopy(asked), choice[:-1], len(choice) - 1)
                logits = torch.cat([first, rest])  # [tokens of the choice, vocabulary]
            wanted = torch.tensor(choice, device=logits.device)  # [tokens of the choice]
            scores.append(float(logits.float().log_softmax(-1).gather(1, wanted[:, None]).mean()))
            if number == 0:
                exact = bool((logits.argmax(-1) == wanted).all())  # what greedy decoding writes, token by token
        return Answer(question, self.read, exact, tuple(scores))

    def _logits(self, cache: Any, ids: Ids, last: int) -> tuple[torch.Tensor, Any]:
        """The logits of the last tokens, shape [last, vocabulary], and the cache behind them."""
        tokens = torch.tensor([ids], device=self._forward.model.device)  # [1, tokens]
        logits, after = self._forward(tokens, range(len(ids) - last, len(ids)), cache, use_cache=True)
        return logits[0], after if cache is None else cache


def in_one_stream(model: Any, cache: sink_patch.SinkCache | None, parts: Iterable[Part], longest: int) -> list[Answer]:
    """The answers where one cache reads all parts.

    Args:
        model: a causal language model of transformers.
        cache: that reads; None: the model's own, which holds all tokens.
        parts: of the stream. Those between two questions go in together, which is faster than each alone.
        longest: tokens in a forward at most; less than the window, as a longer forward sees none of the older tokens.
    """
    stream, answers = Stream(model, cache), []
    waiting: list[int] = []
    with torch.inference_mode():
        for part in parts:
            waiting += part.ids
            while len(waiting) >= longest or (waiting and part.questions):
                stream.feed(tuple(waiting[:longest]))
                del waiting[:longest]
            answers += [stream.ask(question) for question in part.questions]
    return answers


def one_by_one(model: Any, beginning: Ids, parts: Iterable[Part]) -> list[Answer]:
    """The answers where each question is asked alone, in an empty cache behind the beginning."""
    answers = []
    with torch.inference_mode():
        for part in parts:
            for question in part.questions:
                stream = Stream(model)
                if beginning:
                    stream.feed(beginning)
                answers.append(stream.ask(question))
    return answers


def context(model: Any) -> int | None:
    """How many tokens the model was trained for; None: its config does not say."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def within(parts: Iterable[Part], limit: int | None) -> list[Part]:
    """The first parts whose tokens and questions end within so many tokens; None: all of them."""
    found, read = [], 0
    for part in parts:
        read += len(part.ids)
        longest = max((len(one.prompt) + max(map(len, one.choices)) for one in part.questions), default=0)
        if limit is not None and read + longest > limit:
            break
        found.append(part)
    return found
