"""`sink_patch.stream`: the tokens of one endless `generate`, as text, at constant memory."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import tracemalloc

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria

import sink_patch
from sink_patch import (
    CacheStateError,
    HistoryMismatchError,
    SinkArgumentError,
    SinkCache,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from tests.support import directory
from tests.support.chats import Window
from tests.support.tiny import tiny, tokens
from tests.support.versions import NotInThisVersion

W, S = 12, 3
SIZES = {"window_length": W, "num_sink_tokens": S}
GREEDY = {**SIZES, "do_sample": False}
SAMPLED = {**SIZES, "do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
TEXT = "w5 w6 w7 w8"
IDS = torch.tensor([[5, 6, 7, 8]])
CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}, {"role": "user", "content": "w8"}]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token."""
    characters = Tokenizer(models.BPE({chr(token + 32): token for token in range(97)}, []))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters)


def stream(given=IDS, model=None, **asked):
    asked = {"skip_special_tokens": False, **asked}  # "w0" is one
    return sink_patch.stream(model or directory.model(), directory.tokenizer(), given, **asked)


def ids_of(pieces) -> list[int]:
    """Of pieces of text: one word, one token."""
    return [int(token) for token in "".join(pieces).replace("w", " ").split()]


def take(pieces, count: int) -> list[int]:
    taken = list(itertools.islice(pieces, count))
    assert len(taken) == count, "one piece for each token"
    return ids_of(taken)


def generated(ids=IDS, model=None, seed=0, **asked) -> list[int]:
    torch.manual_seed(seed)
    asked = {"cache_implementation": "sink", **asked}
    return (model or directory.model()).generate(ids, **asked)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("columns", [1, W, 40, 100])
@pytest.mark.parametrize("asked", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_tokens_are_those_of_one_long_generate(columns, asked):
    """Past the model's context (64), and after prompts that go in at once, and by pieces."""
    ids = tokens(columns)
    wanted = generated(ids, max_new_tokens=80, **asked)
    torch.manual_seed(0)
    assert take(stream(ids, **asked), 80) == wanted
    assert len(set(wanted)) > 10, "else the test shows little"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}),
        ("falcon", {"alibi": True}),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}),
        ("phi3", {}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
    ids=str,
)
def test_other_models(family, settings):
    try:
        model = tiny(family, layers=2, **settings)
        wanted = generated(model=model, max_new_tokens=60, **GREEDY)
    except (NotInThisVersion, UnsupportedModelError) as reason:
        pytest.skip(str(reason))
    assert take(stream(model=model, **GREEDY), 60) == wanted


def test_a_chat_and_a_text():
    tokenizer = directory.tokenizer()
    ids = torch.tensor([tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)])
    assert ids[0, -1] == 3, "the generation prompt"
    assert take(stream(CHAT, **GREEDY), 30) == generated(ids, max_new_tokens=30, **GREEDY)
    assert take(stream(TEXT, **GREEDY), 30) == generated(max_new_tokens=30, **GREEDY)
    assert take(stream(IDS[0], **GREEDY), 30) == generated(max_new_tokens=30, **GREEDY)


def test_settings_of_the_model_and_of_a_config():
    config = GenerationConfig(**GREEDY, cache_implementation="sink", max_new_tokens=7, keep_streams=3)
    of_config = stream(generation_config=config)
    assert ids_of(of_config) == generated(max_new_tokens=7, **GREEDY)
    assert (of_config.cache.window_length, of_config.cache.num_sink_tokens) == (W, S)
    assert (config.max_new_tokens, config.keep_streams) == (7, 3), "the caller's own stays as it is"
    assert stream(generation_config=config, window_length=20).cache.window_length == 20


# --- what looks back -------------------------------------------------------------------------------------------------


def penalised(count: int, penalty: float, ngram: int) -> list[int]:
    """A loop of forwards over a cache, with both rules written here, over the ids of the window."""
    model, text = directory.model(), IDS[0].tolist()
    cache = SinkCache(W, S, model=model)
    with torch.no_grad():
        logits = model(IDS, past_key_values=cache).logits[0, -1].float()
        for _ in range(count):
            window = text if len(text) <= W else text[:S] + text[S - W :]
            scores = logits.clone()
            for token in set(window):
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            for start in range(len(window) - ngram + 1):
                if window[start : start + ngram - 1] == window[len(window) - ngram + 1 :]:
                    scores[window[start + ngram - 1]] = -torch.inf
            text.append(int(scores.argmax()))
            logits = model(torch.tensor([[text[-1]]]), past_key_values=cache).logits[0, -1].float()
    return text[4:]


