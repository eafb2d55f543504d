"""What one call of `generate` asks of the sink cache, from all the places where that may be said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sink_patch.arguments import CACHE_IMPLEMENTATION, Settings
from sink_patch.errors import SinkArgumentError

Given = dict[str, Any]
"""The settings of a sink cache that were given in one place, not yet checked."""


@dataclass(frozen=True)
class Request:
    """What is asked for in the arguments of a call, in a generation config passed to it, and in the model's own.

    First it is decided which cache is in effect: the argument, else the passed config, else the model's own. Then each
    setting is taken from the first of the same three places that has it; in each of them `window_length=...` goes
    before `cache_config={"window_length": ...}`. With a model whose `generation_config.json` holds

        {"cache_implementation": "sink", "window_length": 9, "cache_config": {"window_length": 7, "num_sink_tokens": 2}}

    the call `generate(ids, window_length=12)` gets a sink cache of 12 tokens with 2 sinks.

    Args:
        implementation: the `cache_implementation` in effect.
        of_call: the one that comes with the call, as an argument or in a passed config.
        arguments, passed, own: the settings in each place.
        passed_names_a_cache: whether the passed config has a `cache_implementation`; then its settings may go unused.
        refuses_cache: whether the call, or the config that asks for the sink cache, says `use_cache=False`.
        leaves_sink: whether a `cache_config` that a config holds for the sink cache would be left to another cache.
    """

    implementation: str | None
    of_call: str | None
    arguments: Given
    passed: Given
    own: Given
    passed_names_a_cache: bool
    refuses_cache: bool
    leaves_sink: bool

    @classmethod
    def read(cls, arguments: Mapping[str, Any], passed: Any, own: Any) -> Request:
        """From the keyword arguments of `generate`, the config passed to it (or None), and the model's own.

        Raises:
            SinkArgumentError: a `cache_config` for the sink cache holds something else.
        """
        named = [getattr(config, "cache_implementation", None) for config in (passed, own)]
        in_configs = named[1] if named[0] is None else named[0]
        implementation = arguments.get("cache_implementation", in_configs)
        cache_config = arguments.get("cache_config")
        configs = [config for config in (passed, own) if config is not None]
        holding = next((config for config in configs if config.cache_config is not None), None)
        refusing = arguments.get("use_cache") is False or getattr(passed, "use_cache", None) is False
        return cls(
            implementation=implementation,
            of_call=arguments.get("cache_implementation", named[0]),
            arguments=_of_cache_config(cache_config, implementation) | Settings.given_in(arguments),
            passed={} if passed is None else _of_config(passed),
            own=_of_config(own),
            passed_names_a_cache=named[0] is not None,
            refuses_cache=refusing or (own.use_cache is False and named[1] == CACHE_IMPLEMENTATION),
            leaves_sink=holding is not None
            and holding.cache_implementation == CACHE_IMPLEMENTATION
            and implementation != CACHE_IMPLEMENTATION
            and cache_config is None,
        )

    def settings(self) -> Settings:
        """Those in effect.

        Raises:
            SinkArgumentError: impossible ones.
        """
        return Settings(**(self.own | self.given_with_call()))

    def given_with_call(self) -> Given:
        """Those that come with the call."""
        return self.passed | self.arguments


def _of_config(config: Any) -> Given:
    return _of_cache_config(config.cache_config, config.cache_implementation) | Settings.given_in(vars(config))


def _of_cache_config(cache_config: Any, implementation: str | None) -> Given:
    """The settings in a `cache_config`; one that is for another cache may hold anything else."""
    if not isinstance(cache_config, Mapping):
        unknown = [] if cache_config is None else [repr(cache_config)]
    else:
        unknown = sorted(set(cache_config) - set(Settings.names()))
    if unknown and implementation == CACHE_IMPLEMENTATION:
        raise SinkArgumentError(
            f"cache_config holds {', '.join(map(str, unknown))}, which the sink cache does not know. It takes a dict "
            f"with {', '.join(Settings.names())}."
        )
    return Settings.given_in(cache_config) if isinstance(cache_config, Mapping) else {}
