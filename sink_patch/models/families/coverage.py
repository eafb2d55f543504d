"""`sink_patch.coverage`: the verdict on every causal language model of the installed transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sink_patch.compat import installed_shim
from sink_patch.models.families.registry import families


@dataclass(frozen=True)
class Verdict:
    """One `model_type`.

    Args:
        model_type: a key of transformers' `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`.
        exact: whether it streams; None where no family claims it, and the probe decides on the model itself.
        reason: how it streams, or why it does not.
    """

    model_type: str
    exact: bool | None
    reason: str


@dataclass(frozen=True)
class Coverage:
    """All verdicts, by name; `str()` is a table in Markdown."""

    transformers_version: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        counts = Counter(verdict.exact for verdict in self.verdicts)
        lines = [
            "# Which models can stream",
            "",
            f"Made by `sink-patch families` with transformers {self.transformers_version}: {len(self.verdicts)} causal "
            f"language models, {counts[True]} exact, {counts[False]} refused, {counts[None]} left to the probe.",
            "",
            "| model_type | verdict | how, or why not |",
            "| --- | --- | --- |",
        ]
        words = {True: "exact", False: "refused", None: "probe"}
        lines += [f"| {one.model_type} | {words[one.exact]} | {one.reason} |" for one in self.verdicts]
        return "\n".join(lines)


def coverage() -> Coverage:
    """One verdict for each causal language model of the installed transformers, from the registry."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    verdicts = tuple(_verdict(model_type) for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    return Coverage(transformers.__version__, verdicts)


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
