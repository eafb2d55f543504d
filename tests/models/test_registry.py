"""The table of families: registering, clashes, plugins of other distributions, models that no family claims."""

from __future__ import annotations

import copy
from importlib.metadata import EntryPoint, EntryPoints

import pytest

import sink_patch
from sink_patch import FamilyClashError, SinkArgumentError, SinkCache, SinkPatchWarning, UnsupportedModelError, rope
from sink_patch.models.families import registry as registry_module
from sink_patch.models.families.family import Family
from sink_patch.models.families.registry import Registry
from tests.support.oracle import worst_error
from tests.support.tiny import FAMILIES, tiny, tokens

HALF = rope()


def test_all_families_of_the_first_issue_are_there():
    assert set(FAMILIES) <= set(sink_patch.families())
    refused = {"gpt2", "opt", "bert"}
    assert all(sink_patch.families()[one].refusal for one in refused)
    assert not [one for one in FAMILIES if sink_patch.families()[one].refusal]


def test_the_view_is_read_only_and_stays_as_it_is():
    view = sink_patch.families()
    with pytest.raises(TypeError):
        view["mine"] = view["llama"]
    mine = sink_patch.register_family("mine")(HALF)
    assert "mine" not in view
    assert sink_patch.families()["mine"] is mine


def test_registering_the_same_again_is_nothing_and_another_a_clash():
    mine = sink_patch.register_family("mine", model_types=("mine", "mine2"))(HALF)
    registry_module.registry.add(mine)
    with pytest.raises(FamilyClashError, match="'yours'.*'mine2' is taken by the family 'mine'.*llama"):
        sink_patch.register_family("yours", model_types=("yours", "mine2"))(HALF)
    assert "yours" not in sink_patch.families()
    with pytest.raises(ValueError, match="'llama' is taken"):
        sink_patch.register_family("llama")(rope("interleaved"))


def test_a_function_run_again_replaces_its_family():
    code = "import sink_patch\n@sink_patch.register_family('mine')\ndef mine(model):\n    return []\n"
    for _ in range(2):
        names = {"__name__": "a_notebook"}
        exec(code, names)
        assert sink_patch.families()["mine"] is names["mine"]


def test_a_warning_that_is_an_error_loses_no_later_plugin():
    plugins = EntryPoints([plugin("broken", "no_such_module:FAMILY"), plugin("theirs", f"{__name__}:THEIRS")])
    registry = Registry(plugins=lambda: plugins)
    with pytest.raises(SinkPatchWarning):  # warnings are errors in these tests
        registry.view()
    assert registry.view()["theirs"] is THEIRS


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"model_types": ["a"], "adapters": HALF}, "must be a tuple"),
        ({"model_types": (), "adapters": HALF}, "must be a tuple"),
        ({"model_types": ("a",)}, "either adapters or a refusal"),
        ({"model_types": ("a",), "adapters": HALF, "refusal": "no"}, "and not both"),
    ],
)
def test_a_family_checks_itself(wrong, match):
    with pytest.raises(SinkArgumentError, match=match):
        Family(name="mine", **wrong)


class _Distribution:
    name = "their-package"


def plugin(name, target):
    entry_point = EntryPoint(name, target, "sink_patch.families")
    vars(entry_point)["dist"] = _Distribution()
    return entry_point


THEIRS = Family("theirs", ("theirs",), HALF)
NOT_A_FAMILY = 7
CLASHING = Family("clashing", ("llama",), rope("interleaved"))


def test_a_plugin_brings_a_family_when_it_is_first_looked_for():
    asked = []
    registry = Registry(plugins=lambda: asked.append(1) or EntryPoints([plugin("theirs", f"{__name__}:THEIRS")]))
    assert not asked
    assert registry.view()["theirs"] is THEIRS
    registry.view()
    assert asked == [1]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("no_such_module:FAMILY", "ModuleNotFoundError"),
        (f"{__name__}:NO_SUCH_NAME", "AttributeError"),
        (f"{__name__}:NOT_A_FAMILY", "a int and not a sink_patch.Family"),
        (f"{__name__}:CLASHING", "'llama' is taken"),
    ],
)
def test_a_failing_plugin_is_named_and_harms_no_other(target, why):
    plugins = EntryPoints([plugin("broken", target), plugin("theirs", f"{__name__}:THEIRS")])
    registry = Registry(plugins=lambda: plugins)
    with pytest.warns(SinkPatchWarning, match=f"'broken' of their-package.*left out.*{why}"):
        view = registry.view()
    assert {"theirs", "llama"} <= set(view)


def renamed(model_type, to="nobody_knows", **settings):
    """A model whose `model_type` no family claims."""
    model = copy.deepcopy(tiny(model_type, **settings))
    model.config.model_type = to
    return model


@pytest.mark.parametrize("model_type", ["llama", "cohere", "gpt_neox", "smollm3", "gemma3_text", "glm"])
def test_a_model_that_no_family_claims_is_served_by_the_probe(model_type):
    model = renamed(model_type, sliding_window=128)
    assert worst_error(model, tokens(60), [7, 20, *[1] * 30], 12, 3) < 1e-5
    assert "none registered; chosen by the probe" in str(sink_patch.inspect(model, 12, 3))


@pytest.mark.filterwarnings("ignore:.position_ids. have no functionality in BLOOM:FutureWarning")
def test_a_model_whose_keys_do_not_turn_is_refused_by_the_probe():
    config = {"n_embed": 64, "hidden_size": 64, "n_head": 4, "n_layer": 1, "num_attention_heads": 4}
    model = renamed("bloom", **config)  # ALiBi
    with pytest.raises(UnsupportedModelError, match="'nobody_knows'.*none of its keys turns"):
        SinkCache(model=model)


def scale_queries_by_position(model):
    """As Llama 4 and Ministral 3 do, where positions are large."""
    attention, positions = model.model.layers[0].self_attn, []
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    attention.q_proj.register_forward_hook(lambda module, args, out: out * (1 + 0.1 * positions[-1][..., None]))


def test_a_model_whose_attention_knows_more_than_distance_is_refused_by_the_probe():
    model = renamed("llama")
    scale_queries_by_position(model)
    with pytest.raises(UnsupportedModelError, match="depends on more than distance"):
        SinkCache(model=model)


def test_an_unknown_model_keeps_to_the_positions_of_its_context():
    with pytest.raises(SinkArgumentError, match="192 positions.*no family is registered.*window_length=129 or less"):
        SinkCache(130, 4, model=renamed("llama"))


def test_a_family_with_another_number_of_adapters_is_refused():
    model = renamed("llama", to="mine")
    sink_patch.register_family("mine")(lambda model: [])
    with pytest.raises(UnsupportedModelError, match="'mine' gave 0 adapters.*1 layers"):
        SinkCache(model=model)


def test_a_registered_family_streams():
    model = renamed("cohere", to="mine")
    sink_patch.register_family("mine")(rope("interleaved"))
    assert worst_error(model, tokens(60), [7, 20, *[1] * 30], 12, 3) < 1e-5
    assert "family   mine" in str(sink_patch.inspect(model, 12, 3))
