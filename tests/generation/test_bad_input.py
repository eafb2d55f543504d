"""Each bad input has its own clear error, before anything is computed, and leaves everything as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import sink_patch
from sink_patch import (
    CacheStateError,
    Family,
    SinkArgumentError,
    SinkCache,
    SinkPatchError,
    UnboundCacheError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from sink_patch.models.families import registry
from tests.support.caches import default_cache
from tests.support.modules import no_module_runs
from tests.support.tiny import tiny, tokens

PROMPT = tokens(6)


def _sink_config(**entries):
    return GenerationConfig(cache_implementation="sink", max_new_tokens=3, **entries)


@pytest.fixture
def model():
    return copy.deepcopy(tiny("llama", layers=1))


def hooks(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def refused(model, error, match, **kwargs):
    """`generate` refuses, no module has run for it, and config and model are as before."""
    config, model_hooks = copy.deepcopy(model.generation_config.to_dict()), hooks(model)
    kwargs = {"max_new_tokens": 20, "do_sample": False, **kwargs}
    with no_module_runs(), pytest.raises(error, match=match) as caught:
        model.generate(kwargs.pop("inputs", PROMPT), **kwargs)
    assert isinstance(caught.value, SinkPatchError)
    assert model.generation_config.to_dict() == config
    assert hooks(model) == model_hooks


SIZES = [
    ({"window_length": 4, "num_sink_tokens": 4}, "leaves no room.*window_length=5 or more"),
    ({"window_length": 4}, "window_length=4 leaves no room beside num_sink_tokens=4"),
    ({"window_length": 0, "num_sink_tokens": 0}, "leaves no room"),
    ({"window_length": -1}, "window_length=-1 is negative"),
    ({"num_sink_tokens": -1}, "num_sink_tokens=-1 is negative"),
    ({"window_length": 12.0}, "window_length=12.0 is a float.*integer"),
    ({"window_length": "12"}, "window_length='12' is a str"),
    ({"num_sink_tokens": True}, "num_sink_tokens=True is a bool"),
]


@pytest.mark.parametrize(("wrong", "match"), SIZES, ids=str)
def test_impossible_sizes(model, wrong, match):
    refused(model, ValueError, match, cache_implementation="sink", **wrong)
    refused(model, SinkArgumentError, match, cache_implementation="sink", cache_config=wrong)
    with pytest.raises(SinkArgumentError, match=match):
        SinkCache(**wrong)
    with pytest.raises(SinkArgumentError, match=match):
        sink_patch.inspect(model, **wrong)


def test_unknown_keys_of_cache_config(model):
    refused(
        model,
        SinkArgumentError,
        "window_size.*does not know",
        cache_implementation="sink",
        cache_config={"window_size": 9},
    )


def test_another_cache_beside_it(model):
    cache = default_cache(model)
    refused(
        model, SinkArgumentError, "together with a DynamicCache", cache_implementation="sink", past_key_values=cache
    )
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("way", ["sink", "cache"])
def test_guidance_by_a_second_text(model, way):
    """transformers gives it a cache of its own, which has no window."""
    asked = {"cache_implementation": "sink"} if way == "sink" else {"past_key_values": SinkCache()}
    refused(model, UnsupportedGenerationError, "guidance_scale=1.5.*Leave it out", guidance_scale=1.5, **asked)
    assert model.generate(PROMPT, max_new_tokens=3, guidance_scale=1, **asked).shape == (1, 9)


@pytest.mark.parametrize("masked", [True, False])
def test_embeddings_of_new_tokens_alone(model, masked):
    """transformers takes them for those of the whole history."""
    cache = model.generate(
        PROMPT, max_new_tokens=9, cache_implementation="sink", window_length=12, return_dict_in_generate=True
    ).past_key_values
    fed = cache.get_seq_length()
    mask = {"attention_mask": torch.ones(1, fed + 3, dtype=torch.long)} if masked else {}
    embeds = model.get_input_embeddings()(tokens(3))
    match = rf"inputs_embeds of 3 columns.*has seen {fed}.*new tokens as input_ids"
    refused(model, SinkArgumentError, match, inputs=None, inputs_embeds=embeds, past_key_values=cache, **mask)
    assert cache.get_seq_length() == fed


@pytest.mark.parametrize("way", ["sink", "cache"])
def test_tuples_for_an_output(model, way):
    """4.x makes them of a `DynamicCache` at the very end."""
    model.generation_config.return_legacy_cache = True
    asked = {"cache_implementation": "sink"} if way == "sink" else {"past_key_values": SinkCache()}
    refused(model, SinkArgumentError, "return_legacy_cache=True.*Leave it out", return_dict_in_generate=True, **asked)
    assert model.generate(PROMPT, max_new_tokens=3, **asked).shape == (1, 9)


def test_no_cache_beside_it(model):
    refused(model, SinkArgumentError, "use_cache=False", cache_implementation="sink", use_cache=False)
    refused(model, SinkArgumentError, "use_cache=False", past_key_values=SinkCache(), use_cache=False)


@pytest.mark.parametrize("other", [{}, {"cache_implementation": "static"}])
def test_sizes_without_the_sink_cache(model, other):
    refused(
        model,
        SinkArgumentError,
        "window_length and num_sink_tokens belong",
        window_length=9,
        num_sink_tokens=2,
        **other,
    )


def test_sizes_that_are_not_those_of_the_cache(model):
    cache = SinkCache(12, 3)
    refused(model, SinkArgumentError, "has window_length=12", past_key_values=cache, window_length=13)
    assert not cache.is_bound_to(model)
    model.generate(PROMPT, past_key_values=cache, window_length=12, max_new_tokens=3)


@pytest.mark.parametrize(
    "mode",
    [
        ("contrastive_search", {"penalty_alpha": 0.6, "top_k": 4}),
        ("group_beam_search", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}),
        ("dola_generation", {"dola_layers": "low"}),
    ],
    ids=lambda mode: mode[0],
)
def test_modes_with_ways_of_their_own(model, mode):
    name, settings = mode
    for given in ({"cache_implementation": "sink"}, {"past_key_values": SinkCache()}):
        refused(model, UnsupportedGenerationError, f"mode '{name}' was asked for", **given, **settings)


def learned_positions(model_type, **settings):
    config = AutoConfig.for_model(
        model_type, vocab_size=97, num_hidden_layers=1, pad_token_id=0, eos_token_id=None, **settings
    )
    return AutoModelForCausalLM.from_config(config).eval()


REFUSED = {
    "gpt2": lambda: learned_positions("gpt2", n_embd=32, n_head=2, n_layer=1),
    "opt": lambda: learned_positions("opt", hidden_size=32, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=32),
    "bert": lambda: learned_positions(
        "bert", hidden_size=32, intermediate_size=32, num_attention_heads=2, is_decoder=True
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_with_learned_positions(model_type):
    model = REFUSED[model_type]()
    match = f"{model_type}.*cannot stream.*learned"
    refused(model, UnsupportedModelError, match, cache_implementation="sink")
    refused(model, NotImplementedError, match, past_key_values=SinkCache())
    with pytest.raises(UnsupportedModelError, match=match):
        SinkCache(model=model)


def test_encoder_decoder_models():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    refused(model, UnsupportedModelError, "t5.*encoder-decoder", cache_implementation="sink")


def test_what_is_no_model():
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        SinkCache(model=torch.nn.Linear(2, 2))


@torch.no_grad()
def test_a_cache_of_another_model(model):
    other = copy.deepcopy(model)
    cache = SinkCache(12, 3, model=other)
    other(tokens(20), past_key_values=cache)
    refused(model, CacheStateError, "another model", past_key_values=cache)
    with pytest.raises(UnboundCacheError, match="not bound to"):
        model(PROMPT, past_key_values=cache)
    assert cache.get_seq_length() == 20
    cache.reset()
    cache.bind(model)
    model(PROMPT, past_key_values=cache)


@torch.no_grad()
def test_another_batch_size(model):
    cache = SinkCache(12, 3, model=model)
    model(tokens(20, rows=2), past_key_values=cache)
    for rows in (1, 3):
        with pytest.raises(CacheStateError, match=f"holds 2 rows, but {rows} were fed"):
            model(tokens(1, rows=rows), past_key_values=cache)
    model(tokens(1, rows=2), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True])
def test_a_bare_forward_with_an_unbound_cache(model, hooked):
    if hooked:
        SinkCache(model=model)
    with pytest.raises(UnboundCacheError, match=r"SinkCache\(12, 3, model=model\)"):
        model(PROMPT, past_key_values=SinkCache(12, 3))


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(1, 1, 6, 26), "two-dimensional.*shape"),
        ({"full_attention": None}, "two-dimensional.*a dict"),
        (torch.ones(1, 25), r"shape \[1, 25\].*26 columns"),
        (torch.ones(2, 26), "1 rows"),
        (torch.tensor([[1] * 20 + [1, 1, 1, 0, 0, 0]]), "padding to the right"),
        (torch.tensor([[0] * 3 + [1] * 23]), "other tokens of the past"),
    ],
    ids=["4D", "a dict", "too short", "too many rows", "right padding", "another past"],
)
def test_masks_that_do_not_fit(model, mask, match):
    cache = SinkCache(12, 3, model=model)
    model(tokens(20), past_key_values=cache)
    with pytest.raises(SinkArgumentError, match=match):
        model(PROMPT, past_key_values=cache, attention_mask=mask)
    assert cache.get_seq_length() == 20
    model(PROMPT, past_key_values=cache, attention_mask=torch.ones(1, 26))


def test_a_row_of_padding_only(model):
    mask = torch.tensor([[1] * 6, [0] * 6])
    refused(
        model,
        SinkArgumentError,
        "Row 1 of attention_mask is padding only",
        inputs=tokens(6, rows=2),
        attention_mask=mask,
        cache_implementation="sink",
    )


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([[5, 6, 7], [0, 0, 0]], "Row 1 of attention_mask is padding only"),
        ([[5, 6, 7], [5, 6, 0]], "padding to the right"),
    ],
)
@pytest.mark.parametrize("way", ["sink", "cache"])
def test_padding_that_only_the_ids_tell_of(model, way, ids, match):
    """transformers makes a mask of them, after it has prepared the config."""
    asked = {"cache_implementation": "sink"} if way == "sink" else {"past_key_values": SinkCache()}
    refused(model, SinkArgumentError, match, inputs=torch.tensor(ids), pad_token_id=0, eos_token_id=96, **asked)


OTHER_INPUTS = (
    *("pixel_values", "pixel_values_videos", "pixel_values_images", "input_features", "input_values"),
    *("audio_values", "mm_encoder_outputs"),
)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_images_and_sounds_in_a_forward(model, name):
    cache = SinkCache(12, 3, model=model)
    given = {"image": torch.ones(1)} if name == "mm_encoder_outputs" else torch.ones(1, 4)
    with pytest.raises(UnsupportedGenerationError, match=f"given {name} with a SinkCache"):
        model(PROMPT, past_key_values=cache, **{name: given})
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_images_and_sounds_in_generate(model, name):
    refused(model, UnsupportedGenerationError, f"given {name} with a", cache_implementation="sink", **{name: PROMPT})
    refused(model, UnsupportedGenerationError, f"given {name} with a", past_key_values=SinkCache(), **{name: PROMPT})


def test_a_model_that_takes_single_tokens_only_decodes_without_drafts(model):
    registry.registry.add(
        Family("one_by_one", ("one_by_one",), adapters=sink_patch.rope("half"), whole_prompts="It takes single tokens")
    )
    model.config.model_type = "one_by_one"
    match = "LlamaForCausalLM.*can neither make drafts"
    for asked in ({"cache_implementation": "sink"}, {"past_key_values": SinkCache()}):
        refused(model, UnsupportedGenerationError, match, prompt_lookup_num_tokens=3, **asked)


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 48}


@torch.no_grad()
def test_windows_and_forwards_that_do_not_fit_the_positions():
    model = tiny("llama", **DYNAMIC)
    with pytest.raises(
        SinkArgumentError, match="window_length=40 does not fit.*48 positions.*'dynamic'.*window_length=33 or less"
    ):
        SinkCache(40, 3, model=model)
    cache = SinkCache(33, 3, model=model)
    with pytest.raises(CacheStateError, match="needs 60 positions.*may use 48.*pieces of 30"):
        model(tokens(60), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert model.generate(tokens(60), past_key_values=cache, max_new_tokens=3).shape[1] == 63


CONFIG_WITH_SIZES = [
    ({"cache_config": {"window_length": 12}}, "window_length belong"),
    ({"generation_config": GenerationConfig(window_length=12, max_new_tokens=3)}, "window_length belong"),
    ({"generation_config": _sink_config(cache_config={"window_size": 12})}, "window_size.*does not know"),
    ({"past_key_values": "ours", "cache_config": {"window_length": 12}}, "has window_length=50"),
    ({"past_key_values": "ours", "cache_config": {"window_length": -12}}, "has window_length=50"),
    ({"past_key_values": "ours", "generation_config": _sink_config(window_length=12)}, "has window_length=50"),
    (
        {"past_key_values": "ours", "cache_implementation": "static"},
        "'static' was asked for, together with a SinkCache",
    ),
]


@pytest.mark.parametrize(("call", "match"), CONFIG_WITH_SIZES)
def test_sizes_in_configs_are_never_passed_over(model, call, match):
    call = dict(call)
    if call.get("past_key_values") == "ours":
        call["past_key_values"] = SinkCache(50)
    if "generation_config" in call:
        call = {**call, "max_new_tokens": None, "do_sample": None}
    refused(model, SinkArgumentError, match, **call)


def test_what_the_models_config_alone_says_gives_way_to_a_cache_that_is_passed(model):
    """4.52 to 4.55 give some models, such as Gemma 2, a config that says "hybrid"."""
    asked = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    wanted = model.generate(PROMPT, past_key_values=SinkCache(12, 3), **asked)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(PROMPT, past_key_values=SinkCache(12, 3), **asked).sequences, wanted.sequences)
    cache = wanted.past_key_values
    assert model.generate(wanted.sequences, past_key_values=cache, **asked).past_key_values is cache


def test_a_stored_typo_is_found(model):
    model.generation_config = _sink_config(cache_config={"window_size": 12})
    refused(model, SinkArgumentError, "window_size.*does not know")


def test_a_refused_mode_binds_nothing(model):
    cache, before = SinkCache(), hooks(model)
    with pytest.raises(UnsupportedGenerationError):
        model.generate(PROMPT, past_key_values=cache, assistant_early_exit=1, max_new_tokens=9)
    assert not cache.is_bound_to(model)
    assert hooks(model) == before


def test_gradient_checkpointing_stores_nothing(model):
    bound = SinkCache(12, 3, model=model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"gradient checkpointing.*model.eval\(\)"):
        SinkCache(12, 3, model=copy.deepcopy(model))
    with pytest.raises(CacheStateError, match="stored nothing"):
        model(PROMPT, past_key_values=bound)
    assert bound.get_seq_length() == 0


@torch.no_grad()
def test_a_failed_first_forward_leaves_an_empty_cache(model):
    cache = SinkCache(12, 3, model=model)
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(6, rows=2), past_key_values=cache)
    handle.remove()
    model(tokens(6, rows=3), past_key_values=cache)
    assert cache.batch_size == 3


def test_a_forward_of_no_tokens(model):
    with pytest.raises(SinkArgumentError, match="no tokens"):
        model(PROMPT[:, :0], past_key_values=SinkCache(12, 3, model=model))
