"""A talk in a file: a zip of its caches, as `SinkCache.save` writes them, and of a JSON file with all else.

Nothing in it is code. Whether the caches are of this model says `SinkCache.load`, and whether they have read these ids
says `SinkCache.window`, so a file from anywhere may be opened.
"""

from __future__ import annotations

import contextlib
import tempfile
import uuid
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from sink_patch import SinkCache, __version__
from sink_patch.errors import CacheFileError, CacheStateError, SinkArgumentError, SinkPatchError
from sink_patch.evaluate.chat.conversation import Conversation, State

_CACHE, _BEFORE, _TALK = "cache.safetensors", "before.safetensors", "talk.json"
_USE = "Give a file that /save has written."

Count = Annotated[int, Meta(ge=0, lt=2**53)]


class Said(Struct, frozen=True, forbid_unknown_fields=True):
    """One message."""

    role: Annotated[str, Meta(pattern=r"^(system|user|assistant)\Z")]
    content: str


class Talk(Struct, frozen=True, forbid_unknown_fields=True):
    """All of a `State` but its caches, and the digest of the chat template."""

    format: Literal[1]
    sink_patch: str
    template: str
    messages: list[Said]
    seed: Count
    answers: Count
    ids: list[Count]
    borders: list[Count]


def save(path: Path, conversation: Conversation) -> None:
    """Write a talk. A saved talk that is there already is replaced when the new one is whole.

    Raises:
        CacheFileError: the file cannot be written, or another one is there.
    """
    state, target = conversation.state, path.expanduser()
    if target.exists() and not _is_talk(target):
        raise CacheFileError(f"{path} is there already, and is no saved chat. Give the name of another file.")
    talk = Talk(
        format=1,
        sink_patch=__version__,
        template=conversation.template.digest,
        messages=[msgspec.convert(message, Said) for message in state.messages],
        seed=state.seed,
        answers=state.answers,
        ids=state.ids,
        borders=state.borders,
    )
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(unfinished, "w") as archive:
            archive.writestr(_TALK, msgspec.json.encode(talk))
            for name, cache in ((_CACHE, state.cache), (_BEFORE, state.before)):
                if cache is not None:
                    cache.save(Path(folder) / name)
                    archive.write(Path(folder) / name, name)
        unfinished.replace(target)
    except OSError as failure:
        raise CacheFileError(
            f"{path} could not be written: {failure}. Give a file in a directory that is there."
        ) from failure
    finally:
        with contextlib.suppress(OSError):  # where it could not be begun, there is nothing to remove
            unfinished.unlink(missing_ok=True)


def load(path: Path, conversation: Conversation) -> State:
    """What `save` has written, for a conversation with the same model.

    Raises:
        CacheFileError: there is no such file; it holds no whole talk, or one with another model or chat template.
    """
    source = path.expanduser()
    if not source.is_file():
        raise CacheFileError(f"{path} is not there, or is no file. {_USE}")
    try:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            if _TALK not in names or any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                raise CacheFileError(f"{path} is no saved chat. {_USE}")
            talk = msgspec.json.decode(archive.read(_TALK), type=Talk)
            if talk.template != conversation.template.digest:
                raise CacheFileError(
                    f"{path} was saved with another chat template than that of this model. Start sink-patch chat with "
                    "the model that it was saved with."
                )
            files = [Path(archive.extract(name, folder)) for name in (_CACHE, _BEFORE) if name in names]
            caches = [_loaded(file, path, conversation, talk) for file in files]
    except (zipfile.BadZipFile, NotImplementedError, OSError, msgspec.MsgspecError) as failure:
        if isinstance(failure, SinkPatchError):  # an unsupported model is a NotImplementedError, too
            raise
        raise CacheFileError(f"{path} is no saved chat, or is damaged: {failure}. {_USE}") from failure
    if not caches or files[0].name != _CACHE or caches[0].get_seq_length() != len(talk.ids):
        raise CacheFileError(f"{path} is damaged: its cache has not read what was said. {_USE}")
    messages = [{"role": said.role, "content": said.content} for said in talk.messages]
    before = caches[1] if len(caches) > 1 else None
    return State(caches[0], messages, talk.seed, talk.ids, talk.answers, talk.borders, before)


def _is_talk(file: Path) -> bool:
    if not file.is_file() or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return _TALK in archive.namelist()


def _loaded(file: Path, path: Path, conversation: Conversation, talk: Talk) -> SinkCache:
    """A cache that has read a beginning of the ids.

    Args:
        path: of the talk, for people.
    """
    try:
        cache = SinkCache.load(file, model=conversation.model)
        if cache.get_seq_length():
            cache.window([talk.ids])
    except CacheFileError as failure:
        raise CacheFileError(str(failure).replace(str(file), str(path))) from failure
    except (SinkArgumentError, CacheStateError, ValueError) as failure:  # a HistoryMismatchError is a ValueError
        raise CacheFileError(f"{path} is damaged: its cache has not read what was said. {_USE}") from failure
    return cache
