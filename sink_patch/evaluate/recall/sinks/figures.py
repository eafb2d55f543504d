"""Attention on the sinks and perplexity over their number, as a record, as tables, and in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sink_patch.evaluate.measures.plots import Curve, Panel
from sink_patch.evaluate.measures.records import Record

if TYPE_CHECKING:
    import torch

    from sink_patch.evaluate.recall.sinks.attention import Attention

WITHIN = 0.01
"""Perplexities that are so near to the best one count as equal to it."""
_LEARNED = 0.01  # of attention, from which on a model has learned sinks


def attention(layers: Sequence[Attention], first: int, tokens: int) -> Record:
    """Shares of attention on the first tokens, by layer and head."""
    return {
        "tokens": tokens,
        "first": first,
        "even_share": round(_even_share(first, tokens), 4),
        "layers": [
            {
                "layer": one.layer,
                "share": round(float(one.share(first).mean()), 4),
                "elsewhere": round(float(one.elsewhere().mean()), 4),
                "heads": [round(share, 4) for share in one.share(first).tolist()],
            }
            for one in layers
        ],
    }


def _even_share(first: int, tokens: int) -> float:
    """The share of the first tokens if a query looked at all that it sees alike: the mean over the second half."""
    queries = range(tokens // 2, tokens)
    return sum(min(1.0, first / (query + 1)) for query in queries) / len(queries)


def perplexity(scores: Mapping[int, torch.Tensor]) -> Record:
    """Perplexities by number of sinks.

    Args:
        scores: by number of sinks, negative log-likelihoods in nats, shape [scored].
    """
    found = {number: float(one.double().mean().exp()) for number, one in scores.items()}
    return {
        "scored": len(next(iter(scores.values()))),
        "sinks": list(found),
        "perplexity": [round(value, 4) if math.isfinite(value) else None for value in found.values()],
        "fewest": fewest(found),
        "within": WITHIN,
    }


def fewest(perplexities: Mapping[int, float], within: float = WITHIN) -> int | None:
    """The fewest sinks whose perplexity is within a share of the best; None: no perplexity is a number."""
    numbers = [value for value in perplexities.values() if math.isfinite(value)]
    if not numbers:
        return None
    return min(number for number, value in perplexities.items() if value <= min(numbers) * (1 + within))


def answer(record: Record) -> str:
    """How many sinks the model needs, in one sentence or two."""
    found = record["perplexity"]
    by_number = dict(zip(found["sinks"], found["perplexity"], strict=True))
    learned = _mean([layer["elsewhere"] for layer in record["attention"]["layers"]])
    number = found["fewest"]
    if number is None:
        return f"{record['model']} writes no numbers in such a stream, whatever its sinks."
    if number:
        fewer = [one for one in found["sinks"] if one < number]
        less = f" ({_number(by_number[max(fewer)])} with {max(fewer)})" if fewer else " (fewer were not tried)"
        them = "it" if number == 1 else "them"
        needs = f"{record['model']} needs {number} {'sink' if number == 1 else 'sinks'}"
        said = f"{needs}: with {them} its perplexity is {by_number[number]:.2f}{less}"
    else:
        said = f"{record['model']} needs no sinks: without them its perplexity is {by_number[0]:.2f}"
    said += f", within {found['within']:.0%} of the best, {min(filter(None, by_number.values())):.2f}."
    if learned > _LEARNED:
        said += f" {learned:.0%} of its attention lies on sinks that it has learned and that are no tokens."
    elif number == 0:
        said += " That is usual where attention is gated."
    return said


def table(record: Record) -> str:
    """Shares by layer, perplexities by number of sinks, and the answer."""
    shares, found = record["attention"], record["perplexity"]
    lines = [
        f"{record['model']}, {record['text']['name']}: share of attention on the first {shares['first']} of "
        f"{shares['tokens']} tokens (if all tokens were looked at alike: {shares['even_share']:.1%})",
        "",
        "layer   mean of heads   least    most",
    ]
    lines += [
        f"{layer['layer']:5}   {layer['share']:13.1%}  {min(layer['heads']):6.1%}  {max(layer['heads']):6.1%}"
        for layer in shares["layers"]
    ]
    lines += [f"  all   {_mean([layer['share'] for layer in shares['layers']]):13.1%}", ""]
    lines += [
        f"A stream of {record['tokens']} tokens in a window of {record['window_length']}:",
        "",
        "sinks   perplexity",
    ]
    pairs = zip(found["sinks"], found["perplexity"], strict=True)
    lines += [f"{number:5}   {_number(value):>10}" for number, value in pairs]
    return "\n".join([*lines, "", answer(record)])


def panels(record: Record) -> list[Panel]:
    """The share over layers, and the perplexity over sinks (at 0 sinks the curve begins)."""
    layers, found = record["attention"]["layers"], record["perplexity"]
    numbers = [layer["layer"] for layer in layers]
    first = record["attention"]["first"]
    kinds = {"mean of heads": "share", "least head": "least", "most head": "most"}
    by_kind = [{**layer, "least": min(layer["heads"]), "most": max(layer["heads"])} for layer in layers]
    shares = tuple(Curve(kind, numbers, [layer[key] for layer in by_kind]) for kind, key in kinds.items())
    known = [(number, y) for number, y in zip(found["sinks"], found["perplexity"], strict=True) if y is not None]
    curve = Curve("perplexity", [number for number, _ in known], [y for _, y in known])
    marks = () if found["fewest"] is None else ((float(found["fewest"]), "fewest within 1 %"),)
    return [
        Panel(f"Attention on the first {first} tokens", "layer", "share", shares, from_zero=True),
        Panel("Perplexity of a stream", "sinks", "perplexity", (curve,), marks=marks),
    ]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.2f}"
