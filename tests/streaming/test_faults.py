"""Forwards that fail at any point: the cache is as before, or refuses further forwards. The text is never wrong."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, StoppingCriteria

import sink_patch
from sink_patch import CacheStateError, SinkCache
from sink_patch.buffers.rings import Ring
from sink_patch.streaming.bound import streams_of
from tests.support import zoo
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

W, S = 12, 3
FAULTS = 50  # in each of the groups
KINDS = (functools.partial(RuntimeError, "out of memory"), KeyboardInterrupt, MemoryError)
POINTS = ("before", "after")
MODELS = {
    "llama": lambda: tiny("llama", layers=2, max_position_embeddings=28),
    "gemma3_text": lambda: tiny(
        "gemma3_text",
        layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=5,
        max_position_embeddings=28,
    ),
    "qwen3_next": lambda: zoo.build("qwen3_next"),
}


@dataclass(frozen=True)
class Fault:
    """What is raised, in which forward of a schedule, and where: in a module, or in a ring of the cache."""

    forward: int
    where: str
    point: str
    kind: Callable[[], BaseException]


@dataclass(frozen=True)
class Run:
    """A stream without faults: what is fed in each forward, and its logits."""

    model: PreTrainedModel
    pieces: tuple[torch.Tensor, ...]
    masks: tuple[torch.Tensor | None, ...]
    logits: tuple[torch.Tensor, ...]
    modules: tuple[tuple[str, ...], ...]  # names of those that run in each forward

    @torch.no_grad()
    def forward(self, cache: SinkCache, number: int) -> torch.Tensor:
        given = {cache_name(self.model): cache, "attention_mask": self.masks[number]}
        return self.model(self.pieces[number], **given).logits


def run_without_faults(model: PreTrainedModel, steps: list[int], *, padded: bool) -> Run:
    stream = tokens(sum(steps), rows=2)
    mask = torch.ones_like(stream)
    mask[1, : steps[0] - 1] = 0
    ends = [sum(steps[: number + 1]) for number in range(len(steps))]
    masks = tuple(mask[:, :end] if padded else None for end in ends)
    run, logits, modules = Run(model, stream.split(steps, dim=1), masks, (), ()), [], []
    cache = SinkCache(W, S, model=model)
    for number in range(len(steps)):
        with recorded_modules(model) as names:
            logits.append(run.forward(cache, number))
        modules.append(tuple(dict.fromkeys(names)))
    return Run(model, run.pieces, masks, tuple(logits), tuple(modules))


@contextlib.contextmanager
def recorded_modules(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that run."""
    names: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
    ]
    yield names
    for handle in handles:
        handle.remove()


def schedule(seed: int, model: PreTrainedModel) -> list[int]:
    rng = random.Random(seed)
    steps = [rng.choice([2, 7, W + 3])]
    one_by_one = bool(sink_patch.families()[model.config.model_type].whole_prompts)
    while sum(steps) < 4 * W:
        steps.append(1 if one_by_one else rng.choice([1, 1, 1, 2, 5, W - S, W + 2]))
    return steps


@functools.cache
def run_of(model_type: str, seed: int) -> Run:
    model = MODELS[model_type]()
    return run_without_faults(model, schedule(seed, model), padded=seed % 2 == 1)


def random_fault(rng: random.Random, run: Run, cache_faults: int) -> Fault:
    """A fault at a random point, but not after the forward of the whole model, which has a test of its own."""
    forward = rng.randrange(len(run.pieces) - 1)
    where, point = rng.choice(run.modules[forward]), rng.choice(POINTS)
    if rng.randrange(4) == 0:
        where = f"ring {rng.randrange(cache_faults)}"
    elif where == "":
        point = "before"
    return Fault(forward, where, point, rng.choice(KINDS))


