"""Requests in slots against one by one: `python -m tests.bench.slots --model DIR [--window N] [--slots 8]`.

16 requests of random prompts, of up to two windows, and of random numbers of new tokens. In slots: each prompt is read
by itself and joins the rows of one cache (`SinkCache.join`), which decode together; rows that are done leave
(`batch_select_indices`). One by one: the same loop with one slot. Printed are tokens a second, the ratio, and how many
of the texts are the same. On a CPU a second is one of the process, as one way runs after the other.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import sink_patch
from tests.bench import models, records

Requests = list[tuple[torch.Tensor, int]]
"""(ids [1, columns], new tokens) each."""


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--slots", type=int, default=8, help="rows at once (%(default)s)")
    parser.add_argument("--new", type=int, default=200, help="new tokens of a request, at most (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    entries, model = models.load(arguments)
    figures = run(model, arguments.window, arguments.slots, arguments.new)
    print(figures)
    records.write(arguments.json, **entries, slots=arguments.slots, new=arguments.new, figures=figures)


def requests(window: int, new: int, vocabulary: int, count: int = 16) -> Requests:
    generator = torch.Generator().manual_seed(0)

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    return [
        (torch.randint(vocabulary, (1, number(5, 2 * window)), generator=generator), number(new // 4, new))
        for _ in range(count)
    ]


def run(model: Any, window: int, slots: int, new: int) -> dict[str, float]:
    asked = requests(window, new, model.config.vocab_size)
    asked = [(ids.to(model.device), count) for ids, count in asked]
    serve(model, window, slots, asked[:1])  # what is done once
    together, alone = (serve(model, window, rows, asked) for rows in (slots, 1))
    speeds = [sum(map(len, texts)) / seconds for texts, seconds in (together, alone)]
    return {
        "tokens_a_second_in_slots": round(speeds[0], 1),
        "tokens_a_second_one_by_one": round(speeds[1], 1),
        "ratio": round(speeds[0] / speeds[1], 2),
        "same_texts_of_16": sum(one == other for one, other in zip(together[0], alone[0], strict=True)),
    }


@torch.inference_mode()
def serve(model: Any, window: int, slots: int, asked: Requests) -> tuple[list[list[int]], float]:
    """The new tokens of each request, and the seconds that all took."""
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    start, waiting, rows = clock(), list(range(len(asked))), []
    said: list[list[int]] = [[] for _ in asked]
    running = sink_patch.SinkCache(window, model=model)
    while waiting or rows:
        while waiting and len(rows) < slots:
            number, prompt = waiting.pop(0), sink_patch.SinkCache(window, model=model)
            said[number] += read(model, asked[number][0], prompt)
            running.join(prompt)
            rows.append(number)
        newest = torch.tensor([said[number][-1:] for number in rows], device=model.device)  # [rows, 1]
        for number, token in zip(rows, read(model, newest, running), strict=True):
            said[number].append(token)
        stay = [row for row, number in enumerate(rows) if len(said[number]) < asked[number][1]]
        if len(stay) < len(rows):
            running.batch_select_indices(torch.tensor(stay))
            rows = [rows[row] for row in stay]
    return said, clock() - start


def read(model: Any, ids: torch.Tensor, cache: sink_patch.SinkCache) -> list[int]:
    """The next token of each row of ids [rows, columns]."""
    tokens: list[int] = model(ids, past_key_values=cache).logits[:, -1].argmax(-1).tolist()
    return tokens


if __name__ == "__main__":
    main()
