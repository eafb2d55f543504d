"""`sink_patch.coverage`: the verdict on every causal language model of the installed transformers.

And on each model that sees or hears: whether it streams with images and sounds, or with text alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sink_patch.compat import installed_shim
from sink_patch.models.families.media import MEDIA, media_of
from sink_patch.models.families.registry import families


@dataclass(frozen=True)
class Verdict:
    """One `model_type`.

    Args:
        model_type: a key of transformers' `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`; with images and sounds, of
            `MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES` or `MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES`.
        exact: whether it streams; None where no family claims it, and the probe decides on the model itself.
        reason: how it streams, or why it does not.
    """

    model_type: str
    exact: bool | None
    reason: str


@dataclass(frozen=True)
class Coverage:
    """All verdicts, by name; `str()` are two tables in Markdown.

    Args:
        verdicts: on text.
        media: on images and sounds in the first prompt.
    """

    transformers_version: str
    verdicts: tuple[Verdict, ...]
    media: tuple[Verdict, ...] = ()

    def __str__(self) -> str:
        counts = Counter(verdict.exact for verdict in self.verdicts)
        lines = [
            "# Which models can stream",
            "",
            f"Made by `sink-patch families` with transformers {self.transformers_version}: {len(self.verdicts)} causal "
            f"language models, {counts[True]} exact, {counts[False]} refused, {counts[None]} left to the probe.",
            "",
            *_table(self.verdicts),
            "",
            "## With images and sounds in the first prompt",
            "",
            f"{len(self.media)} models that see or hear: {sum(bool(one.exact) for one in self.media)} exact with them; "
            "the others refuse them by name, and take text where their decoder streams.",
            "",
            *_table(self.media),
        ]
        return "\n".join(lines)


def coverage() -> Coverage:
    """One verdict for each causal language model of the installed transformers, from the registry."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    verdicts = tuple(_verdict(model_type) for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    return Coverage(transformers.__version__, verdicts, tuple(map(_verdict_on_media, sorted(_that_see_or_hear()))))


def _table(verdicts: Sequence[Verdict]) -> Iterable[str]:
    words = {True: "exact", False: "refused", None: "probe"}
    return [
        "| model_type | verdict | how, or why not |",
        "| --- | --- | --- |",
        *(f"| {one.model_type} | {words[one.exact]} | {one.reason} |" for one in verdicts),
    ]


def _that_see_or_hear() -> set[str]:
    from transformers.models.auto import modeling_auto

    names = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
    return {model_type for name in names for model_type in getattr(modeling_auto, name, ())}


def _verdict_on_media(model_type: str) -> Verdict:
    """Some names share the config of another one."""
    from transformers import CONFIG_MAPPING

    media, family = media_of(CONFIG_MAPPING[model_type]), families().get(model_type)
    if media is not None:
        return Verdict(model_type, True, str(media))
    if family is not None and family.refusal is not None:
        return Verdict(model_type, False, family.refusal)
    left = MEDIA.get(model_type)
    return Verdict(model_type, False, (left and left.refusal) or "not proven with them")


def _verdict(model_type: str) -> Verdict:
    family = families().get(model_type)
    if family is None:
        return Verdict(model_type, None, "no family is registered; the probe decides when a model is bound")
    refusal = family.refusal or installed_shim().own_cache_of(model_type)
    if refusal is not None:
        return Verdict(model_type, False, refusal)
    how = str(family.adapters)
    if family.position_limit is not None:
        how += f"; within limited positions, as {family.position_limit.why}"
    return Verdict(model_type, True, how)
