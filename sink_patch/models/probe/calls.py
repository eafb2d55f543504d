"""How the probe calls a model: as a user would, through the model's own call, with nothing that a model need not take.

What stands around a model hangs on that call: FSDP gathers the weights there, a pipeline passes states from process to
process, accelerate moves inputs. A call of the decoder alone would go past them.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sink_patch.errors import UnsupportedModelError
from sink_patch.models.entries import cache_argument, decoder_of, input_device, names_of_cache, text_config

NUM_TOKENS = 4
"""Tokens that are looked at; the median over them counts: rounding may send one token to other experts."""

_GIVEN = ("input_ids", "position_ids", "use_cache")


def probe_tokens(model: nn.Module, count: int = NUM_TOKENS) -> torch.Tensor:
    """Token ids spread over the vocabulary, [count, 1]; not the padding token, whose embedding may be zero."""
    vocab_size = _vocab_size(model)
    ids = [(2 * index + 1) * vocab_size // (2 * count) for index in range(count)]
    padding = getattr(text_config(model), "pad_token_id", None)
    ids = [(token + 1) % vocab_size if token == padding else token for token in ids]
    return torch.tensor(ids, device=input_device(model))[:, None]


def run(model: nn.Module, token_ids: torch.Tensor, positions: torch.Tensor | None, cache: Any = None) -> Any:
    """The output of one forward of tokens [rows, columns] without gradients; the model is left as it was.

    Args:
        positions: [1, columns]; None: the model finds them by itself.
        cache: None: the forward uses none.

    Raises:
        UnsupportedModelError: positions cannot be given to the model.
    """
    entrance = _entrance(model)
    given: dict[str, Any] = {"input_ids": token_ids}
    if _takes(entrance, "use_cache"):
        given["use_cache"] = cache is not None
    if positions is not None:
        _check_takes_positions(entrance)
        given["position_ids"] = positions
    if cache is not None:
        given[cache_argument(entrance if names_of_cache(entrance) else decoder_of(model))] = cache
    with _no_trace(model), _not_compiled(model):
        return entrance(**given)


def _vocab_size(model: Any) -> int:
    """How many token ids there surely are: the fewest that anything says, as a table may have been cut or packed."""
    said = [getattr(text_config(model), "vocab_size", None)]
    with contextlib.suppress(NotImplementedError):  # transformers, of a model that does not say where its embedding is
        embedding = model.get_input_embeddings()
        said.append(getattr(embedding, "num_embeddings", None))
        weight = getattr(embedding, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point():  # else it is packed
            said.append(weight.shape[0])
    return min((size for size in said if isinstance(size, int) and size > 0), default=NUM_TOKENS)


def _entrance(model: nn.Module) -> nn.Module:
    """The model; its decoder where the model's own call asks for more than tokens, or takes no cache."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]  # without self
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    asked_for = {one.name for one in parameters if one.default is one.empty and one.kind not in variadic}
    takes_cache = names_of_cache(model) or any(one.kind is one.VAR_KEYWORD for one in parameters)
    return model if takes_cache and asked_for <= {*_GIVEN, *names_of_cache(model)} else decoder_of(model)


def _takes(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(type(module).forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _check_takes_positions(module: nn.Module) -> None:
    if not _takes(module, "position_ids"):
        raise UnsupportedModelError(
            f"The forward of {type(module).__name__} takes no position_ids, so its tokens cannot be told where they "
            "stand in the cache. Let it take position_ids and pass them on, or use another cache_implementation."
        )


@contextlib.contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """A forward inside leaves no gradients, and in training mode drops the same units each time.

    The caller's random state is put back.
    """
    with torch.no_grad():
        if not model.training:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield


def _not_compiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Inside, what the user has compiled runs as it was written: no graph is made for the shapes of the probe."""
    if is_compiled(model):
        eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager
    return contextlib.nullcontext()


def is_compiled(model: nn.Module) -> bool:
    """Whether the user has compiled the model, or a part of it."""
    return "torch._dynamo" in sys.modules and any(map(_is_compiled, model.modules()))


def _is_compiled(module: nn.Module) -> bool:
    by_method = getattr(module, "_compiled_call_impl", None) is not None  # module.compile()
    return by_method or hasattr(module.forward, "_torchdynamo_orig_callable")  # module.forward = torch.compile(...)
