"""The record of how sink_patch meets one range of versions of transformers."""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet

from sink_patch.compat.caches import Cached, Entry


@dataclass(frozen=True)
class Constant:
    """A collection in a module of transformers to which an entry of ours is added, and from which it is taken again.

    Args:
        module, name: where it is.
        entry: a name in a tuple or list, or a key of a dict.
        value: what a dict holds under that key, made when it is added.
    """

    module: str
    name: str
    entry: str
    value: Callable[[], Any] | None = None

    def added_to(self, held: Any) -> Any:
        """A collection of the same kind, with the entry at its end."""
        if self.value is not None:
            return {**held, self.entry: self.value()}
        return type(held)([*held, self.entry])

    def removed_from(self, held: Any) -> Any:
        """A collection of the same kind, without the entry."""
        if self.value is not None:
            return {name: value for name, value in held.items() if name != self.entry}
        return type(held)(name for name in held if name != self.entry)


class Role(enum.Enum):
    """What our wrapper around a method does (`WRAPPERS` in generation/wrappers.py and in the files of doors/)."""

    MAKE_CONFIG = enum.auto()
    UPDATE_CONFIG = enum.auto()
    PREPARE_GENERATION_CONFIG = enum.auto()
    PREPARE_CACHE = enum.auto()
    DECODE = enum.auto()
    DECODE_WITH_DRAFTS = enum.auto()
    MAY_COMPILE = enum.auto()
    COMPILED_CALL = enum.auto()
    INITIAL_CACHE_POSITION = enum.auto()
    LOAD_CUSTOM_GENERATE = enum.auto()
    INIT_CONTINUOUS_BATCHING = enum.auto()
    MAKE_MANAGER = enum.auto()
    GENERATE_BATCH = enum.auto()
    MAKE_HANDLER = enum.auto()
    PREPARE_INPUTS = enum.auto()
    KEEP_CACHE = enum.auto()


@dataclass(frozen=True)
class Method:
    """A method of a class of transformers that is wrapped.

    Args:
        module, owner, name: where it is.
        parameters: those that our wrapper reads; the method must have them.
        role: which of our wrappers goes around it.
        optional: whether it is no matter if it is missing: what it says, a later one says as well.
    """

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...]
    role: Role
    optional: bool = False


@dataclass(frozen=True)
class Place:
    """A name of transformers without a guarantee that classes of ours build on: it is looked at before they do.

    Args:
        module, owner, name: where it is; with an `owner` of "" it is a function of the module.
        parameters: its first ones, beside `self`, which are passed by their place or read.
    """

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join(filter(None, (self.owner, self.name)))

    def is_there(self) -> bool:
        """Whether transformers has it, with these parameters."""
        try:
            module: Any = importlib.import_module(self.module)
            found = getattr(getattr(module, self.owner) if self.owner else module, self.name)
        except (ImportError, AttributeError):
            return False
        if not callable(found):
            return True
        names = [name for name in inspect.signature(inspect.unwrap(found)).parameters if name != "self"]
        return tuple(names[: len(self.parameters)]) == self.parameters


@dataclass(frozen=True)
class Quirk:
    """What these versions make of some families that later or earlier ones do not.

    Args:
        model_types: in words.
        refusal: why they cannot stream here; None: they can.
        whole_prompts: why several tokens cannot follow others in one forward; None: they can. See `Family`.
        explicit_mask: whether they must be given a mask even where every column is visible.
    """

    model_types: str
    refusal: str | None = None
    whole_prompts: str | None = None
    explicit_mask: bool = False


@dataclass(frozen=True)
class Shim:
    """All that differs, for the versions of one row of the table.

    Args:
        versions: of transformers.
        constants, methods: what is added to and wrapped.
        cache_base: gives the class that `SinkCache` derives from: the `Cache` of these versions, whose calls it maps to
            ours.
        read_entries: from a text config to the entries of the model's own cache.
        own_layers: from a text config to fresh layers of that cache, for the entries that hold no attention.
        probe_cache: an empty cache of transformers' own for a text config.
        cached: what is in that cache after a forward, entry by entry.
        generation_mode: from the arguments of `_prepare_cache_for_generation` by name to the name of the decoding mode.
        own_cache: from the class of a model to why it cannot be given a cache object at all; None: it can.
        passes_cache_position: whether models take the mask coordinates of the new tokens as `cache_position`.
        explicit_masks: whether models must be given a mask even where every column is visible.
        traced_by: versions of torch whose compiler can trace the models.
        quirks: families that behave differently here.
        batching: the places on which sinks in continuous batching build; none where it takes no sinks.
        no_media: model types, in words, that take no images and sounds here, though they do in other versions.
        first_media: those that put images into the first prompt of a cache alone.
    """

    versions: SpecifierSet
    constants: tuple[Constant, ...]
    methods: tuple[Method, ...]
    cache_base: Callable[[], type]
    read_entries: Callable[[Any], Sequence[Entry]]
    own_layers: Callable[[Any], Sequence[Any]]
    probe_cache: Callable[[Any], Any]
    cached: Callable[[Any], Sequence[Cached]]
    generation_mode: Callable[[Mapping[str, Any]], str]
    own_cache: Callable[[type], str | None]
    passes_cache_position: bool
    explicit_masks: bool
    traced_by: SpecifierSet
    quirks: tuple[Quirk, ...] = field(default=())
    batching: tuple[Place, ...] = field(default=())
    no_media: str = ""
    first_media: str = ""

    def own_cache_of(self, model_type: str) -> str | None:
        """`own_cache` of the causal language model of a `model_type`, whose class is imported for that."""
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        return self.own_cache(model_class)
