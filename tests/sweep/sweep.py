"""One call of `generate` on one model: right, refused by name, or wrong."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import sink_patch
from sink_patch import SinkCache, SinkPatchError
from tests.support import zoo
from tests.support.exact import room_in
from tests.support.tiny import tokens
from tests.sweep.calls import CHUNK, CONTEXT, DECODING, PROMPT, SINKS, Call
from tests.sweep.lineage import Lineages, tokens_of, worst_error

TOLERANCE = 3e-5
NEW = 16
PAD, EOS = 0, 500  # no token is the end: prompt lookup wants to know one
LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")


@dataclass(frozen=True)
class Outcome:
    """Args: `verdict` is "right", "refused" or "wrong"; `why` the reason of a refusal, or what is wrong."""

    model_type: str
    call: Call
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.model_type}, {self.call}{': ' if self.why else ''}{self.why}"


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model with each kind of layer of its family, and a context that the longest prompt leaves behind."""
    model = zoo.build(model_type, seed=seed)
    config = model.config.get_text_config(decoder=True)
    more = room_in(config) or {name: CONTEXT for name in LENGTHS if hasattr(config, name)}
    model = zoo.build(model_type, seed=seed, **more)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model


def tried(model_type: str, call: Call, seed: int = 0) -> Outcome:
    """Build a model, and try a call on it."""
    model = build(model_type, seed)
    try:
        wrong = _run(model, call, seed)
    except SinkPatchError as refusal:
        return Outcome(model_type, call, "refused", f"{type(refusal).__name__}: {refusal}")
    except Exception as failure:  # whatever it is: is it of transformers itself?
        if _fails_by_itself(model_type, call, seed):
            return Outcome(model_type, call, "refused", f"transformers: {type(failure).__name__}: {failure}")
        return Outcome(model_type, call, "wrong", f"{type(failure).__name__}: {failure}")
    return Outcome(model_type, call, "wrong" if wrong else "right", wrong)


def _run(model: PreTrainedModel, call: Call, seed: int) -> str:
    """What is wrong, or "". Each forward is compared with the naive cache, and the text with the default cache's."""
    lineages, prompt, pads = Lineages(model), *_prompt(call, seed)
    cache: Any = SinkCache(call.window_length, SINKS) if call.cache == "given" else None
    with lineages.watched():
        out = _generate(model, call, prompt, pads, cache, seed)
        cache, sequences = out.past_key_values, out.sequences
        wrong = _not_fed(lineages, cache, call, sequences, pads)
        if call.second_turn != "none":
            history = torch.cat((sequences, tokens(4, rows=len(sequences), seed=seed + 1)), dim=1)
            cache = _saved_and_loaded(lineages, cache, model) if call.second_turn == "saved" else cache
            read = cache.get_seq_length()
            given = history[:, read:] if call.second_turn == "new tokens" else history
            out = _generate(model, call, given, pads, cache, seed, stream=history.shape[1])
            sequences = torch.cat((history, out.sequences[:, given.shape[1] :]), dim=1)
            wrong = wrong or _not_fed(lineages, cache, call, sequences, pads)
    errors = [worst_error(model, row, call.window_length, SINKS) for row in lineages.rows_of(cache)]
    if max(errors) > TOLERANCE:
        wrong = wrong or f"logits are off by {max(errors):.1e}"
    if call.window == "large" and call.second_turn == "none":
        wrong = wrong or _unlike_the_default(model, call, prompt, pads, seed, sequences)
    return wrong


def _prompt(call: Call, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Ids [rows, columns], none of them the padding, and how many columns of each row are padding."""
    rows = 1 if call.rows == "one" else 2
    ids = tokens(PROMPT[call.prompt], rows=rows, seed=seed) % 90 + 2
    pads = [0, 2][:rows]
    for row, count in enumerate(pads):
        ids[row, :count] = PAD
    return ids, pads


def _generate(
    model: PreTrainedModel,
    call: Call,
    ids: torch.Tensor,
    pads: list[int],
    cache: Any,
    seed: int,
    stream: int | None = None,
    *,
    default: bool = False,
) -> Any:
    """Args: `stream` is how many columns the mask covers; `default`: with the cache of transformers."""
    mask = torch.ones(len(ids), stream or ids.shape[1], dtype=torch.long)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    asked = {**DECODING[call.decoding], "max_new_tokens": NEW, "return_dict_in_generate": True}
    if cache is not None:
        asked["past_key_values"] = cache
    elif not default:
        asked |= {"cache_implementation": "sink", "window_length": call.window_length, "num_sink_tokens": SINKS}
    if call.decoding == "assistant":
        asked["assistant_model"] = _assistant(model)
    if call.feeding == "pieces" and not default:
        asked["prefill_chunk_size"] = CHUNK
    if call.feeding == "embeds":
        asked["inputs_embeds"] = model.get_input_embeddings()(ids)
    torch.manual_seed(seed)
    out = model.generate(ids, attention_mask=mask, **asked)
    if call.feeding == "embeds" and out.sequences.shape[1] == NEW:
        out.sequences = torch.cat((ids, out.sequences), dim=1)
    return out


def _assistant(model: PreTrainedModel) -> PreTrainedModel:
    """One whose drafts are accepted now and then: the model itself, its head a little off."""
    other = copy.deepcopy(model)
    for module in other.modules():  # hooks of ours and of the test would be called for it as well
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks_always_called.clear()
    return other


def _not_fed(lineages: Lineages, cache: Any, call: Call, sequences: torch.Tensor, pads: list[int]) -> str:
    """What the cache has read must be the text, but for its last token; rows of beams are any of theirs."""
    if not isinstance(cache, SinkCache):
        return f"the cache that came out is a {type(cache).__name__}"
    if call.decoding == "beams":
        return ""
    for row, text, pad in zip(lineages.rows_of(cache), sequences.tolist(), pads, strict=True):
        read = tokens_of(row)
        same = [one in (-1, other) for one, other in zip(read, text[pad:], strict=False)]
        if len(read) != len(text) - pad - 1 or not all(same):
            return f"read {read} of the text {text[pad:]}"
    return ""


def _saved_and_loaded(lineages: Lineages, cache: SinkCache, model: PreTrainedModel) -> SinkCache:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        loaded = SinkCache.load(path, model=model)
    lineages.goes_on_in(cache, loaded)
    return loaded


def _unlike_the_default(
    model: PreTrainedModel, call: Call, prompt: torch.Tensor, pads: list[int], seed: int, sequences: torch.Tensor
) -> str:
    try:
        wanted = _generate(model, call, prompt, pads, None, seed, default=True).sequences
    except Exception:  # then there is no text to be like: a limit of the default cache, such as padding and states
        return ""
    return "" if torch.equal(wanted, sequences) else "another text than that of the default cache"


def _fails_by_itself(model_type: str, call: Call, seed: int) -> bool:
    """Whether the call fails without us."""
    prompt, pads = _prompt(call, seed)
    sink_patch.unpatch()
    try:
        _generate(build(model_type, seed), call, prompt, pads, None, seed, default=True)
    except Exception:
        return True
    finally:
        sink_patch.patch()
    return False