@contextlib.contextmanager
def injected(model: PreTrainedModel, cache: SinkCache, fault: Fault) -> Iterator[None]:
    """Inside, the fault is raised when its point is reached."""
    if fault.where.startswith("ring "):
        rings = [ring for layer in cache.layers for ring in getattr(layer, "rings", ())]
        ring = rings[int(fault.where.removeprefix("ring "))]
        update, copy = ring.update, torch.Tensor.index_copy_

        def failing(*args: Any) -> Any:
            if fault.point == "after":
                update(*args)
            raise fault.kind()

        def failing_copy(held: torch.Tensor, *args: Any) -> torch.Tensor:
            """One token in a ring that is full, which goes in without `update`."""
            if held is not ring.buffer:
                return copy(held, *args)
            if fault.point == "after":
                copy(held, *args)
            raise fault.kind()

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ring, "update", failing)
            patched.setattr(torch.Tensor, "index_copy_", failing_copy)
            yield
        return

    def fail(*_: Any) -> None:
        raise fault.kind()

    module = model.get_submodule(fault.where)
    before = fault.point == "before"
    handle = module.register_forward_pre_hook(fail) if before else module.register_forward_hook(fail)
    yield
    handle.remove()


def unless_refused(repeat: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """The logits; None if the cache refuses the forward and says to reset it."""
    try:
        return repeat()
    except CacheStateError as refusal:
        if "reset()" in str(refusal):
            return None
        raise


def outcome(run: Run, fault: Fault) -> str:
    """What happens to a stream after a fault: "repeated" or "refused"; anything else fails the test."""
    cache = SinkCache(W, S, model=run.model)
    for number in range(fault.forward):
        run.forward(cache, number)
    with injected(run.model, cache, fault), pytest.raises(type(fault.kind())):
        run.forward(cache, fault.forward)
    found = unless_refused(lambda: run.forward(cache, fault.forward))
    if found is None:
        assert unless_refused(lambda: run.forward(cache, fault.forward)) is None, fault  # it refuses again
        cache.reset()
        for number in range(2):
            assert torch.equal(run.forward(cache, number), run.logits[number]), fault
        return "refused"
    assert torch.equal(found, run.logits[fault.forward]), fault
    for number in range(fault.forward + 1, min(fault.forward + 4, len(run.pieces))):
        assert torch.equal(run.forward(cache, number), run.logits[number]), fault
    return "repeated"


@pytest.mark.parametrize("model_type", ["llama", "llama, padded", "gemma3_text", "qwen3_next"])
def test_after_a_fault_a_forward_may_be_repeated_or_is_refused(model_type):
    name, _, padded = model_type.partition(", ")
    rng, outcomes = random.Random(model_type), Counter()
    for number in range(FAULTS):
        run = run_of(name, 2 * (number % 3) + bool(padded))
        outcomes[outcome(run, random_fault(rng, run, cache_faults=2 if name == "qwen3_next" else 4))] += 1
    assert min(outcomes["repeated"], outcomes["refused"]) >= 3, outcomes
    assert outcomes.total() == FAULTS


def tokens_until_the_clock_is_set_back(model: PreTrainedModel, cache: SinkCache) -> int:
    """Feeds single tokens until one of them sets the clock back; returns its number, from 0."""
    turned: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        turn = Ring.turn
        patch.setattr(Ring, "turn", lambda ring, *args: (turned.append(1), turn(ring, *args)))
        for number in range(100):
            with torch.no_grad():
                model(tokens(1, rows=2, seed=number), past_key_values=cache)
            if turned:
                return number
    raise AssertionError("the clock was never set back")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("ring", range(2))
@pytest.mark.parametrize("point", POINTS)
@torch.no_grad()
def test_a_fault_while_the_clock_is_set_back_makes_the_cache_unusable(ring, point, kind, monkeypatch):
    """Some keys are rotated by then, and others are not. Two layers have one ring of keys each."""
    model = MODELS["llama"]()
    last = tokens_until_the_clock_is_set_back(model, SinkCache(W, S, model=model))
    cache, turn, count = SinkCache(W, S, model=model), Ring.turn, []
    for number in range(last):
        model(tokens(1, rows=2, seed=number), past_key_values=cache)

    def failing(self: Ring, *args: Any) -> None:
        count.append(self)
        if len(count) == ring + 1 and point == "before":
            raise kind
        turn(self, *args)
        if len(count) == ring + 1:
            raise kind

    token = tokens(1, rows=2, seed=last)
    with monkeypatch.context() as patch:
        patch.setattr(Ring, "turn", failing)
        with pytest.raises(kind):
            model(token, past_key_values=cache)
    for _ in range(2):
        with pytest.raises(CacheStateError, match="clock.*could not be set.*reset"):
            model(token, past_key_values=cache)
    with pytest.raises(CacheStateError, match="clock.*could not be set.*reset"):
        model.generate(tokens(3, rows=2), past_key_values=cache, max_new_tokens=3)
    cache.reset()
    fresh = SinkCache(W, S, model=model)
    for number in range(3):
        one, other = (model(tokens(1, rows=2, seed=number), past_key_values=each).logits for each in (cache, fresh))
        assert torch.equal(one, other)


class TextRecorder(StoppingCriteria):
    """Records the text so far, as a streamer does."""

    def __init__(self, text: torch.Tensor):
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.text = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generate(model: PreTrainedModel, cache: SinkCache, ids: torch.Tensor, new: int, **asked: Any) -> torch.Tensor:
    asked = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, cache_name(model): cache, **asked}
    return model.generate(ids, **asked)


