"""What one call of `generate` asks of the sink cache, from all the places where it may be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sink_patch.arguments import ARGUMENTS
from sink_patch.errors import SinkArgumentError

NAME = "sink"
Source = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """Settings of the call, and of the model's own config.

    Args:
        said: settings that come with the call, the strongest first: arguments, `cache_config`, and a passed config.
        stored: settings of the model's own generation config.
        implementation: the `cache_implementation` that comes with the call.
        refuses_cache: whether the call, or a config that asks for the sink cache, says `use_cache=False`.
        leaves_sink: whether another cache is asked for while the `cache_config` in effect is for the sink cache.
    """

    said: Sequence[Source]
    stored: Sequence[Source]
    implementation: str | None
    refuses_cache: bool
    leaves_sink: bool

    @classmethod
    def read(cls, arguments: Mapping[str, Any], passed: Any, own: Any) -> Request:
        """From the keyword arguments of `generate`, the config passed to it (or None), and the model's own.

        Raises:
            SinkArgumentError: a `cache_config` for the sink cache holds something else.
        """
        given = _known(arguments)
        of_call = [given, _cache_config(arguments.get("cache_config"), arguments, passed, own)]
        if passed is not None:
            of_call += _settings(passed)
        refuses = arguments.get("use_cache") is False or getattr(passed, "use_cache", None) is False
        contradictory = own.use_cache is False and own.cache_implementation == NAME
        said = arguments.get("cache_implementation", getattr(passed, "cache_implementation", None))
        return cls(of_call, _settings(own), said, refuses or contradictory, _leaves_sink(arguments, passed, own))

    def sizes(self) -> dict[str, Any]:
        """`window_length` and `num_sink_tokens`, not yet checked."""
        return {name: _first(name, (*self.said, *self.stored), default) for name, default in ARGUMENTS.items()}

    def sizes_said(self) -> dict[str, Any]:
        """Those that come with the call alone."""
        found = {name: _first(name, self.said, None) for name in ARGUMENTS}
        return {name: value for name, value in found.items() if value is not None}


def _leaves_sink(arguments: Mapping[str, Any], passed: Any, own: Any) -> bool:
    configs = [config for config in (passed, own) if config is not None]
    stored = next((config for config in configs if config.cache_config is not None), None)
    if stored is None or stored.cache_implementation != NAME or arguments.get("cache_config") is not None:
        return False
    names = [config.cache_implementation for config in configs]
    asked = arguments.get("cache_implementation", next((name for name in names if name is not None), None))
    return bool(asked != NAME)


def _settings(config: Any) -> list[Source]:
    """Entries of a config's own, then those in its `cache_config`."""
    wanted = config.cache_implementation == NAME
    inner = _checked(config.cache_config) if wanted else config.cache_config
    return [_known(vars(config)), _known(inner) if isinstance(inner, Mapping) else {}]


def _cache_config(cache_config: Any, arguments: Mapping[str, Any], passed: Any, own: Any) -> Source:
    if cache_config is None:
        return {}
    asked = [arguments.get("cache_implementation")]
    asked += [getattr(config, "cache_implementation", None) for config in (passed, own)]
    wanted = next((name for name in asked if name is not None), None) == NAME
    checked = _checked(cache_config) if wanted else cache_config
    return _known(checked) if isinstance(checked, Mapping) else {}


def _checked(cache_config: Any) -> Any:
    if cache_config is None:
        return None
    unknown = sorted(set(cache_config) - set(ARGUMENTS)) if isinstance(cache_config, Mapping) else [repr(cache_config)]
    if unknown:
        raise SinkArgumentError(
            f"cache_config holds {', '.join(unknown)}, which the sink cache does not know. It takes a dict with "
            f"{' and '.join(ARGUMENTS)}."
        )
    return cache_config


def _known(source: Source) -> Source:
    return {name: source[name] for name in ARGUMENTS if source.get(name) is not None}


def _first(name: str, sources: Sequence[Source], default: Any) -> Any:
    return next((source[name] for source in sources if name in source), default)
