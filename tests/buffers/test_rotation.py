"""Rotations against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sink_patch.buffers.rotation import Rotation


def by_complex_numbers(states: torch.Tensor, rotation: Rotation, delta: int) -> torch.Tensor:
    """Each pair (a, b) is the number a + bi, turned by e^(i * angle); the other dims stay."""
    turned = states.double().clone()
    half = rotation.rotary_dim // 2
    for pair, frequency in enumerate(rotation.inv_freq.tolist()):
        first, second = (pair, pair + half) if rotation.pairing == "half" else (2 * pair, 2 * pair + 1)
        first, second = first + rotation.start, second + rotation.start
        number = torch.complex(turned[..., first], turned[..., second])
        angle = torch.tensor(rotation.sign * frequency * delta, dtype=torch.float64)
        number = number * torch.polar(torch.ones_like(angle), angle)
        turned[..., first], turned[..., second] = number.real, number.imag
    return turned


@st.composite
def rotations(draw):
    pairs = draw(st.integers(1, 8))
    start = draw(st.integers(0, 16 - 2 * pairs))
    inv_freq = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=pairs, max_size=pairs)), dtype=torch.float64)
    return Rotation(inv_freq, draw(st.sampled_from(["half", "interleaved"])), start, draw(st.sampled_from([1, -1])))


@given(rotation=rotations(), delta=st.integers(-100_000, 100_000))
@settings(deadline=None)
def test_equals_complex_numbers(rotation, delta):
    states = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    turned = rotation.apply(states, rotation.cos_sin(torch.tensor([delta]), states.device))
    torch.testing.assert_close(turned.double(), by_complex_numbers(states, rotation, delta), atol=2e-6, rtol=0)


def test_each_row_turns_by_its_own_delta():
    rotation = Rotation(torch.tensor([1.0, 0.1], dtype=torch.float64))
    states = torch.randn(3, 2, 4, 4)
    deltas = torch.tensor([0, 7, -3])
    turned = rotation.apply(states, rotation.cos_sin(deltas, states.device))
    for row, delta in enumerate(deltas.tolist()):
        alone = rotation.apply(states[row : row + 1], rotation.cos_sin(torch.tensor([delta]), states.device))
        assert torch.equal(turned[row : row + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_turn_by_zero_changes_no_bit(dtype):
    rotation = Rotation(torch.rand(4, dtype=torch.float64), "interleaved", start=2)
    states = torch.randn(1, 2, 3, 16).to(dtype)
    turned = rotation.apply(states, rotation.cos_sin(torch.tensor([0]), states.device))
    assert turned.dtype == dtype
    assert torch.equal(turned, states)


def test_same_as_compares_all_fields():
    rotation = Rotation(torch.tensor([1.0, 0.1], dtype=torch.float64))
    others = [
        Rotation(torch.tensor([1.0, 0.2], dtype=torch.float64)),
        Rotation(rotation.inv_freq, "interleaved"),
        Rotation(rotation.inv_freq, start=2),
        Rotation(rotation.inv_freq, sign=-1),
    ]
    assert rotation.same_as(Rotation(rotation.inv_freq.clone()))
    assert not any(rotation.same_as(other) for other in others)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_turn_equals_that_of_rows_whatever_was_turned_before(sign):
    rotation = Rotation(torch.tensor([1.0, 0.1, 0.003], dtype=torch.float64), sign=sign)
    for number, delta in enumerate([0, 1, 31, 32, 33, -1, -32, -33, 5, 100_000, 99_999]):
        with torch.inference_mode(number % 2 == 0):
            found = rotation.cos_sin(delta, torch.device("cpu"))
            wanted = rotation.cos_sin(torch.tensor([delta]), torch.device("cpu"))
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape == (1, 1, 1, 6)
            assert torch.equal(one, other)
            assert not one.is_inference()


def test_the_turns_of_a_few_streams_are_held_and_no_more():
    rotation, made = Rotation(torch.tensor([1.0, 0.1], dtype=torch.float64)), []
    make = Rotation._made_block
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Rotation, "_made_block", lambda *args: made.append(1) or make(*args))
        for step in range(64):
            for stream in range(8):
                rotation.cos_sin(1000 * stream + step, torch.device("cpu"))
    assert len(made) < 8 * 4
    for step in range(100):
        rotation.cos_sin(1000 * step, torch.device("cpu"))
    assert len(rotation._blocks) == 16
