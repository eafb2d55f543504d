"""How a config says its rotation: `rope_parameters`, or `rope_theta` and `rope_scaling` before there were these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.versions.fields import ConfigClass, fields

Settings = Mapping[str, Any]
_ALL, _LOCAL = "full_attention", "sliding_attention"


def say_rope(config_class: ConfigClass, settings: Settings) -> dict[str, Any]:
    """The settings with their `rope_parameters` in the words of this config class."""
    names = fields(config_class)
    if "rope_parameters" not in settings or "rope_parameters" in names:
        return dict(settings)
    rope = settings["rope_parameters"] or {}
    said = {name: value for name, value in settings.items() if name != "rope_parameters"}
    if _LOCAL in rope:
        if theta := (rope[_LOCAL] or {}).get("rope_theta"):
            said["rope_local_base_freq"] = theta
        rope = rope[_ALL] or {}
    if "rope_theta" in rope:
        said["rotary_emb_base" if "rotary_emb_base" in names else "rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        said["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return said | {"rope_scaling": _scaling(config_class, rope)}


def _scaling(config_class: ConfigClass, rope: Settings) -> dict[str, Any] | None:
    scaled = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if scaled.keys() <= {"rope_type"} and scaled.get("rope_type", "default") == "default":
        return None
    if "original_max_position_embeddings" in fields(config_class):  # Phi's long RoPE knows these from other settings
        kept = ("short_factor", "long_factor")
        return {"type": scaled["rope_type"], **{name: scaled[name] for name in kept if name in scaled}}
    return scaled