@contextlib.contextmanager
def failing_once(module: nn.Module, call: int, kind: Callable[[], BaseException], point: str) -> Iterator[None]:
    """Inside, the module fails in the call with this number, from 0."""
    calls = itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == call:
            raise kind()

    handle = module.register_forward_pre_hook(fail) if point == "before" else module.register_forward_hook(fail)
    yield
    handle.remove()


def outcome_of_another_try(repeat: Callable[[SinkCache], torch.Tensor], wanted: torch.Tensor, cache: SinkCache) -> str:
    """The outcome, as above; a cache that refuses works again after a reset."""
    found = unless_refused(lambda: repeat(cache))
    if found is None:
        cache.reset()
        assert torch.equal(repeat(cache), repeat(SinkCache(W, S)))
        return "refused"
    assert torch.equal(found, wanted)
    return "repeated"


END = 40


def rest_of_the_text(model: PreTrainedModel, text: torch.Tensor, cache: SinkCache, *, history: bool) -> torch.Tensor:
    """The whole text; `generate` gets the text so far, or the part of it that the cache has not read."""
    ids = text if history else text[:, cache.get_seq_length() :]
    out = generate(model, cache, ids, END - text.shape[1], attention_mask=torch.ones_like(text))
    return torch.cat((text, out[:, ids.shape[1] :]), dim=1)


@pytest.mark.parametrize("history", [True, False], ids=["history", "new tokens"])
@pytest.mark.parametrize("model_type", MODELS)
def test_generate_continues_after_a_fault_or_is_refused(model_type, history):
    """Interrupted in any of its forwards, in any module; the caller continues with the text that was generated."""
    model, rng, outcomes = MODELS[model_type](), random.Random(model_type), Counter()
    prompt = tokens(9, rows=2)
    wanted = rest_of_the_text(model, prompt, SinkCache(W, S), history=True)
    run = run_of(model_type, 0)
    single = next(number for number, piece in enumerate(run.pieces) if piece.shape[1] == 1)
    names = [name for name in run.modules[single] if name]
    for number in range(21):
        kind, cache, recorded = KINDS[number % 3], SinkCache(W, S, model=model), TextRecorder(prompt)
        fault = failing_once(model.get_submodule(rng.choice(names)), rng.randrange(25), kind, rng.choice(POINTS))
        with fault, pytest.raises(type(kind())):
            generate(model, cache, prompt, END - 9, stopping_criteria=[recorded])
        assert cache.get_seq_length() in (0, recorded.text.shape[1] - 1)
        repeat = functools.partial(rest_of_the_text, model, recorded.text, history=history)
        outcomes[outcome_of_another_try(repeat, wanted, cache)] += 1
    assert len(outcomes) == 2, outcomes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.1.mlp"])
