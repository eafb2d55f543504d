"""Ctrl-C where Python may let it in: as a function begins or a generator goes on, and after a call of a function in C.

A profile function raises it there, in functions of ours and in what they call. (One that traces lines would raise it
where Python never does, such as between the body of a `with` and the release of its lock.)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import sink_patch
import sink_patch.compat

OURS = tuple(str(Path(package.__file__ or "").parent) for package in (sink_patch, sink_patch.compat))


def is_interrupted(number: int, run: Callable[[], object]) -> bool:
    """Interrupt `run` at the place with this number; False: it does not come so far.

    (An interrupt as a generator is closed is lost; `run` ends as without it.)
    """
    left = number

    def at_place(_where: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        _profiled(at_place, run)
    return left <= 0


def last_visits(run: Callable[[], object]) -> list[int]:
    """Numbers for `is_interrupted`: for each such place in our code, when `run` comes there last."""
    found, count = dict[object, int](), 0

    def at_place(where: object) -> None:
        nonlocal count
        count += 1
        found[where] = count

    _profiled(at_place, run)
    return sorted(found.values())


def _profiled(at_place: Callable[[Any], None], run: Callable[[], object]) -> None:
    def at_event(frame: FrameType, event: str, arg: Any) -> None:
        mine = frame if event == "c_return" else frame.f_back if not _is_ours(frame) else frame
        if event in ("call", "c_return") and mine is not None and _is_ours(mine) and arg is not sys.setprofile:
            at_place((mine.f_code.co_filename, mine.f_lineno, frame.f_code.co_name))

    sys.setprofile(at_event)
    try:
        run()
    finally:
        sys.setprofile(None)


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OURS)
