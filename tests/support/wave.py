"""A model whose code is not in transformers: a Llama that turns its keys the other way."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class WaveConfig(LlamaConfig):
    model_type = "wave"


class WaveRotaryEmbedding(LlamaRotaryEmbedding):
    def forward(self, x, position_ids):
        return super().forward(x, -position_ids)


class WaveForCausalLM(LlamaForCausalLM):
    config_class = WaveConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = WaveRotaryEmbedding(config)
