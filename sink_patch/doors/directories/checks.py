"""Whether the model in a directory streams and a window fits it: without weights, where its config will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.models.claims import Claim, read_claim
from sink_patch.models.report import inspect

_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError)


def check_streams(directory: Path, sizes: Sizes) -> None:
    """Check a model and the sizes of its cache.

    The model of a family that is known is not loaded: the family is proven on its weights when it is first used.

    Raises:
        UnsupportedModelError: the model cannot stream.
        SinkArgumentError: the window does not fit it, or it cannot be loaded.
    """
    claim = read_claim(_model(directory, weights=False))
    if not _is_enough(claim, sizes):
        inspect(_model(directory, weights=True), sizes.window_length, sizes.num_sink_tokens)


def _is_enough(claim: Claim, sizes: Sizes) -> bool:
    """Whether the config tells all; a window near the limit of the positions is left to `horizon`."""
    limit = claim.context.limit
    return claim.family is not None and (limit is None or 3 * sizes.window_length <= 2 * limit)


def _model(directory: Path, *, weights: bool) -> Any:
    """The model; without weights it lies on the meta device.

    Raises:
        SinkArgumentError: it cannot be loaded.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
        auto: Any = transformers.AutoModelForCausalLM
        model_class: Any = next((one for one in named if one is not None), None)
        if weights:
            return (model_class or auto).from_pretrained(directory).eval()
        with torch.device("meta"):
            return (auto.from_config if model_class is None else model_class._from_config)(config).eval()
    except _FAILURES as failure:
        what = "model" if weights else "config of a model"
        raise SinkArgumentError(
            f"{directory} holds no {what} that transformers can load: {failure} Name a directory that from_pretrained "
            "loads."
        ) from failure
