"""The sinks of all layers are rotated together and written into the buffers: each layer must get its own."""

from __future__ import annotations

import weakref

import pytest
import torch

from sink_patch.buffers.layouts import UniformLayout
from sink_patch.buffers.rings import Ring
from sink_patch.buffers.rotation import Rotation, Turn
from sink_patch.buffers.sinks import group as group_module
from sink_patch.buffers.sinks.owner import Sinks
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import plan_row
from sink_patch.rules.rows import Row

S, SLOTS, HEADS, DIM = 3, 8, 2, 12
ROTATIONS = {
    "half": Rotation(torch.tensor([1.0, 0.1, 0.01, 0.5, 0.05, 0.3], dtype=torch.float64)),
    "partial": Rotation(torch.tensor([1.0, 0.1], dtype=torch.float64)),
    "tail": Rotation(torch.tensor([1.0, 0.1], dtype=torch.float64), start=DIM - 4),
    "interleaved": Rotation(torch.tensor([1.0, 0.1, 0.7], dtype=torch.float64), pairing="interleaved", start=2),
    "backwards": Rotation(torch.tensor([1.0, 0.1], dtype=torch.float64), sign=-1),
}


def turned(states, rotation, turns):
    """Pair by pair, in complex numbers."""
    out = states.double().clone()
    for pair, frequency in enumerate(rotation.inv_freq.tolist()):
        half = rotation.inv_freq.numel()
        first, second = (pair, pair + half) if rotation.pairing == "half" else (2 * pair, 2 * pair + 1)
        first, second = first + rotation.start, second + rotation.start
        for row, turn in enumerate(turns):
            number = torch.complex(out[row, ..., first], out[row, ..., second])
            number = number * torch.exp(torch.tensor(1j * rotation.sign * turn * frequency, dtype=torch.complex128))
            out[row, ..., first], out[row, ..., second] = number.real, number.imag
    return out


def full_rings(rotations, rows=2, dtype=torch.float32):
    generator, rings = torch.Generator().manual_seed(0), []
    for rotation in rotations:
        ring = Ring(rotation)
        ring.buffer = torch.randn(rows, HEADS, SLOTS, DIM, generator=generator).to(dtype)
        rings.append(ring)
    return rings


def sinks_of(rings):
    """A `Sinks` of the keys that are now in the first slots of the buffers."""
    sinks = Sinks(rings)
    for ring in rings:
        sinks.put(ring, ring.buffer[:, :, :S].clone())
    return sinks


def copies(rings, sinks):
    return [(ring.buffer.clone(), sinks.pristine_of(ring).clone()) for ring in rings]


def assert_shown(rings, sinks, before, turns):
    for ring, (buffer, pristine) in zip(rings, before, strict=True):
        assert torch.equal(sinks.pristine_of(ring), pristine)
        assert torch.equal(ring.buffer[:, :, S:], buffer[:, :, S:])
        wanted = turned(pristine, ring.rotation, turns)
        off = (ring.buffer[:, :, :S].double() - wanted).norm() / wanted.norm()
        assert off < (2e-3 if ring.buffer.dtype == torch.bfloat16 else 1e-6)  # rounded once: at most 2^-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTATIONS)
def test_each_of_many_layers_shows_its_own_sinks(name, dtype, monkeypatch):
    # more rings than are put side by side in one tensor, and not a multiple of that
    monkeypatch.setattr(group_module, "_PIECE", 8 * 2 * HEADS * SLOTS * DIM * dtype.itemsize)
    rings = full_rings([ROTATIONS[name]] * 19, dtype=dtype)
    sinks = sinks_of(rings)
    before = copies(rings, sinks)
    for turns in ((5, 5), (6, 6), (7, 9), (7, 9), (0, 0), (1000, 2)):  # they are put side by side at the second
        sinks.show(Turn(turns))
        assert_shown(rings, sinks, before, turns)


