"""Flash attention through transformers' own code, which gets no mask but only the padding.

On a CPU the kernels are replaced by a few lines of torch that compute the same as those of flash-attn 2. On a GPU they
are those in torch, and those of flash-attn 2, 3 and 4 if they are installed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
import transformers.utils
from torch.nn import functional
from transformers import CompileConfig, PreTrainedModel, modeling_flash_attention_utils

from sink_patch import SinkCache
from tests.support.oracle import relative_error, worst_error
from tests.support.tiny import tiny, tokens

W, S = 12, 3
CONTEXT = 40  # short, so that the clock is set back
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
LOCAL = {"mistral": 7}  # sliding windows that are shorter than the cache's
MODELS = ("llama", "mistral", "gemma2")  # gemma2: soft caps
SCHEDULES = {
    "a short prompt": [7, 3, 1, 1, W - S, 1, 1, 1, 1, W, *[1] * 3 * W],
    "a long prompt": [2 * W, 1, 1, 4, *[1] * 3 * W, W + 2, 1, 1],
}
# new tokens of two rows in each forward; the row with fewer tokens is padded to the left
RAGGED = [(9, 4), *[(1, 1)] * 5, (5, 2), *[(1, 1)] * 3 * W, (3, W - S), (1, 1), (W + 2, 5), *[(1, 1)] * W]


# Kernels that compute the same as those of flash-attn 2.


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, window: Sequence[int], softcap: float
) -> torch.Tensor:
    """Attention of one row, all tensors [tokens, heads, head size]; the last query is the newest token."""
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = (torch.arange(count, device=q.device) for count in scores.shape[1:])
    back = (queries + len(keys) - len(queries))[:, None] - keys  # distance from the key to the query
    left, right = window[0], 0 if causal else window[1]
    seen = ((back <= left) | (left < 0)) & ((-back <= right) | (right < 0))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", torch.where(seen, weights, 0), v)  # a query without keys gives 0


def on_gpu(q, k, v, cu_seqlens, max_seqlens, scale, causal, window, softcap) -> torch.Tensor:
    """By the kernels of flash-attn 2 that are in torch."""
    if softcap:
        pytest.skip("the kernels in torch have no soft caps")
    limits = {"window_size_left": window[0], "window_size_right": window[1]}
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, *cu_seqlens, *max_seqlens, 0.0, causal, False, scale=scale, **limits)[0]


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    given = softmax_scale or q.shape[-1] ** -0.5, causal, window_size, softcap
    if q.is_cuda:
        return on_gpu(q, k, v, (None, None), (q.shape[1], k.shape[1]), *given)
    return torch.stack([attend(*row, *given) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    given = softmax_scale or q.shape[-1] ** -0.5, causal, window_size, softcap
    if q.is_cuda:
        return on_gpu(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), *given)
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    if max(lengths_q) > max_seqlen_q or max(lengths_k) > max_seqlen_k:
        raise ValueError(f"{lengths_q}, {lengths_k}: longer than {max_seqlen_q}, {max_seqlen_k}")
    rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([attend(*row, *given) for row in rows])


def index_first_axis(tensor, indices):
    return tensor[indices]


def unpad_input(tensor, mask):
    indices, lengths = mask.flatten().nonzero().flatten(), mask.sum(-1, dtype=torch.int32)
    starts = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return tensor.flatten(0, 1)[indices], indices, starts, lengths.max().item(), lengths


def pad_input(tensor, indices, rows, columns):
    padded = tensor.new_zeros(rows * columns, *tensor.shape[1:])
    padded[indices] = tensor
    return padded.unflatten(0, (rows, columns))


PACKAGE: dict[str, dict[str, Any]] = {
    "flash_attn": {
        "flash_attn_func": flash_attn_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": None,
    },
    "flash_attn.bert_padding": {
        "index_first_axis": index_first_axis,
        "pad_input": pad_input,
        "unpad_input": unpad_input,
    },
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": {"apply_rotary_emb": None},  # imported by old versions of transformers
}


# The kernels that are tested.


@dataclass(frozen=True)
class Flash:
    """The name of the attention in transformers, and the device and dtype of a test."""

    attention: str
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    tolerance: float = 3e-2  # of bfloat16
    is_installed: bool = True

    def model(self, model_type: str, layers: int = 1, sliding_window: int | None = None) -> PreTrainedModel:
        """A model that a test may change."""
        sliding_window = sliding_window or LOCAL.get(model_type, 128)
        settings = {"max_position_embeddings": CONTEXT, "sliding_window": sliding_window}
        # without the package, transformers refuses to build a model with flash attention
        built = self.attention if self.is_installed else "eager"
        model = copy.deepcopy(tiny(model_type, layers=layers, attention=built, **settings))
        model.config._attn_implementation = self.attention
        return model.to(self.device, self.dtype)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The functions above as the package flash_attn, which transformers imports at its own import or at first use."""
    for name, content in PACKAGE.items():
        module = importlib.util.module_from_spec(ModuleSpec(name, None))
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda **_asked: True)
    loaded = vars(modeling_flash_attention_utils)
    before = dict(loaded)
    for name in before:
        if not name.startswith("__"):
            del loaded[name]
    importlib.reload(modeling_flash_attention_utils)
    yield
    loaded.clear()
    loaded.update(before)


