"""What a model is to a sink cache: its family, adapters, layers and positions. Decided and proven before any stream.

Which adapters are proven, by the example of DeepSeek-V3. transformers caches its attention in one of two forms, and
the family has adapters for both:

    ============  =========================  ================================  ===================================
    of Family     the cache is               "keys"                            "values"
    ============  =========================  ================================  ===================================
    adapters      latent                     compressed, 512 dims: still       rotated part, 64 dims: all turn
    formerly      expanded for each head     192 dims: turn from dim 128 on    128 dims: still
    ============  =========================  ================================  ===================================

The probe runs the model on the same tokens at positions 1 and 1 + delta, and compares what is cached. On a latent cache
`formerly` is refuted (the keys should have turned, and did not), and `adapters` fits: the facts are those of
`adapters`. On an expanded cache `formerly` fits. If neither fits, `AdapterMismatchError` says what is off from
`adapters`. For a model that no family claims, the candidates are all known conventions (probe/choice.py).

What is proven is remembered for the model object, as the probe costs two forwards. The family's functions run at each
call all the same: they read the model's frequencies, and a cast of the model rounds those. If they give what was
proven, that holds; else the probe runs again.
"""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar

from torch import nn

from sink_patch.errors import UnsupportedModelError
from sink_patch.models.claims import Claim, read_claim
from sink_patch.models.facts import ModelFacts
from sink_patch.models.families.family import Family
from sink_patch.models.families.registry import families
from sink_patch.models.probe import choice, distance, proof, readings
from sink_patch.models.probe.calls import NUM_TOKENS

_proven: weakref.WeakKeyDictionary[nn.Module, ModelFacts] = weakref.WeakKeyDictionary()
# Held for one read or write of `_proven`, never over code of others: families and models may call `examine` themselves.
# Reentrant, as the garbage collector may run code of others at any moment.
_lock = threading.RLock()
_being_examined: ContextVar[tuple[nn.Module, ...]] = ContextVar("being_examined", default=())


def examine(model: nn.Module, rows: int = NUM_TOKENS) -> ModelFacts:
    """Find out how a model streams, and prove it by the probe.

    The probe runs once for a model object. Threads that examine a new model at the same time each run it, and find the
    same.

    Args:
        model: a transformers model, without the wrappers of PEFT or torch.compile (see `unwrapped`).
        rows: of the forwards of the probe; in a call of `generate`, as many as the call has.

    Raises:
        UnsupportedModelError: it cannot stream, with the reason; before any forward where the config tells. Or it is
            examined by its own family's function.
        AdapterMismatchError: its cache does not turn as its family says.
    """
    families()  # loads those of other distributions, which may examine this very model as they are imported
    outer = _being_examined.get()
    _check_not_within_itself(model, outer)
    try:  # here, and in no context manager: Ctrl-C can fall on the beginning of its exit
        _being_examined.set((*outer, model))
        claim = read_claim(model)
        with _lock:
            known = _proven.get(model)
        facts = _found(claim, known, rows) if claim.family is None else _proved(claim, claim.family, known, rows)
        with _lock:
            _proven[model] = facts
    finally:
        _being_examined.set(outer)
    return facts


def _proved(claim: Claim, family: Family, known: ModelFacts | None, rows: int) -> ModelFacts:
    """The facts with the adapters of the family, of `adapters` or of `formerly`: see the example above."""
    factories = [factory for factory in (family.adapters, family.formerly) if factory is not None]
    present, *former = candidates = [claim.facts(claim.adapters_of(factory)) for factory in factories]
    for facts in candidates:
        if known is not None and facts.same_as(known):
            return facts
    if not any(entry.attention for entry in claim.entries):
        return present  # nothing turns
    largest, positions = claim.context.largest_probe_position, claim.position_source == "position_ids"
    entries, found = claim.entries_here, list[readings.Reading | None]()
    for found in readings.read(claim.model, largest, entries, positions=positions, rows=rows):
        for facts in (*former, present):
            if proof.fits(found, entries, facts.adapters):
                return facts
    proof.verify(found, entries, present.adapters, family.name)
    return present


def _found(claim: Claim, known: ModelFacts | None, rows: int) -> ModelFacts:
    """The facts of a model that no family claims, with the adapters that its readings show."""
    model, largest = claim.model, claim.context.largest_probe_position
    if known is not None and known.family is None and choice.still_hold(known.adapters, model):
        return known
    *_, found = readings.read(model, largest, claim.entries, positions=True, rows=rows)
    adapters = choice.choose(model, claim.entries_here, found)
    dtypes = {reading.keys[0].dtype for reading in found if reading is not None}
    distance.check_distance_only(model, largest, dtypes, rows)
    return claim.facts(adapters)


def _check_not_within_itself(model: nn.Module, outer: tuple[nn.Module, ...]) -> None:
    """While a model is examined, this thread (or task) may examine others, but not it: that would never end."""
    if any(one is model for one in outer):
        raise UnsupportedModelError(
            f"{type(model).__name__} was to be examined while it is being examined: the function of its family, or a "
            "hook that runs in its forward, calls sink_patch.inspect, makes a SinkCache or generates with one, for "
            "this very model. Do that for another model only, or read what is needed from the model itself."
        )
