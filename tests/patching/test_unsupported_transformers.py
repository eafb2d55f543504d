"""A transformers that is too old, too new, or shaped otherwise, and other libraries that wrap the same methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

import pytest
import transformers
import wrapt
from transformers import GenerationConfig
from transformers.generation import configuration_utils, utils
from transformers.generation.utils import GenerationMixin

import sink_patch
from sink_patch.compat import choose_shim, table
from sink_patch.compat.shim import Role
from sink_patch.doors import configs, continuous_batching, custom_generate
from sink_patch.errors import SinkPatchWarning, UnsupportedTransformersError
from sink_patch.generation import wrappers
from sink_patch.patching import refuse_all
from sink_patch.patching.switch import when_imported
from tests.support.fresh import fresh
from tests.support.layers import METHODS, ours, peel
from tests.support.tiny import tiny, tokens

ASKED = {"cache_implementation": "sink", "window_length": 12, "num_sink_tokens": 3}
GREEDY = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True}
METHOD = "_prepare_cache_for_generation"


def stream():
    return tiny("llama").generate(tokens(5), **ASKED, **GREEDY).past_key_values


def state() -> tuple:
    """What of transformers may be touched; methods by identity, as a wrapper equals what it wraps."""
    known = getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", None)
    return *(id(vars(GenerationMixin).get(name)) for name in METHODS), known


def fire_hooks() -> None:
    for module in (configuration_utils, utils, transformers.modeling_utils):
        when_imported(module)


def no_method(it):
    it.delattr(GenerationMixin, METHOD)
    return rf"GenerationMixin\.{METHOD}\("


def no_parameter(it):
    it.setattr(GenerationMixin, METHOD, lambda self, generation_config, model_kwargs, assistant: None)
    return rf"GenerationMixin\.{METHOD}\(generation_config, model_kwargs, [\w, ]+\)"


def no_class(it):
    it.delattr(utils, "GenerationMixin")
    return "GenerationMixin"


def no_constant(it):
    it.delattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS")
    return r"configuration_utils\.ALL_CACHE_IMPLEMENTATIONS"


def our_own_fault(it):
    it.delitem(wrappers.WRAPPERS, Role.PREPARE_CACHE)
    return "PREPARE_CACHE"


CHANGES = [no_method, no_parameter, no_class, no_constant]


@pytest.fixture
def pristine() -> Iterator[pytest.MonkeyPatch]:
    """transformers as if sink_patch had never been there; put back before other fixtures patch it again."""
    with pytest.MonkeyPatch.context() as it:
        sink_patch.unpatch()
        peel(it)
        yield it


@pytest.mark.parametrize("change", CHANGES)
def test_patch_refuses_a_transformers_of_another_shape(change, pristine):
    missing = change(pristine)
    with pytest.raises(UnsupportedTransformersError, match=rf"{transformers.__version__} has no .*{missing}"):
        sink_patch.patch()
    assert not sink_patch.is_patched()
    assert "sink" not in getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", ())
    with pytest.raises(UnsupportedTransformersError, match=rf"'sink'.*{missing}"):  # said where it is asked for, too
        GenerationConfig(cache_implementation="sink")


@pytest.mark.parametrize("change", CHANGES)
def test_a_refused_patch_has_touched_nothing(change, pristine):
    change(pristine)
    before = state()
    with pytest.raises(UnsupportedTransformersError):
        sink_patch.patch()
    assert state() == before


def test_whatever_fails_the_patch_is_off_as_a_whole(pristine):
    missing = our_own_fault(pristine)
    with pytest.raises(KeyError, match=missing):
        sink_patch.patch()
    assert not sink_patch.is_patched()
    assert "sink" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS


@pytest.mark.parametrize("change", [*CHANGES, our_own_fault])
def test_the_import_hook_only_warns_of_it(change, pristine):
    sink_patch.patch()
    assert stream().window_length == 12
    peel(pristine)
    missing = change(pristine)
    with pytest.warns(SinkPatchWarning, match=missing) as told:
        fire_hooks()
    assert len(told) == 1
    assert not sink_patch.is_patched()


def test_a_transformers_that_is_too_old_is_refused_with_what_was_found_and_what_is_needed():
    with pytest.raises(UnsupportedTransformersError) as refusal:
        choose_shim("4.51.3")
    assert "4.51.3" in str(refusal.value)
    assert table.OLDEST in str(refusal.value)


@pytest.mark.parametrize("found", ["{}", "{}.9", "{}.0rc1", "{}.0.dev0"])
def test_every_release_of_the_newest_known_version_is_known(found):
    assert choose_shim(found.format(table.NEWEST)).methods  # and pytest would raise a warning


def test_a_newer_transformers_is_served_like_the_newest_known_one_with_a_warning():
    with pytest.warns(SinkPatchWarning) as told:
        assert choose_shim("99.1") is choose_shim(table.NEWEST)
    assert len(told) == 1
    for part in (table.OLDEST, table.NEWEST, "99.1"):
        assert part in str(told[0].message)


@pytest.mark.parametrize(("version", "works"), [("4.51.3", False), ("99.1", True)])
def test_a_version_is_complained_of_once_and_never_breaks_the_import(version, works):
    done = fresh(
        f"""
        import sys, transformers
        transformers.__version__ = {version!r}
        import sink_patch, transformers.modeling_utils
        from transformers import LlamaForCausalLM
        assert sink_patch.is_patched() is {works}
        from transformers import GenerationConfig
        try:
            GenerationConfig(cache_implementation="sink")
            assert {works}
        except sink_patch.UnsupportedTransformersError as refusal:
            assert not {works} and {version!r} in str(refusal), refusal
        if not {works}:
            sys.modules["transformers"].__version__ = {version!r}  # transformers has imported itself once more
            try:
                sink_patch.patch()
            except sink_patch.UnsupportedTransformersError as refusal:
                assert {version!r} in str(refusal)
            else:
                raise AssertionError("patch() must say why")
        """,
        flags=(),
    )
    assert done.err.count("SinkPatchWarning: ") == 1, done.err
    assert version in done.err


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_another_librarys_wrapper_on_the_config_is_not_taken_for_ours(layers, pristine):
    """`GenerationConfig.validate` is where a request is refused; other libraries wrap it too, before us or after."""

    def passes(wrapped, _instance, args, kwargs):
        return wrapped(*args, **kwargs)

    def refusing() -> int:
        function, count = vars(GenerationConfig)["validate"], 0
        while function is not None:
            count += getattr(function, "_self_wrapper", None) is refuse_all._refuse
            function = getattr(function, "__wrapped__", None)
        return count

    pristine.setattr(GenerationConfig, "validate", inspect.unwrap(vars(GenerationConfig)["validate"]))
    for _ in range(layers):
        around = wrapt.FunctionWrapper(vars(GenerationConfig)["validate"], passes)
        pristine.setattr(GenerationConfig, "validate", around)
    no_method(pristine)
    for _ in range(3):  # once for each of the modules that are waited for, say
        with pytest.raises(UnsupportedTransformersError, match=METHOD):
            sink_patch.patch()
    with pytest.raises(UnsupportedTransformersError, match="'sink' was asked for"):
        GenerationConfig(cache_implementation="sink")
    assert refusing() == 1
    around = wrapt.FunctionWrapper(vars(GenerationConfig)["validate"], passes)  # and one after us
    pristine.setattr(GenerationConfig, "validate", around)
    fire_hooks()
    assert refusing() == 1
    assert GenerationConfig(cache_implementation="static").cache_implementation == "static"


def test_each_role_has_its_wrapper():
    homes = (wrappers, configs, continuous_batching, custom_generate)
    assert {role for home in homes for role in home.WRAPPERS} == set(Role)


@pytest.mark.parametrize("place", ["above", "below"])
@pytest.mark.parametrize("how", ["wrapt", "functools"])
def test_another_librarys_wrapper_survives_and_ours_is_not_stacked(place, how, monkeypatch):
    calls = []

    def spy(wrapped, instance, args, kwargs):
        calls.append(instance)
        return wrapped(*args, **kwargs)

    def around(function):
        if how == "wrapt":
            return wrapt.FunctionWrapper(function, spy)
        return functools.wraps(function)(lambda self, *args, **kwargs: spy(function.__get__(self), self, args, kwargs))

    if place == "below":
        peel(monkeypatch)
    monkeypatch.setattr(GenerationMixin, METHOD, around(vars(GenerationMixin)[METHOD]))
    for step in ("patch", "unpatch", "patch", "patch"):
        getattr(sink_patch, step)()
        if sink_patch.is_patched():
            assert stream().window_length == 12
        calls.clear()
        tiny("llama").generate(tokens(5), **GREEDY)
        assert len(calls) == 1, f"after {step}"
        assert ours(METHOD) == 1, f"after {step}"


# a transformers to come: another version, in which a method that is wrapped has another name
FUTURE = """
from importlib.machinery import SourceFileLoader
as_written = SourceFileLoader.get_code
def get_code(self, fullname):
    if fullname not in ("transformers", "transformers.generation.utils"):
        return as_written(self, fullname)
    source = self.get_source(fullname).replace("_prepare_cache_for_generation", "_prepare_what_was_the_cache")
    return compile(source.replace(f'__version__ = "{VERSION}"', '__version__ = "99.0.0"'), self.path, "exec")
