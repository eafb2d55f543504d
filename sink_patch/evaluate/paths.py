"""Paths that a user names, checked before torch is imported, a model loaded or a hub asked."""

from __future__ import annotations

from pathlib import Path

from sink_patch.errors import SinkArgumentError

_ASKED = "Give a directory with config.json, weights and tokenizer, or a name on the Hugging Face hub."


def model_source(model: str) -> str:
    """What `from_pretrained` is given for a MODEL of the command line: a directory that is there, or a name on the hub.

    Raises:
        SinkArgumentError: it can only be a path, and no model is there.
    """
    path = Path(model).expanduser()
    if model.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise SinkArgumentError(f"The model {model!r} cannot be loaded: there is no config.json in it. {_ASKED}")
        return str(path)
    if model.strip() and path.exists():
        raise SinkArgumentError(f"The model {model!r} cannot be loaded: it is a file. {_ASKED}")
    if _is_path(model):
        raise SinkArgumentError(f"The model {model!r} cannot be loaded: there is no such directory. {_ASKED}")
    return model


def _is_path(model: str) -> bool:
    """Whether it is no name on the hub, which is `name` or `owner/name`."""
    return (
        not model.strip()
        or model.startswith((".", "~", "/"))
        or model.endswith("/")
        or model.count("/") > 1
        or "\\" in model
    )