@pytest.fixture
def on_cpu(package: None) -> Flash:
    return Flash("flash_attention_2", "cpu", torch.float32, 1e-5, is_installed=False)


@pytest.fixture
def in_torch(package: None) -> Flash:
    return Flash("flash_attention_2", is_installed=False)


_GPU = (pytest.mark.gpu, pytest.mark.filterwarnings("ignore"))  # of packages and compilers
_ON_GPU = ("in_torch", "flash_attn_2", "flash_attn_3", "flash_attn_4")
KERNELS = ["on_cpu", *(pytest.param(name, marks=_GPU) for name in _ON_GPU)]


@pytest.fixture(params=KERNELS)
def flash(request: pytest.FixtureRequest) -> Flash:
    """Each of the kernels that is available."""
    name = request.param
    if name != "on_cpu" and not torch.cuda.is_available():
        pytest.skip("flash attention runs on a GPU alone, and there is none")
    if name in ("on_cpu", "in_torch"):
        return request.getfixturevalue(name)
    is_available = getattr(transformers.utils, f"is_{name}_available", None)
    if is_available is None or not is_available():
        pytest.skip(f"transformers finds no {name}")
    return Flash(f"flash_attention_{name[-1]}")


# Tests.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_stream_equals_the_oracle(flash, model_type, schedule):
    model, steps = flash.model(model_type), SCHEDULES[schedule]
    stream = tokens(sum(steps)).to(flash.device)
    assert worst_error(model, stream, steps, W, S, local_window=LOCAL.get(model_type)) <= flash.tolerance


@torch.no_grad()
def worst_error_of_rows(model: PreTrainedModel) -> float:
    """Largest relative error of the last logits of rows that are padded to one length, against each row alone."""
    together, *alone = (SinkCache(W, S, model=model) for _ in range(3))
    texts = tokens(sum(map(max, RAGGED)), rows=2).to(model.device)
    masks, seen, errors = texts.new_zeros(2, 0), [0, 0], []
    for counts in RAGGED:
        new = [text[start : start + count] for text, start, count in zip(texts, seen, counts, strict=True)]
        ids, mask = (texts.new_zeros(2, max(counts)) for _ in range(2))
        for row, count in enumerate(counts):
            ids[row, -count:], mask[row, -count:] = new[row], 1
        masks = torch.cat((masks, mask), dim=1)
        found = model(ids, attention_mask=masks, past_key_values=together).logits[:, -1]
        for row, cache in enumerate(alone):
            wanted = model(new[row][None], past_key_values=cache).logits[0, -1]
            errors.append(relative_error(found[row], wanted))
        seen = [start + count for start, count in zip(seen, counts, strict=True)]
    return torch.tensor(errors).max().item()  # NaN if one of them is


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("model_type", MODELS)
def test_rows_of_different_lengths_equal_each_row_alone(flash, model_type, layers):
    assert worst_error_of_rows(flash.model(model_type, layers=layers)) <= flash.tolerance


@pytest.mark.parametrize("model_type", MODELS)
def test_the_text_is_that_of_eager_attention(on_cpu, model_type):
    model = on_cpu.model(model_type, layers=2)
    ids, mask = tokens(9, rows=2), torch.ones(2, 9, dtype=torch.long)
    mask[0, :5] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 5 * W, "do_sample": False, **SINK}
    found = model.generate(ids, **asked)
    model.config._attn_implementation = "eager"
    assert torch.equal(found, model.generate(ids, **asked))


def test_at_fixed_shapes_a_model_with_a_sliding_window_reads_its_mask_from_the_right(on_cpu, monkeypatch):
    """So these forwards run only where all kinds of layers are full; messages leave in between."""
    monkeypatch.setattr(torch, "compile", lambda call, **_asked: call)  # what would be compiled runs as it is
    model = on_cpu.model("gemma2", layers=2, sliding_window=7)
    config = CompileConfig()
    config._compile_all_devices = True
    turns = {"evict": "turns", "turn_start": [[token] for token in range(0, 97, 8)]}
    asked = {"max_new_tokens": 5 * W, "do_sample": True, "temperature": 9.0, "top_k": 0, **SINK, **turns}
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    made = []
    for compiled in ({}, {"compile_config": config}):
        torch.manual_seed(0)
        made.append(model.generate(tokens(9), **asked, **compiled))
    for found, wanted in zip(made[1].logits, made[0].logits, strict=True):
        assert relative_error(found, wanted) < 1e-5