SourceFileLoader.get_code = get_code
"""


@pytest.mark.parametrize("switch", ["", "import sink_patch"], ids=["entry point", "import"])
def test_a_transformers_to_come_gets_one_clear_error_and_is_left_alone_otherwise(switch):
    done = fresh(
        f"VERSION = {transformers.__version__!r}",
        FUTURE,
        switch,
        """
        import torch, transformers
        from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
        assert transformers.__version__ == "99.0.0"
        sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, eos_token_id=None))
        ids = torch.tensor([[5, 6, 7]])
        for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            assert model.generate(ids, max_new_tokens=4, do_sample=False, **more).shape == (1, 7)

        import sink_patch
        assert not sink_patch.is_patched()
        def with_stored():
            model.generation_config.cache_implementation = "sink"
            try:
                model.generate(ids, max_new_tokens=4)
            finally:
                model.generation_config.cache_implementation = None

        for ask in (
            lambda: model.generate(ids, max_new_tokens=4, cache_implementation="sink"),
            lambda: GenerationConfig(cache_implementation="sink"),
            with_stored,
        ):
            try:
                ask()
            except sink_patch.UnsupportedTransformersError as refusal:
                for part in ("cache_implementation='sink'", "99.0.0", "_prepare_cache_for_generation"):
                    assert part in str(refusal), refusal
            else:
                raise AssertionError("it must be refused")
        sink_patch.unpatch()
        assert refused()
        """,
        flags=(),
    )
    assert done.err.count("is not patched") == 1, done.err
