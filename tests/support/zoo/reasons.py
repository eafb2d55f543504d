"""Model types that cannot be built, each with the reason and the versions of transformers."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from packaging.specifiers import SpecifierSet
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@dataclass(frozen=True)
class Reason:
    """Why some model types are not built, and in which versions of transformers (default: all)."""

    model_types: str
    why: str
    versions: str = ""

    def applies(self) -> bool:
        """Whether it applies to the installed transformers."""
        return SpecifierSet(self.versions).contains(transformers.__version__, prereleases=True)


_NOT_BUILT = (
    Reason(
        "gemma4_assistant gemma4_unified_assistant",
        "drafts for another model: its forward takes that model's keys and embeddings, not tokens",
    ),
    Reason("qdqbert", "needs the package pytorch-quantization"),
    Reason("speech_to_text_2", "broken in this release: its table of positions cannot be initialised", "<5"),
    Reason("transfo-xl", "broken in this release: its forward calls a function that torch does not have", "<5"),
    Reason("mvp", "broken in this release: its config has no valid setting for a decoder alone", "==5.4.*"),
)

_NO_DEFAULT_CACHE = (
    Reason(
        "llama4 llama4_text",
        "the cache that its forward makes is always of bfloat16, whatever the dtype of the model",
        "==4.52.*",
    ),
)


def _applying(reasons: tuple[Reason, ...]) -> dict[str, str]:
    """The reasons that apply to the installed transformers, by model type."""
    found = {
        model_type: reason.why for reason in reasons if reason.applies() for model_type in reason.model_types.split()
    }
    return {model_type: why for model_type, why in found.items() if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


NOT_BUILT = _applying(_NOT_BUILT)
NO_DEFAULT_CACHE = _applying(_NO_DEFAULT_CACHE)  # these are built, and run without a cache or with one that is passed
