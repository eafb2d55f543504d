"""Cached keys do not drift: after 10,000 decode steps in 16 bits they equal freshly computed ones.

The model has one layer, so that a key depends on its own token and position alone, and can be computed again. The key
that the cache shows for a token is compared with three computations of it at the position where it is shown:

* exact: the key as the model computes it in 16 bits before rotation, rotated in float64. The error of the cache is then
  that of the model's own rotation and of ours: the "two roundings" below.
* float32: the whole model in float32, with the same (16-bit) weights; the roundings of its norm and projection as well.
* model: the key that the model would compute now, in 16 bits, with a rounding error of its own.

Measured on a CPU, at the end of the stream, when nearly all keys of the ring have been turned back once; u is one
rounding, 2^-8 = 3.9e-3 in bfloat16 and 2^-11 = 4.9e-4 in float16; per key vector, norm of the error to norm of the key:

                  bfloat16: worst   mean   float16: worst   mean
    ring, exact           4.8e-3  2.8e-3          5.9e-4  3.7e-4
    ring, float32         6.5e-3  4.2e-3          8.2e-4  5.1e-4
    ring, model           6.0e-3  3.3e-3          8.1e-4  4.3e-4
    sinks, exact          3.2e-3  2.5e-3          5.7e-4  3.2e-4
    model, exact          4.0e-3  2.5e-3          5.3e-4  3.4e-4    (the error of the model's own fresh keys)

The largest error of one element, to the largest element of its vector: 7.1e-3 and 1.0e-3 for ring, exact.
"""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from sink_patch import SinkCache
from sink_patch.compat import installed_shim
from tests.support.caches import default_cache
from tests.support.tiny import tiny, tokens

W, S = 32, 4
RING = W - S
STEPS = 10_000
CONTEXT = 48  # shorter than 2 W, so the clock is set back every W + 1 steps
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


@dataclass(frozen=True)
class Shown:
    """The keys that the cache shows at the end, oldest first: sinks, then ring; all of one row."""

    model: PreTrainedModel
    tokens: torch.Tensor  # [W]
    positions: torch.Tensor  # [W]
    keys: torch.Tensor  # [W, heads, head_dim]
    times_set_back: int


@functools.cache
@torch.no_grad()
def shown_after_10000_steps(dtype: torch.dtype) -> Shown:
    original = tiny("llama", max_position_embeddings=CONTEXT)
    config = copy.deepcopy(original.config)
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
    # not .to(dtype), which would round the rotary frequencies too
    model = type(original)._from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(original.state_dict())
    cache, stream = SinkCache(W, S, model=model), tokens(STEPS)
    newest = [0]
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: newest.append(int(kwargs["position_ids"])), with_kwargs=True
    )
    for index in range(STEPS):
        model(stream[:, index : index + 1], past_key_values=cache)
    hook.remove()
    indices = [*range(S), *range(STEPS - RING, STEPS)]
    slots = [index if index < S else S + (index - S) % RING for index in indices]
    return Shown(
        model,
        stream[0, indices],
        newest[-1] - (W - 1) + torch.arange(W),
        cache.layers[0].keys[0, :, slots].transpose(0, 1),
        sum(later < earlier for earlier, later in itertools.pairwise(newest)),
    )


@torch.no_grad()
def keys_of(model: PreTrainedModel, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the model itself caches for single tokens [tokens] at positions: [tokens, heads, head_dim]."""
    cache = default_cache(model)
    model(token_ids[:, None], position_ids=positions[:, None], past_key_values=cache)
    keys, _ = installed_shim().cached(cache)[0]
    return keys[:, :, 0]


def exactly_rotated(model: PreTrainedModel, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys [tokens, heads, head_dim] turned by `positions` in float64."""
    angles = positions.double()[:, None, None] * model.get_decoder().rotary_emb.inv_freq.double()
    first, second = keys.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def exact_keys(shown: Shown) -> torch.Tensor:
    """At position 0 nothing is rotated, so that the model computes its keys before rotation."""
    unrotated = keys_of(shown.model, shown.tokens, torch.zeros_like(shown.positions))
    return exactly_rotated(shown.model, unrotated, shown.positions)


def relative_errors(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Relative errors: norm of the error to norm of the key, [tokens, heads]."""
    return (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)


@pytest.mark.slow
@DTYPES
def test_after_10000_steps_cached_keys_have_an_error_of_at_most_two_roundings(dtype):
    shown, u = shown_after_10000_steps(dtype), ROUNDING[dtype]
    assert shown.times_set_back == (STEPS - W - 1) // (W + 1)
    assert shown.positions[0] < 4  # the clock has just been set back: nearly all keys of the ring were rotated
    exact = exact_keys(shown)
    in_float32 = keys_of(copy.deepcopy(shown.model).float(), shown.tokens, shown.positions).double()
    assert relative_errors(shown.keys, exact).max() <= 2 * u
    assert relative_errors(shown.keys, in_float32).max() <= 2 * u
    largest = (shown.keys - exact).abs().amax(dim=-1) / exact.abs().amax(dim=-1)  # [tokens, heads]
    assert largest.max() <= 3 * u  # an element has the roundings of both elements of its pair


@pytest.mark.slow
@DTYPES
def test_after_10000_steps_cached_keys_are_hardly_worse_than_fresh_ones(dtype):
    shown, u = shown_after_10000_steps(dtype), ROUNDING[dtype]
    fresh = keys_of(shown.model, shown.tokens, shown.positions).double()
    assert relative_errors(shown.keys, fresh).max() <= 3 * u  # two of the cached key, and that of the fresh one
    exact = exact_keys(shown)
    assert relative_errors(shown.keys, exact).mean() <= 1.5 * relative_errors(fresh, exact).mean()


@pytest.mark.slow
@DTYPES
def test_after_10000_steps_sinks_are_exactly_rotated_and_rounded_once(dtype):
    shown, u = shown_after_10000_steps(dtype), ROUNDING[dtype]
    made = torch.cat([keys_of(shown.model, shown.tokens[[sink]], torch.tensor([sink])) for sink in range(S)])
    exact = exactly_rotated(shown.model, made, shown.positions[:S] - torch.arange(S))
    # for each element; the second term is the rounding of float32, which matters where two terms nearly cancel
    allowed = u * exact.abs() + 1e-6 * exact.norm(dim=-1, keepdim=True)
    assert ((shown.keys[:S] - exact).abs() <= allowed).all()
