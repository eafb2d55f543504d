"""A stream of other weights, another adapter or another mode is never used."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import sink_patch
from sink_patch import UnsupportedGenerationError
from sink_patch.kept.sameness import settings_of, weights_of
from tests.kept.talk import SINK, counted, llama
from tests.support.tiny import tokens

ASKED = {**SINK, "do_sample": False, "max_new_tokens": 6, "keep_streams": 8}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    model(tokens(5), labels=tokens(5)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def copied(model: PreTrainedModel) -> None:
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.k_proj.weight
        weight.copy_(weight * 1.01)


def one_number(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[37, 11] += 1  # hardly among the samples, but torch counts it


def written_through_data(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(-2.0)


def replaced_data(model: PreTrainedModel) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data * 1.01


def loaded(model: PreTrainedModel) -> None:
    model.load_state_dict({name: weight * 0.99 for name, weight in model.state_dict().items()})


def in_inference_mode(model: PreTrainedModel) -> None:
    with torch.inference_mode():
        model.model.norm.weight.add_(0.1)


def another_module(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 64, bias=False)


def another_dtype(model: PreTrainedModel) -> None:
    model.to(torch.float64)


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "copy_ without gradients": copied,
    "one number": one_number,
    "a write through .data": written_through_data,
    "another .data": replaced_data,
    "load_state_dict": loaded,
    "a write in inference mode": in_inference_mode,
    "SGD": lambda model: step(model, torch.optim.SGD(model.parameters(), 0.1)),
    "AdamW": lambda model: step(model, torch.optim.AdamW(model.parameters(), 0.01)),
    "AdamW, fused": lambda model: step(model, torch.optim.AdamW(model.parameters(), 0.01, fused=True)),
    "another module": another_module,
    "another dtype": another_dtype,
}


def test_streams_of_the_same_weights_are_used():
    model = copy.deepcopy(llama())
    with counted(model) as forwards:
        prompt = torch.cat((model.generate(tokens(40), **ASKED), tokens(5)), dim=1)
        model(tokens(5), labels=tokens(5)).loss.backward()  # gradients are no weights
        forwards.clear()
        model.generate(prompt, **ASKED)
    assert sum(forwards) == 6 + 5


@pytest.mark.parametrize("change", CHANGES)
def test_streams_of_other_weights_are_forgotten(change):
    model = copy.deepcopy(llama())
    with counted(model) as forwards:
        prompt = torch.cat((model.generate(tokens(40), **ASKED), tokens(5)), dim=1)
        CHANGES[change](model)
        forwards.clear()
        found = model.generate(prompt, **ASKED)
    assert sum(forwards) == prompt.shape[1] + 5
    sink_patch.kept_streams.clear()
    assert torch.equal(found, model.generate(prompt, **ASKED))


def test_streams_of_other_weights_do_not_stay_in_memory():
    model = copy.deepcopy(llama())
    for seed in range(3):
        model.generate(tokens(40, seed=seed), **ASKED)
    assert len(sink_patch.kept_streams) == 3
    copied(model)
    model.generate(tokens(40), **ASKED)
    assert len(sink_patch.kept_streams) == 1


def test_weights_that_change_while_a_call_runs_keep_nothing_of_use():
    model = copy.deepcopy(llama())

    def change(_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        written_through_data(model)
        return scores

    with counted(model) as forwards:
        prompt = torch.cat((model.generate(tokens(40), logits_processor=[change], **ASKED), tokens(5)), dim=1)
        forwards.clear()
        model.generate(prompt, **ASKED)
    assert sum(forwards) == prompt.shape[1] + 5


def test_settings_that_change_while_a_call_runs_keep_nothing_even_if_they_change_back():
    model = copy.deepcopy(llama())
    attention = model.model.layers[0].self_attn
    before = attention.scaling

    def change(_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        attention.scaling = 0.3
        return scores

    with counted(model) as forwards:
        prompt = torch.cat((model.generate(tokens(40), logits_processor=[change], **ASKED), tokens(5)), dim=1)
        attention.scaling = before
        assert not len(sink_patch.kept_streams)
        forwards.clear()
        model.generate(prompt, **ASKED)
    assert sum(forwards) == prompt.shape[1] + 5


def with_hook(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda _module, _args, out: out)


def with_another_setting(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling = 0.3


def with_another_control_vector(model: PreTrainedModel) -> None:
    model.model.layers[0].control = torch.tensor([1.0, 3.0])  # as repeng's ControlModule holds one


def with_a_number_of_numpy(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.scaling = numpy.float32(0.3)


def with_one_of_many(model: PreTrainedModel) -> None:
    model.model.layers[0].scalings["40"] = 0.5


MODES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "train": lambda model: model.train(),
    "train, a part": lambda model: model.model.layers[1].train(),
    "a hook": with_hook,
    "a setting of a module": with_another_setting,
    "a number of numpy": with_a_number_of_numpy,
    "one number of many": with_one_of_many,
    "a plain tensor": with_another_control_vector,
    "the config": lambda model: setattr(model.config, "_attn_implementation_internal", "sdpa"),
}


@pytest.mark.parametrize("mode", MODES)
def test_streams_of_another_mode_are_not_used(mode):
    model = copy.deepcopy(llama())
    model.model.layers[0].control = torch.tensor([1.0, 2.0])
    model.model.layers[1].self_attn.scaling = numpy.float32(0.25)
    model.model.layers[0].scalings = {str(number): 1.0 for number in range(50)}
    with counted(model) as forwards:
        prompt = torch.cat((model.generate(tokens(40), **ASKED), tokens(5)), dim=1)
        MODES[mode](model)
        forwards.clear()
        model.generate(prompt, **ASKED)
    assert sum(forwards) == prompt.shape[1] + 5


def test_back_in_eval_mode_the_stream_is_there_again():
    model = copy.deepcopy(llama())
    with counted(model) as forwards:
        prompt = torch.cat((model.generate(tokens(40), **ASKED), tokens(5)), dim=1)
        model.train()
        model.generate(tokens(30), **ASKED)
        model.eval()
        forwards.clear()
        model.generate(prompt, **ASKED)
    assert sum(forwards) == 6 + 5


def test_autocast_is_another_mode():
    model = copy.deepcopy(llama())
    with counted(model) as forwards:
        prompt = torch.cat((model.generate(tokens(40), **ASKED), tokens(5)), dim=1)
        forwards.clear()
        with torch.autocast("cpu", torch.bfloat16):
            model.generate(prompt, **ASKED)
    assert sum(forwards) == prompt.shape[1] + 5


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(llama()), config)
    model.add_adapter("other", config)
    return model.eval()


def test_each_adapter_has_its_own_streams(adapted):
    prompt, texts = tokens(40), {}
    with counted(adapted.get_base_model()) as forwards:

        def ask(name: str) -> int:
            text = torch.cat((texts.get(name, prompt), tokens(3)), dim=1)
            forwards.clear()
            if name == "none":
                with adapted.disable_adapter():
                    texts[name] = adapted.generate(input_ids=text, **ASKED)
            else:
                adapted.set_adapter(name)
                texts[name] = adapted.generate(input_ids=text, **ASKED)
            return sum(forwards) - 5

        for name in ("default", "other", "none"):
            assert ask(name) == 43
        for name in ("default", "other", "none"):
            assert ask(name) == 4
    assert not torch.equal(texts["default"], texts["other"])
    adapted.set_adapter("default")
    adapted.merge_adapter()
    adapted.generate(input_ids=texts["default"], **ASKED)
    assert len(sink_patch.kept_streams) == 1, "merged weights are other weights"


def test_rows_with_adapters_of_their_own_are_not_kept(adapted):
    adapted.generate(input_ids=tokens(40), adapter_names=["other"], **ASKED)
    assert len(sink_patch.kept_streams) == 0


def test_adapters_that_begin_within_a_prompt_are_not_kept_and_go_in_at_once():
    """PEFT tells them where they begin from the end of a forward, so in pieces they would begin elsewhere."""
    peft = pytest.importorskip("peft")
    if "alora_invocation_tokens" not in inspect.signature(peft.LoraConfig).parameters:
        pytest.skip("this PEFT has no such adapters")
    torch.manual_seed(0)
    asked = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["k_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(copy.deepcopy(llama()), peft.LoraConfig(**asked, alora_invocation_tokens=[50, 51]))
    prompt = tokens(40)
    prompt[prompt == 50] = 52
    prompt[0, 20:22] = torch.tensor([50, 51])
    plain = model.eval().generate(input_ids=prompt, do_sample=False, max_new_tokens=6)
    assert torch.equal(model.generate(input_ids=prompt, **{**ASKED, "window_length": 64}), plain)
    assert len(sink_patch.kept_streams) == 0
    with pytest.raises(UnsupportedGenerationError, match="begins within a prompt"):
        model.generate(input_ids=prompt, prefill_chunk_size=16, **{**ASKED, "keep_streams": 0})


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT computes others
def test_prompt_tuning_is_not_kept():
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        copy.deepcopy(llama()), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    prompt = tokens(40)
    tuned.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **ASKED)
    assert len(sink_patch.kept_streams) == 0


def test_weights_that_nobody_can_see_are_not_the_same():
    model = copy.deepcopy(llama())
    assert weights_of(model) == weights_of(model)
    assert settings_of(model) == settings_of(model)
    assert weights_of(model.to("meta")) is None


def test_weights_in_another_order_of_memory_are_sampled_as_well():
    layer = nn.Linear(64, 32, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    before = weights_of(layer)
    layer.weight.data.mul_(1.01)
    assert weights_of(layer) != before
