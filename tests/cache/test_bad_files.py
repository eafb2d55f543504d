"""What a file says is held against itself, its tensors and the model; whatever is not right there is a CacheFileError.

Read with `SinkCache.load` alone. Files are made by changing what `SinkCache.save` has written.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sink_patch import CacheFileError, SinkCache
from tests.support import zoo
from tests.support.replay import cache_name
from tests.support.saved import header_of, header_text, hooks, rewrite, without_hooks
from tests.support.tiny import tiny, tokens

W, S, SEEN, ROWS = 12, 3, 20, 2
NEW = {"sink_patch", "transformers"}  # versions, of which any are read where there are no states
Place = tuple[str | int, ...]


@dataclass
class Saved:
    """A file, and what it was before it was changed."""

    path: Path
    model: torch.nn.Module
    header: dict[str, Any]

    def refused(self, match: str = "cache") -> None:
        """It must be."""
        before = hooks(self.model)
        with pytest.raises(CacheFileError, match=match) as caught:
            SinkCache.load(self.path, model=self.model)
        assert hooks(self.model) == before
        assert str(self.path) in str(caught.value)

    def say(self, place: Place, value: Any) -> None:
        """Have another value at a place of the header."""
        rewrite(self.path, json.dumps(replaced(self.header, place, value)))


def save(model: torch.nn.Module, path: Path, columns: int = SEEN) -> Saved:
    used = without_hooks(model)
    cache = SinkCache(W, S, model=used)
    with torch.no_grad():
        used(tokens(columns, rows=ROWS), **{cache_name(used): cache})
    cache.save(path)
    return Saved(path, without_hooks(model), header_of(path))


def llama() -> torch.nn.Module:
    return tiny("llama", layers=2, max_position_embeddings=32)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return save(llama(), tmp_path / "cache")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Each test gives the file a header of its own."""
    return save(llama(), tmp_path_factory.mktemp("shared") / "cache")


def places(value: Any, here: Place = ()) -> list[Place]:
    """The places of all that is in a header."""
    inside: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [one for key, held in inside for one in ((*here, key), *places(held, (*here, key)))]


