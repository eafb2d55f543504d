"""`generate` with nothing said but the cache: `python -m tests.bench.by_default [--model NAME] [--device cuda]`.

Tokens a second of `cache_implementation="sink"`, "static" and None, counting the first call (of `--first` tokens, in
which "sink" and "static" make their graph on a GPU) and in later ones (of a window, `--rounds` times, interleaved); and
the share of what the card's memory could give, if each token read all weights once and nothing else.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch

import sink_patch  # noqa: F401 - for "sink"
from tests.bench import models, records

WAYS = ("sink", "static", None)
PROMPT = 16


def seconds(model: Any, way: str | None, new: int, window: int) -> float:
    """Time of one call for `new` tokens."""
    ids = torch.randint(1000, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)
    asked = {"window_length": window} if way == "sink" else {}
    start = time.perf_counter()
    model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, cache_implementation=way, pad_token_id=0, **asked
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def run(model: Any, window: int, first: int, rounds: int, bandwidth: float | None) -> dict[str, Any]:
    """Figures of all ways."""
    later, firsts = window - PROMPT, {}
    found: dict[str | None, list[float]] = {way: [] for way in WAYS}
    seconds(model, "sink", 4, window)  # what is looked at once
    for way in ("sink", "static"):
        torch.compiler.reset()
        firsts[way] = first / seconds(model, way, first, window)
    torch.compiler.reset()  # else the lengths of two static caches would make a graph of any length
    for way in WAYS:
        seconds(model, way, later, window)
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(seconds(model, way, later, window))
    rates = {str(way): round(later / statistics.median(times), 2) for way, times in found.items()}
    figures: dict[str, Any] = {
        "first_call_tokens": first,
        "first_call_tokens_a_second": {way: round(rate, 2) for way, rate in firsts.items()},
        "later_tokens_a_second": rates,
        "sink against static, first call": round(firsts["sink"] / firsts["static"], 3),
        "sink against static, later": ratio(found["sink"], found["static"]),
        "sink against None, later": ratio(found["sink"], found[None]),
    }
    if bandwidth is not None:
        weights = sum(weight.nbytes for weight in model.parameters())
        figures["share of the bandwidth"] = round(rates["sink"] * weights / (bandwidth * 1e9), 3)
    return figures


def ratio(one: list[float], other: list[float]) -> float:
    """How many times as fast the first is."""
    return round(statistics.median(b / a for a, b in zip(one, other, strict=True)), 3)


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--first", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, help="of the card's memory, in GB a second (H100 3350, H200 4800)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about, model = models.load(arguments)
    figures = run(model, arguments.window, arguments.first, arguments.rounds, arguments.bandwidth)
    print(json.dumps(figures, indent=1))
    records.write(arguments.json, **about, **figures)


if __name__ == "__main__":
    main()
