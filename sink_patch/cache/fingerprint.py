"""By what a model is known again when a cache is loaded: what decides how its keys look, and samples of its weights."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from typing import Any

import msgspec
import torch
from torch import nn

from sink_patch.buffers.rotation import Rotation
from sink_patch.cache.header import Fingerprint, KindRecord, Turning
from sink_patch.models.facts import LayerFacts, ModelFacts

_SAMPLES = 64  # of each parameter: enough to tell weights apart, and some milliseconds for billions of them
_STEP = 0x9E3779B1  # a prime: steps of it, modulo any size, go through rows and columns alike
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # for any dtype of so many bytes
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)
_SHORT = 40


def fingerprint(model: nn.Module, facts: ModelFacts, window_length: int, num_sink_tokens: int) -> Fingerprint:
    """Of a model, as a cache of this size sees it; the same on any device."""
    return Fingerprint(
        model_class=facts.model_class,
        model_type=facts.model_type,
        family=facts.family,
        positions=(facts.context.length, facts.context.limit),
        number_of_layers=len(facts.layers),
        kinds_of_layers=[_kind(layer, window_length, num_sink_tokens) for layer in facts.layers],
        rotations=[(_turning(layer.adapter.keys), _turning(layer.adapter.values)) for layer in facts.layers],
        weights=_digest(model),
        part=_part(model),
    )


def differences(saved: Fingerprint, found: Fingerprint) -> list[str]:
    """What is not the same, in words."""
    then, now = (msgspec.json.decode(msgspec.json.encode(one)) for one in (saved, found))
    pairs = {name: (then.get(name), now.get(name)) for name in {**then, **now}}
    return [_difference(name, str(one), str(two)) for name, (one, two) in pairs.items() if not _same(one, two)]


def _difference(name: str, saved: str, found: str) -> str:
    return f"{name} ({saved} then, {found} now)" if max(len(saved), len(found)) <= _SHORT else name


def _same(one: Any, two: Any) -> bool:
    """Frequencies that two devices or releases compute may differ in the last bit; all else is equal or not."""
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=1e-6)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return bool(one == two)


def _kind(layer: LayerFacts, window_length: int, num_sink_tokens: int) -> tuple[bool, bool, KindRecord]:
    kind = KindRecord(**asdict(layer.kind(window_length, num_sink_tokens)))
    return layer.entry.attention, layer.entry.state, kind


def _turning(rotation: Rotation | None) -> Turning | None:
    return None if rotation is None else (rotation.pairing, rotation.start, rotation.sign, rotation.inv_freq.tolist())


def _part(model: nn.Module) -> str | None:
    """Which parts of its weights this process has, if it has only parts: its cache holds the heads of these.

    "0 of 2" is the first of two processes; "(0, 1) of (2, 2)" is the second of the first two of four.
    """
    meshes: list[Any] = [getattr(parameter, "device_mesh", None) for parameter in model.parameters()]  # of a DTensor
    places = {(tuple(mesh.get_coordinate() or ()), tuple(mesh.shape)) for mesh in meshes if mesh is not None}
    named = [" of ".join(str(one[0] if len(one) == 1 else one) for one in place) for place in sorted(places)]
    return ", ".join(named) or None


def _digest(model: nn.Module) -> str:
    """Of dtype, shape and samples of all weights, whose names and order depend on the version of transformers."""
    sampled = sorted(map(_sampled, [*model.parameters(), *_packed(model)]))
    return hashlib.sha256("\n".join([*sampled, *_adapters(model)]).encode()).hexdigest()


def _packed(model: nn.Module) -> list[torch.Tensor]:
    """Weights that are buffers, as quantisation packs them (GPTQ, AWQ, BitNet), and all that is saved beside them."""
    found = list[torch.Tensor]()
    for module in model.modules():
        made_here = module._non_persistent_buffers_set
        saved = [one for name, one in module.named_buffers(recurse=False) if name not in made_here]
        if any(one.dtype in _PACKED and one.ndim > 1 for one in saved):
            found += saved
    return found


def _adapters(model: nn.Module) -> list[str]:
    """Which adapters are active (PEFT), where these are not simply all that there are."""
    found = list[str]()
    for module in model.modules():
        parts = [getattr(module, name, ()) for name in getattr(module, "adapter_layer_names", ())]
        held = {name for part in parts for name in part} if parts else set()
        if held and (module.disable_adapters or set(module.active_adapters) != held):  # type: ignore[arg-type]
            found.append(f"adapters {[] if module.disable_adapters else list(module.active_adapters)}")  # type: ignore[arg-type]
    return found


def _sampled(parameter: Any) -> str:
    if hasattr(parameter, "to_local"):  # of a DTensor, the part that this process has
        parameter = parameter.detach().to_local()
    named = f"{parameter.dtype} {tuple(parameter.shape)}"
    if parameter.is_meta or not parameter.numel() or type(parameter.data) is not torch.Tensor:
        return named  # of weights that lie on disk, or are packed in ways of their own, nothing more can be said
    places = (torch.arange(_SAMPLES, device="cpu") * _STEP % parameter.numel()).to(parameter.device)
    bits = parameter.detach().reshape(-1).view(_BITS[parameter.element_size()])
    return f"{named} {bits[places].tolist()}"
