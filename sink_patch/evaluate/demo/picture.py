"""A picture of the comparison (`--plot FILE`), by matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sink_patch.errors import SinkArgumentError, SinkPatchError

if TYPE_CHECKING:
    from sink_patch.evaluate.demo.compare import Point

_COLOURS = ("tab:gray", "tab:red", "tab:blue")
_KINDS = (".png", ".svg", ".pdf")


def check(file: Path) -> None:
    """Whether a picture can be written there, before anything is loaded.

    Raises:
        SinkArgumentError: no such directory, or another kind of file.
        SinkPatchError: matplotlib is not installed.
    """
    if file.suffix.lower() not in _KINDS:
        raise SinkArgumentError(f"--plot {file}: give a name that ends in {', '.join(_KINDS)}.")
    if not file.parent.is_dir() or file.is_dir():
        raise SinkArgumentError(f"--plot {file}: there is no directory {file.parent} to write it to. Make it first.")
    if find_spec("matplotlib") is None:
        raise SinkPatchError(f'--plot {file}: pictures are drawn by matplotlib: pip install "sink-patch[demo]".')


def draw(file: Path, title: str, names: Sequence[str], points: Sequence[Point], window_length: int) -> None:
    """Perplexity and memory over tokens, a line for each way.

    Raises:
        SinkPatchError: the file cannot be written.
    """
    pictures: Any = importlib.import_module("matplotlib.figure")
    figure = pictures.Figure(figsize=(9, 3.6), layout="constrained")
    perplexity, memory = figure.subplots(1, 2)
    full = [point for point in points if point.tokens >= window_length]
    for number, (name, colour) in enumerate(zip(names, _COLOURS, strict=True)):
        look = {"color": colour, "label": name, "linewidth": 2, "linestyle": "--" if number == 0 else "-"}
        perplexity.plot([one.tokens for one in full], [one.perplexity[number] for one in full], **look)
        memory.plot([one.tokens for one in points], [one.megabytes[number] for one in points], **look)
    perplexity.set(xlabel="tokens read", ylabel="perplexity", title=f"Perplexity of the newest {window_length} tokens")
    memory.set(xlabel="tokens read", ylabel="MB", title="Size of the cache")
    for axes in (perplexity, memory):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.axvline(window_length, color="lightgray", linewidth=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    figure.suptitle(title)
    try:
        figure.savefig(file, dpi=120)
    except OSError as failure:
        raise SinkPatchError(f"--plot {file}: it could not be written: {failure}") from failure