@pytest.mark.parametrize(("penalty", "ngram"), [(1.3, 2), (0.9, 2), (1.8, 3)])
def test_what_looks_back_sees_the_window(penalty, ngram):
    asked = {**GREEDY, "repetition_penalty": penalty, "no_repeat_ngram_size": ngram}
    wanted = penalised(80, penalty, ngram)
    assert take(stream(**asked), 80) == wanted
    assert wanted != generated(max_new_tokens=80, **asked), "else the test shows nothing: all of the text"


def test_what_looks_back_sees_the_window_of_a_stream_that_goes_on():
    asked = {"do_sample": False, "repetition_penalty": 1.3}
    wanted = penalised(80, 1.3, 100)
    first = stream(**asked, **SIZES)
    begun = take(first, 30)
    assert begun == wanted[:30]
    new = torch.tensor([wanted[30:33]])
    mask_free = stream(" ".join(f"w{token}" for token in new[0].tolist()), past_key_values=first.cache, **asked)
    assert take(mask_free, 47) == wanted[33:]


class Sees(StoppingCriteria):
    """Writes down what it is given, and stops at a token."""

    def __init__(self, last: int | None = None):
        self.last, self.seen = last, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([int(input_ids[0, -1]) == self.last])


def test_criteria_see_the_window_and_end_it():
    text = [*IDS[0].tolist(), *generated(max_new_tokens=60, **GREEDY)]
    last = text[50]
    end = text.index(last, 4) + 1
    criterion = Sees(last)
    assert ids_of(stream(stopping_criteria=[criterion], **GREEDY)) == text[4:end]
    whole = [text[:count] for count in range(5, end + 1)]
    assert criterion.seen == [seen if len(seen) <= W else seen[:S] + seen[S - W :] for seen in whole]


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ending(monkeypatch):
    """A model whose generation config has an eos token that soon comes; and the text up to there."""
    model, text = directory.model(), generated(max_new_tokens=60, **GREEDY)
    eos = text[20]
    monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    monkeypatch.setattr(model.generation_config, "pad_token_id", 0)
    return text, eos, text[: text.index(eos) + 1]


def test_an_eos_token_is_no_end(ending):
    text, _, _ = ending
    assert take(stream(**GREEDY), 60) == text
    assert take(stream(stopping_criteria=[Sees()], **GREEDY), 60) == text


def test_an_eos_token_that_is_passed_is_the_end(ending):
    text, eos, short = ending
    assert ids_of(stream(eos_token_id=eos, **GREEDY)) == short
    assert ids_of(stream(generation_config=GenerationConfig(eos_token_id=eos, pad_token_id=0, **GREEDY))) == short
    other = next(token for token in range(90) if token not in text)
    assert ids_of(stream(eos_token_id=[other, eos], **GREEDY)) == short


def test_max_new_tokens_and_stop_strings_end_it():
    text = generated(max_new_tokens=60, **GREEDY)
    ended = stream(max_new_tokens=25, **GREEDY)
    assert ids_of(ended) == text[:25]
    assert next(ended, None) is None
    assert ended.cache.get_seq_length() == 4 + 25, "all that was given was read"
    letters = character_tokenizer()
    pair = letters.decode(text[30:32])
    written = letters.decode(text)
    ended = sink_patch.stream(directory.model(), letters, IDS, stop_strings=[pair], **GREEDY)
    assert "".join(ended) == written[: written.index(pair) + 2]


# --- going on --------------------------------------------------------------------------------------------------------


def test_after_a_break_it_goes_on_where_it_stands():
    text, pieces = generated(max_new_tokens=60, **GREEDY), []
    going = stream(**GREEDY)
    for _ in range(3):
        for piece in going:
            pieces.append(piece)
            if len(pieces) in (1, 21, 60):
                break
        assert going.cache.get_seq_length() == 4 + len(pieces)
    assert ids_of(pieces) == text
    going.close()
    assert list(going) == []
    assert going.cache.get_seq_length() == 64


def test_new_text_goes_on_in_the_cache():
    """However short or long it is, and though it begins as the stream began: compared with forwards over a cache."""
    model = directory.model()
    for new in (IDS, torch.tensor([[9]]), tokens(90)):
        first = stream(**GREEDY)
        begun = take(first, 20)
        cache, wanted = SinkCache(W, S, model=model), []
        with torch.no_grad():
            for piece in (IDS, *torch.tensor(begun)[:, None, None], *new.split(W - S if new.shape[1] > 61 else 90, 1)):
                logits = model(piece, past_key_values=cache).logits
            for _ in range(20):
                wanted.append(int(logits[0, -1].argmax()))
                logits = model(torch.tensor([[wanted[-1]]]), past_key_values=cache).logits
        words = " ".join(f"w{token}" for token in new[0].tolist())
        assert take(stream(words, past_key_values=first.cache, do_sample=False), 20) == wanted


