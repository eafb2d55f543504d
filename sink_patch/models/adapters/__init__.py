"""How position enters what a layer caches: one `Adapter` a layer, made by the family's factory."""

from __future__ import annotations

from sink_patch.models.adapters.adapter import Adapter, AdapterFactory
from sink_patch.models.adapters.rope import no_positions, rope, sinusoidal_table

__all__ = ["Adapter", "AdapterFactory", "no_positions", "rope", "sinusoidal_table"]