@pytest.mark.parametrize("lead", [0, 5], ids=["rows alike", "rows that differ"])
@pytest.mark.parametrize("most", [8, 3, 1])
@pytest.mark.parametrize("name", ["half", "interleaved"])
def test_turns_that_follow_each_other_are_made_some_at_once(name, most, lead, monkeypatch):
    """Across the end of a block of cosines, with a jump, in another queue of the device, and where memory is short."""
    rings, made, queue = full_rings([ROTATIONS[name]] * 5), [], [0]
    size = 5 * 2 * HEADS * S * ROTATIONS[name].rotary_dim * 4
    monkeypatch.setattr(group_module, "_MOST_AHEAD", most * size + 1)
    monkeypatch.setattr(group_module, "queue_of", lambda _: queue[0])
    turn_dims = group_module.turn_dims
    monkeypatch.setattr(group_module, "turn_dims", lambda *args: made.append(len(args[3])) or turn_dims(*args))
    sinks = sinks_of(rings)
    before = copies(rings, sinks)
    for queue[0], turns in ((0, range(50, 75)), (1, range(75, 80)), (0, range(3)), (0, range(1, 4))):
        for turn in turns:
            sinks.show(Turn((turn, turn + lead)))
            assert_shown(rings, sinks, before, (turn, turn + lead))
    assert max(made) == most
    assert sinks.turned_nbytes == (most + 1) * size
    if most == 8 and lead:  # where all turn alike, some end with a block of cosines
        assert made == [1, *[8] * 3, 8, 1, 8, 1, 8]


def test_one_turn_at_a_time_is_made_where_tensors_do_not_last(monkeypatch):
    """As while a CUDA graph is recorded."""
    monkeypatch.setattr(group_module, "tensors_last", lambda _: False)
    rings = full_rings([ROTATIONS["half"]] * 3)
    sinks = sinks_of(rings)
    before = copies(rings, sinks)
    for turn in range(4):
        sinks.show(Turn((turn, turn)))
        assert_shown(rings, sinks, before, (turn, turn))
    assert not any(group._ahead for group in sinks._groups)


def test_layers_that_turn_in_different_ways_or_have_other_shapes():
    rings = full_rings([*ROTATIONS.values()] * 2) + full_rings([ROTATIONS["half"]] * 2, rows=2)
    rings[-1].buffer = rings[-1].buffer[:, :1].clone()
    sinks = sinks_of(rings)
    before = copies(rings, sinks)
    for turns in ((5, 4), (6, 5), (7, 6)):
        sinks.show(Turn(turns))
        assert_shown(rings, sinks, before, turns)


@pytest.mark.parametrize("name", ROTATIONS)
def test_sinks_that_come_later_are_shown_too(name):
    rings = full_rings([ROTATIONS[name]] * 3)
    sinks = sinks_of(rings)
    for turns in ((1, 1), (2, 2), (3, 3)):
        sinks.show(Turn(turns))
    third = UniformLayout(LayerKind(SLOTS, S), plan_row(Row(seen=2), 1, SLOTS, S, horizon=100), 1)
    for ring in rings:
        ring.update(torch.randn(2, HEADS, 1, DIM), third)
    before = copies(rings, sinks)
    sinks.show(Turn((4, 4)))
    assert_shown(rings, sinks, before, (4, 4))


def test_replaced_buffers_are_noticed():
    rings = full_rings([ROTATIONS["half"]] * 9)
    sinks = sinks_of(rings)
    for turns in ((1, 1), (2, 2)):
        sinks.show(Turn(turns))
    for owner in (*rings, sinks):
        owner.select_rows(torch.tensor([1, 0]))
    before = copies(rings, sinks)
    for turns in ((2, 2), (3, 3), (4, 4)):
        sinks.show(Turn(turns))
        assert_shown(rings, sinks, before, turns)


def test_buffers_that_change_with_each_token_are_not_put_side_by_side():
    """The buffers of beams, for example, would be copied once more each time."""
    rings = full_rings([ROTATIONS["half"]] * 9)
    sinks = sinks_of(rings)
    for turn in range(4):
        for owner in (*rings, sinks):
            owner.select_rows(torch.tensor([1, 0]))
        addresses = [ring.buffer.data_ptr() for ring in rings]
        sinks.show(Turn((turn, turn)))
        assert [ring.buffer.data_ptr() for ring in rings] == addresses


def test_only_some_buffers_are_held_twice_while_they_are_put_side_by_side(monkeypatch):
    monkeypatch.setattr(group_module, "_PIECE", 8 * 2 * HEADS * SLOTS * DIM * torch.float32.itemsize)
    rings = full_rings([ROTATIONS["half"]] * 24)
    sinks, alive, stack = sinks_of(rings), [], torch.stack
    old = [weakref.ref(ring.buffer) for ring in rings]
    sinks.show(Turn((1, 1)))

    def counting_stack(tensors):
        alive.append(sum(buffer() is not None for buffer in old))
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", counting_stack)
    sinks.show(Turn((2, 2)))
    assert alive == [24, 16, 8]
    assert not any(buffer() is not None for buffer in old)