def test_a_prompt_that_failed_between_its_pieces_continues_or_is_refused(module, kind):
    """Before a layer has stored anything of a piece, and after one has overwritten old tokens."""
    model, prompt = MODELS["llama"](), tokens(60, rows=2)
    pieces = {"prefill_chunk_size": 7, "attention_mask": torch.ones_like(prompt)}

    def repeat(cache: SinkCache) -> torch.Tensor:
        return generate(model, cache, prompt, 20, **pieces)

    wanted = repeat(SinkCache(W, S))
    for call in (0, 4, 8):  # 60 = 8 * 7 + 4: the last piece is fed by transformers itself
        outcome = "repeated" if call == 0 or "embed" in module else "refused"
        cache = SinkCache(W, S, model=model)
        with failing_once(model.get_submodule(module), call, kind, "before"), pytest.raises(type(kind())):
            repeat(cache)
        assert streams_of(cache).call is None
        assert cache.get_seq_length() == 7 * call
        assert outcome_of_another_try(repeat, wanted, cache) == outcome


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_decoder_begins_a_new_forward_after_one_of_the_model_failed(kind):
    """If the forward of the model still counted as in progress, the decoder would not begin one."""
    model, token = MODELS["llama"](), tokens(1)
    cache, wanted = SinkCache(W, S, model=model), SinkCache(W, S, model=model)
    for one in (cache, wanted):
        model(tokens(30), past_key_values=one)
    with failing_once(model.model.embed_tokens, 0, kind, "before"), pytest.raises(type(kind())):
        model(token, past_key_values=cache)
    found, other = (model.model(token, past_key_values=one).last_hidden_state for one in (cache, wanted))
    assert torch.equal(found, other)
    assert cache.get_seq_length() == 31


class RaisingHook:
    """A hook of a user that raises in one forward."""

    def __init__(self, forward: int):
        self.forward, self.calls = forward, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.forward + 1:
            raise ValueError("raised by the hook of a user")


@pytest.mark.parametrize("forward", [0, 3, 15])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("place", ["", "model"], ids=["model", "decoder"])
def test_a_hook_of_a_user_that_raises_before_a_forward_changes_nothing(place, first, forward):
    model, run = MODELS["llama"](), run_of("llama", 0)
    cache = SinkCache(W, S, model=model)
    handle = model.get_submodule(place).register_forward_pre_hook(RaisingHook(forward), prepend=first)
    for number, wanted in enumerate(run.logits):
        if number == forward:
            with pytest.raises(ValueError, match="hook of a user"):
                run.forward(cache, number)
        assert torch.equal(run.forward(cache, number), wanted)
    handle.remove()


@pytest.mark.parametrize("forward", [0, 3, 15])
def test_after_a_hook_raised_behind_the_model_the_forward_is_complete(forward):
    """The tokens of such a forward are in the cache and counted, and the stream continues after them."""
    model, run = MODELS["llama"](), run_of("llama", 0)
    cache = SinkCache(W, S, model=model)
    handle = model.register_forward_hook(RaisingHook(forward))
    for number, wanted in enumerate(run.logits):
        if number == forward:
            with pytest.raises(ValueError, match="hook of a user"):
                run.forward(cache, number)
        else:
            assert torch.equal(run.forward(cache, number), wanted)
        assert cache.get_seq_length() == sum(piece.shape[1] for piece in run.pieces[: number + 1])
    handle.remove()
