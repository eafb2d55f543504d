"""The coordinates of masks, `cache_position` up to 5.3, reach the model's masks on whatever way its forward takes them.

A forward may name them, read them from its `**kwargs`, hand them on there, or not at all. All versions run this; newer
ones have none, and the same models must be right.
"""

from __future__ import annotations

import copy

import pytest
import torch

import sink_patch
from sink_patch import SinkCache
from tests.support import zoo
from tests.support.oracle import relative_error
from tests.support.replay import cache_name, replayed
from tests.support.tiny import FAMILIES, tiny, tokens, variants

WINDOW, SINKS, LOCAL, NEW = 24, 3, 7, 60
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 500, "pad_token_id": 0, "output_logits": True}
SINK = {"cache_implementation": "sink", "window_length": WINDOW, "num_sink_tokens": SINKS}
SLIDING = [(family, settings) for family in FAMILIES for name, settings in variants(family) if "short_sliding" in name]


def handing_on(owner, name):
    """A subclass that takes its arguments as `**kwargs`, as many of users' own do."""

    def past_key_values(self, input_ids=None, past_key_values=None, **kwargs):
        return owner.forward(self, input_ids, past_key_values=past_key_values, **kwargs)

    def cache(self, input_ids=None, cache=None, **kwargs):
        return owner.forward(self, input_ids, cache=cache, **kwargs)

    forward = cache if name == "cache" else past_key_values
    return type(owner.__name__, (owner,), {"forward": forward})


def dropping(owner, name):
    """A subclass that hands on what it names, and leaves the others out."""

    def past_key_values(self, input_ids=None, past_key_values=None, attention_mask=None, position_ids=None, **_others):
        named = {"attention_mask": attention_mask, "position_ids": position_ids}
        return owner.forward(self, input_ids, past_key_values=past_key_values, **named)

    def cache(self, input_ids=None, cache=None, attention_mask=None, position_ids=None, **_others):
        return owner.forward(self, input_ids, cache=cache, attention_mask=attention_mask, position_ids=position_ids)

    forward = cache if name == "cache" else past_key_values
    return type(owner.__name__, (owner,), {"forward": forward})


def changed(change, family, settings, attention="eager"):
    model = copy.deepcopy(tiny(family, attention=attention, **settings))
    model.__class__ = change(type(model), cache_name(model))
    return model


@pytest.mark.parametrize("change", [handing_on, dropping])
@pytest.mark.parametrize(("family", "settings"), SLIDING, ids=str)
def test_a_loop_of_ones_own(family, settings, change):
    model, stream = changed(change, family, settings), tokens(70)
    cache, seen = SinkCache(WINDOW, SINKS, model=model), 0
    several = [] if sink_patch.families()[family].whole_prompts else [5, 9]
    for new in [11, *[1] * 20, *several, *[1] * 25]:
        total = seen + new
        with torch.no_grad():
            found = model(stream[:, seen:total], **{cache_name(model): cache}).logits[:, -1]
            wanted = model(stream[:, max(0, total - LOCAL) : total], use_cache=False).logits[:, -1]
        assert relative_error(found, wanted) < 1e-5, f"token {total}"
        seen = total


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("change", [handing_on, dropping])
@pytest.mark.parametrize(("family", "settings"), SLIDING, ids=str)
def test_a_call_of_generate(family, settings, change, attention):
    if attention == "sdpa" and not type(tiny(family, **settings))._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {family}")
    model = changed(change, family, settings, attention)
    out = model.generate(tokens(11), return_dict_in_generate=True, **GREEDY, **SINK)
    for count, found in enumerate(out.logits):
        total = 11 + count
        with torch.no_grad():
            wanted = model(out.sequences[:, max(0, total - LOCAL) : total], use_cache=False).logits[:, -1]
        assert relative_error(found, wanted) < 1e-4, f"token {total}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [WINDOW, 80])
def test_a_model_that_reads_them_from_its_kwargs(window, attention):
    """ModernBERT-decoder: its sliding window of 64 is longer than one of these windows, and shorter than the other."""
    if "modernbert-decoder" not in zoo.entries():
        pytest.skip("this transformers has no ModernBERT-decoder")
    model = zoo.build("modernbert-decoder", attn_implementation=attention)
    sink = SINK | {"window_length": window}
    out = model.generate(tokens(11), return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 110}, **sink)
    wanted = replayed(model, out.sequences, [11, *[1] * 109], window, SINKS)
    for count, pair in enumerate(zip(out.logits, wanted, strict=True)):
        assert relative_error(*pair) < 1e-4, f"token {11 + count}"
