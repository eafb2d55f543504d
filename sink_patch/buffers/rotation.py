"""Rotary position embedding as maths on tensors: what one rotation does to cached states.

Rotating a key that a model placed at position p by `delta` gives the key at position p + delta (RoFormer, arXiv
2104.09864, section 3.2.2). Angles are computed in float64 and applied in float32; the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from sink_patch.arguments import whole_number
from sink_patch.buffers.devices import Place, made_once, moved, on_device
from sink_patch.errors import SinkArgumentError

TURNS = 64  # that are made at once, as the sinks of a stream turn by one position more for each token
_MOST_BLOCKS = 16
Pairing = Literal["half", "interleaved"]
CosSin = tuple[torch.Tensor, torch.Tensor]


def check_rotation(pairing: object, sign: object) -> None:
    """Raise what `Rotation` would.

    Raises:
        SinkArgumentError: an unknown pairing or sign.
    """
    if pairing not in get_args(Pairing):
        raise SinkArgumentError(f"pairing={pairing!r} is not known. Use one of {get_args(Pairing)}.")
    if sign not in (1, -1):
        raise SinkArgumentError(f"sign={sign!r} is not known. Use 1, or -1 for a model that turns the other way.")


def turn_dims(states: torch.Tensor, crossed: torch.Tensor, cos_sin: CosSin, turned: torch.Tensor) -> None:
    """The rotation of rotary dims [..., rows, heads, tokens, rotary_dim], of which more is held for it to be quick.

    Args:
        states, crossed: the dims, and what `Rotation.crossed` makes of them.
        turned: another tensor, in float32, that is written.
    """
    cos, sin = cos_sin
    # to float32 here, as not every device multiplies mixed dtypes
    torch.mul(states.float(), cos, out=turned).addcmul_(crossed.float(), sin)


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one cached tensor turns when its tokens move by some positions.

    Args:
        inv_freq: tensor of floats of shape [rotary_dim / 2] on the CPU, radians a position, one for each pair.
        pairing: which dims of the rotary part form a pair: "half" is (i, i + rotary_dim / 2), "interleaved" is
            (2i, 2i + 1).
        start: index of the first rotary dim in the head (0: front; head_dim - rotary_dim: tail).
        sign: +1, or -1 for a model that turns the other way.

    Raises:
        SinkArgumentError: `inv_freq` is no such tensor, or `pairing`, `start` or `sign` is not allowed.

    `attention_scaling` (yarn, longrope) is already in the cached key and takes no part.
    """

    inv_freq: torch.Tensor
    pairing: Pairing = "half"
    start: int = 0
    sign: int = 1
    _frequencies: dict[Place, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    _blocks: dict[Place, CosSin] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        inv_freq, start = self.inv_freq, self.start
        if not isinstance(inv_freq, torch.Tensor) or inv_freq.ndim != 1 or not inv_freq.is_floating_point():
            raise SinkArgumentError(
                f"inv_freq={inv_freq!r} was given to a Rotation. Give a tensor of floats, [rotary_dim / 2]."
            )
        check_rotation(self.pairing, self.sign)
        object.__setattr__(self, "start", whole_number("start", start, 0, "of dims"))

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.numel()

    def same_as(self, other: Rotation) -> bool:
        """Whether both turn a tensor alike (tensors have no truth value, so `==` is of no use here)."""
        same_shape = (self.pairing, self.start, self.sign) == (other.pairing, other.start, other.sign)
        return same_shape and torch.equal(self.inv_freq, other.inv_freq)

    def cos_sin(self, delta: torch.Tensor | int, device: torch.device) -> CosSin:
        """Cosine and sine of a turn by `delta` positions, in float32.

        Args:
            delta: int64 tensor of shape [rows], on any device; or one number for all rows, which needs no copy from the
                host (`Turn` chooses).

        Returns:
            Two tensors of shape [rows, 1, 1, rotary_dim] on `device`: those of a pair stand at both of its dims.
        """
        if isinstance(delta, int):
            return self.from_turn(delta, 1, device)
        return self._cos_sin(delta.to(device))

    def from_turn(self, first: int, most: int, device: torch.device) -> CosSin:
        """The same of `first` and of some of the turns behind it, [turns, 1, 1, rotary_dim] each; `most` at most."""
        number, turn = divmod(first, TURNS)
        cos, sin = made_once(self._blocks, device, number, self._made_block, _MOST_BLOCKS)
        return cos[turn : turn + most], sin[turn : turn + most]

    def _cos_sin(self, delta: torch.Tensor) -> CosSin:
        """The same for turns [rows] on the device."""
        inv_freq = made_once(self._frequencies, delta.device, 0, self._on, _MOST_BLOCKS)  # [1, 1, 1, rotary_dim]
        angles = delta.to(inv_freq.dtype)[:, None, None, None] * (self.sign * inv_freq)  # [rows, 1, 1, rotary_dim]
        return angles.cos().float(), angles.sin().float()

    def _made_block(self, number: int, device: torch.device) -> CosSin:
        """Cosines and sines of the turns from `number * TURNS` on."""
        first = number * TURNS
        return self._cos_sin(torch.arange(first, first + TURNS, device=device))

    def apply(self, states: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """`states` turned, in their own dtype.

        Args:
            states: shape [..., rows, heads, tokens, head_dim].
            cos_sin: what `cos_sin` returned.
        """
        turned, (cos, sin) = states.to(torch.float32, copy=True), cos_sin
        sin, _ = self._pairs(sin)  # [rows, 1, 1, rotary_dim / 2], which both of a pair share
        first, second = self._pairs(self.turning(states))
        to_first, to_second = self._pairs(self.turning(turned).mul_(cos))
        to_first.addcmul_(second.float(), sin, value=-1)
        to_second.addcmul_(first.float(), sin)
        return turned.to(states.dtype)

    def turning(self, states: torch.Tensor) -> torch.Tensor:
        """The rotary dims, as a view."""
        return states[..., self.start : self.start + self.rotary_dim]

    def crossed(self, dims: torch.Tensor) -> torch.Tensor:
        """Of each pair (a, b) of rotary dims [..., rotary_dim] the pair (-b, a), which turns by the sine."""
        first, second = self._pairs(dims)
        if self.pairing == "half":
            return torch.cat((-second, first), dim=-1)
        return torch.stack((-second, first), dim=-1).flatten(-2)

    def _pairs(self, dims: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second of each pair of rotary dims, as views [..., rotary_dim / 2]."""
        if self.pairing == "half":
            middle = self.rotary_dim // 2
            return dims[..., :middle], dims[..., middle:]
        return dims[..., ::2], dims[..., 1::2]

    def _on(self, _number: int, device: torch.device) -> torch.Tensor:
        """`inv_freq` of each dim, [1, 1, 1, rotary_dim] on a device; float32 where it has no float64 (Apple's MPS)."""
        half, dtype = self.pairing == "half", torch.float32 if device.type == "mps" else torch.float64
        of_dims = self.inv_freq.repeat(2) if half else self.inv_freq.repeat_interleave(2)
        return moved(of_dims.to(dtype).view(1, 1, 1, -1), device)


class Turn:
    """By how many positions each row turns; angles are computed once for a rotation and a device."""

    def __init__(self, rows: Sequence[int]):
        self.rows = tuple(rows)
        self._is_one = len(set(self.rows)) == 1
        self._made: dict[tuple[int, torch.device], CosSin] = {}

    def cos_sin(self, rotation: Rotation, device: torch.device) -> CosSin:
        """What `Rotation.cos_sin` returns."""
        key = (id(rotation), device)
        if key not in self._made:
            by = self.rows[0] if self._is_one else on_device(self.rows, device)
            self._made[key] = rotation.cos_sin(by, device)
        return self._made[key]

    def following(self, rotation: Rotation, device: torch.device, most: int) -> CosSin:
        """Those of this turn and of some that turn each row by one position more each, `most` at most.

        Returns:
            Two tensors of shape [turns, rows or 1, 1, 1, rotary_dim].
        """
        if self._is_one:
            cos, sin = rotation.from_turn(self.rows[0], most, device)  # [turns, 1, 1, rotary_dim]
            return cos[:, None], sin[:, None]
        turns = on_device([row + number for number in range(most) for row in self.rows], device)
        cos, sin = rotation.cos_sin(turns, device)  # [turns * rows, 1, 1, rotary_dim]
        shape = (most, len(self.rows), *cos.shape[1:])
        return cos.view(shape), sin.view(shape)
