"""The settings of a config for its rotation: `rope_parameters`, or `rope_theta` and `rope_scaling` in old versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.versions.fields import ConfigClass, fields

Settings = Mapping[str, Any]
_ALL, _LOCAL = "full_attention", "sliding_attention"


def rope_settings(config_class: ConfigClass, settings: Settings) -> dict[str, Any]:
    """The settings, with `rope_parameters` replaced by the names of this config class."""
    names = fields(config_class)
    if "rope_parameters" not in settings or "rope_parameters" in names:
        return dict(settings)
    rope = settings["rope_parameters"] or {}
    renamed = {name: value for name, value in settings.items() if name != "rope_parameters"}
    if _LOCAL in rope:
        if theta := (rope[_LOCAL] or {}).get("rope_theta"):
            renamed["rope_local_base_freq"] = theta
        rope = rope[_ALL] or {}
    if "rope_theta" in rope:
        renamed["rotary_emb_base" if "rotary_emb_base" in names else "rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        renamed["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return renamed | {"rope_scaling": _scaling(config_class, rope)}


def _scaling(config_class: ConfigClass, rope: Settings) -> dict[str, Any] | None:
    scaled = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if scaled.keys() <= {"rope_type"} and scaled.get("rope_type", "default") == "default":
        return None
    if "original_max_position_embeddings" in fields(
        config_class
    ):  # Phi's long RoPE reads the others from other settings
        kept = ("short_factor", "long_factor")
        return {"type": scaled["rope_type"], **{name: scaled[name] for name in kept if name in scaled}}
    return scaled
