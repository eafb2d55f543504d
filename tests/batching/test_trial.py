"""A trial says of a model alone whether it is served, and leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from sink_patch import UnsupportedGenerationError, UnsupportedModelError
from sink_patch.batching import trial
from sink_patch.batching.managers import service_for
from tests.batching.serving import asked, batching, check, config, needs_batching, served
from tests.support.tiny import tiny

pytestmark = needs_batching
W, S = 16, 3


@pytest.fixture
def model():
    """One that no trial knows."""
    return copy.deepcopy(tiny("llama", layers=2))


def serve(model, window_length=W, num_sink_tokens=S):
    wanted, requests = config(window_length, num_sink_tokens), asked([(4, 9)])
    (result,) = served(model, requests, wanted, batching())
    return requests[0], result, wanted


@pytest.mark.parametrize(("window_length", "num_sink_tokens"), [(5, 2), (2, 1), (1, 0)])
def test_small_windows(model, window_length, num_sink_tokens):
    """That are smaller than what a trial reads."""
    for sizes in ((window_length, num_sink_tokens), (W, S)):
        check(model, *serve(model, *sizes))


def test_another_dtype(model):
    serve(model)
    serve(model.to(torch.bfloat16))


def test_dropout_and_training(model):
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()
    training = [module.training for module in model.modules()]
    assert service_for(model, config(W, S)) is not None  # the manager itself calls `eval`
    assert [module.training for module in model.modules()] == training


def test_random_numbers(model):
    before = torch.random.get_rng_state()
    assert trial.fault(model, lambda _manager: None) == ""
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_has_failed_is_tried_again(model, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(trial, "_paged", lambda *_given: 1 / 0)
        with pytest.raises(UnsupportedModelError, match="ZeroDivisionError"):
            serve(model)
    check(model, *serve(model))


def test_a_kept_manager_of_a_model_with_another_context_now(model):
    wanted = {"generation_config": config(W, S), "continuous_batching_config": batching()}
    prompts = [one.prompt for one in asked([(4, 9)])]
    model.generate_batch(prompts, persistent_manager=True, progress_bar=False, **wanted)
    model.config.max_position_embeddings = 48  # where clocks are set back
    with pytest.raises(UnsupportedGenerationError, match="keeps a manager"):
        model.generate_batch(prompts, persistent_manager=True, progress_bar=False, **wanted)
    model.destroy_cached_continuous_batching_manager()


def test_images():
    """transformers passes over arguments that it does not know."""
    with pytest.raises(UnsupportedGenerationError, match="pixel_values was given"):
        tiny("llama").generate_batch([[3, 4]], cache_implementation="sink", pixel_values=torch.zeros(1, 3, 4, 4))


def test_a_model_goes_when_nobody_holds_it(model):
    """Without the garbage collector, as where transformers serves by itself: on a GPU its weights would stay."""
    given = {"generation_config": config(W, S), "continuous_batching_config": batching(), "progress_bar": False}
    mine = copy.deepcopy(model)
    gc.collect()
    gc.disable()
    try:
        mine.generate_batch([[3, 4]], **given)
        held = weakref.ref(mine)
        del mine
        assert held() is None
    finally:
        gc.enable()
