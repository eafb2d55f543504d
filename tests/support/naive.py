"""A simple sink cache in float64: an independent computation that the product is compared with.

It keeps the un-rotated key of every token. Each forward selects the visible tokens by the four rules
(sink_patch/README.md), rotates their keys with the model's own functions to their positions in this forward, and gives
the model explicit masks and positions. It has no ring and no clock, and imports nothing of `sink_patch`.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.support.caches import BareCache


def visible_past(seen: int, new: int, window_length: int, num_sink_tokens: int) -> list[int]:
    """Absolute indices of the cached tokens that a layer with sinks sees, by the four rules."""
    if seen + new <= window_length or seen == 0:  # rules 1 and 2
        return list(range(seen))
    sinks = list(range(min(seen, num_sink_tokens)))
    if new <= window_length - num_sink_tokens:  # rule 3
        return sinks + list(range(seen - (window_length - num_sink_tokens - new), seen))
    return sinks  # rule 4


class NaiveCache(BareCache):
    """One stream through a float64 copy of `model`, fed by `forward`.

    `floor` is the absolute index of the first token behind the sinks that has not left in a whole message.
    """

    def __init__(self, model: PreTrainedModel, window_length: int, num_sink_tokens: int):
        super().__init__()
        config = copy.deepcopy(model.config)
        # a new model, because a deep copy would include the hooks that sink_patch has registered
        self.model: PreTrainedModel = type(model)._from_config(config, attn_implementation="eager").eval()
        self.model.load_state_dict(model.state_dict())
        self.model.double()
        self.window_length, self.num_sink_tokens = window_length, num_sink_tokens
        self.types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.sliding_window = config.sliding_window if "sliding_attention" in self.types else None
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (un-rotated keys, values) of all tokens
        self.seen = self.floor = 0

    @torch.no_grad()
    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, columns, vocab] of the next tokens [rows, columns] of the stream."""
        new = token_ids.shape[1]
        past = visible_past(self.seen, new, self.window_length, self.num_sink_tokens)
        past = [index for index in past if index < self.num_sink_tokens or index >= self.floor]
        # positions within the cache: 0, 1, ... for what layers with sinks see, the new tokens last
        self.queries = torch.arange(len(past), len(past) + new)
        self.visible = {"full_attention": (past, torch.arange(len(past)))}
        masks = {"full_attention": self._mask(torch.arange(len(past)), None)}
        if self.sliding_window is not None:
            if self.sliding_window < self.window_length:  # its own window, at its true distances, no sinks
                past = list(range(max(0, self.seen - self.sliding_window + 1), self.seen))
                positions = torch.tensor(past, dtype=torch.long) - self.seen + self.queries[0]
            else:
                positions = torch.arange(len(past))
            self.visible["sliding_attention"] = (past, positions)
            masks["sliding_attention"] = self._mask(positions, self.sliding_window)
        logits: torch.Tensor = self.model(
            token_ids,
            past_key_values=self,
            position_ids=self.queries[None],
            attention_mask=masks if self.sliding_window is not None else masks["full_attention"],
            use_cache=True,
        ).logits
        self.seen += new
        return logits

    def crop(self, count: int) -> None:
        """Remove the newest `count` tokens."""
        self.seen -= count
        for layer_idx, states in self.stored.items():
            keys, values = (tensor[:, :, : self.seen] for tensor in states)
            self.stored[layer_idx] = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pristine = turned(self.model, key_states, -self.queries, layer_idx)
        if layer_idx in self.stored:
            pristine = torch.cat((self.stored[layer_idx][0], pristine), dim=2)
            stored_values = torch.cat((self.stored[layer_idx][1], value_states), dim=2)
        else:
            stored_values = value_states
        self.stored[layer_idx] = pristine, stored_values
        past, positions = self.visible[self.types[layer_idx]]
        keys = turned(self.model, pristine[:, :, past], positions, layer_idx)
        values = stored_values[:, :, past]
        return torch.cat((keys, key_states), dim=2), torch.cat((values, value_states), dim=2)

    def _mask(self, past_positions: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
        """Additive mask [1, 1, new, past + new], from distances alone."""
        distance = self.queries[:, None] - torch.cat((past_positions, self.queries))[None, :]
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)[None, None]


def decoder_of(model: PreTrainedModel) -> Any:
    """The model without its head; up to 4.57, Gemma 3's `base_model` is the whole model."""
    return getattr(model, "model", model.base_model)


def turned(model: PreTrainedModel, keys: torch.Tensor, positions: torch.Tensor, layer_idx: int) -> torch.Tensor:
    """Un-rotated keys [rows, heads, tokens, dim] at `positions`, by the model's own functions; negative ones undo."""
    module: Any = sys.modules[type(model).__module__]
    config, layer_types = model.config, getattr(model.config, "layer_types", None)
    decoder = decoder_of(model)
    if keys.shape[2] == 0:
        return keys
    if config.model_type == "gptj":
        table = module.create_sinusoidal_positions(config.max_position_embeddings, config.rotary_dim).double()
        sin, cos = table[positions.abs()][None].chunk(2, dim=-1)  # [1, tokens, rotary_dim / 2] each
        sin = sin * positions.sign()[None, :, None]
        tokens_first = keys.transpose(1, 2)  # [rows, tokens, heads, dim], as its function wants them
        rotary = module.apply_rotary_pos_emb(tokens_first[..., : config.rotary_dim], sin, cos)
        return torch.cat((rotary, tokens_first[..., config.rotary_dim :]), dim=-1).transpose(1, 2)
    if config.model_type == "smollm3" and not config.no_rope_layers[layer_idx]:
        return keys
    if config.model_type == "cohere2" and layer_types[layer_idx] == "full_attention":
        return keys
    rotary, by_type = decoder.rotary_emb, ()
    if config.model_type == "gemma3_text":
        if hasattr(decoder, "rotary_emb_local"):  # up to 4.57
            rotary = decoder.rotary_emb_local if layer_types[layer_idx] == "sliding_attention" else rotary
        else:
            by_type = (layer_types[layer_idx],)
    cos, sin = rotary(keys, positions[None], *by_type)
    rotated: torch.Tensor = module.apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    return rotated
