"""The benchmarks run, each for a moment: their figures are for people, and none is looked at here."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.bench import (
    batching,
    batching_memory,
    batching_talks,
    by_default,
    decode,
    endless,
    forever,
    kvpress_rule,
    memory,
    precision,
    prefill,
    profile,
    serving,
    slots,
    stream,
    turns,
    update,
    window_cost,
)
from tests.bench.__main__ import RESULTS
from tests.support.known_gaps import is_newest
from tests.support.tiny import tiny

pytestmark = pytest.mark.skipif(not is_newest(), reason="benchmarks are of the newest transformers")


@pytest.fixture(autouse=True)
def one_thread():
    """The number of threads that a benchmark sets does not stay."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small():
    return copy.deepcopy(tiny("llama", layers=2, vocab_size=1000))


def test_update(monkeypatch):
    monkeypatch.setattr(update, "WINDOWS", (8, 16))
    assert [row["W"] for row in update.run("cpu", rounds=1)] == [8, 16]


def test_decode(monkeypatch):
    monkeypatch.setattr(decode, "POINTS", (30,))
    bench = decode.Bench(small(), 16, compiled=False)
    assert "ours after 30" in decode.run(bench, 30, 2, 1)["tokens_a_second"]
    assert bench.growing["dynamic"].get_seq_length() == 16 - bench.block // 2  # taken back behind each block


def test_by_default():
    assert by_default.run(small(), 24, 20, 1, 100.0)["sink against static, later"] > 0


def test_batching():
    asked = SimpleNamespace(window=16, requests=2, rounds=1)
    model = copy.deepcopy(tiny("llama", layers=2, vocab_size=1000, attention="sdpa"))
    with torch.inference_mode():
        held = batching.run(model, asked)["bytes of pages"]
    assert held["with sinks"] * 4 < held["transformers, ten windows"]


def test_batching_talks():
    asked, model = (
        SimpleNamespace(window=16, clients=2, turns=2, rounds=1),
        copy.deepcopy(tiny("llama", vocab_size=1000)),
    )
    read = batching_talks.run(model, asked)["tokens of a prompt that were read, after the first turn"]
    assert read == {"kept": batching_talks.MESSAGE + 1, "anew": 264}


@pytest.mark.parametrize("way", batching_memory.WAYS)
def test_batching_memory(monkeypatch, way):
    monkeypatch.setattr(batching_memory, "STRETCH", 24)
    (row,) = batching_memory.run(way, 24)
    assert (row["wrong"], row["most_blocks_of_a_request"]) == (0, 4)


def test_serving(tmp_path):
    """Its count of answers; the servers are those of tests/serving."""
    asked = serving.Asked(serving.make_folder(tmp_path / "model", None, 12), window=12, clients=1, turns=2, new=20)
    question = {"role": "user", "content": serving.text(0, 0)}
    told = [{"role": "assistant", "content": said} for said in ("w5", serving.alone(asked)([question]))]
    talks = [serving.Talk([question, one], []) for one in told]
    assert serving.answers_that_differ(asked, talks) == 1


def test_profile():
    bench = decode.Bench(small(), 16, compiled=False)
    bench.add_ours(16)
    bench.add_others()
    assert profile.measure(bench, "ours")[0]["ms_in_the_cache_profiled"] > 0


@pytest.mark.parametrize("peer", memory.PEERS)
def test_memory(peer):
    with torch.no_grad():
        memory.make_step(peer, small(), 16, 30)()


def test_prefill():
    assert len(prefill.run(2, 252)) == 2


def test_stream(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 2)
    monkeypatch.setattr(stream, "STRETCH", 4)
    assert len(stream.run(8)) == 2


def test_endless(monkeypatch):
    monkeypatch.setattr(endless, "BLOCK", 2)
    monkeypatch.setattr(endless, "STRETCH", 4)
    assert [row["tokens"] for row in endless.run(8)] == [4, 8]


def test_slots():
    assert slots.run(small(), 12, slots=4, new=4)["same_texts_of_16"] == 16


def test_turns():
    parts = [[1, 5, 6], *[[1, 7], [1, 8, 9, 10, 11]] * 5]
    figures = turns.run(small(), {"parts": parts, "turn_start": [[1]]}, 12)
    assert [figures[evict]["answers"] for evict in ("tokens", "turns")] == [3, 3]


def test_forever(monkeypatch):
    monkeypatch.setattr(forever, "STRETCH", 3)
    monkeypatch.setattr(forever, "POINTS", 1)
    model = forever.make_model()
    made = forever.sink_patch.SinkCache(forever.WINDOW, forever.SINKS, model=model)
    assert forever.stretch(model, model, made, forever.Stream())["tokens"] == 3


def test_window_cost_is_the_table_of_the_readme(monkeypatch):
    """Two of its models, without and with sliding windows; all of them take 9 s."""
    readme = (RESULTS.parent / "README.md").read_text().splitlines()
    start = next(index for index, line in enumerate(readme) if line.startswith("| bfloat16, one row"))
    written = readme[start : start + 2 + len(window_cost.MODELS)]
    assert [line.split(" | ")[0] for line in written[2:]] == [f"| {name}" for name in window_cost.MODELS]
    some = ("Llama 3.2 1B", "gpt-oss 20b")
    monkeypatch.setattr(window_cost, "MODELS", {name: window_cost.MODELS[name] for name in some})
    assert list(window_cost.table()) == [
        line for line in written if line.startswith(("| b", "| -", *map("| {}".format, some)))
    ]


def test_precision(monkeypatch):
    monkeypatch.setattr(precision, "POINTS", (80,))
    assert precision.run(precision.Ours, torch.float32, 80)[0]["worst_error"] < 1e-4


def test_kvpress_rule_without_kvpress(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvpress_rule", "--help"])
    with pytest.raises(SystemExit, match="0"):
        kvpress_rule.main()
    assert "--beside" in capsys.readouterr().out
    monkeypatch.setattr(kvpress_rule, "PIECE", 40)
    monkeypatch.setattr(kvpress_rule, "SCORED", 8)
    ids = torch.randint(0, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    assert "dense" in kvpress_rule.in_pieces(small(), ids, 4, [])


def test_kvpress_rule_beside():
    record = RESULTS / "perplexity-smollm2-w256.json"
    settings = {"tokens": 6144, "every": 4, "num_sink_tokens": 4, "window_length": 256}
    assert "4 sinks" in kvpress_rule.beside(record, settings)
    with pytest.raises(SystemExit, match=r"'every': 4}, not with .*'every': 8"):
        kvpress_rule.beside(record, settings | {"every": 8})
