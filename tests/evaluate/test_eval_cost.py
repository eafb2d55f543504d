"""`sink-patch eval cost`: the bytes by hand, which tokens are read, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import sink_patch
from sink_patch import cli
from sink_patch.evaluate import models
from sink_patch.evaluate.measures import memory
from sink_patch.evaluate.measures.cost import figures, run
from tests.support.measured import failure, tiny_model, write_model
from tests.support.tokenizer import tiny_tokenizer

W, S = 12, 3
BYTES_OF_A_TOKEN = 2 * 2 * 16 * 4  # layers, keys and values, one head of 16, float32


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.Loaded("tiny", tiny_model(), tiny_tokenizer())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cost.json"
    sizes = ["--window-length", str(W), "--num-sink-tokens", str(S), "--windows", "1,3"]
    model = write_model(tmp_path / "tiny")
    assert cli.main(["eval", "cost", model, *sizes, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    record = json.loads(file.read_text(encoding="utf-8"))
    dense, sinks = record["rows"]
    assert record["tokens"] == [W, 3 * W]
    assert dense["cache_bytes"] == [W * BYTES_OF_A_TOKEN, 3 * W * BYTES_OF_A_TOKEN]
    assert sinks["cache_bytes"][0] == sinks["cache_bytes"][1] >= W * BYTES_OF_A_TOKEN
    assert all(milliseconds > 0 for row in (dense, sinks) for milliseconds in row["ms_a_token"])
    assert all(count > 1e7 for row in (dense, sinks) for count in row["process_bytes"])
    assert model not in file.read_text(encoding="utf-8")
    lines = out.splitlines()
    assert lines[0] == f"tiny, float32, window of {W}, 1 thread(s)"
    assert [line.split()[0] for line in lines[3:]] == [str(W), str(3 * W)]
    assert "100%" in err


def test_each_token_is_read_once_and_in_order_with_each_cache(
    loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three streams, each from the first token on; measured are single tokens, of the two caches in turn."""
    fed: dict[int, list[torch.Tensor]] = {}
    singles: list[int] = []
    plain = run._Stream._next

    def next_and_note(self: Any, count: int) -> int:
        fed.setdefault(id(self), []).append(self.ids[0, self.read : self.read + count])
        kept.append(self)
        if count == 1:
            singles.append(id(self))
        return plain(self, count)

    kept: list[Any] = []
    monkeypatch.setattr(run._Stream, "_next", next_and_note)
    plan = figures.Plan(W, S, (1, 2))
    run.measure(loaded, plan)
    alone, first, second = (torch.cat(parts) for parts in fed.values())
    assert len(alone) == 2 * W
    assert len(first) == len(second) == 2 * W + plan.block * figures.ROUNDS
    assert first.equal(second)
    assert first[: 2 * W].equal(alone)
    assert len(set(first.tolist())) > 10  # not the same token again and again
    blocks = [singles[place] for place in range(0, len(singles), plan.block)][: 2 * figures.ROUNDS]
    assert blocks == blocks[:2] * figures.ROUNDS
    assert len(set(blocks)) == 2


def test_without_psutil_the_process_is_not_measured(loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)  # as if it were not installed
    monkeypatch.setattr(run, "cache_bytes", lambda cache: 1)
    record = run.measure(loaded, figures.Plan(W, S, (1,)))
    assert [row["process_bytes"] for row in record["rows"]] == [[None], [None]]
    assert figures.table(record).endswith("-")
    assert [curve.label for curve in figures.panels(record)[0].curves] == ["dense", "sinks"]


@torch.no_grad()
def test_bytes_of_a_sink_cache_are_its_own(loaded: models.Loaded) -> None:
    cache = sink_patch.SinkCache(W, S, model=loaded.model)
    loaded.model(torch.arange(20)[None], past_key_values=cache)
    assert memory.cache_bytes(cache) == cache.nbytes > 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--windows", "1,b"], "windows='1,b' is no list of numbers"),
        (["--windows", "4,2"], "give numbers that rise"),
        (["--windows", "0,2"], "give numbers that rise"),
        (["--window-length", "4", "--num-sink-tokens", "1"], "window_length=4 is too short"),
        (["--num-sink-tokens", "256"], "leaves no room"),
        (["--json", "no/such/directory/x.json"], "no directory"),
        (["--plot", "no/such/directory/x.png"], "no directory"),
    ],
)
def test_refused_before_a_model_is_loaded(
    extra: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    assert message in failure(["eval", "cost", "tiny", *extra], capsys)


def test_size_of_a_cache_of_transformers():
    cache = DynamicCache()
    assert memory.cache_bytes(cache) == 0
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), layer)
    assert memory.cache_bytes(cache) == 2 * 2 * 2 * 5 * 16 * 4
