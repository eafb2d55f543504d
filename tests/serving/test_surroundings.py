"""Sink caches with grad modes, garbage collection, accelerate, PEFT, quantised weights and attention kernels."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn
from transformers import PreTrainedModel

import sink_patch
from sink_patch import SinkCache
from tests.support import zoo
from tests.support.oracle import relative_error, worst_error
from tests.support.tiny import tiny, tokens

W, S = 12, 3
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
TOLERANCE = 1e-5
CONTEXT = 40  # short, so that the clock is set back
STEPS = [7, 3, 1, 1, W - S, 1, 1, 1, 1, W, *[1] * 3 * W]
STREAM = tokens(sum(STEPS))


def llama(layers: int = 1, attention: str = "sdpa") -> PreTrainedModel:
    """A model that a test may change."""
    return copy.deepcopy(tiny("llama", layers=layers, attention=attention, max_position_embeddings=CONTEXT))


def error(model: Any, **given: Any) -> float:
    """The worst error of a stream by a one-layer model against fresh forwards of this model."""
    return worst_error(model, STREAM, STEPS, W, S, **given)


def generated(model: Any, **asked: Any) -> torch.Tensor:
    return model.generate(input_ids=tokens(5), do_sample=False, max_new_tokens=4 * W, **SINK, **asked)


# Grad modes.

MODES = {"inference mode": torch.inference_mode, "no grad": torch.no_grad, "grad": contextlib.nullcontext}
MODELS = {
    "llama": lambda: tiny("llama", layers=2, max_position_embeddings=CONTEXT),
    "bloom": lambda: zoo.build("bloom"),
}


def logits_in(model: PreTrainedModel, mode_of: Callable[[int], Any]) -> list[torch.Tensor]:
    cache, logits = SinkCache(W, S, model=model), []
    for number, piece in enumerate(STREAM.split(STEPS, dim=1)):
        with mode_of(number)():
            logits.append(model(piece, past_key_values=cache).logits.detach())
    return logits


@pytest.mark.parametrize("model_type", MODELS)
def test_all_grad_modes_give_the_same_and_may_change_between_forwards(model_type):
    model, rng = MODELS[model_type](), random.Random(0)
    wanted = logits_in(model, lambda _: torch.no_grad)
    for mode in MODES.values():
        assert all(map(torch.equal, logits_in(model, lambda _, mode=mode: mode), wanted))
    for _ in range(3):
        assert all(map(torch.equal, logits_in(model, lambda _: rng.choice(list(MODES.values()))), wanted))


@pytest.mark.parametrize("begun", MODES.values(), ids=MODES)
def test_a_stream_of_generate_continues_in_any_mode(begun):
    model = tiny("llama", layers=2, max_position_embeddings=CONTEXT)
    with begun():
        out = generated(model, return_dict_in_generate=True)
    token, caches = out.sequences[:, -1:].clone(), [copy.deepcopy(out.past_key_values) for _ in MODES]
    for _ in range(W):
        logits = []
        for cache, mode in zip(caches, MODES.values(), strict=True):
            with mode():
                logits.append(model(token, past_key_values=cache).logits[:, -1].detach())
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])
        token = logits[0].argmax(-1, keepdim=True)


def test_backward_may_be_called_after_each_forward():
    """Gradients flow through the new tokens; what is in the cache is a constant."""
    model = llama(layers=2)
    cache = SinkCache(W, S, model=model)
    for piece in STREAM.split(STEPS, dim=1):
        model.zero_grad()
        model(piece, past_key_values=cache).logits.logsumexp(-1).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
        assert model.model.layers[0].self_attn.q_proj.weight.grad.any() or cache.get_seq_length() == 1


# Garbage collection.


def test_neither_model_nor_cache_is_kept_alive_after_generate():
    model = llama(layers=2)
    out = generated(model, return_dict_in_generate=True)
    cache, keys = weakref.ref(out.past_key_values), weakref.ref(out.past_key_values.layers[0].keys)
    del out
    gc.collect()
    assert cache() is None
    assert keys() is None
    own = SinkCache(W, S)
    model.generate(tokens(5), past_key_values=own, max_new_tokens=20)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert own.get_seq_length() == 24


def test_the_memory_of_a_cache_is_freed_without_the_garbage_collector():
    """The collector does not know how much memory of a device it would free."""
    model = llama(layers=2)
    gc.collect()
    gc.disable()
    try:
        out = generated(model, return_dict_in_generate=True)
        keys = weakref.ref(out.past_key_values.layers[0].keys)
        del out
        assert keys() is None
        cache = SinkCache(W, S, model=model)
        with torch.no_grad():
            model(tokens(20), past_key_values=cache)
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


def test_a_model_that_was_refused_or_failed_is_not_kept_alive():
    model = llama(layers=2)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generated(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# accelerate.


class Doubled(ModelHook):
    """A hook that changes the output, as those of accelerate do."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output


def offloaded(model: PreTrainedModel) -> nn.Module:
    """Weights on "meta", which are loaded for each module when it runs."""
    moved = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert moved.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    return moved


DISPATCHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dispatched": lambda model: accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True),
    "dispatched by parts": lambda model: accelerate.dispatch_model(
        model, device_map={"model": "cpu", "lm_head": "cpu"}, force_hooks=True
    ),
    "offloaded": offloaded,
    "aligned": lambda model: add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True)),
    "a hook that changes logits": lambda model: add_hook_to_module(model, Doubled()),
}


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with:UserWarning")  # of weights on "meta"; not in 5.24
@pytest.mark.parametrize("bound", ["before", "after"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_model_with_hooks_of_accelerate_streams_right(dispatch, bound):
    model, text = llama(), generated(llama())
    if bound == "before":
        sink_patch.inspect(model)
        SinkCache(W, S, model=model)
    model = DISPATCHES[dispatch](model)
    assert hasattr(model, "_hf_hook")
    assert error(model) <= TOLERANCE
    assert torch.equal(generated(model), text)


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with:UserWarning")
def test_an_offloaded_model_takes_a_second_turn():
    """The device of a model whose weights are on "meta" is "meta", where no tensor has data."""
    texts = []
    for model in (llama(), offloaded(llama())):
        first = generated(model, return_dict_in_generate=True)
        turn = torch.cat((first.sequences[:, -1:], tokens(6, seed=1)), dim=1)
        texts.append(model.generate(turn, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=20))
    assert torch.equal(*texts)


# PEFT.


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")  # peft, of transformers
def test_a_model_with_lora_streams_right():
    peft = pytest.importorskip("peft")
    model = llama()
    plain = generated(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    assert error(adapted, cache=SinkCache(W, S, model=adapted)) <= TOLERANCE
    text = generated(adapted)
    assert not torch.equal(text, plain)
    with adapted.disable_adapter():
        assert torch.equal(generated(adapted), plain)
        assert error(adapted, cache=SinkCache(W, S, model=adapted)) <= TOLERANCE
    merged = adapted.merge_and_unload()
    assert error(merged) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("names", [["b"], ["default", "b", "__base__"], ["b", "default", "b", "default", "__base__"]])
def test_each_row_may_have_an_adapter_of_its_own_in_the_first_call(names, beams):
    """PEFT makes the layers of the model take so many rows and no others while the call runs."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(llama(layers=2), config)
    adapted.add_adapter("b", config)
    adapted.eval()
    prompt = tokens(5, len(names))
    asked = {"do_sample": False, "max_new_tokens": 3 * W, "num_beams": beams, **SINK}
    texts = copy.deepcopy(adapted).generate(input_ids=prompt, adapter_names=names, **asked)
    for row, (name, text) in enumerate(zip(names, texts, strict=True)):
        if name == "__base__":
            with adapted.disable_adapter():
                alone = adapted.generate(input_ids=prompt[row : row + 1], **asked)
        else:
            adapted.set_adapter(name)
            alone = adapted.generate(input_ids=prompt[row : row + 1], **asked)
        assert torch.equal(alone[0], text)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT computes others
def test_prompt_tuning_streams_its_virtual_tokens_as_sinks():
    """PEFT prepends embeddings to the prompt and calls the model with these."""
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=S)).eval()
    prompt = tokens(5)
    asked = {"do_sample": False, "max_new_tokens": 4 * W, "return_dict_in_generate": True, "output_logits": True}
    out = tuned.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **asked, **SINK)
    virtual = tuned.get_prompt(batch_size=1)
    embeds = tuned.get_input_embeddings()(out.sequences)
    with torch.no_grad():
        recent = embeds[:, -(W - S) - 1 : -1]  # the last token is not fed
        wanted = tuned.get_base_model()(inputs_embeds=torch.cat((virtual, recent), dim=1), use_cache=False).logits
    assert relative_error(out.logits[-1], wanted[:, -1]) <= TOLERANCE


# Quantised weights.


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale for each output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight * self.scale, self.bias)


def with_int8(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Int8Linear(linear))


def with_quanto(model: PreTrainedModel) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def with_torchao(model: PreTrainedModel) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def with_bitsandbytes(model: PreTrainedModel) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for name, linear in list(layer.mlp.named_children()):
            if isinstance(linear, nn.Linear):
                quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False)
                quantised.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False)
                setattr(layer.mlp, name, quantised.to("cpu"))


QUANTISED = {"int8": with_int8, "quanto": with_quanto, "torchao": with_torchao, "bitsandbytes": with_bitsandbytes}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_model_equals_its_own_oracle(kind):
    model, plain = llama(), llama()
    with torch.no_grad():
        QUANTISED[kind](model)
        before, after = (one(STREAM, use_cache=False).logits for one in (plain, model))
    assert relative_error(after, before) > 1e-3  # quantisation has changed the model
    assert error(model) <= TOLERANCE
    assert generated(model).shape == (1, 5 + 4 * W)


def test_weights_of_half_precision_are_probed_and_stream():
    """A key and its rotated copy are rounded separately."""
    for dtype in (torch.bfloat16, torch.float16):
        assert error(llama().to(dtype)) < 0.03


# Kernels of attention.


@pytest.mark.filterwarnings("ignore:.*_compile flag on create_block_mask:DeprecationWarning")  # transformers, of torch
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")  # torch, of itself
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:.*return_lse is deprecated:FutureWarning")
def test_flex_attention_equals_the_oracle():
    """Not compiled, because inductor takes ten seconds for it."""
    with torch.compiler.set_stance("force_eager"):
        assert error(tiny("llama", attention="flex_attention", max_position_embeddings=CONTEXT)) <= TOLERANCE
