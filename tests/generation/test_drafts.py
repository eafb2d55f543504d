"""Assisted decoding: an assistant model or prompt lookup drafts tokens, and rejected ones are cropped."""

from __future__ import annotations

import copy

import pytest
import torch

from sink_patch import SinkArgumentError, SinkCache, UnsupportedGenerationError
from tests.support import zoo
from tests.support.known_gaps import skip_if_model_is_newer
from tests.support.modules import no_module_runs
from tests.support.naive import NaiveCache, decoder_of
from tests.support.oracle import relative_error
from tests.support.tiny import tiny, tokens
from tests.support.tokenizer import SPECIAL, WORDS, tiny_tokenizer

W, S = 24, 4
CONTEXT = 64  # short, so that the clock is set back
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
NO_END = {"eos_token_id": 500, "pad_token_id": 501}  # prompt lookup needs these
PROMPT = tokens(6)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", layers=2, max_position_embeddings=CONTEXT)


def drafted_by(kind):
    """Settings of `generate`. The model itself as assistant has all of its drafts accepted, another one has few."""
    assistants = {
        "another model": {"assistant_model": tiny("llama", max_position_embeddings=CONTEXT, seed=1)},
        "itself": {"assistant_model": tiny("llama", layers=2, max_position_embeddings=CONTEXT)},
    }
    return assistants.get(kind, {"prompt_lookup_num_tokens": 3})


KINDS = ("prompt lookup", "another model", "itself")


def run(model, ids=PROMPT, *, new=70, **settings):
    asked = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, **NO_END}
    return model.generate(ids, **asked, **settings)


class Log:
    """What happens to each sink cache: the ids that are fed, and how many tokens are cropped."""

    def __init__(self, monkeypatch, *models):
        self.events, take_back = [], SinkCache._take_back

        def recording(cache, count, asked):
            self._record(cache, int(count))
            take_back(cache, count, asked)

        monkeypatch.setattr(SinkCache, "_take_back", recording)
        self.hooks = [
            decoder_of(model).register_forward_pre_hook(
                lambda _, args, named: self._record(
                    named.get("cache", named.get("past_key_values")), named["input_ids"]
                ),
                with_kwargs=True,
            )
            for model in models
        ]

    def _record(self, cache, what):
        self.events.append((cache, what))

    def of(self, cache):
        return [what for owner, what in self.events if owner is cache]

    def close(self):
        for hook in self.hooks:
            hook.remove()


@pytest.fixture
def log(monkeypatch, model):
    SinkCache(W, S, model=model)  # its hooks come before those of the log, which so gets the arguments of the model
    log = Log(monkeypatch, model)
    yield log
    log.close()


