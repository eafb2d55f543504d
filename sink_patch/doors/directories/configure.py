"""`sink_patch.configure` and `unconfigure`: from then on the model of a directory streams, with no change of code."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from sink_patch.arguments import SYSTEM, TURNS, Settings
from sink_patch.doors.directories import files
from sink_patch.doors.directories.checks import check_streams
from sink_patch.doors.directories.files import ConfigFile, Entries
from sink_patch.errors import SinkArgumentError
from sink_patch.generation.templates.settings import chat_settings


def configure(
    directory: str | PathLike[str],
    *,
    window_length: int = Settings.window_length,
    num_sink_tokens: int | str = Settings.num_sink_tokens,
    evict: str = Settings.evict,
    keep_streams: int = Settings.keep_streams,
    dry_run: bool = False,
    tell: Callable[[str], object] = print,
) -> None:
    """Let the generation_config.json of a model's directory ask for a sink cache.

    What the file was is kept beside it; `unconfigure` puts it back. The ids of messages are read off the chat template.

    Args:
        directory: of a model, with config.json; with a tokenizer for "turns" and "system".
        window_length, num_sink_tokens, evict, keep_streams: as for `generate`.
        dry_run: change nothing.
        tell: is told the difference, before anything is written.

    Raises:
        SinkArgumentError: impossible settings, or a window that does not fit; no chat template, or one that does not
            tell messages apart; files that cannot be read or written. Nothing is changed then.
        UnsupportedModelError: the model cannot stream.
    """
    path = Path(directory)
    file = ConfigFile.read(path)
    of_ids = _settings_of_chats(path, num_sink_tokens) if num_sink_tokens == SYSTEM or evict == TURNS else {}
    settings = Settings(window_length, num_sink_tokens, evict, keep_streams=keep_streams, **of_ids)
    check_streams(path, settings.sizes())
    entries = file.entries() if file.text is not None else _entries_of_model(path)
    wanted = files.with_sink(entries, settings)
    if wanted == file.entries():
        tell(f"{path / files.NAME} asks for this already.")
        return
    text = files.written(wanted)
    tell(files.difference(file.text, text))
    if not dry_run:
        file.configure(text)


def unconfigure(
    directory: str | PathLike[str], *, dry_run: bool = False, tell: Callable[[str], object] = print
) -> None:
    """Put back what the generation_config.json of a directory asked for before; other changes since then stay.

    Args:
        directory, dry_run, tell: as for `configure`.

    Raises:
        SinkArgumentError: it asks for no sink cache, or files cannot be read or written. Nothing is changed then.
    """
    path = Path(directory)
    file = ConfigFile.read(path)
    if not file.is_configured:
        raise SinkArgumentError(f"{path / files.NAME} asks for no sink cache, so there is nothing to put back.")
    text = _text_put_back(path, file)
    tell(files.difference(file.text, text))
    if not dry_run:
        file.put_back(text)


def _text_put_back(directory: Path, file: ConfigFile) -> str | None:
    """What the file was, to the letter, where nothing else has changed since; None: it was not there."""
    had_none = file.before == ""
    before = _entries_of_model(directory) if had_none else file.entries_before()
    entries = files.without_sink(file.entries(), before)
    if file.before is not None and entries == before:
        return None if had_none else file.before
    return files.written(entries)


def _settings_of_chats(directory: Path, num_sink_tokens: Any) -> dict[str, Any]:
    """What the chat template says, as far as it is needed.

    Raises:
        SinkArgumentError: there is none, or it does not say it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as failure:  # tokenizers raise what they like
        raise SinkArgumentError(
            f"{directory} holds no tokenizer that transformers can load, so nothing tells where messages begin: "
            f"{failure} Save the tokenizer there, or ask for a number of sinks and for tokens that leave one by one."
        ) from failure
    found = chat_settings(tokenizer)
    if num_sink_tokens == SYSTEM and "system_start" not in found:
        raise SinkArgumentError(
            f"The chat template in {directory} does not mark system messages by ids of their own, so they cannot be "
            "found. Give a number of sinks (sink_patch.count_sink_tokens counts those of a chat)."
        )
    wanted = {"turn_start"} | ({"system_start"} if num_sink_tokens == SYSTEM else set())
    return {name: runs for name, runs in found.items() if name in wanted}


def _entries_of_model(directory: Path) -> Entries:
    """What transformers makes of config.json where there is no generation_config.json: eos tokens, for one."""
    from transformers import AutoConfig, GenerationConfig

    made = GenerationConfig.from_model_config(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    entries = made.to_diff_dict()
    return {
        name: value for name, value in entries.items() if not name.startswith("_") and name != "transformers_version"
    }
