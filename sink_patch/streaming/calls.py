"""What is known of the call of `generate` in progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Call:
    prompt_columns: int
    held: int | None = None
    of_history: bool = False

    def is_past_prompt(self, columns: int) -> bool:
        return columns >= self.prompt_columns

    def cut(self, inputs: torch.Tensor, attention_mask: Any) -> torch.Tensor:
        """The rest of inputs [rows, columns, ...]."""
        if self.held is None:
            return inputs
        held, self.held = self.held, None
        whole = attention_mask is None or inputs.shape[1] == attention_mask.shape[-1]
        return inputs[:, held:] if whole or not self.of_history else inputs
