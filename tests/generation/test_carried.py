"""What else a call of `generate` can carry: below the window the text is the default cache's, or it is refused."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    WatermarkingConfig,
)

from sink_patch import SinkCache, SinkPatchError
from tests.support.tiny import tiny, tokens
from tests.support.tokenizer import tiny_tokenizer

PROMPT = tokens(6)
NEW = 30


class Fading(LogitsProcessor):
    """Makes each token that it has chosen less likely: it counts its own calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        newest = input_ids[:, -5:]
        return scores.scatter_add(1, newest, torch.full(newest.shape, -0.1 * self.calls, dtype=scores.dtype))


class AfterCalls(StoppingCriteria):
    """Stops after so many calls."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


def of_letters():
    """Each token a letter, so that any string may be the end of a text."""
    letters = [chr(number) for number in range(ord("a"), ord("a") + 26)]
    known = ["<unk>", "abcdef", *letters]  # transformers reads each token behind this word (stopping_criteria.py)
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(known)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


CARRIED = {
    "a logits processor with a state": lambda: {"logits_processor": LogitsProcessorList([Fading()])},
    "a stopping criterion with a state": lambda: {"stopping_criteria": StoppingCriteriaList([AfterCalls(9)])},
    "bad_words_ids": lambda: {"bad_words_ids": [[token] for token in range(2, 60)]},
    "forced_eos_token_id": lambda: {"forced_eos_token_id": 7},
    "num_return_sequences": lambda: {"num_return_sequences": 3, "do_sample": True},
    "num_return_sequences of beams": lambda: {"num_return_sequences": 2, "num_beams": 3},
    "guidance_scale": lambda: {"guidance_scale": 1.5},
    "negative_prompt_ids": lambda: {"guidance_scale": 1.5, "negative_prompt_ids": tokens(3, seed=5)},
    "renormalize_logits": lambda: {"renormalize_logits": True, "do_sample": True, "top_k": 5},
    "watermarking_config": lambda: {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    "stop_strings": lambda: {"stop_strings": ["zz", "u", "cat"], "tokenizer": of_letters()},
    "synced_gpus": lambda: {"synced_gpus": False},
    "prefix_allowed_tokens_fn": lambda: {"prefix_allowed_tokens_fn": lambda _row, ids: [int(ids[-1]) % 50 + 2, 9, 11]},
    "repetition_penalty": lambda: {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": lambda: {"no_repeat_ngram_size": 2},
    "sequence_bias": lambda: {"sequence_bias": [[[11], 5.0], [[12, 13], -9.0]]},
    "min_p": lambda: {"do_sample": True, "min_p": 0.05},
}


@pytest.fixture
def model():
    return copy.deepcopy(tiny("llama", layers=2, vocab_size=300))


def generated(model, sink, carried):
    torch.manual_seed(3)
    asked = {"max_new_tokens": NEW, "pad_token_id": 0, "return_dict_in_generate": True}
    return model.generate(PROMPT, **asked, **{"do_sample": False, **carried}, **sink)


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("way", ["sink", "cache"])
def test_the_text_is_that_of_the_default_cache_or_it_is_refused_by_name(model, name, way):
    sink = {"cache_implementation": "sink"} if way == "sink" else {"past_key_values": SinkCache()}
    if "guidance_scale" in CARRIED[name]():
        with pytest.raises(SinkPatchError, match="guidance_scale"):
            generated(model, sink, CARRIED[name]())
        return
    wanted, found = generated(model, {}, CARRIED[name]()), generated(model, sink, CARRIED[name]())
    assert isinstance(found.past_key_values, SinkCache)
    assert torch.equal(found.sequences, wanted.sequences)


OUTPUTS = ("output_logits", "output_scores", "output_hidden_states", "output_attentions")


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_those_of_the_default_cache(name):
    model = copy.deepcopy(tiny("llama", layers=2, vocab_size=300))
    model.set_attn_implementation("eager") if hasattr(model, "set_attn_implementation") else None
    sink = {"cache_implementation": "sink"}
    wanted, found = (generated(model, more, {name: True}) for more in ({}, sink))
    for key in [key for key in wanted if key not in ("sequences", "past_key_values", "cache")]:
        flat = [_tensors(out[key]) for out in (wanted, found)]
        assert len(flat[0]) == len(flat[1]) > 0
        for one, other in zip(*flat, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _tensors(nest):
    return [nest] if isinstance(nest, torch.Tensor) else [tensor for part in nest for tensor in _tensors(part)]


def test_a_streamer_in_a_thread(model):
    texts = []
    for sink in ({}, {"cache_implementation": "sink"}):
        streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True)
        thread = threading.Thread(target=generated, args=(model, sink, {"streamer": streamer}))
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1] != ""
