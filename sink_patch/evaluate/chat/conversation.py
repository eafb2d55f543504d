"""A talk without end over one sink cache: each turn reads its new tokens alone.

What was read must be the beginning of what the template writes for the next turn. Where it writes an answer anew
(thoughts are stripped, spaces trimmed), the talk goes on in a copy of the cache from before the answer; where it writes
older messages anew, all of the text is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import sink_patch
from sink_patch import SinkCache, Window
from sink_patch.evaluate.chat.settings import Settings
from sink_patch.evaluate.chat.template import Ids, Message, Template, common, system_message
from sink_patch.evaluate.measures.forwards import cache_name
from sink_patch.evaluate.models import Loaded


@dataclass
class State:
    """All that a talk is: what `/save` keeps.

    Args:
        cache: it has read `ids`.
        messages: what was said.
        seed: of the first answer; each further one has the next number.
        answers: how many there were.
        borders: where what was read in one go began: the message of the user, and the answer.
        before: the cache as it was before the newest answer.
    """

    cache: SinkCache
    messages: list[Message]
    seed: int
    ids: Ids = field(default_factory=list)
    answers: int = 0
    borders: list[int] = field(default_factory=list)
    before: SinkCache | None = None


class Conversation:
    """A talk with a model.

    Args:
        loaded: the model.
        template: of it.
        settings: of the talk.

    Raises:
        UnsupportedModelError: the model cannot stream.
        SinkArgumentError: the window does not fit the model or the system prompt.
    """

    def __init__(self, loaded: Loaded, template: Template, settings: Settings):
        self.model, self.tokenizer, self.template, self._settings = loaded.model, loaded.tokenizer, template, settings
        system = system_message(settings.system)
        turns: dict[str, Any] = {"evict": "turns", "turn_start": template.turn_start} if template.turn_start else {}
        cache = SinkCache(settings.window_length, template.sinks(system), model=loaded.model, **turns)
        self.state = State(cache, system, settings.seed)

    def reset(self) -> None:
        """Begin anew, with the same system prompt."""
        system = [message for message in self.state.messages[:1] if message["role"] == "system"]
        self.state = State(self._empty(), system, self.state.seed)

    def answer(self, words: str, say: Callable[[str], None], is_over: Callable[[], bool]) -> None:
        """Answer a message of the user. If that fails, nothing was said.

        Args:
            say: is given the text as it is made.
            is_over: whether the answer is to end; asked after each token.

        Raises:
            SinkPatchError: the template does not take the message.
        """
        state, messages = self.state, [*self.state.messages, {"role": "user", "content": words}]
        ids = self.template.ids(messages, answering=True)
        asked = self.template.ids(messages, answering=False)
        try:
            self._go_back(ids)
            answer = max(len(state.ids), common(ids, asked))  # where it begins, or the prompt for it
            state.borders.append(len(state.ids))
            self._read(ids[: min(answer, len(ids) - 1)])  # one token at least is left for the stream
            state.before = state.cache.clone()
            state.borders.append(answer)
            text = self._answered(ids, say, is_over)
        except BaseException:  # an interrupt as well: what the cache has read by then is not known
            self._forget()
            raise
        state.messages = [*messages, {"role": "assistant", "content": text}]
        state.answers += 1

    def window(self) -> tuple[Window, list[range]]:
        """What the window holds, and where the messages of all that was read are, as places in `ids`."""
        state = self.state
        if not state.ids:
            return Window(range(0), range(0), ()), []
        (window,) = state.cache.window([state.ids])
        starts = list(state.borders if window.turns is None else window.turns)
        if starts and not self.tokenizer.decode(state.ids[: starts[0]], skip_special_tokens=True).strip():
            starts = starts[1:]
        starts = [0, *(start for start in starts if start > 0)]
        return window, [range(*pair) for pair in zip(starts, [*starts[1:], len(state.ids)], strict=True)]

    def text(self, part: range) -> str:
        """What stands at some places of `ids`, in one line."""
        decoded: str = self.tokenizer.decode(self.state.ids[part.start : part.stop], skip_special_tokens=True)
        return " ".join(decoded.split())

    def _empty(self) -> SinkCache:
        cache = self.state.cache
        return SinkCache(
            cache.window_length,
            cache.num_sink_tokens,
            evict=cache.evict,
            turn_start=cache.turn_start,
            model=self.model,
        )

    def _go_back(self, ids: Ids) -> None:
        """To the newest cache that has read a beginning of the ids, and not all of them."""
        state, same = self.state, common(self.state.ids, ids)
        if same == len(state.ids) < len(ids):
            return
        if state.before is not None and state.before.get_seq_length() <= same:
            state.cache, state.ids = state.before, ids[: state.before.get_seq_length()]
            state.before = None
        else:
            self._forget()
        state.borders = [border for border in state.borders if border < len(state.ids)]

    def _forget(self) -> None:
        """Have read nothing: the next turn reads all of the text again."""
        state = self.state
        state.cache, state.ids, state.borders, state.before = self._empty(), [], [], None

    def _read(self, ids: Ids) -> None:
        """Let the cache read up to the end of these ids."""
        if len(ids) > len(self.state.ids):
            given = torch.tensor([ids], device=self.model.device)  # [1, tokens]
            only = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}  # a token that nobody reads
            self.model.generate(given, **{cache_name(self.model): self.state.cache}, **only)
            self.state.ids = ids

    def _answered(self, ids: Ids, say: Callable[[str], None], is_over: Callable[[], bool]) -> str:
        state, settings = self.state, self._settings
        torch.manual_seed((state.seed + state.answers) % 2**32)
        newest = _Newest(_ends(self.model, self.tokenizer))
        stream = sink_patch.stream(
            self.model,
            self.tokenizer,
            torch.tensor([ids]),  # [1, tokens]: all of the text, of which the cache has read most
            past_key_values=state.cache,
            max_new_tokens=settings.max_new_tokens,
            stopping_criteria=StoppingCriteriaList([newest]),
            **settings.sampling(self.model.generation_config),
        )
        pieces = []
        for piece in stream:
            pieces.append(piece)
            say(piece)
            if is_over():
                break
        state.ids = [*ids, *newest.ids]
        return "".join(pieces)


class _Newest(StoppingCriteria):
    """Notes each token of an answer, and ends it where the model does.

    Args:
        ends: ids that end an answer.
    """

    def __init__(self, ends: set[int]):
        self.ids: Ids = []
        self._ends = ends

    def __call__(self, input_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        self.ids.append(int(input_ids[0, -1]))
        return torch.tensor([self.ids[-1] in self._ends])


def _ends(model: Any, tokenizer: Any) -> set[int]:
    found = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    several = [one if isinstance(one, (list, tuple)) else [one] for one in found]
    return {int(one) for ids in several for one in ids if one is not None}