@pytest.mark.parametrize("prompt", [6, 40, 150], ids=["short prompt", "long prompt", "prompt past the context"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_the_naive_cache_fed_with_the_same_forwards(model, log, kind, prompt):
    out = run(model, tokens(prompt), **SINK, **drafted_by(kind), output_logits=True)
    cache, naive, wanted, new = out.past_key_values, NaiveCache(model, W, S), [], torch.empty(1, 0, 1)
    with torch.no_grad():
        for what in log.of(cache):
            if isinstance(what, torch.Tensor):
                wanted += new.unbind(1)  # no token of the last forward was rejected
                new = naive.forward(what)
                new = new[:, :0] if naive.seen < prompt else new  # only the last token of a prompt predicts
            else:
                naive.crop(what)
                wanted += new[:, : new.shape[1] - what].unbind(1)
                new = new[:, :0]
    wanted += new.unbind(1)
    assert out.sequences.shape[1] == prompt + 70
    assert len(out.logits) == 70
    for found, logits in zip(out.logits, wanted, strict=False):
        assert relative_error(found.double(), logits) < 1e-5
    greedy = torch.stack([logits.argmax(-1) for logits in wanted[:70]], dim=1)
    assert torch.equal(out.sequences[:, prompt:], greedy)


@pytest.mark.parametrize("kind", KINDS)
def test_while_each_forward_fits_into_the_window_the_text_is_that_of_plain_decoding(model, kind):
    plain = run(model, new=18, **SINK).sequences
    assert plain.shape[1] == W
    settings = drafted_by(kind)
    if "assistant_model" in settings:  # its drafts may be longer than the text
        settings["assistant_model"] = copy.copy(settings["assistant_model"])
        settings["assistant_model"].generation_config = copy.deepcopy(settings["assistant_model"].generation_config)
        settings["assistant_model"].generation_config.num_assistant_tokens = 4
    for window in (W, 256):
        assert torch.equal(run(model, new=18, **{**SINK, "window_length": window}, **settings).sequences, plain)


@pytest.mark.parametrize("passed", [True, False], ids=["a cache that is passed", "a cache that is asked for"])
def test_an_assistant_has_a_sink_cache_of_the_same_sizes(model, monkeypatch, passed):
    assistant = drafted_by("another model")["assistant_model"]
    SinkCache(W, S, model=assistant)
    log = Log(monkeypatch, assistant)
    target = {"past_key_values": SinkCache(W, S)} if passed else SINK
    out = run(model, **target, assistant_model=assistant)
    log.close()
    caches = {id(cache): cache for cache, _ in log.events if len(cache) == len(assistant.model.layers)}
    assert len(caches) == 1
    (cache,) = caches.values()
    assert isinstance(cache, SinkCache)
    assert cache is not out.past_key_values
    assert (cache.window_length, cache.num_sink_tokens) == (W, S)
    assert cache.get_seq_length() > 2 * W
    assert cache.layers[0].keys.shape[2] < 4 * W  # with room for drafts of 20 tokens
    returned = out.past_key_values
    assert returned.layers[0].keys.shape[2] == W
    assert not returned.is_croppable


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_continues_the_first(model, log, kind):
    """With drafts, then without, then with drafts again: the text is that of one stream."""
    first = run(model, **SINK, **drafted_by(kind))
    cache, whole = first.past_key_values, torch.cat((first.sequences, tokens(5, seed=1)), dim=1)
    for settings in ({}, drafted_by(kind)):
        out = run(model, whole, past_key_values=cache, new=20, **settings)
        assert out.past_key_values is cache
        assert torch.equal(out.sequences[:, : whole.shape[1]], whole)
        whole = out.sequences
    naive, logits = NaiveCache(model, W, S), None
    with torch.no_grad():
        for what in log.of(cache):
            if isinstance(what, torch.Tensor):
                logits = naive.forward(what)
            else:
                naive.crop(what)
                logits = logits[:, : logits.shape[1] - what]
    assert naive.seen == cache.get_seq_length() == whole.shape[1] - 1
    assert torch.equal(logits[:, -1].argmax(-1), whole[:, -1])


def test_sampling_with_drafts_streams_past_the_window(model):
    torch.manual_seed(0)
    asked = {"do_sample": True, "max_new_tokens": 70, "return_dict_in_generate": True, **NO_END}
    for kind in KINDS:
        out = model.generate(PROMPT, **asked, **SINK, **drafted_by(kind))
        assert out.sequences.shape[1] == 76
        assert out.past_key_values.get_seq_length() == 75


def test_an_assistant_that_cannot_stream_is_refused(model):
    # its table of angles is too short for the window
    short = tiny("gptj", n_positions=24, n_ctx=24, max_position_embeddings=24)
    with pytest.raises(SinkArgumentError, match="does not fit GPTJForCausalLM"):
        run(model, **SINK, assistant_model=short)


def test_new_tokens_alone_are_refused(model):
    first = run(model, **SINK)
    whole = torch.cat((first.sequences, tokens(5, seed=1)), dim=1)
    fed = first.past_key_values.get_seq_length()
    mask = torch.ones_like(whole)
    with pytest.raises(UnsupportedGenerationError, match="Pass the whole history"):
        run(
            model,
            whole[:, fed:],
            past_key_values=first.past_key_values,
            attention_mask=mask,
            prompt_lookup_num_tokens=3,
        )
    assert first.past_key_values.get_seq_length() == fed


@pytest.mark.parametrize("output", ["output_attentions", "output_hidden_states"])
def test_outputs_of_all_forwards_are_refused(output):
    model = copy.deepcopy(tiny("llama", layers=2))  # which no probe has run on
    with no_module_runs(), pytest.raises(UnsupportedGenerationError, match=output):
        run(model, **SINK, prompt_lookup_num_tokens=3, **{output: True})


def test_early_exits_are_refused():
    model = copy.deepcopy(tiny("llama", layers=2))
    with no_module_runs(), pytest.raises(UnsupportedGenerationError, match="assistant_early_exit=1"):
        run(model, **SINK, assistant_early_exit=1)


def test_models_with_states_are_refused():
    skip_if_model_is_newer("qwen3_next")
    with (
        no_module_runs(),
        pytest.raises((NotImplementedError, ValueError), match="states|stateful"),
    ):  # transformers may refuse first
        run(zoo.build("qwen3_next"), **SINK, prompt_lookup_num_tokens=3)


def test_an_assistant_that_cannot_take_tokens_back_is_refused_before_any_forward(model):
    skip_if_model_is_newer("qwen3_next")
    cache = SinkCache(W, S, model=model)
    with (
        no_module_runs(),
        pytest.raises(UnsupportedGenerationError, match="Qwen3NextForCausalLM.*can neither make drafts"),
    ):
        run(model, past_key_values=cache, assistant_model=zoo.build("qwen3_next"))
    assert cache.get_seq_length() == 0


def test_embeddings_are_refused(model):
    embeds = model.get_input_embeddings()(PROMPT).detach()
    for kind in KINDS:
        with no_module_runs(), pytest.raises(UnsupportedGenerationError, match="inputs_embeds was given with drafts"):
            model.generate(inputs_embeds=embeds, max_new_tokens=5, **SINK, **NO_END, **drafted_by(kind))


@pytest.mark.parametrize("sample", [False, True])
def test_an_assistant_with_another_tokenizer(sample):
    """For sampling, transformers puts an embedding around that of the assistant, and its first call counts."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *reversed(WORDS), "more"])}
    target = tiny("llama", layers=2, vocab_size=63, tie_word_embeddings=False)

    def drafted(seed, **settings):
        assistant = copy.deepcopy(tiny("llama", vocab_size=64, tie_word_embeddings=False, seed=3))
        # new ones, by which transformers knows the assistant that it has changed
        tokenizers = {"tokenizer": tiny_tokenizer(), "assistant_tokenizer": tiny_tokenizer(vocabulary=vocabulary)}
        settings |= {"assistant_model": assistant, **tokenizers}
        settings |= {"do_sample": sample, "max_new_tokens": 8, "pad_token_id": 2, "eos_token_id": 2}
        torch.manual_seed(seed)
        return target.generate(PROMPT % 60 + 3, **settings)

    try:
        wanted = [drafted(seed) for seed in range(4)]
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        pytest.skip(f"transformers itself cannot do that: {error}")
    found = [drafted(seed, **{**SINK, "window_length": 64}) for seed in range(4)]
    if sample:  # random numbers are drawn at other places
        assert all(one.shape[1] > 6 for one in found)
    else:
        assert all(map(torch.equal, found, wanted))
