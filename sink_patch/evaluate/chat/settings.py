"""What a chat is asked to be. Imported before any model is, as it refuses what cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.options import check_utf8

WINDOW, MOST_TOKENS = 1024, 512
_TEMPERATURE, _TOP_P = 0.7, 0.9


@dataclass(frozen=True)
class Settings:
    """Of one run of the program.

    Args:
        window_length: tokens in the window, the system prompt counted in.
        max_new_tokens: of an answer.
        system: the system prompt; None: there is none.
        temperature, top_p: of sampling; None: what the model's generation config says, else 0.7 and 0.9.
        greedy: take the likeliest token always.
        seed: each answer is drawn with a seed of its own, made from this one.

    Raises:
        SinkArgumentError: impossible sizes, sampling that has no meaning, or a system prompt that is not UTF-8.
    """

    window_length: int = WINDOW
    max_new_tokens: int = MOST_TOKENS
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        Sizes(self.window_length, min(Sizes.num_sink_tokens, max(self.window_length, 1) - 1))
        check_utf8("--system", self.system or "")
        if self.max_new_tokens < 1:
            raise SinkArgumentError(f"--max-new-tokens {self.max_new_tokens}: give a number of tokens, 1 or more.")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise SinkArgumentError(
                f"--temperature {self.temperature}: give a number above 0, or --greedy for the likeliest token always."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SinkArgumentError(f"--top-p {self.top_p}: give a share of the probability, above 0 and up to 1.")
        if self.greedy and (self.temperature, self.top_p) != (None, None):
            raise SinkArgumentError("--greedy draws nothing: leave out --temperature and --top-p.")
        if not 0 <= self.seed < 2**32:
            raise SinkArgumentError(f"--seed {self.seed}: give a number from 0 up to {2**32 - 1}.")

    def sampling(self, own: Any) -> dict[str, Any]:
        """Arguments of `generate`.

        Args:
            own: the generation config of the model.
        """
        if self.greedy:
            return {"do_sample": False}
        temperature = self.temperature or _unless(own, "temperature", _TEMPERATURE)
        return {"do_sample": True, "temperature": temperature, "top_p": self.top_p or _unless(own, "top_p", _TOP_P)}


def _unless(own: Any, name: str, default: float) -> float:
    """What a generation config says; it cannot say 1, which is also what it says where nobody has asked."""
    value = getattr(own, name, None)
    return default if value in (None, 1.0) else float(value)
