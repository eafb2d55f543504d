"""No lock of ours is held over code of others: families, plugins and models may call sink_patch themselves."""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sink_patch
from sink_patch import Family, PositionLimit, SinkCache, UnsupportedModelError
from sink_patch.models.families import registry as registry_module
from sink_patch.models.families.registry import Registry
from tests.support.oracle import worst_error
from tests.support.tiny import tiny, tokens

PATIENCE = 20  # seconds after which a call is taken to hang
STEPS = [7, 20, *[1] * 30]


def started(work: Callable[[], Any]) -> Future:
    """Run in a thread that does not keep the process from ending where it hangs."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def done(work: Callable[[], Any]) -> Any:
    """The result, or a TimeoutError where the call hangs."""
    return started(work).result(PATIENCE)


def model_of(model_type: str):
    """A model object of its own, under another model type."""
    model = copy.deepcopy(tiny("llama"))
    model.config.model_type = model_type
    return model


def register(model_type: str, first: Callable[[Any], Any]) -> None:
    """A family like llama whose function calls something first."""

    def adapters(model):
        first(model)
        return sink_patch.rope("half")(model)

    sink_patch.register_family(model_type)(adapters)


CALLS = {
    "inspects": sink_patch.inspect,
    "makes a cache for": lambda model: SinkCache(12, 3, model=model),
    "generates with": lambda model: model.generate(
        tokens(3), max_new_tokens=2, do_sample=False, cache_implementation="sink", window_length=12, num_sink_tokens=3
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_family_function_may_examine_another_model(call):
    inner = model_of("llama")
    register("outer", lambda _model: CALLS[call](inner))
    model = model_of("outer")
    assert done(lambda: sink_patch.inspect(model)).family == "outer"
    assert done(lambda: worst_error(model, tokens(sum(STEPS)), STEPS, 12, 3)) < 1e-5


def test_a_forward_may_examine_another_model():
    inner, model = model_of("llama"), model_of("llama")
    model.model.layers[0].register_forward_hook(lambda *_: sink_patch.inspect(inner) and None)
    assert done(lambda: sink_patch.inspect(model)).family == "llama"


def test_the_functions_beside_the_adapters_may_examine_another_model():
    inner, seen = model_of("llama"), []

    def look(value):
        return lambda _config: seen.append(sink_patch.inspect(inner).family) or value

    limit = PositionLimit(look(100), "it says so")
    family = Family("outer", ("outer",), sink_patch.rope("half"), position_limit=limit)
    registry_module.registry.add(dataclasses.replace(family, position_source=look("position_ids")))
    assert done(lambda: sink_patch.inspect(model_of("outer"), 12, 3)).horizon == 100
    assert set(seen) == {"llama"}
    assert len(seen) >= 2


@pytest.mark.parametrize("call", CALLS)
def test_a_family_function_that_examines_its_own_model_is_told_so(call):
    register("outer", CALLS[call])
    with pytest.raises(UnsupportedModelError, match="Llama.* examined while it is being examined.*its family"):
        done(lambda: SinkCache(12, 3, model=model_of("outer")))


def test_models_whose_families_examine_each_other_are_told_so():
    first, second = model_of("first"), model_of("second")
    register("first", lambda _model: sink_patch.inspect(second))
    register("second", lambda _model: sink_patch.inspect(first))
    with pytest.raises(UnsupportedModelError, match="examined while it is being examined"):
        done(lambda: sink_patch.inspect(first))


def test_a_forward_that_examines_its_own_model_is_told_so_and_then_it_can_be_examined():
    model = model_of("llama")
    hook = model.model.layers[0].register_forward_hook(lambda *_: sink_patch.inspect(model) and None)
    with pytest.raises(UnsupportedModelError, match="or a hook"):
        done(lambda: sink_patch.inspect(model))
    hook.remove()
    assert done(lambda: sink_patch.inspect(model)).family == "llama"


@pytest.mark.parametrize("model_type", ["llama", "nobody_knows"])
def test_threads_that_examine_a_model_at_once_find_the_same(model_type):
    """Both are in the middle of the probe's first forward before either goes on."""
    model, meeting, met = model_of(model_type), threading.Barrier(2), threading.local()

    def meet(*_: Any) -> None:
        if not getattr(met, "once", False):
            met.once = True
            meeting.wait(PATIENCE)

    hook = model.model.layers[0].register_forward_hook(meet)
    both = [started(lambda: sink_patch.inspect(model, 12, 3)) for _ in range(2)]
    first, second = (one.result(PATIENCE) for one in both)
    hook.remove()
    alone = sink_patch.inspect(model_of(model_type), 12, 3)
    assert first == second == alone
    assert worst_error(model, tokens(sum(STEPS)), STEPS, 12, 3) < 1e-5


