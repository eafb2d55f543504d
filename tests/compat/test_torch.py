"""A torch that cannot compile the models of the installed transformers is told by name, and decodes without a graph."""

from __future__ import annotations

import ast
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import CompileConfig

import sink_patch
from sink_patch import UnsupportedGenerationError
from sink_patch.compat import table
from tests.support.tiny import tiny, tokens

ASKED = {"cache_implementation": "sink", "window_length": 12, "num_sink_tokens": 3, "do_sample": False}


def graph_config():
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # else on GPUs only
    return config


@pytest.fixture
def too_old(monkeypatch):
    """As on the last torch before one that can trace the models."""
    shim = dataclasses.replace(table.installed_shim(), traced_by=SpecifierSet(">=99"))
    monkeypatch.setattr(table, "installed_shim", lambda: shim)


def test_a_graph_that_torch_cannot_trace_is_refused_by_name_before_the_model_runs(too_old, monkeypatch):
    model = tiny("llama")
    model.generate(tokens(5), max_new_tokens=1, **ASKED)  # its adapters are proven

    @functools.wraps(type(model).forward)  # whose arguments tell that it takes a cache
    def forward_that_fails(*_given, **_named):
        pytest.fail("the model has run")

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "forward", forward_that_fails)
        with pytest.raises(UnsupportedGenerationError) as refusal:
            model.generate(tokens(5), max_new_tokens=20, compile_config=graph_config(), **ASKED)
    for said in (f"torch {torch.__version__}", f"transformers {transformers.__version__}", "torch>=99"):
        assert said in str(refusal.value)


def test_without_a_graph_it_decodes_as_ever(too_old):
    model, ids = tiny("llama"), tokens(5)
    wanted = model.generate(ids, max_new_tokens=20, use_cache=False, do_sample=False)[:, :10]
    found = model.generate(ids, max_new_tokens=20, **ASKED)
    assert torch.equal(found[:, :10], wanted)
    # a CPU, for which transformers makes no graph unless all devices are named
    assert torch.equal(model.generate(ids, max_new_tokens=20, compile_config=CompileConfig(), **ASKED), found)


def test_each_range_of_versions_says_which_torch_traces_its_models():
    for shim in table.TABLE:
        assert Version("2.13") in shim.traced_by
        assert Version("2.5") not in shim.traced_by
    assert table.why_not_traced() is None or Version(torch.__version__).release[:2] < (2, 7)


TRACED = ("buffers", "streaming/hooks.py", "streaming/forward.py", "streaming/fixed", "cache/transformers_cache.py")


@pytest.mark.parametrize("place", TRACED)
def test_what_goes_into_a_graph_asks_no_iterator_for_a_default(place):
    """`next(..., default)` is traced by no torch before 2.8."""
    path = Path(sink_patch.__file__).parent / place
    for file in [path] if path.is_file() else path.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            is_next = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next"
            assert not is_next or len(node.args) == 1, f"{file}:{node.lineno}"
