"""Why some entries have no model, each with the versions of transformers in which that is so."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from packaging.specifiers import SpecifierSet
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@dataclass(frozen=True)
class Reason:
    """Why some model types are not built, in the versions where they are entries."""

    model_types: str
    why: str
    versions: str = ""

    def here(self) -> bool:
        """Does it hold for the installed transformers?"""
        return SpecifierSet(self.versions).contains(transformers.__version__, prereleases=True)


_NOT_BUILT = (
    Reason(
        "gemma4_assistant gemma4_unified_assistant",
        "drafts for another model: its forward takes that model's keys and embeddings, not tokens",
    ),
    Reason("qdqbert", "needs the package pytorch-quantization"),
    Reason("speech_to_text_2", "broken in this release: its table of positions cannot be initialised", "<5"),
    Reason(
        "transfo-xl", "broken in this release: its forward makes positions by a call that torch does not have", "<5"
    ),
    Reason("mvp", "broken in this release: its config refuses to say that a decoder stands alone", "==5.4.*"),
)

_NO_DEFAULT_CACHE = (
    Reason(
        "llama4 llama4_text", "the cache that its forward makes is of bfloat16, whatever the model is of", "==4.52.*"
    ),
)


def _here(reasons: tuple[Reason, ...]) -> dict[str, str]:
    """The reasons that hold for entries of the installed transformers, by model type."""
    said = {model_type: reason.why for reason in reasons if reason.here() for model_type in reason.model_types.split()}
    return {model_type: why for model_type, why in said.items() if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


NOT_BUILT = _here(_NOT_BUILT)
NO_DEFAULT_CACHE = _here(_NO_DEFAULT_CACHE)  # these are built, and run with a cache that is given or without one