def test_only_the_first_text_has_a_token_that_begins_texts():
    tokenizer = directory.tokenizer()
    begins = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer.backend_tokenizer.post_processor = begins
    first = sink_patch.stream(directory.model(), tokenizer, TEXT, **GREEDY)
    next(first)
    assert first.cache.get_seq_length() == 5 + 1
    second = sink_patch.stream(directory.model(), tokenizer, TEXT, past_key_values=first.cache, do_sample=False)
    next(second)
    assert first.cache.get_seq_length() == 6 + 4 + 1


def test_generate_goes_on_in_its_cache_and_it_in_that_of_generate():
    text = generated(max_new_tokens=60, **GREEDY)
    first = stream(**GREEDY)
    begun = take(first, 20)
    whole = torch.tensor([[*IDS[0].tolist(), *begun, 9]])
    wanted = take(stream("w9", past_key_values=first.cache.clone(), do_sample=False), 20)
    assert (
        generated(whole, past_key_values=first.cache, max_new_tokens=20, do_sample=False, cache_implementation=None)
        == wanted
    )
    cache = SinkCache(W, S, model=directory.model())
    made = directory.model().generate(IDS, past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert take(stream(made, past_key_values=cache, do_sample=False), 30) == text[30:]
    with pytest.raises(HistoryMismatchError):
        stream(tokens(200), past_key_values=cache)


def test_an_unused_cache_and_a_cache_that_is_used_elsewhere():
    cache = SinkCache(W, S, model=directory.model())
    going = stream(TEXT, past_key_values=cache, do_sample=False)
    assert take(going, 10) == generated(max_new_tokens=10, **GREEDY)
    with torch.no_grad():
        directory.model()(IDS, past_key_values=cache)
    with pytest.raises(CacheStateError, match="used elsewhere"):
        next(going)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_an_error_of_the_model_reaches_the_caller_and_the_step_can_be_tried_again():
    """With the token that was chosen: sampling goes on as if nothing had been."""
    model, text = directory.model(), generated(max_new_tokens=30, **SAMPLED)
    going, failing = stream(**SAMPLED), [False]
    torch.manual_seed(0)

    def fail(*_):
        if failing[0]:
            raise RuntimeError("no memory")

    with_fault = model.model.layers[0].register_forward_pre_hook(fail)
    try:
        got = take(going, 10)
        failing[0] = True
        with pytest.raises(RuntimeError, match="no memory"):
            next(going)
        failing[0] = False
        assert got + take(going, 20) == text
        other = stream(**GREEDY)
        failing[0] = True
        with pytest.raises(RuntimeError, match="no memory"):
            next(other)
        with pytest.raises(CacheStateError, match="not read to its end"):
            next(other)
    finally:
        with_fault.remove()


def test_a_step_within_a_step_is_refused():
    def ask(*_):
        next(going)

    going = stream(stopping_criteria=[ask], **GREEDY)
    with pytest.raises(CacheStateError, match="in its own step"):
        next(going)


def test_threads_share_a_stream_and_a_model():
    text, got, shared = generated(max_new_tokens=60, **GREEDY), [], stream(max_new_tokens=60, **GREEDY)
    alone = [stream(**GREEDY) for _ in range(2)]
    single: dict[int, list[int]] = {}

    def share():
        got.extend(shared)

    threads = [threading.Thread(target=share) for _ in range(3)]
    threads += [
        threading.Thread(target=lambda place=place: single.update({place: take(alone[place], 60)})) for place in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids_of(got)) == sorted(text)
    assert single == {0: text, 1: text}


def test_the_mode_of_gradients_is_the_callers():
    going = stream(**GREEDY)
    next(going)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


REFUSED = {
    "no tokens": ({"given": ""}, SinkArgumentError, "needs one token at least"),
    "several texts": ({"given": ["w5", "w6"]}, SinkArgumentError, "several streams"),
    "several rows": ({"given": tokens(4, rows=2)}, SinkArgumentError, "several streams"),
    "no messages": ({"given": []}, SinkArgumentError, "a chat"),
    "ids beside the text": ({"input_ids": IDS}, SinkArgumentError, "in place of the text"),
    "a streamer": ({"streamer": object()}, SinkArgumentError, "streamer was given to stream"),
    "a length": ({"max_length": 40}, SinkArgumentError, "max_new_tokens"),
    "kept streams": ({"keep_streams": 2}, SinkArgumentError, "keep_streams"),
    "an adapter": ({"adapter_names": ["one"]}, SinkArgumentError, "adapter_names"),
    "healing": ({"token_healing": True}, SinkArgumentError, "token_healing=True"),
    "beams": ({"num_beams": 2}, SinkArgumentError, "num_beams=2"),
    "several answers": ({"num_return_sequences": 2, "do_sample": True}, SinkArgumentError, "num_return_sequences=2"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, SinkArgumentError, "prompt_lookup_num_tokens=3"),
    "no tokens to make": ({"max_new_tokens": 0}, SinkArgumentError, "max_new_tokens=0"),
    "another cache": ({"past_key_values": DynamicCache()}, SinkArgumentError, "DynamicCache"),
    "another implementation": ({"cache_implementation": "static"}, SinkArgumentError, "needs a sink cache"),
    "no cache": ({"use_cache": False}, SinkArgumentError, "use_cache=False"),
    "impossible sizes": ({"window_length": 3, "num_sink_tokens": 3}, SinkArgumentError, "leaves no room"),
    "a shortest length": ({"min_new_tokens": 5, "eos_token_id": 7}, SinkArgumentError, "min_new_tokens"),
    "tokens at the beginning": ({"begin_suppress_tokens": [5]}, SinkArgumentError, "begin_suppress_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_stream_cannot_do_is_refused_before_anything_is_computed(case):
    asked, error, match = REFUSED[case]
    model = directory.model()
    stream(**GREEDY)  # the probe, once
    computes = model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    try:
        with pytest.raises(error, match=match):
            stream(asked.get("given", IDS), **{name: value for name, value in asked.items() if name != "given"})
    finally:
        computes.remove()


ADAPTERS = {
    "prompt tuning": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "activated": lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_peft_brings_in_calls_of_generate_alone(kind):
    peft = pytest.importorskip("peft")
    try:
        adapter = ADAPTERS[kind](peft)
    except TypeError:
        pytest.skip("this PEFT has no such adapters")
    model = peft.get_peft_model(copy.deepcopy(directory.model()), adapter)
    with pytest.raises(UnsupportedGenerationError, match="in calls of generate alone"):
        stream(model=model, **GREEDY)


def test_what_is_no_model_and_what_is_no_tokenizer():
    with pytest.raises(UnsupportedModelError, match="A str was given to stream"):
        sink_patch.stream("llama", directory.tokenizer(), TEXT)
    with pytest.raises(SinkArgumentError, match="A NoneType was given to stream as the tokenizer"):
        sink_patch.stream(directory.model(), None, TEXT)


def test_a_chat_that_the_template_does_not_take():
    tokenizer = directory.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate.') }}"
    with pytest.raises(SinkArgumentError, match=r"Roles must alternate\..* Pass messages that it takes"):
        sink_patch.stream(directory.model(), tokenizer, CHAT)


# --- for ever --------------------------------------------------------------------------------------------------------


def traced_of_ours() -> int:
    """Bytes that were allocated in our files."""
    gc.collect()
    ours = tracemalloc.Filter(inclusive=True, filename_pattern="*sink_patch*")
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).traces)


class Looking(StoppingCriteria):
    """Notes the ids that it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_where_whole_messages_leave_it_goes_on_as_generate_does_and_sees_what_is_left():
    plain = generated(max_new_tokens=150, **GREEDY)
    begins = max(set(plain[:-1]), key=plain.count)  # a token that comes up often
    asked = {**GREEDY, "evict": "turns", "turn_start": [begins]}
    wanted, looking = generated(max_new_tokens=150, **asked), Looking()
    assert wanted != plain, "else the test shows nothing"
    assert take(stream(stopping_criteria=[looking], **asked), 150) == wanted
    text = [*IDS[0].tolist(), *wanted]
    window = Window(text, W, S, runs=[[begins]])
    window.visible(0, IDS.shape[1])
    for length, seen in enumerate(looking.seen[:150], start=IDS.shape[1] + 1):
        assert seen == [text[place] for place in window.visible(length - 1, 1)], length
    assert window.floor > 3 * W, "messages have left"


def peak(going):
    """The most of it while 528 tokens go by: after 512 ids that wait are hashed, and steps are made 16 at once."""
    found = []
    for _ in range(16):
        take(going, 33)
        found.append(traced_of_ours())
    return max(found)


def test_nothing_grows():
    """The same in `tests.bench.endless`, over a million tokens."""
    model = tiny("llama", layers=1)
    going, lengths = stream(model=model, repetition_penalty=1.1, **GREEDY), set()
    model_inputs = model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.update(value.shape[-1] for value in kwargs.values() if hasattr(value, "shape")),
        with_kwargs=True,
    )
    try:
        tracemalloc.start()
        first, second = peak(going), peak(going)
        assert second - first < 12_000, "the ids that a history remembers take 4,352"
    finally:
        tracemalloc.stop()
        model_inputs.remove()
    assert max(lengths) <= W