def test_families_can_be_gone_through_while_others_are_registered():
    view, seen = sink_patch.families(), []
    for model_type in view:
        seen.append(model_type)
        if len(seen) == 3:
            started(lambda: sink_patch.register_family("mine")(sink_patch.rope())).result(PATIENCE)
    assert seen == list(view)
    assert "mine" not in view
    assert "mine" in sink_patch.families()


def test_no_family_is_lost_where_two_threads_register_at_once(monkeypatch):
    """Both have looked at what is registered before either adds its own."""
    check, meeting, met = registry_module._check_clash, threading.Barrier(2), threading.local()

    def meet(*args: Any) -> None:
        check(*args)
        if not getattr(met, "once", False):
            met.once = True
            meeting.wait(PATIENCE)

    monkeypatch.setattr(registry_module, "_check_clash", meet)
    work = [lambda name=name: sink_patch.register_family(name)(sink_patch.rope()) for name in ("mine", "yours")]
    for one in [started(job) for job in work]:
        one.result(PATIENCE)
    assert {"mine", "yours"} <= set(sink_patch.families())


class Plugins:
    """Entry points of the registry; their modules run some code of a test as they are imported."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.points: list[EntryPoint] = []

    def add(self, name: str, code: str, **names: Any) -> None:
        """A plugin that brings a family, after some code that sees these names."""
        given, module = ModuleType(f"names_of_{name}"), f"plugin_of_{name}"
        vars(given).update(names)
        self.monkeypatch.setitem(sys.modules, given.__name__, given)
        self.monkeypatch.setitem(sys.modules, module, given)  # so that it is forgotten when the test ends
        self.monkeypatch.delitem(sys.modules, module)
        family = f"FAMILY = sink_patch.Family({name!r}, ({name!r},), sink_patch.rope())"
        lines = ("import sink_patch", f"from {given.__name__} import *", code, family)
        (self.folder / f"{module}.py").write_text("\n".join(lines))
        self.points.append(EntryPoint(name, f"{module}:FAMILY", registry_module.ENTRY_POINT_GROUP))


@pytest.fixture
def plugins(monkeypatch, tmp_path):
    """Plugins of a registry that has not looked for them yet."""
    made = Plugins(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry_module, "registry", Registry(plugins=lambda: EntryPoints(made.points)))
    return made


def test_a_plugin_may_look_up_and_register_families_while_it_is_loaded(plugins):
    loaded = []
    plugins.add(
        "theirs",
        "loaded.append('llama' in sink_patch.families())\nsink_patch.register_family('beside')(sink_patch.rope())",
        loaded=loaded,
    )
    assert {"theirs", "beside", "llama"} <= set(done(sink_patch.families))
    assert loaded == [True]


def test_a_plugin_that_takes_long_does_not_keep_other_threads_from_registering(plugins):
    loading, go_on = threading.Event(), threading.Event()
    plugins.add("theirs", "loading.set(); go_on.wait(20)", loading=loading, go_on=go_on)
    view = started(sink_patch.families)
    assert loading.wait(PATIENCE)
    done(lambda: sink_patch.register_family("mine")(sink_patch.rope()))
    assert not view.done()
    go_on.set()
    assert {"theirs", "mine"} <= set(view.result(PATIENCE))


def test_a_thread_that_comes_while_plugins_are_loaded_misses_none(plugins):
    loading, go_on = threading.Event(), threading.Event()
    plugins.add("theirs", "loading.set(); go_on.wait(20)", loading=loading, go_on=go_on)
    first = started(sink_patch.families)
    assert loading.wait(PATIENCE)
    second = started(sink_patch.families)
    go_on.set()
    assert all(one.result(PATIENCE)["theirs"].name == "theirs" for one in (first, second))


def test_a_plugin_may_examine_a_model_while_it_is_loaded(plugins):
    model, found = model_of("llama"), []
    plugins.add("theirs", "found.append(sink_patch.inspect(model).family)", model=model, found=found)
    assert done(lambda: sink_patch.inspect(model)).family == "llama"
    assert found == ["llama"]


def test_a_broken_plugin_is_named_once_where_several_threads_load_it(plugins):
    """The second thread loads it while the first has not finished."""
    meeting, caught = threading.Barrier(2), []
    broken = EntryPoint("broken", "no_such_module:FAMILY", registry_module.ENTRY_POINT_GROUP)
    registry = Registry(plugins=lambda: meeting.wait(PATIENCE) is not None and EntryPoints([broken]))

    def look() -> None:
        try:
            registry.view()
        except sink_patch.SinkPatchWarning as warning:  # warnings are errors in these tests
            caught.append(warning)

    for one in [started(look) for _ in range(2)]:
        one.result(PATIENCE)
    assert len(caught) == 1
    assert registry.view()["llama"]
