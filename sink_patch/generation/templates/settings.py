"""`sink_patch.chat_settings`: the ids with which messages begin, found in what the chat template writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sink_patch.errors import SinkArgumentError
from sink_patch.generation.chat import common
from sink_patch.generation.templates.probe import BY_HAND, Ids, Probe, occurrences

_PLAIN = ("Good morning", "Hello there", "What is new", "Not much", "So be it", "Indeed", "Farewell")
_RICH = (
    "1. One: two\n\n2. (Three) [four] {five} <six> <b>seven</b>",
    '# Heading\n\n### Another\n\n- a user asked the system: is it "so"?\n- the assistant said: yes!',
    "```python\nprint('x' + str(1))\n```\n\n> quoted\n\n| a | b |\n| - | - |\n",
    "7 + 8 = 15; $x_1^2$ \\frac{1}{2} & more...\n***\n[a link](https://example.org/?q=1#top)\n---\nend",
    "Dear Sir,\n\nQ: why?\nA: because.\n\nYours",
)
_TALK = ("user", "assistant", "user", "assistant", "user")


def chat_settings(tokenizer: Any, **template: Any) -> dict[str, list[Ids]]:
    """`turn_start` and `system_start` of a sink cache, as the chat template of a tokenizer writes chats.

        model.generation_config.update(
            cache_implementation="sink", evict="turns", num_sink_tokens="system", **sink_patch.chat_settings(tokenizer)
        )

    Chats of known words are written, and what stands before the words of each message is compared. What is found is
    checked: in these chats it occurs at each message, and nowhere else. An answer that the template does not mark
    (Llama 2) belongs to the message before.

    Args:
        tokenizer: of the model, with a chat template.
        template: more arguments of the chat template: `tools`, `chat_template`, variables of its own.

    Returns:
        "turn_start": the runs of ids that begin messages; one, if all begin alike. "system_start": the run with which a
        chat begins whose first message is a system message; left out where that cannot be told by ids.

    Raises:
        SinkArgumentError: there is no chat template, or messages have no beginning that can be recognised.
    """
    plain, rich = (Probe.of(tokenizer, template, _chat(_TALK, words)) for words in (_PLAIN, _RICH))
    with_system = _with_system(tokenizer, template)
    turn_start = _turn_start(plain, [plain, rich])
    if turn_start is None:
        raise SinkArgumentError(
            f"The chat template of this {type(tokenizer).__name__} writes no ids that begin each message and occur "
            f"nowhere else, so messages cannot be told apart. {BY_HAND}"
        )
    if with_system is None:
        return {"turn_start": turn_start}
    if _first(with_system, turn_start) is None:
        turn_start = _with_own_start(tokenizer, with_system, turn_start, [plain, rich])
    system_start = _system_start(with_system, plain, turn_start)
    found = {"turn_start": turn_start, "system_start": [] if system_start is None else [system_start]}
    return {name: runs for name, runs in found.items() if runs}


def _chat(roles: Sequence[str], words: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content.strip()} for role, content in zip(roles, words, strict=False)]


def _with_system(tokenizer: Any, template: Mapping[str, Any]) -> Probe | None:
    """A chat that begins with a system message; None where the template takes none, or writes it elsewhere."""
    try:
        return Probe.of(tokenizer, template, _chat(("system", *_TALK), _PLAIN))
    except SinkArgumentError:
        return None


def _turn_start(plain: Probe, probes: Sequence[Probe]) -> list[Ids] | None:
    """What all messages begin with; else what those of each role begin with. None: neither is a mark."""
    runs = plain.runs()
    if not plain.runs("user"):
        return None
    alike = runs[0][: common(*runs)] if len(runs) > 1 else runs[0]
    own = [run for place, run in enumerate(runs) if run not in runs[:place]]
    first = plain.ids[: plain.places[0].words]
    for candidate in ([alike] if alike else [], own, [*own, first]):
        if candidate and all(_marks(candidate, probe) for probe in probes):
            return candidate
    return None


def _marks(turn_start: Sequence[Ids], probe: Probe) -> bool:
    """Whether these runs occur at each message and nowhere else.

    Before the words of the first one there may be a system message of the template's own.
    """
    first, *others = probe.places
    found = occurrences(probe.ids, turn_start)
    wanted = [place.start for place in others if place.words > place.start]
    return any(place < first.words for place in found) and [at for at in found if at >= first.words] == wanted


def _first(probe: Probe, turn_start: Sequence[Ids]) -> int | None:
    """Where the first message begins; None: nothing before its words tells."""
    return next((place for place in occurrences(probe.ids, turn_start) if place < probe.places[0].words), None)


def _with_own_start(tokenizer: Any, with_system: Probe, turn_start: list[Ids], others: Sequence[Probe]) -> list[Ids]:
    """With what a system message begins with, where that is a mark of its own."""
    begins = int(with_system.ids[:1] == [getattr(tokenizer, "bos_token_id", None)])
    own = with_system.ids[begins : with_system.places[0].words]
    return [*turn_start, own] if own and not any(occurrences(probe.ids, [own]) for probe in others) else turn_start


def _system_start(with_system: Probe, plain: Probe, turn_start: Sequence[Ids]) -> Ids | None:
    """What a chat with a system message begins with, as far as it tells that from a message of the user."""
    ids, words, start = with_system.ids, with_system.places[0].words, _first(with_system, turn_start)
    if start is None:
        return None
    of_user = plain.runs("user")[0]
    same = common(ids[start:words], of_user)
    if start + same == words:
        return None  # a message of the user begins like that
    found = ids[: start + same + 1] if same < len(of_user) else ids[:words]
    before_words = plain.ids[: plain.places[0].words]
    has_one_of_its_own = len(occurrences(before_words, turn_start)) > 1
    return None if plain.ids[: len(found)] == found and not has_one_of_its_own else found
