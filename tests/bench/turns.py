"""Whole messages that leave against single tokens: `python -m tests.bench.turns TEXT --model DIR [--window N]`.

A long chat in which the model tells a book: its answers are the paragraphs of TEXT, the user asks it to go on. Each
message goes in as one forward. Printed is the perplexity of the answers (all but the first window of the chat), with
the same sinks (the system message) and the same window, where single tokens leave (`evict="tokens"`) and where whole
messages do (`evict="turns"`).
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import sink_patch
from tests.bench import models, records

SYSTEM = "You tell the story of a novel, a paragraph at a time."
ASKED = "Please go on."


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--answers", type=int, default=80, help="how many paragraphs are told (%(default)s)")
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("--model is needed: a directory with a chat template")
    torch.set_num_threads(1)
    entries, model = models.load(arguments)
    messages = chat(AutoTokenizer.from_pretrained(arguments.model), paragraphs(arguments.text, arguments.answers))
    figures = run(model, messages, arguments.window)
    for evict, found in figures.items():
        print(f"{evict}: {found}")
    records.write(arguments.json, **entries, figures=figures)


def paragraphs(path: Path, count: int) -> list[str]:
    """Paragraphs of 40 to 120 words."""
    found = (" ".join(one.split()) for one in path.read_text(encoding="utf-8").split("\n\n"))
    return [one for one in found if 40 <= len(one.split()) <= 120][:count]


def chat(tokenizer: Any, answers: list[str]) -> dict[str, Any]:
    """The ids of the chat, cut into messages ("parts"), and what begins one ("turn_start")."""
    said = [{"role": "system", "content": SYSTEM}]
    for answer in answers:
        said += [{"role": "user", "content": ASKED}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    settings = sink_patch.chat_settings(tokenizer)
    starts = [place for place in range(len(ids)) if begins(ids, place, settings["turn_start"])]
    parts = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return {"parts": parts, "turn_start": settings["turn_start"]}


def begins(ids: list[int], place: int, runs: list[list[int]]) -> bool:
    return any(ids[place : place + len(run)] == list(run) for run in runs)


@torch.inference_mode()
def run(model: Any, messages: dict[str, Any], window: int) -> dict[str, dict[str, float]]:
    """Figures for each way to evict."""
    parts, figures = messages["parts"], {}
    for evict in ("tokens", "turns"):
        cache = sink_patch.SinkCache(window, len(parts[0]), evict=evict, turn_start=messages["turn_start"], model=model)
        losses, answers, read = [], 0, 0
        for number, part in enumerate(parts):
            ids = torch.tensor([part])
            logits = model(ids, past_key_values=cache).logits[0, :-1].float()  # [tokens - 1, vocabulary]
            if number % 2 == 0 and read > window:  # the system speaks first, then the user and the model in turn
                losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
                answers += 1
            read += len(part)
        figures[evict] = {
            "perplexity of the answers": round(math.exp(statistics.fmean(losses)), 4),
            "answers": answers,
            "tokens of answers": len(losses),
            "tokens of the chat": read,
        }
    return figures


if __name__ == "__main__":
    main()
