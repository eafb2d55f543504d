"""Whether transformers is patched, and why not: the one record of it. Imports the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class State:
    """Of this process.

    Args:
        is_waiting: whether the modules of transformers are patched as they are imported.
        is_patching: whether it is being patched, by the thread that has the lock.
        is_due: whether there is more to patch than when that began.
        is_enabled: whether our wrappers around methods of transformers do anything.
        refusal: why transformers cannot be patched, a sentence for the user; None: it can, or has not been tried.
        has_failed: whether something of ours failed while it was switched on by an import; then nothing more is tried.
    """

    is_waiting: bool = False
    is_patching: bool = False
    is_due: bool = False
    is_enabled: bool = False
    refusal: str | None = None
    has_failed: bool = False


state = State()