def at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def replaced(header: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    header = copy.deepcopy(header)
    at(header, place[:-1])[place[-1]] = value
    return header


def without(header: Any, place: Place) -> Any:
    header = copy.deepcopy(header)
    del at(header, place[:-1])[place[-1]]
    return header


DEEP = 100_000
TEXTS = {
    "nothing": "",
    "no JSON": "{",
    "words": "hello",
    "empty": "{}",
    "null": "null",
    "a list": "[]",
    "a number": "1",
    "not a number": '{"format": NaN}',
    "half a character": '{"format": 1, "sink_patch": "\\ud800"}',
    "format alone": '{"format": 1, "sink_patch": "0.1.0"}',
    "a format in words": '{"format": "1", "sink_patch": "0.1.0"}',
    "a deep list": "[" * DEEP + "]" * DEEP,
    "deep inside": '{"format": 1, "sink_patch": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_header_that_is_none_is_refused(saved, text):
    rewrite(saved.path, text)
    saved.refused(r"cannot read its header")


def test_a_header_that_is_deep_is_refused(saved):
    text = json.dumps(replaced(saved.header, ("layers", 0, "held", "dict"), [["conv_states", "here"]]))
    rewrite(saved.path, text.replace('"here"', '{"dict": [[0, ' * DEEP + "1" + "]]}" * DEEP))
    saved.refused(r"cannot read its header")


def test_a_header_that_is_cut_short_is_refused(shared):
    text = json.dumps(shared.header)
    for length in range(0, len(text), 7):
        rewrite(shared.path, text[:length])
        shared.refused()


def test_nothing_in_a_header_may_be_missing(shared):
    """No key of any object, and no entry of any list."""
    for place in places(shared.header):
        rewrite(shared.path, json.dumps(without(shared.header, place)))
        shared.refused()


OTHERS = [None, True, False, -1, 0.5, 10**30, "x", [], [None], {}, {"tensor": "x"}, {"tensor": None}, {"dict": []}]
MAY_BE = [(("sink_patch",), "x"), (("transformers",), "x"), (("recording",), True)]


def test_everything_in_a_header_has_its_type(shared):
    for place in places(shared.header):
        for other in OTHERS:
            before = at(shared.header, place)
            if (type(other) is type(before) and other == before) or (place, other) in MAY_BE:
                continue
            shared.say(place, other)
            shared.refused()


_BUFFER = "layers.0.keys.buffer"
WRONG = {
    "no window": (("window_length",), 0, "window_length=0 beside"),
    "all are sinks": (("num_sink_tokens",), W, "beside num_sink_tokens=12"),
    "another window": (("window_length",), W + 1, "another model .* kinds of layers"),
    "fewer columns than tokens": (("columns",), SEEN - 1, "columns=19 of a cache whose longest row has seen 20"),
    "no rows": (("rows",), None, "columns=20 of a cache whose longest row has seen 0"),
    "more tokens than columns": (("rows", 0, "seen"), SEEN + 1, "columns=20 .* 21"),
    "a clock set back too far": (("rows", 0, "base"), SEEN + 1, "base=21 .*rows"),
    "an image that ends before it begins": (("rows", 0, "spans"), [[5, 3]], r"spans=\(\(5, 3\),\)"),
    "an image of tokens to come": (("rows", 0, "spans"), [[3, SEEN + 1]], r"spans=\(\(3, 21\),\)"),
    "images that have left, and none were read": (("rows", 0, "dropped"), 2, "evict='tokens' and .*dropped=2"),
    "a token back that has left": (("rows", 0, "recallable"), 1, "recallable=1.* 0 of them to spare"),
    "all tokens still there": (("rows", 0, "complete"), True, "complete=True.* does not go with 12 slots"),
    "another kind": (("layers", 0, "kind", "capacity"), W - 1, r"layers.0 is a LayerKind\(capacity=11"),
    "other sinks": (("layers", 0, "kind", "num_sink_tokens"), S - 1, "layers.0 is a LayerKind"),
    "a sliding window": (("layers", 0, "kind", "local"), True, "layers.0 is a LayerKind"),
    "in order": (("layers", 0, "kind", "ordered"), True, "layers.0 is a LayerKind"),
    "more slots than there are": (
        ("layers", 0, "kind", "spare"),
        4,
        "layers.0.keys.buffer is of shape .* for 20 tokens",
    ),
    "a kind alone": (("layers", 0, "keys"), None, "layers.0 has no keys and values, and has some in this model"),
    "fewer layers": (("layers",), [], "it has 0 layers"),
    "another layer's": (
        ("layers", 0, "keys", "dict", 0, 1, "tensor"),
        "layers.1.keys.buffer",
        f"{_BUFFER} is said to be",
    ),
    "no keys": (("layers", 0, "keys", "dict", 0, 1), None, "layers.0.keys holds nothing of 20 tokens"),
    "no sinks": (("layers", 0, "keys", "dict", 1, 1), None, "layers.0.keys has no sinks"),
    "sinks of values": (("layers", 0, "values", "dict", 1, 1), {"tensor": _BUFFER}, "has sinks that turn, and none in"),
    "a state": (("layers", 0, "held", "dict"), [["conv_states", None]], r"layers.0 holds \['conv_states'\]"),
}


@pytest.mark.parametrize(("place", "value", "match"), WRONG.values(), ids=WRONG)
def test_a_header_that_contradicts_itself_or_its_tensors_is_refused(saved, place, value, match):
    saved.say(place, value)
    saved.refused(match)


def test_other_rows_than_those_of_the_tensors_are_refused(saved):
    rows = saved.header["rows"]
    for other in (rows[:1], [*rows, rows[0]], []):
        saved.say(("rows",), other)
        saved.refused("layers.0.keys.buffer is of shape .* rows")


def test_a_window_that_the_model_cannot_have_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    saved = save(tiny("llama", rope_parameters=rope, max_position_embeddings=48), tmp_path / "cache")
    text = json.dumps(saved.header).replace(f'"capacity": {W}', '"capacity": 40')
    rewrite(saved.path, text.replace(f'"window_length": {W}', '"window_length": 40'))
    saved.refused("of a cache that this model cannot have: window_length=40 does not fit")


BUFFER, PRISTINE = "layers__0__keys__buffer", "layers__0__keys__pristine"  # [2, 2, 12, 16] and [2, 2, 3, 16]
TENSORS = {
    "no buffer": {BUFFER: None},
    "no sinks": {PRISTINE: None},
    "one more": {"layers__2__keys__buffer": torch.zeros(1)},
    "ints": {BUFFER: torch.zeros(ROWS, 2, W, 16, dtype=torch.int64)},
    "bools": {BUFFER: torch.zeros(ROWS, 2, W, 16, dtype=torch.bool)},
    "complex": {BUFFER: torch.zeros(ROWS, 2, W, 16, dtype=torch.complex64)},
    "8 bits": {BUFFER: torch.zeros(ROWS, 2, W, 16).to(torch.float8_e4m3fn)},
    "ints for sinks": {PRISTINE: torch.zeros(ROWS, 2, S, 16, dtype=torch.int32)},
    "a number": {BUFFER: torch.zeros(())},
    "three dims": {BUFFER: torch.zeros(ROWS, W, 16)},
    "more rows": {BUFFER: torch.zeros(ROWS + 1, 2, W, 16)},
    "more heads": {BUFFER: torch.zeros(ROWS, 3, W, 16)},
    "values of more heads": {"layers__0__values__buffer": torch.zeros(ROWS, 3, W, 16)},
    "more slots": {BUFFER: torch.zeros(ROWS, 2, W + 1, 16)},
    "fewer slots": {BUFFER: torch.zeros(ROWS, 2, W - 1, 16)},
    "fewer dims than turn": {BUFFER: torch.zeros(ROWS, 2, W, 8), PRISTINE: torch.zeros(ROWS, 2, S, 8)},
    "more sinks": {PRISTINE: torch.zeros(ROWS, 2, S + 1, 16)},
    "sinks of other heads": {PRISTINE: torch.zeros(ROWS, 1, S, 16)},
    "sinks of more rows": {PRISTINE: torch.zeros(ROWS + 1, 2, S, 16)},
    "sinks of other dims": {PRISTINE: torch.zeros(ROWS, 2, S, 32)},
}


@pytest.mark.parametrize("changed", TENSORS.values(), ids=TENSORS)
def test_tensors_that_contradict_the_header_are_refused(saved, changed):
    try:
        rewrite(saved.path, header_text(saved.path), **changed)
    except KeyError as dtype:
        if dtype.args != (torch.complex64,):
            raise
        pytest.skip("this safetensors knows no complex numbers")
    saved.refused(r"is not as cache\.save\(path\) writes it: .*layers\.")


ATTRIBUTES: dict[str, Any] = {
    "update": {"dtype": "save"},
    "keys_": {"dtype": "load"},
    "kind": None,
    "rings": {"dict": []},
    "is_sliding": True,
    "__class__": None,
    "note": 1,
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_file_sets_no_attribute_of_a_layer_of_ours(saved, name):
    saved.say(("layers", 0, "held", "dict"), [[name, ATTRIBUTES[name]]])
    saved.refused(rf"layers\.0 holds \['{name}'\]")


@pytest.fixture
def states(tmp_path: Path) -> Saved:
    """Layer 0 holds a convolution state alone."""
    saved = save(zoo.build("lfm2"), tmp_path / "cache")
    assert "kind" not in saved.header["layers"][0]
    return saved


def test_a_file_sets_no_unknown_attribute_of_a_layer_of_states(states):
    place = ("layers", 0, "held", "dict")
    held = at(states.header, place)
    for name in ("update_conv_state", "lazy_initialization", "__class__", "keys", "crop", "note"):
        for value in (None, 1, {"dtype": "float32"}, {"device": "cpu"}):
            states.say(place, [*held, [name, value]])
            states.refused(r"layers\.0 holds")
    states.say(place, [*held, held[0]])
    states.refused(r"layers\.0 holds")


def test_nothing_in_a_layer_of_states_may_be_missing(states):
    for index, _ in enumerate(states.header["layers"]):
        for place in places(states.header["layers"][index], ("layers", index)):
            rewrite(states.path, json.dumps(without(states.header, place)))
            states.refused()


def test_every_attribute_of_a_layer_of_states_has_its_type(states):
    """Of `has_previous_state` any is right; and nobody reads a batch size, or the device on which a state was."""
    free = {"has_previous_state": bool, "max_batch_size": int, "device": str}
    for index, (name, _) in enumerate(at(states.header, ("layers", 0, "held", "dict"))):
        start: Place = ("layers", 0, "held", "dict", index, 1)
        for place in [start, *places(at(states.header, start), start)]:
            before = at(states.header, place)
            for other in [*OTHERS, {"dtype": "save"}, {"dtype": "nn"}, {"device": 1}, {"list": []}]:
                if (type(other) is type(before) and other == before) or type(other) is free.get(name):
                    continue
                states.say(place, other)
                states.refused()


def test_states_of_other_rows_or_dtypes_are_refused(states):
    (name,) = [name for name in load_file(states.path) if name.startswith("layers.0.")]
    state = load_file(states.path)[name]
    for other in (state[:1], state.long(), state.bool(), state[..., 1:], state.sum(), None):
        rewrite(states.path, header_text(states.path), **{name.replace(".", "__"): other})
        states.refused(r"is not as cache\.save\(path\) writes it: .*layers\.0\.conv_states")
    rewrite(states.path, header_text(states.path), **{name.replace(".", "__"): state})
    assert SinkCache.load(states.path, model=states.model).get_seq_length() == SEEN


def test_keys_in_a_layer_of_states_alone_are_refused(states):
    layers = states.header["layers"]
    with_keys = next(layer for layer in layers if "kind" in layer)
    for added in ("kind", "keys", "values"):
        states.say(("layers", 0), {**layers[0], added: with_keys[added]})
        states.refused(r"layers\.0 has keys and values, and none in this model")


def test_tensors_of_a_cache_without_rows_are_refused(saved):
    rewrite(saved.path, json.dumps({**saved.header, "rows": None, "columns": 0}))
    saved.refused("layers.0.keys holds something, and no tokens were seen")


def test_slots_to_spare_in_one_layer_alone_are_refused(saved):
    """Its tensors have them too."""
    slots = {f"layers__0__{what}__buffer": torch.zeros(ROWS, 2, W + 4, 16) for what in ("keys", "values")}
    rewrite(saved.path, json.dumps(replaced(saved.header, ("layers", 0, "kind", "spare"), 4)), **slots)
    saved.refused("its layers have different numbers of slots")


KEYS = st.sampled_from(["seen", "kind", "dict", "tensor", "format", "model", "news"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inside, max_size=3),
    max_leaves=5,
)


def mutated(data: st.DataObject, header: Any) -> Any:
    """A header with one more change: something left out, added, doubled, replaced, or put where another thing was."""
    header = copy.deepcopy(header)
    place = data.draw(st.sampled_from(places(header)))
    parent, key = at(header, place[:-1]), place[-1]
    how = data.draw(st.sampled_from(["drop", "add", "double", "replace", "nudge", "move"]))
    if how == "drop":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent[data.draw(KEYS | st.text(max_size=5))] = data.draw(JSON)
    elif how == "double" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif how == "nudge" and type(parent[key]) is int:
        parent[key] += data.draw(st.integers(-3, 3))
    elif how == "move":
        parent[key] = copy.deepcopy(at(header, data.draw(st.sampled_from(places(header)))))
    else:
        parent[key] = data.draw(JSON)
    return header


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_file_with_any_header_is_refused_or_holds_what_it_says(shared, data):
    header = shared.header
    for _ in range(data.draw(st.integers(1, 3))):
        header = mutated(data, header) if places(header) else header
    text = json.dumps(header)
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(text)))
        text = text[:start] + text[start + data.draw(st.integers(0, 20)) :]
    rewrite(shared.path, text)
    before = hooks(shared.model)
    try:
        cache = SinkCache.load(shared.path, model=shared.model)
    except CacheFileError:
        assert hooks(shared.model) == before
        return
    again, said = shared.path.with_name("again"), json.loads(text)
    cache.save(again)
    found, tensors = header_of(again), load_file(again)
    for key in found.keys() - NEW - {"model"}:
        assert found[key] == said[key]
    assert found["model"] == shared.header["model"]
    assert all(torch.equal(tensors.pop(name), tensor) for name, tensor in load_file(shared.path).items())
    assert not tensors
