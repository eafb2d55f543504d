"""Bytes of a full window: a cache is made and filled on the meta device, where tensors take no memory, and counted.

So the figure is that of the buffers as they are really laid out, with the sinks' copies, and no formula beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sink_patch.arguments import Sizes
from sink_patch.buffers.layers import SinkLayer
from sink_patch.buffers.layouts import UniformLayout
from sink_patch.buffers.store import LayerStore
from sink_patch.models.cost.sample import Sample
from sink_patch.models.facts import ModelFacts
from sink_patch.models.layers import make_layers
from sink_patch.rules.plans import RowPlan

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


@dataclass(frozen=True)
class Cost:
    """What a row of a full cache holds in this process; a batch or beams take as many times that as they have rows.

    Beside the layers a cache holds some kilobytes at any window: what it has read last, and angles.

    Args:
        window_length: tokens that are kept, sinks counted in.
        window_bytes: bytes a row: keys, values, the sinks as they were made (in the model's dtype) and as they are
            turned (in float32), and recurrent states. Layers with a shorter sliding window hold that many tokens only.
        token_bytes: bytes a row that a window longer by one token takes more.
        state_bytes: bytes a row of the recurrent and convolution states alone, whatever the window.
        dtype: of the keys and values ("bfloat16"), all of them where layers differ; of the states where there are no
            keys.
    """

    window_length: int
    window_bytes: int
    token_bytes: int
    state_bytes: int
    dtype: str

    def __str__(self) -> str:
        said = f"a window of {self.window_length}: {in_words(self.window_bytes)} a row in {self.dtype}"
        if self.state_bytes:
            said += f", {in_words(self.state_bytes)} of it recurrent states"
        return f"{said}; each token more {in_words(self.token_bytes)}"


def cost_of(facts: ModelFacts, config: Any, samples: Sequence[Sample], sizes: Sizes) -> Cost:
    """What a window costs.

    Args:
        config: the model's text config.
        samples: one for each layer.
    """
    length = sizes.window_length
    store = LayerStore(make_layers(facts, config, sizes))
    plan = RowPlan(seen=0, new=length, past=0, shift=0, base=0, turn=0)
    layouts = [UniformLayout(kind, plan, length) for kind in store.kinds]
    token_bytes, dtypes = 0, set[torch.dtype]()
    for layer, known, one in zip(store.layers, facts.layers, samples, strict=True):
        if isinstance(layer, SinkLayer) and one.keys is not None and one.values is not None:
            layer.update(_repeated(one.keys, length), _repeated(one.values, length), layouts)
            dtypes |= {one.keys.dtype, one.values.dtype}
            if not known.kind(length + 1, sizes.num_sink_tokens).local:
                token_bytes += one.keys.nbytes + one.values.nbytes
    store.take_all_slots()
    states = [state for one in samples for state in one.states]
    state_bytes = sum(state.nbytes for state in states)
    dtypes = dtypes or {state.dtype for state in states}
    return Cost(
        window_length=length,
        window_bytes=store.nbytes + store.sinks.turned_nbytes + state_bytes,
        token_bytes=token_bytes,
        state_bytes=state_bytes,
        dtype=" and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
    )


def in_words(count: int) -> str:
    """So many bytes, for people: "11.8 MB" (of 10^6 bytes)."""
    name, size = next((unit for unit in _UNITS if count >= unit[1]), ("bytes", 1))
    value = count / size
    return f"{value:.1f} {name}" if size > 1 and value < 100 else f"{value:.0f} {name}"


def _repeated(token: torch.Tensor, length: int) -> torch.Tensor:
    return token.expand(-1, -1, length, -1)  # [1, heads, length, dim]
