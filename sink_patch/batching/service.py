"""What continuous batching with sinks is asked for, and whether it can serve that exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION, TOKENS, Settings, Sizes
from sink_patch.batching import trial
from sink_patch.batching.models import Group, check_model, groups_of, refusal
from sink_patch.compat import installed_shim
from sink_patch.errors import SinkArgumentError, UnsupportedGenerationError, UnsupportedTransformersError
from sink_patch.generation.inputs.cuts import Cuts, Text
from sink_patch.generation.request import Request
from sink_patch.kept.texts import tokens_ahead
from sink_patch.models.entries import unwrapped
from sink_patch.models.examine import examine
from sink_patch.models.facts import ModelFacts
from sink_patch.models.horizon import horizon

INSTEAD = (
    "Use generate (or serve without --continuous-batching); or leave it out and set "
    "model.generation_config.cache_implementation = None, for the paged cache of transformers, which keeps all tokens."
)


@dataclass(frozen=True, eq=False)
class Service:
    """How requests of one model are served.

    Args:
        facts: of the model.
        sizes: of what each request keeps.
        horizon: RoPE position at which the clock of a request is set back.
        cuts: where the texts of requests are cut.
        groups: its layers, by how transformers groups them.
        keep: how many slots of requests that have ended are kept.
    """

    facts: ModelFacts
    sizes: Sizes
    horizon: int
    cuts: Cuts
    groups: Mapping[str, Group]
    keep: int = 0

    @classmethod
    def asked_for(cls, model: Any, passed: Any, arguments: Mapping[str, Any] | None = None) -> Service | None:
        """What is asked for by arguments, the generation config that is passed, or that of the model.

        Returns:
            None where no sink cache is asked for.

        Raises:
            UnsupportedGenerationError: what continuous batching cannot do.
            UnsupportedModelError: the model cannot be served exactly.
            UnsupportedTransformersError: this transformers has other private places than those that are known.
            SinkArgumentError: impossible sizes.
        """
        own = model.generation_config
        request = Request.read(arguments or {}, passed, own)
        if request.implementation != CACHE_IMPLEMENTATION:
            return None
        settings = request.settings()
        sizes = _sizes(settings)
        _check_transformers()
        piece = next((size for size in map(_piece, (passed, own)) if size is not None), None)
        return cls._of(unwrapped(model), sizes, piece, settings.keep_streams)

    @classmethod
    def _of(cls, model: nn.Module, sizes: Sizes, piece: int | None, keep: int = 0) -> Service:
        facts = examine(model)
        check_model(model, facts)
        clock = horizon(facts, sizes.window_length, sizes.num_sink_tokens)
        cuts = Cuts(sizes.window_length, sizes.num_sink_tokens, facts.context.length, piece)
        return cls(facts, sizes, clock, cuts, groups_of(model, facts, sizes), keep)

    def of_trial(self, model: nn.Module) -> Service:
        """The same model at sizes that fit a trial, whatever was asked for."""
        return self._of(model, Sizes(16, 2), None)

    def same_as(self, other: Service | None) -> bool:
        """Whether both give the same text."""
        if other is None or not self.facts.same_as(other.facts):
            return False
        mine, theirs = ((one.sizes, one.cuts, one.horizon, one.keep) for one in (self, other))
        return mine == theirs

    def fresh(self, prompt: int, most: int | None = None) -> Text:
        """How a prompt of so many tokens is read from its first token on.

        Args:
            most: tokens of the request when it ends; None: it is not known whether they are more than the window.
        """
        is_copied = self.keep and (most is None or most > self.fewest)
        return Text(prompt, pause=tokens_ahead(prompt, begins_at_end=False) if is_copied else 0)

    @cached_property
    def fewest(self) -> int:
        """Tokens that all layers hold; what is longer overwrites its oldest ones in some of them."""
        return min(group.kind.capacity for group in self.groups.values())

    def check_prompt(self, text: Text, batch_tokens: int | None) -> None:
        """Refuse a prompt that `generate` reads in a forward that no batch has room for.

        Args:
            text: of it.
            batch_tokens: of the largest batch; None: not known yet.

        Raises:
            SinkArgumentError: as it says; or there are none.
        """
        if reason := self.too_long(text, batch_tokens):
            raise SinkArgumentError(reason)

    def too_long(self, text: Text, batch_tokens: int | None) -> str:
        """Why a text cannot be read; empty: it can."""
        if text.prompt < 1:
            return "A request of no tokens was given. Pass at least one token to start from."
        longest, needed = self.cuts.longest(text), self.cuts.positions(text)
        limit, ring = self.facts.context.limit, self.sizes.window_length - self.sizes.num_sink_tokens
        if batch_tokens is not None and longest > batch_tokens:
            return (
                f"A prompt of {text.prompt} tokens was given, of which {longest} go in at once, as in generate, and "
                f"max_batch_tokens={batch_tokens}. Raise that, or let prompts go in by pieces: "
                f"prefill_chunk_size={min(ring, batch_tokens)} in the generation config."
            )
        if limit is not None and needed > limit:
            return (
                f"A prompt of {text.prompt} tokens needs {needed} positions in one forward, and "
                f"{self.facts.model_class} may use {limit}, as {self.facts.context.why_limited}. Use "
                f"prefill_chunk_size={ring} or less."
            )
        return ""

    def check_trial(self, model: Any, serve: Callable[[Any, Service], None]) -> None:
        """Refuse a model that transformers itself does not serve as it should.

        Args:
            serve: lets a manager serve as a service says.

        Raises:
            UnsupportedModelError: as it says.
        """
        bare = unwrapped(model)
        if reason := trial.fault(bare, lambda manager: serve(manager, self.of_trial(bare))):
            raise refusal(self.facts, reason)

    @cached_property
    def kept(self) -> str:
        """For people."""
        sizes = f"window_length={self.sizes.window_length}, num_sink_tokens={self.sizes.num_sink_tokens}"
        return f"{sizes}, keep_streams={self.keep}" if self.keep else sizes


def _check_transformers() -> None:
    shim = installed_shim()
    if not shim.batching:
        raise UnsupportedGenerationError(
            f"Continuous batching was asked for with cache_implementation={CACHE_IMPLEMENTATION!r}, and its paged "
            f"cache takes no sinks in this version of transformers. Upgrade transformers. {INSTEAD}"
        )
    if moved := [str(place) for place in shim.batching if not place.is_there()]:
        raise UnsupportedTransformersError(
            f"Continuous batching was asked for with cache_implementation={CACHE_IMPLEMENTATION!r}, and this "
            f"transformers has no {', '.join(moved)}, which that builds on with a paged cache. {INSTEAD}"
        )


def _sizes(settings: Settings) -> Sizes:
    """What each request keeps.

    Raises:
        UnsupportedGenerationError: settings that continuous batching does not know.
    """
    asked = {
        "num_sink_tokens": settings.num_sink_tokens if settings.keeps_system else None,
        "evict": settings.evict if settings.evict != TOKENS else None,
    }
    if others := [f"{name}={value!r}" for name, value in asked.items() if value is not None]:
        raise UnsupportedGenerationError(
            f"Continuous batching was asked for with {' and '.join(others)}. In its paged cache each request keeps "
            "the same number of first tokens, and forgets token by token. Leave that out (sink-patch "
            f"configure DIR --window-length ...). {INSTEAD}"
        )
    return settings.sizes()


def _piece(config: Any) -> int | None:
    size: int | None = getattr(config, "prefill_chunk_size", None)
    return size
