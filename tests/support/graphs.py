"""Graphs of torch on the CPU: how they are asked for, and how many were made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import CompileConfig


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Inside, there are no graphs of before, those that are made are counted, and each is made once."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def graph_config(backend="eager"):
    """One graph without breaks, of torch's own operations, on a CPU."""
    config = CompileConfig(backend=backend, mode=None, fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # else on GPUs only
    return config


def graphs():
    """The number of graphs, and of graph breaks."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
