"""The StreamingLLM press of kvpress against ours: `python -m tests.bench.kvpress_rule --model DIR --text FILE`.

kvpress is installed aside (`pip install --target FOLDER kvpress`, and FOLDER on PYTHONPATH); 0.5.5 asks for
transformers from 4.56 to 5.2. Two readings of one text, with the same sinks and the same number of tokens seen:

- a stream. `DecodingPress` with an interval of 1 lets `StreamingLLMPress` drop a token after each token. It turns no
  keys, so what a token sees is the whole text under a mask, and the text is read in long forwards with the mask that
  the press itself draws (`Tokens`). The first tokens are also read one by one with the hooks of kvpress, and the
  scores compared. So are those of `KeyRerotationPress` with those of a `SinkCache`. `--beside` adds other ways, from
  the JSON of `sink-patch eval perplexity` with the same settings.
- pieces of 1024 tokens. All but the last 128 are read at once and cut down once, as `StreamingLLMPress` is mostly used;
  the last 128 are scored. Where a call names no positions, transformers counts on from the length of the cut cache.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache

import sink_patch
from sink_patch.evaluate.measures.perplexity.scoring import Reading, Streamed
from tests.bench import models, records

PIECE, SCORED = 1024, 128


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6144, help="of the stream (%(default)s)")
    parser.add_argument("--every", type=int, default=4, help="positions that are scored (%(default)s)")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--beside", type=Path, metavar="JSON", help="of `sink-patch eval perplexity`")
    parser.add_argument("--steps", type=int, default=64, help="read one by one as well (%(default)s)")
    parser.add_argument("--pieces", type=int, default=4, help="how many, read as one batch (%(default)s)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 512], help="of the pieces (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=["stream", "pieces", "one by one"], help="default: all three")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    entries, model = models.load(arguments)
    ids = torch.tensor(AutoTokenizer.from_pretrained(arguments.model)(arguments.text.read_text("utf-8"))["input_ids"])
    window, sinks = arguments.window, arguments.sinks
    positions = range(window, arguments.tokens - 1, arguments.every)
    settings = {"tokens": arguments.tokens, "every": arguments.every, "num_sink_tokens": sinks}
    entries |= {"text": arguments.text.name, "kvpress": importlib.metadata.version("kvpress"), **settings}
    found = {
        "kept by the press": [
            kept(window - 1, sinks, 1, (1, 2, 3, 10, 100, 1000)),
            kept(2048, sinks, 512, (1, 2, 3, 10)),  # the defaults of DecodingPress
        ],
        "KeyRerotationPress in DecodingPress": refusal(sinks),
        "other ways": beside(arguments.beside, {**settings, "window_length": window}),
    }
    for name, measure in {
        "stream": lambda: stream(Reading(model, ids[: arguments.tokens], positions, window), sinks),
        "pieces": lambda: in_pieces(model, ids[: PIECE * arguments.pieces].view(-1, PIECE), sinks, arguments.budgets),
        "one by one": lambda: one_by_one(model, ids, window, sinks, arguments.steps),
    }.items():
        if name not in (arguments.only or [name]):
            continue
        found[name] = measure()
        print(f"{name}: {json.dumps(found[name], indent=1)}", flush=True)
        records.write(arguments.json, **entries, figures=found)


def beside(path: Path | None, settings: dict[str, int]) -> dict[str, Any] | None:
    """Perplexities of other ways, from a record with the same settings."""
    if path is None:
        return None
    record = json.loads(path.read_text("utf-8"))
    other = {name: record[name] for name in settings if record[name] != settings[name]}
    if other:
        raise SystemExit(f"{path} was measured with {other}, not with {settings}.")
    ways = {row["mode"]: {key: row[key] for key in ("perplexity", "perplexity_by_stretch")} for row in record["rows"]}
    return {"versions": record["versions"], **ways}


def press(kind: str, sinks: int) -> Any:
    """A `StreamingLLMPress`: "as it is", "in order" (the cache stays in the order of the text), or "turned"."""
    import kvpress

    class InOrder(kvpress.StreamingLLMPress):
        def compress(self, module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
            stays = self.score(module, hidden, keys, values, attentions, kwargs)[0, 0].bool()  # [tokens]
            return keys[:, :, stays], values[:, :, stays]

    class Turned(kvpress.StreamingLLMPress):
        def compress(self, *given: Any) -> Any:
            return kvpress.KeyRerotationPress(self).compress(*given)

    return {"as it is": kvpress.StreamingLLMPress, "in order": InOrder, "turned": Turned}[kind](n_sink=sinks)


def decoding(base: Any, target: int, interval: int = 1) -> Any:
    import kvpress

    return kvpress.DecodingPress(base, compression_interval=interval, target_size=target)


def refusal(sinks: int) -> str:
    """What `DecodingPress` says to a press in a `KeyRerotationPress`."""
    import kvpress

    try:
        decoding(kvpress.KeyRerotationPress(press("as it is", sinks)), 8)
    except AssertionError as failure:
        return f"AssertionError: {failure}"
    return "taken"


class Tokens:
    """Which tokens a press keeps: it is given keys of one number, the place of a token in the text.

    Args:
        rule: a `DecodingPress`.
        read: how many tokens the first forward reads; nothing is dropped behind it.
    """

    def __init__(self, rule: Any, read: int) -> None:
        self._rule = rule
        self.read = read
        self.places = torch.arange(float(read)).view(1, 1, -1, 1)  # [1, 1, tokens, 1]: keys of one head

    def feed(self, count: int) -> torch.Tensor:
        """Read so many more tokens, and drop; the places that were seen, [tokens]."""
        new = torch.arange(float(self.read), self.read + count).view(1, 1, -1, 1)
        seen = torch.cat([self.places, new], dim=2)
        self.places, _ = self._rule.compress(SimpleNamespace(head_dim=1), None, seen, seen, None, {})
        self.read += count
        return seen.flatten().long()


def kept(target: int, sinks: int, interval: int, rounds: tuple[int, ...]) -> dict[str, Any]:
    """What `StreamingLLMPress` has kept after so many rounds of `interval` tokens, on this machine."""
    tokens, found = Tokens(decoding(press("as it is", sinks), target, interval), target), {}
    for number in range(1, max(rounds) + 1):
        tokens.feed(interval)
        if number in rounds:
            now, first = {int(place) for place in tokens.places.flatten()}, set(range(sinks))
            newest = set(range(tokens.read - target + sinks, tokens.read))
            found[f"after {number}"] = {
                "sinks": len(now & first),
                "newest tokens": f"{len(now & newest)} of {target - sinks}",
                "tokens from between": len(now - newest - first),
            }
    return {"target_size": target, "compression_interval": interval, **found}


def stream(reading: Reading, sinks: int) -> dict[str, dict[str, Any]]:
    """Perplexity of the stream, also by stretches of four windows: the press as it is, and with its cache in order."""
    size, found = 4 * reading.window_length // reading.positions.step, {}
    for kind in ("as it is", "in order"):
        scores = masked(reading, press(kind, sinks))
        stretches = [round(float(one.mean().exp()), 3) for one in scores.split(size)]
        found[f"press {kind}"] = {
            "perplexity": round(float(scores.mean().exp()), 4),
            "perplexity_by_stretch": stretches,
        }
    return found


@torch.inference_mode()
def masked(reading: Reading, base: Any) -> torch.Tensor:
    """Scores [positions] where each token sees what the press has kept, at its position in the text."""
    window, cache, scores = reading.window_length, DynamicCache(), []
    tokens = Tokens(decoding(base, window - 1), window - 1)
    end = reading.positions[-1] + 1
    for start in tqdm(range(0, end, window)):
        stop = min(start + window, end)
        seen = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)  # [tokens, tokens so far]
        for position in range(max(start, window - 1), stop):
            seen[position - start] = False
            seen[position - start, tokens.feed(1)] = True
        chosen = reading.scored(start, stop)
        logits, _ = reading.forward(
            reading.ids[None, start:stop],
            [position - start for position in chosen],
            cache,
            attention_mask=_additive(seen, reading.model.dtype),
            position_ids=torch.arange(start, stop)[None],
        )
        if chosen:
            scores.append(reading.score(logits[0], chosen))
    return torch.cat(scores)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@contextmanager
def pressing(model: Any, rule: Any) -> Iterator[None]:
    """The press on the model. It leaves a `rotary_emb` in each layer; that is taken away again."""
    try:
        with rule(model):
            yield
    finally:
        for layer in model.model.layers:
            del layer.self_attn.rotary_emb


def one_by_one(model: Any, ids: torch.Tensor, window: int, sinks: int, steps: int) -> dict[str, float]:
    """Largest differences of scores, in nats, over the first tokens past the window."""
    reading = Reading(model, ids[: window + steps + 1], range(window, window + steps), window)
    with torch.inference_mode():
        way, end = Streamed(reading, sinks), window + steps
        ours = torch.cat([way.read(0, window), *(way.read(start, start + 1) for start in range(window, end))])
    by_hooks = pressed(reading, "as it is", sinks)
    pairs = {
        "the press, from the same under a mask": (by_hooks, masked(reading, press("as it is", sinks))),
        "the press with turned keys, from a SinkCache": (pressed(reading, "turned", sinks), ours),
        "the press, from a SinkCache": (by_hooks, ours),
    }
    return {name: round(float((one - other).abs().max()), 6) for name, (one, other) in pairs.items()}


@torch.inference_mode()
def pressed(reading: Reading, kind: str, sinks: int) -> torch.Tensor:
    """Scores [positions] of one pass with a `DynamicCache` that `DecodingPress` cuts down after each token.

    Positions are those of the text, as in the pipeline of kvpress; of turned keys those of the cache.
    """
    cache, scores, first = DynamicCache(), [], reading.window_length - 1
    with pressing(reading.model, decoding(press(kind, sinks), first)):
        reading.forward(reading.ids[None, :first], [], cache)
        for position in tqdm(range(first, reading.positions[-1] + 1)):
            wanted = position in reading.positions
            named = {} if kind == "turned" else {"position_ids": torch.tensor([[position]])}
            ids = reading.ids[None, position : position + 1]
            logits, _ = reading.forward(ids, [0] if wanted else [], cache, **named)
            if wanted:
                scores.append(reading.score(logits[0], [position]))
    return torch.cat(scores)


@torch.inference_mode()
def in_pieces(model: Any, ids: torch.Tensor, sinks: int, budgets: list[int]) -> dict[str, dict[str, float]]:
    """Perplexity of the last tokens of pieces [pieces, PIECE], by budget and by the way to cut down to it."""
    found = {"dense": {"perplexity": _perplexity(_last(model, ids, None, "cache"))}}
    for budget in budgets:
        found[str(budget)] = {}
        for name, score in _cuts(model, ids, budget, sinks).items():
            found[str(budget)][name] = _perplexity(score())
            print(f"budget {budget}, {name}: {found[str(budget)][name]}", flush=True)
    return found


def _perplexity(scores: torch.Tensor) -> float:
    return round(float(scores.double().mean().exp()), 3)


def _cuts(model: Any, ids: torch.Tensor, budget: int, sinks: int) -> dict[str, Callable[[], torch.Tensor]]:
    import kvpress

    made = press("as it is", sinks)
    made.compression_ratio = 1 - (budget + 0.5) / (PIECE - SCORED)  # what is kept: int(tokens * (1 - ratio))
    turned = kvpress.KeyRerotationPress(made)
    return {
        "press, positions of the text": lambda: _last(model, ids, made, "text"),
        "press, no positions named": lambda: _last(model, ids, made, "cache"),
        "KeyRerotationPress, no positions named": lambda: _last(model, ids, turned, "cache"),
        "SinkCache": lambda: _last_by_ours(model, ids, sink_patch.SinkCache(budget, sinks, model=model)),
    }


def _last(model: Any, ids: torch.Tensor, cut: Any, positions: str) -> torch.Tensor:
    """Scores [pieces * (SCORED - 1)] of the last tokens, in one forward: nothing is dropped among them."""
    cache, read = DynamicCache(), PIECE - SCORED
    with pressing(model, cut) if cut is not None else nullcontext():
        model(ids[:, :read], past_key_values=cache, logits_to_keep=1)
    named = {"position_ids": torch.arange(read, PIECE).expand(len(ids), -1)} if positions == "text" else {}
    logits = model(ids[:, read:], past_key_values=cache, **named).logits  # [pieces, SCORED, vocabulary]
    return _scores(logits[:, :-1], ids[:, read + 1 :])


def _last_by_ours(model: Any, ids: torch.Tensor, cache: sink_patch.SinkCache) -> torch.Tensor:
    """Scores [pieces * (SCORED - 1)] of the last tokens, read one by one: the window stays as long as it is."""
    read = PIECE - SCORED
    model(ids[:, :read], past_key_values=cache, logits_to_keep=1)
    logits = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(read, PIECE - 1)]
    return _scores(torch.cat(logits, dim=1), ids[:, read + 1 :])


def _scores(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Scores [pieces * tokens] from logits [pieces, tokens, vocabulary]."""
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


if __name__ == "__main__":
    main()
