"""`SinkCache`: attention sinks and a window of the newest tokens, for ever.

Source: StreamingLLM, arXiv 2309.17453, section 3. The cache holds the first `num_sink_tokens` tokens of each stream and
the newest `window_length - num_sink_tokens`; positions are positions within the cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from sink_patch import seam
from sink_patch.arguments import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, check_window
from sink_patch.binding import ModelFacts, examine, horizon
from sink_patch.clock import Row, plan_row
from sink_patch.errors import CacheStateError, UnboundCacheError
from sink_patch.layers import SinkLayer
from sink_patch.padding import new_tokens
from sink_patch.step import Step


class SinkCache(Cache, seam.Streaming):
    """A cache of fixed size with which a model generates without end.

    Args:
        window_length: tokens that are kept, sinks counted in.
        num_sink_tokens: how many of the first tokens of each row are kept for good.
        model: the model that will use it; `generate` binds a cache that has none.

    `get_seq_length()` counts all columns ever fed, and `attention_mask` covers the whole stream, as with any cache of
    transformers; `position_ids` are set by the cache. Rows are streams of their own; padding to the left of a row's
    tokens is dropped. Gradients do not flow into the cache.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream.
    """

    def __init__(
        self,
        window_length: int = DEFAULT_WINDOW_LENGTH,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        *,
        model: nn.Module | None = None,
    ):
        self.window_length, self.num_sink_tokens = check_window(window_length, num_sink_tokens)
        super().__init__(layers=[])
        self._facts: ModelFacts | None = None
        self._entrances: tuple[weakref.ref[nn.Module], ...] = ()
        self._horizon = 0
        self._rows: list[Row] | None = None  # None: nothing fed yet
        self._columns = 0
        self._step: Step | None = None
        self._step_module: weakref.ref[nn.Module] | None = None
        self._broken: str | None = None
        if model is not None:
            self.bind(model)

    def __repr__(self) -> str:
        bound = "unbound" if self._facts is None else f"model={self._facts.model_class}, layers={len(self.layers)}"
        size = f"window_length={self.window_length}, num_sink_tokens={self.num_sink_tokens}"
        return f"{type(self).__name__}({size}, {bound}, seen={self.get_seq_length()})"

    # --- binding -------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> None:
        """Tie the cache to a model: find and prove its adapters, and let its forward know sink caches.

        Raises:
            UnsupportedModelError: the model cannot stream; neither the cache nor the model is changed.
            SinkArgumentError: the window does not fit the model's positions.
            CacheStateError: the cache holds the tokens of another model.
        """
        model = _unwrapped(model)
        if self.is_bound_to(model):
            return
        if self._rows is not None:
            raise CacheStateError(
                f"{self!r} holds the tokens of another model than this {type(model).__name__}. Use a new SinkCache, or "
                "reset() this one first."
            )
        facts = examine(model)
        self._horizon = horizon(facts, self.window_length, self.num_sink_tokens)
        self._facts = facts
        self._entrances = tuple(weakref.ref(module) for module in seam.install(model))
        self.layers = [
            SinkLayer(
                layer.kind(self.window_length, self.num_sink_tokens),
                layer.adapter.keys,
                layer.adapter.values,
                sliding=layer.sliding_window is not None,
            )
            for layer in facts.layers
        ]

    def is_bound_to(self, model: nn.Module) -> bool:
        """Whether the cache belongs to this model (or to the model that this decoder is a part of)."""
        return any(entrance() is model for entrance in self._entrances)

    def fits_in_one_forward(self, columns: int) -> bool:
        """Whether so many new tokens stay within the context that the model was trained on, if fed at once."""
        if self._facts is None or columns <= self.window_length - self.num_sink_tokens:
            return True
        sinks = 0 if self._rows is None else min(self.num_sink_tokens, max(row.seen for row in self._rows))
        return sinks + columns <= self._facts.context.length

    # --- one forward, driven by the hooks of seam.py -------------------------------------------------------------

    def begin_forward(
        self, module: nn.Module, inputs: torch.Tensor, attention_mask: Any
    ) -> dict[str, torch.Tensor | None] | None:
        """Make room, set the clock, and say what the model is to receive.

        Args:
            inputs: token ids [rows, columns] or embeddings [rows, columns, hidden].
            attention_mask: None, or [rows, columns ever fed + columns], 1 for real tokens.

        Returns:
            `position_ids` and `attention_mask` for the model, or None where an outer module has begun this forward.
        """
        if not self.is_bound_to(module):
            raise self._not_bound_to(type(module).__name__)
        if self._step is not None and self._step_module is not None and self._step_module() is not module:
            return None
        self._abandon_step()  # of a forward that ended in an interrupt, past all hooks
        if self._broken is not None:
            raise CacheStateError(f"{self._broken} Call reset() and feed the text again, or use a new SinkCache.")
        rows, columns = inputs.shape[:2]
        step = self._plan(rows, columns, attention_mask, inputs.device)
        self._set_clock(step)
        self._step, self._step_module = step, weakref.ref(module)
        return {"position_ids": step.position_ids(), "attention_mask": step.attention_mask()}

    def end_forward(self, module: nn.Module, completed: bool) -> None:
        if self._step is None or self._step_module is None or self._step_module() is not module:
            return
        if not completed:
            self._abandon_step()
            return
        self._rows = [plan.after() for plan in self._step.plans]
        self._columns += self._step.columns
        self._step = self._step_module = None

    def _plan(self, rows: int, columns: int, attention_mask: Any, device: torch.device) -> Step:
        held = self._rows if self._rows is not None else [Row()] * rows
        if len(held) != rows:
            raise CacheStateError(
                f"{self!r} holds {len(held)} rows, but {rows} were fed. Use a new SinkCache for another batch size."
            )
        new = new_tokens(attention_mask, [row.seen for row in held], self._columns, columns)
        sizes = (self.window_length, self.num_sink_tokens, self._horizon)
        made = {key: plan_row(*key, *sizes) for key in set(zip(held, new, strict=True))}
        plans = [made[key] for key in zip(held, new, strict=True)]
        self._check_positions(max(plan.first_position + plan.new for plan in plans))
        return Step(plans, columns, self._kinds(), device)

    def _check_positions(self, needed: int) -> None:
        """Only a forward longer than the context can need more positions than the horizon leaves."""
        context = None if self._facts is None else self._facts.context
        if context is not None and context.limit is not None and needed > context.limit:
            raise CacheStateError(
                f"This forward needs {needed} positions, but {context.why_limited}, and {context.limit} are all it may "
                f"use. Feed the text in pieces of {self.window_length - self.num_sink_tokens} tokens or fewer "
                "(prefill_chunk_size in generate)."
            )

    def _set_clock(self, step: Step) -> None:
        """Turn all rings back where the newest position would reach the horizon."""
        if not any(plan.turn for plan in step.plans):
            return
        turns = -torch.tensor([plan.turn for plan in step.plans], dtype=torch.long)  # [rows]
        self._broken = "The clock of this cache could not be set back to the end."
        for layer in self.layers:
            layer.turn(turns)
        self._rows = [Row(seen=plan.seen, base=plan.base) for plan in step.plans]
        self._broken = None

    def _abandon_step(self) -> None:
        """Forget a forward that did not end; tokens that it overwrote are lost."""
        step, self._step, self._step_module = self._step, None, None
        if step is None or not step.touched:
            return
        if any(kind.evicts(plan) for kind in self._kinds() for plan in step.plans):
            self._broken = "A forward with this cache failed half-way, after it had overwritten old tokens."

    def _kinds(self) -> list[Any]:
        return list(dict.fromkeys(layer.kind for layer in self.layers))

    # --- what models and masks ask for ----------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states [rows, heads, columns, head_dim] of a layer; return what it attends to in this forward."""
        return self.layers[layer_idx].update(key_states, value_states, self._current_step())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns ever fed, padding counted in; it is never reset by evictions."""
        return self._columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Mask coordinate of the first new token."""
        return self._current_step().query_offset(self.layers[layer_idx].kind)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, offset of the keys) of the mask of a layer."""
        return self._current_step().mask_sizes(self.layers[layer_idx].kind)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """`window_length`: how many tokens are held at most."""
        return self.window_length

    @property
    def batch_size(self) -> int:
        return -1 if self._rows is None else len(self._rows)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self._rows is not None

    # --- whole-cache operations -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens; stay bound to the model."""
        for layer in self.layers:
            layer.reset()
        self._rows, self._columns, self._step, self._step_module, self._broken = None, 0, None, None, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self._rows is not None:
            self.batch_select_indices(torch.arange(len(self._rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order; a boolean mask over the rows will do too."""
        if self._rows is None:
            return
        rows = torch.arange(len(self._rows))[indices.cpu()]
        for layer in self.layers:
            layer.select_rows(rows)
        self._rows = [self._rows[row] for row in rows.tolist()]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; possible only while nothing has left the window.

        Raises:
            CacheStateError: tokens that would have to come back are gone.
        """
        count = -tokens_to_remove
        if count == 0 or self._rows is None:
            return
        full = any(row.seen > kind.capacity for kind in self._kinds() for row in self._rows)
        if count < 0 or full or count > min(row.seen for row in self._rows):
            raise CacheStateError(
                f"{self!r} cannot be cropped by {tokens_to_remove}: give minus the number of newest tokens to forget, "
                "and only while no token has left the window."
            )
        self._rows = [Row(seen=row.seen - count, base=row.base) for row in self._rows]
        self._columns -= count

    # --- errors ---------------------------------------------------------------------------------------------------

    def _current_step(self) -> Step:
        if self._step is None:
            raise self._not_bound_to("model")
        return self._step

    def _not_bound_to(self, caller: str) -> UnboundCacheError:
        if self._facts is None:
            return UnboundCacheError(
                f"This SinkCache is not bound to the {caller} that it was passed to, so nothing is known of how its "
                f"keys turn. Make it with SinkCache({self.window_length}, {self.num_sink_tokens}, model=model)."
            )
        return UnboundCacheError(
            f"{self!r} was passed to a {caller} that it is not bound to, or that was not called as a whole. Call the "
            "model itself, with a cache made by SinkCache(..., model=model)."
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT or torch.compile wrapper."""
    inner: Sequence[Any] = (getattr(model, "_orig_mod", None), getattr(model, "get_base_model", lambda: None)())
    return next((_unwrapped(one) for one in inner if isinstance(one, nn.Module)), model)
