"""Whether a model is as it was when a stream was kept: its weights, and all else by which its keys come about.

Nothing is written to the model, and nothing of it is held. What is compared is read off anew for each call:

- of the weights: where each parameter and buffer lies, how often it was written to (torch counts that), and samples of
  its bytes, as writes through `.data` are not counted;
- of the modules: their own settings (train or eval, which adapter is active, how it is scaled), their hooks, the
  config, and autocast.

Weights never become again what they were, so a stream of other weights is of no use; settings may.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sink_patch.models.entries import given_to_hooks, text_config

_SAMPLES = 256  # bytes of each tensor
_STEP = 0x9E3779B1  # a prime: steps of it, modulo any size, go through rows and columns alike
_PLAIN = (numbers.Number, str, type(None))  # numbers of numpy, too
_MOST_ITEMS = 4096  # of a list or dict that counts as a setting
_OF_ONE_CALL = frozenset({"adapter_names", "alora_offsets"})  # adapters of single rows (PEFT), or behind some token
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OF_ANY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_OF_THE_NEWEST_CALL = frozenset({"rope_deltas"})  # where its images stood, for the model's own positions

Digest = bytes


@torch.no_grad()
def weights_of(model: nn.Module) -> Digest | None:
    """A digest of the weights of a model as they are now; None: they cannot be seen (offloaded to disk or CPU)."""
    places: list[Any] = []
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        for part in _parts(tensor):
            if part.is_meta:
                return None
            version = None if part.is_inference() else part._version
            places.append((_address(part), version, str(part.dtype), tuple(part.shape)))
            sampled = _sampled(part)
            if sampled is not None:
                samples.setdefault(part.device, []).append(sampled)
    taken = [torch.cat(of_device).cpu().numpy().tobytes() for of_device in samples.values()]
    return _digest([repr(places).encode(), *taken])


def settings_of(model: nn.Module) -> Digest | None:
    """A digest of all settings of a model as they are now; None: they are of this call alone."""
    settings: list[Any] = []
    for module in model.modules():
        held = vars(module)
        for hooks in (held[name] for name in _HOOKS if held[name]):
            if not _OF_ONE_CALL.isdisjoint(given_to_hooks(module)):
                return None
            settings.append(list(hooks))  # their numbers in torch, which no other hook will ever have
        settings.append((type(module).__name__, _plain(held)))
    configs = {id(config): config for config in (getattr(model, "config", None), text_config(model))}
    settings += [_plain(vars(config)) for config in configs.values()]
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    autocast = torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device))
    return _digest([repr(settings).encode(), str(autocast).encode()])


def _plain(held: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those attributes that are settings."""
    own = [(name, held[name]) for name in held.keys() - _OF_ANY_MODULE - _OF_THE_NEWEST_CALL]
    settings = [(name, value) for name, value in own if _is_setting(value)]
    tensors = [(name, _content(value)) for name, value in own if isinstance(value, torch.Tensor)]
    return sorted(settings + tensors)


def _is_setting(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if not isinstance(value, (list, tuple, set, dict)) or len(value) > _MOST_ITEMS:
        return False
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return all(isinstance(item, _PLAIN) for item in items)


def _content(tensor: torch.Tensor) -> Any:
    """Of a tensor that a module holds as a plain attribute, such as a control vector; some are made anew each time."""
    sampled = _sampled(tensor) if not tensor.is_meta else None
    return str(tensor.dtype), tuple(tensor.shape), None if sampled is None else sampled.tolist()


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor is made of: several where weights are quantised."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    if not names:
        yield tensor
    for name in names:
        yield from _parts(getattr(tensor, name))


def _address(tensor: torch.Tensor) -> int | None:
    return tensor.data_ptr() if type(tensor.data) is torch.Tensor else None


def _sampled(tensor: torch.Tensor) -> torch.Tensor | None:
    """Some bytes of a tensor, uint8 [samples]; None: it has none, or lies in memory in a way of its own."""
    held = tensor.detach()
    if not held.numel() or type(tensor.data) is not torch.Tensor or held.is_quantized or held.layout != torch.strided:
        return None
    if not held.is_contiguous():
        held = held.permute(sorted(range(held.ndim), key=held.stride, reverse=True))
        if not held.is_contiguous():
            return None
    flat = held.reshape(-1).view(torch.uint8)  # [bytes]
    return flat if flat.numel() <= _SAMPLES else flat[_places(flat.numel(), flat.device)]


@functools.lru_cache(maxsize=256)
def _places(size: int, device: torch.device) -> torch.Tensor:
    """int64 [samples]."""
    with torch.inference_mode(False):
        return (torch.arange(_SAMPLES, device="cpu") * _STEP % size).to(device)


def _digest(parts: Iterable[bytes]) -> Digest:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
