"""Pictures of records, by matplotlib, which is optional. Each measure says what its panels are; here they are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sink_patch.errors import SinkArgumentError, SinkPatchError
from sink_patch.evaluate.measures.records import Record, check_writable

_KINDS = (".png", ".svg", ".pdf")
_NAMED_BY = ("model", "dtype", "window_length", "num_sink_tokens")
_WORDS = {"window_length": "window {}", "num_sink_tokens": "{} sinks"}
_STYLES = ("-", "--", ":", "-.")
_MOST_TICKS = 9


@dataclass(frozen=True)
class Curve:
    """A line of a panel. Curves of one label have one colour, and those of one record one style of line."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    of: str = ""  # the record, where there are several


@dataclass(frozen=True)
class Panel:
    """Axes with curves. Panels of several records with the same titles are drawn as one.

    Args:
        title, x_label, y_label: above and beside it, with units.
        curves: what is drawn.
        log_x, log_y: logarithmic axes. The places on a logarithmic x axis are those of the points.
        from_zero: the y axis begins at 0.
        marks: (x, word) of vertical lines.
    """

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    marks: tuple[tuple[float, str], ...] = ()


def check(path: Path | None) -> None:
    """Whether a picture can be made, before the long work.

    Raises:
        SinkArgumentError: no file can be written there, or it is no kind of picture.
        SinkPatchError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in _KINDS:
        raise SinkArgumentError(
            f"{path.name} is no picture that can be drawn. Give a name that ends in .png, .svg or .pdf."
        )
    check_writable(path)
    if find_spec("matplotlib") is None:
        raise SinkPatchError(
            f'Drawing {path.name} needs matplotlib, which is not installed: pip install "sink-patch[plot]"'
        )


def together(records: Sequence[Record], panels: Iterable[Sequence[Panel]]) -> list[Panel]:
    """The panels of several records, those with the same titles as one; curves are named by what differs."""
    merged: dict[tuple[str, str, str], Panel] = {}
    names = _names(records)
    for name, own in zip(names, panels, strict=True):
        for panel in own:
            curves = tuple(replace(curve, style=names.index(name), of=name) for curve in panel.curves)
            key = (panel.title, panel.x_label, panel.y_label)
            before = merged.get(key)
            marks = tuple(mark for mark in panel.marks if before is None or mark not in before.marks)
            merged[key] = replace(
                panel,
                curves=(() if before is None else before.curves) + curves,
                marks=(() if before is None else before.marks) + marks,
            )
    return list(merged.values())


def draw(panels: Sequence[Panel], path: Path, title: str = "") -> None:
    """Draw the panels side by side into a file.

    Raises:
        SinkPatchError: what `check` raises.
    """
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no state of pyplot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    FigureCanvasAgg(figure)
    colours = _colours(panels)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel, colours)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _draw(axes: Any, panel: Panel, colours: dict[str, str]) -> None:
    for curve in panel.curves:
        marker = "o" if len(curve.x) <= _MOST_TICKS else ""
        axes.plot(
            curve.x,
            curve.y,
            _STYLES[curve.style % len(_STYLES)],
            marker=marker,
            markersize=4,
            color=colours[curve.label],
            label=f"{curve.label}, {curve.of}" if curve.of else curve.label,
        )
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.log_y:
        _log(axes.yaxis, axes.set_yscale, [y for curve in panel.curves for y in curve.y])
    if panel.log_x:
        ticks = sorted({x for curve in panel.curves for x in curve.x})
        axes.set_xscale("log")
        axes.set_xticks(ticks[:: 1 + len(ticks) // _MOST_TICKS])
        axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:,.10g}")
    if panel.from_zero and not panel.log_y:
        axes.set_ylim(bottom=0)
    for x, word in panel.marks:
        axes.axvline(x, color="0.6", linewidth=1, zorder=0)
        axes.annotate(
            word,
            (x, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            color="0.4",
            fontsize=8,
        )
    axes.grid(alpha=0.25)
    if panel.curves:
        axes.legend(fontsize=8)


def _log(axis: Any, scale: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers: at 1, 2, 5, 10 and so on, or at powers of ten where these are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scale("log")
    shown = [value for value in values if math.isfinite(value) and value > 0]
    steps = (1, 2, 5) if shown and max(shown) < 1000 * min(shown) else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _colours(panels: Sequence[Panel]) -> dict[str, str]:
    """A colour for each label, the same in all panels."""
    labels = dict.fromkeys(curve.label for panel in panels for curve in panel.curves)
    return {label: f"C{number}" for number, label in enumerate(labels)}


def _names(records: Sequence[Record]) -> list[str]:
    """Each record by what it does not share with the others; "" where nothing differs."""
    differing = [key for key in _NAMED_BY if len({str(record.get(key)) for record in records if key in record}) > 1]
    return [
        ", ".join(_WORDS.get(key, "{}").format(record[key]) for key in differing if key in record) for record in records
    ]
