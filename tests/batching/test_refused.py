"""Models that would not be served exactly are refused by name, before anything of theirs is changed."""

from __future__ import annotations

import pytest

from sink_patch import SinkArgumentError, UnsupportedModelError
from sink_patch.batching import trial
from sink_patch.compat import models
from tests.batching.serving import batching, config, needs_batching
from tests.support import zoo
from tests.support.known_gaps import is_newest
from tests.support.tiny import tiny

pytestmark = needs_batching
REASONS = {
    "bamba": "layer 0 keeps a recurrent state",
    "deepseek_v3": "layer 0 keeps its rotated part beside a latent cache",
    "bloom": "takes distances from the order of its keys",
    "llama4_text": "transformers does not know its layers there",
    "gpt2": "it adds learned",
    "gemma2": "its attention caps logits",
}
if is_newest():  # older ones serve the one, and have no other reason for the other
    REASONS |= {"gemma3n_text": "layer 2 keeps no keys of its own", "gpt_neox": "a trial of it fails"}


@pytest.mark.parametrize("name", REASONS)
def test_models(name):
    model = zoo.build(name, attn_implementation="eager")
    before, attributes = model.generation_config.to_dict(), set(vars(model))
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=REASONS[name]) as caught:
            model.init_continuous_batching(config(12, 2), batching())
        assert type(model).__name__ in str(caught.value)
    assert (model.generation_config.to_dict(), set(vars(model))) == (before, attributes)
    assert model.config._attn_implementation == "eager"


def test_windows_that_pages_would_not_have(monkeypatch):
    monkeypatch.setattr(models, "group_layers", lambda _config: {"full_attention": [0]})
    with pytest.raises(UnsupportedModelError, match="windows of 7, and would get others there"):
        tiny("mistral", sliding_window=7).init_continuous_batching(config(12, 2), batching())


@pytest.mark.parametrize(("factor", "off"), [(2, r"1\.0e\+00"), (1.0001, r"1\.0e-04")])
def test_logits_that_are_off(monkeypatch, factor, off):
    """Whatever the cause: a trial compares them with a plain forward."""
    model = tiny("qwen3", layers=1, seed=7)
    prepared = trial._paged
    monkeypatch.setattr(trial, "_paged", lambda *given: {name: factor * one for name, one in prepared(*given).items()})
    with pytest.raises(UnsupportedModelError, match=f"off by {off}"):
        model.init_continuous_batching(config(12, 2), batching())


def test_windows_that_do_not_fit():
    with pytest.raises(SinkArgumentError, match="leaves no room"):
        tiny("llama").init_continuous_batching(config(4, 4), batching())
