"""The table of families: built-in ones, those that users register, and those that other distributions bring."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from sink_patch.compat import installed_shim
from sink_patch.errors import FamilyClashError, SinkArgumentError, SinkPatchWarning
from sink_patch.models.adapters.adapter import AdapterFactory
from sink_patch.models.families.built_in import BUILT_IN
from sink_patch.models.families.family import Family, PositionLimit

ENTRY_POINT_GROUP = "sink_patch.families"

_loading: ContextVar[tuple[Registry, ...]] = ContextVar("loading", default=())
"""The registries whose plugins this thread is loading."""


class Registry:
    """Families by `model_type`.

    Plugins (entry points of other distributions) are loaded at the first look-up, each on its own: one that fails is
    named in a warning. Until they are all loaded, every thread that looks up a family loads them itself. So no thread
    misses a family, and none waits for another, except in Python's own import of a module; to load a plugin twice is
    the same as once. A plugin may look up and register families while it is loaded: it finds what is there so far.
    """

    def __init__(
        self, families: Iterable[Family] | None = None, plugins: Callable[[], Iterable[EntryPoint]] | None = None
    ):
        self._families: dict[str, Family] = {}  # replaced and never changed, so that a view of it stays as it is
        # held for single reads and writes, never over code of others; reentrant, as the garbage collector may run any
        self._lock = threading.RLock()
        self._plugins = plugins  # None: they are loaded
        for family in _of_installed(BUILT_IN) if families is None else families:
            self.add(family)

    def add(self, family: Family) -> None:
        """Register a family. The same one twice is nothing; another one for a `model_type` already taken is a clash.

        Raises:
            FamilyClashError: another family claims one of the model types. Nothing is registered then.
        """
        while True:
            known = self._families
            _check_clash(family, known)
            with self._lock:
                if self._families is known:  # else another thread was first: look at what it has registered
                    self._families = {**known, **dict.fromkeys(family.model_types, family)}
                    return

    def view(self) -> Mapping[str, Family]:
        """All families by `model_type`, as they are now: read-only, and unchanged by families registered later."""
        self._load_plugins()
        return MappingProxyType(self._families)

    def _load_plugins(self) -> None:
        plugins = self._plugins
        if plugins is None or self in _loading.get():
            return
        token = _loading.set((*_loading.get(), self))
        try:
            complaints = [self._load(entry_point) for entry_point in plugins()]
        finally:
            _loading.reset(token)
        with self._lock:
            is_first, self._plugins = self._plugins is not None, None
        if is_first:  # the others have the same complaints
            for complaint in filter(None, complaints):  # when all are loaded, as a warning may be an error
                warnings.warn(complaint, SinkPatchWarning, stacklevel=3)

    def _load(self, entry_point: EntryPoint) -> str | None:
        """Register what an entry point holds; returns what is the matter with it, if anything."""
        try:
            self.add(_as_family(entry_point.load()))
        except Exception as failure:
            distribution = entry_point.dist.name if entry_point.dist is not None else "an unknown distribution"
            return (
                f"The family {entry_point.name!r} of {distribution} ({entry_point.value}) is left out: "
                f"{type(failure).__name__}: {failure}"
            )
        return None


def _check_clash(family: Family, known: Mapping[str, Family]) -> None:
    held = {one: known[one] for one in family.model_types if one in known}
    taken = {one: by for one, by in held.items() if by != family and not _redefines(family, by)}
    if taken:
        clashes = ", ".join(f"{one!r} is taken by the family {by.name!r}" for one, by in sorted(taken.items()))
        raise FamilyClashError(
            f"The family {family.name!r} cannot be registered: {clashes}. Known model types: "
            f"{', '.join(sorted(known))}."
        )


def _of_installed(families: Iterable[Family]) -> Iterable[Family]:
    """The families as the installed transformers has them."""
    quirks = {name: quirk for quirk in installed_shim().quirks for name in quirk.model_types.split()}
    for family in families:
        quirk = quirks.get(family.name)
        if quirk is None:
            yield family
        elif quirk.refusal is not None:
            yield Family(name=family.name, model_types=family.model_types, refusal=quirk.refusal)
        else:
            yield replace(
                family,
                whole_prompts=quirk.whole_prompts or family.whole_prompts,
                explicit_mask=quirk.explicit_mask or family.explicit_mask,
            )


def _redefines(new: Family, old: Family) -> bool:
    """Whether both come from the same function, defined again (a cell of a notebook that is run twice)."""
    names = [(getattr(one.adapters, "__module__", ""), getattr(one.adapters, "__qualname__", "")) for one in (new, old)]
    return new.name == old.name and names[0] == names[1] and bool(names[0][1]) and "<" not in names[0][1]


def _as_family(loaded: Any) -> Family:
    if not isinstance(loaded, Family):
        raise SinkArgumentError(f"it is a {type(loaded).__name__} and not a sink_patch.Family")
    return loaded


registry = Registry(plugins=lambda: entry_points(group=ENTRY_POINT_GROUP))


def register_family(
    name: str, *, model_types: Iterable[str] | None = None, position_limit: PositionLimit | None = None
) -> Callable[[AdapterFactory], Family]:
    """Decorator: register a function from a model to its adapters as a family.

    The decorated name becomes the `Family`, which may also be the value of an entry point in the group
    "sink_patch.families".

    Args:
        name: the family's name, and its `model_type` where `model_types` is not given.
        model_types: the `model_type`s that it claims.
        position_limit: see `Family`.

    Raises:
        SinkArgumentError: no name, no names of model types, or what is decorated is no function.
        FamilyClashError: a model type is taken by another family.
    """
    if not isinstance(name, str):
        raise SinkArgumentError(
            f"register_family was given {name!r} as the name. Write @register_family('model_type') over a function."
        )
    if isinstance(model_types, str):
        raise SinkArgumentError(f"model_types={model_types!r} is one name. Give a list of them, [{model_types!r}].")

    def decorate(adapters: AdapterFactory) -> Family:
        types = (name,) if model_types is None else tuple(model_types)
        family = Family(name=name, model_types=types, adapters=adapters, position_limit=position_limit)
        registry.add(family)
        return family

    return decorate


def families() -> Mapping[str, Family]:
    """All known families by `model_type`, as they are now.

    The mapping is read-only, and families that are registered later do not come into it: call this again for those.
    """
    return registry.view()


def find_family(config: Any) -> Family | None:
    """The family of a model config: by its own `model_type`, else by that of its language model."""
    known = families()
    text = config.get_text_config(decoder=True)
    return known.get(config.model_type) or known.get(text.model_type)
