"""generation_config.json in a model's directory, and beside it what it was before it asked for a sink cache."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sink_patch.arguments import CACHE_IMPLEMENTATION, Settings
from sink_patch.errors import SinkArgumentError

NAME = "generation_config.json"
_BEFORE = f"{NAME}.before_sink_patch"
_OURS = ("cache_implementation", "cache_config", *Settings.names())

Entries = dict[str, Any]


@dataclass(frozen=True)
class ConfigFile:
    """The file, as it is.

    Args:
        directory: of the model.
        text: of the file; None: there is no file.
        before: what it was before it was configured, empty where there was none; None: nothing was kept.
    """

    directory: Path
    text: str | None
    before: str | None

    @classmethod
    def read(cls, directory: Path) -> ConfigFile:
        """Read both.

        Raises:
            SinkArgumentError: this is no directory of a model, or a file in it cannot be read.
        """
        if not directory.is_dir():
            raise SinkArgumentError(f"{directory} is no directory. Name one with a model: config.json, weights.")
        if not (directory / "config.json").is_file():
            raise SinkArgumentError(
                f"{directory} has no config.json, so there is no model in it. Name the directory of a model, as "
                "save_pretrained writes it."
            )
        made = cls(directory, _read(directory / NAME), _read(directory / _BEFORE))
        made.entries()
        made.entries_before()
        return made

    @property
    def is_configured(self) -> bool:
        return self.entries().get("cache_implementation") == CACHE_IMPLEMENTATION

    def entries(self) -> Entries:
        """Those of the file; none where there is no file."""
        return _parsed(self.directory / NAME, self.text)

    def entries_before(self) -> Entries:
        """Those that were kept."""
        return _parsed(self.directory / _BEFORE, self.before)

    def configure(self, text: str) -> None:
        """Put a text in the place of the file, whole or not at all, and keep beside it what it was at first.

        Raises:
            SinkArgumentError: it cannot be written; the file is as it was.
        """
        with self._writing():
            if not self.is_configured or self.before is None:
                _replace(self.directory / _BEFORE, self.text or "", like=self.directory / NAME)
            _replace(self.directory / NAME, text, like=self.directory / NAME)

    def put_back(self, text: str | None) -> None:
        """Put a text in its place (None: no file), and keep nothing any more.

        Raises:
            SinkArgumentError: it cannot be written; the file is as it was.
        """
        with self._writing():
            if text is None:
                (self.directory / NAME).unlink()
            else:
                _replace(self.directory / NAME, text, like=self.directory / NAME)
            (self.directory / _BEFORE).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            raise SinkArgumentError(
                f"{self.directory / NAME} cannot be written: {failure}. It is as it was. Give yourself the right to "
                "write there, or copy the directory."
            ) from failure


def with_sink(entries: Mapping[str, Any], settings: Settings) -> Entries:
    """Entries that ask for a sink cache, in the form that all versions keep: settings in `cache_config`."""
    asked = {"cache_implementation": CACHE_IMPLEMENTATION, "cache_config": settings.as_dict()}
    kept = {name: value for name, value in entries.items() if name not in _OURS}
    if kept.get("use_cache") is False:
        del kept["use_cache"]  # which contradicts it
    return json.loads(json.dumps({**kept, **asked}))  # type: ignore[no-any-return]


def without_sink(entries: Mapping[str, Any], before: Mapping[str, Any]) -> Entries:
    """Entries that ask for what was asked for before, and else are as they are."""
    put_back = {name: value for name, value in before.items() if name in (*_OURS, "use_cache")}
    return {name: value for name, value in entries.items() if name not in _OURS} | put_back


def written(entries: Mapping[str, Any]) -> str:
    """The text of a file, as transformers writes it, in the order of the entries."""
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def difference(before: str | None, after: str | None) -> str:
    """Old and new lines, for people."""
    old, new = ((text or "").splitlines() for text in (before, after))
    return "\n".join(difflib.unified_diff(old, new, fromfile=NAME, tofile=NAME, lineterm=""))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeError) as failure:
        raise SinkArgumentError(f"{path} cannot be read: {failure}. Mend it, or take it away.") from failure


def _parsed(path: Path, text: str | None) -> Entries:
    try:
        entries = json.loads(text) if text else {}
    except ValueError as failure:
        raise SinkArgumentError(f"{path} is no JSON: {failure}. Mend it, or take it away.") from failure
    if not isinstance(entries, dict):
        raise SinkArgumentError(f"{path} holds a {type(entries).__name__}, and no object. Mend it, or take it away.")
    return entries


def _replace(path: Path, text: str, *, like: Path) -> None:
    """Write a whole file beside it, with the rights of another one, and rename that."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if like.exists():
            shutil.copymode(like, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
