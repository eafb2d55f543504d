"""What can be known of a model before it is loaded: whether it is there, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sink_patch.errors import SinkArgumentError


def check(model: str) -> None:
    """Refuse a path at which there is no model, before anything is loaded or a hub is asked.

    Raises:
        SinkArgumentError: it is a path by its form, and nothing is there; or what is there is no model.
    """
    path = Path(model)
    if not model.strip():
        why = "is not there"
    elif path.exists():
        if (path / "config.json").is_file():
            return
        why = "has no config.json" if path.is_dir() else "is a file"
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        why = "is not there"
    else:
        return
    raise SinkArgumentError(
        f"The model {model!r} {why}. Give a directory with config.json, weights and tokenizer, or a name on the "
        "Hugging Face hub."
    )


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model alone, from a directory or the hub.

    Raises:
        SinkArgumentError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as failure:
        raise SinkArgumentError(
            f"The tokenizer of the model {model!r} cannot be loaded: {failure}. Give a directory with config.json, "
            "weights and tokenizer, or a name on the Hugging Face hub."
        ) from failure
