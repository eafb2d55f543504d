"""A method that we have wrapped, kept by an object: it is copied and pickled as any bound method is."""

from __future__ import annotations

import copy
import pickle

import pytest
from transformers.generation.utils import GenerationMixin

from sink_patch.compat import installed_shim
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
