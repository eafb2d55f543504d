"""A method that we have wrapped, kept by an object: it is copied and pickled as any bound method is."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from transformers.generation.utils import GenerationMixin

from sink_patch.compat import installed_shim
from sink_patch.patching.wrapping import wrap_once
from tests.support.tiny import tiny, tokens

NAMES = sorted(
    {
        method.name
        for method in installed_shim().methods
        if method.owner == "GenerationMixin" and hasattr(GenerationMixin, method.name)
    }
)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_keeps_one_of_its_methods_may_be_copied(name, way):
    """As PEFT's models do; the copy's method is that of the copy."""
    model = copy.deepcopy(tiny("llama", layers=1))
    model.kept = getattr(model, name)
    copied = way(model)
    assert copied.kept.__self__ is copied
    assert copied.kept.__name__ == name
    assert copy.copy(model.kept).__self__ is model


def test_a_copied_method_is_still_wrapped():
    model = copy.deepcopy(tiny("llama", layers=1))
    model.kept = model._prepare_cache_for_generation
    out = copy.deepcopy(model).generate(
        tokens(5), cache_implementation="sink", max_new_tokens=3, return_dict_in_generate=True
    )
    assert out.past_key_values.window_length == 256


class Owner:
    def method(self, first, second=2):
        return self, first, second

    @classmethod
    def of_the_class(cls, first, second=2):
        return cls, first, second

    @staticmethod
    def static(first, second=2):
        return None, first, second


class Heir(Owner):
    def method(self, first, second=2):
        return Owner.method(self, first)


@pytest.mark.parametrize(
    ("call", "instance"),
    [
        (lambda owner: owner.method(1), Owner),
        (lambda owner: Owner.method(owner, 1), Owner),
        (lambda owner: Owner.method(owner, first=1), Owner),
        (lambda owner: Heir().method(1), Heir),
        (lambda owner: owner.of_the_class(1), type),
        (lambda owner: Owner.of_the_class(1), type),
        (lambda owner: owner.static(1), None),
        (lambda owner: Owner.static(1), None),
    ],
)
def test_a_wrapper_sees_the_same_arguments_whichever_way_a_method_is_called(call, instance, monkeypatch):
    """On each wrapt: through the object, through its class (`GenerationMixin._sample(model, ...)`), from a subclass."""
    seen = []

    def record(wrapped, instance, args, kwargs):
        seen.append((inspect.signature(wrapped).bind(*args, **kwargs).arguments, instance))
        return wrapped(*args, **kwargs)

    for name in ("method", "of_the_class", "static"):
        monkeypatch.setattr(Owner, name, vars(Owner)[name])  # taken back after the test
        wrap_once(Owner, name, record, lambda: True)
    wanted = {None: type(None), Owner: Owner, Heir: Heir, type: type}[instance]
    owner, first, second = call(Owner())
    assert isinstance(owner, wanted)
    assert (first, second) == (1, 2)
    ((arguments, held),) = seen
    assert arguments == {"first": 1}
    assert isinstance(held, wanted) or instance is None
