"""Many clients of `transformers serve`, with and without `--continuous-batching`: `python -m tests.bench.serving`.

8 clients of the openai package talk for 10 turns each at once, and each sends its whole talk so far, over a model
directory that stores the sink cache: a tiny random one, or a copy of `--model DIR`. Answers are streamed; what counts
is the time to the first piece of text, and the time to the end of all talks. All answers are compared with `generate`
of the same messages alone. Servers run one after the other on one core each, `--rounds` times.

It needs fastapi, uvicorn and openai (`pip install 'transformers[serving]'`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench import records
from tests.support import directory
from tests.support.server import serving

Messages = list[dict[str, str]]
SINKS, PAGE = 4, 16
TEXTS = (
    "Tell me about the sea.",
    "What is in it?",
    "Why is that so?",
    "Say it in other words.",
    "And on land?",
    "Who has seen that?",
    "When was it?",
    "Is that all?",
    "Name one more.",
    "How does it end?",
)


@dataclass(frozen=True)
class Asked:
    """What is measured."""

    folder: Path
    window: int
    clients: int
    turns: int
    new: int

    @property
    def options(self) -> list[str]:
        """Of a server with continuous batching: room for all clients."""
        blocks = self.clients * -(-self.window // PAGE)
        sizes = {"block-size": PAGE, "num-blocks": blocks, "max-batch-tokens": 512}
        return [
            "--continuous-batching",
            *(word for name, size in sizes.items() for word in (f"--cb-{name}", str(size))),
        ]


@dataclass(frozen=True)
class Talk:
    """Of one client: all messages, and the seconds to the first piece of each answer."""

    messages: Messages
    waits: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory; default: a tiny random model")
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--new", type=int, default=24, help="tokens of an answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as where:
        folder = make_folder(Path(where) / "model", arguments.model, arguments.window)
        asked = Asked(folder, arguments.window, arguments.clients, arguments.turns, arguments.new)
        figures = run(asked, arguments.rounds)
    sizes = {name: getattr(arguments, name) for name in ("clients", "turns", "new", "rounds")}
    name = "tiny" if arguments.model is None else arguments.model.name
    records.write(arguments.json, model=name, window_length=arguments.window, **sizes, figures=figures)


def make_folder(where: Path, source: Path | None, window: int) -> Path:
    """A model directory that asks for the sink cache, and decodes greedily."""
    where.mkdir()
    entries: dict[str, Any] = {
        "do_sample": False,
        "cache_implementation": "sink",
        "cache_config": {"window_length": window, "num_sink_tokens": SINKS},
    }
    if source is None:
        return directory.write(where, **entries)
    for file in source.iterdir():
        (where / file.name).symlink_to(file.resolve())
    own = where / "generation_config.json"
    kept = json.loads(own.read_text()) if own.exists() else {}
    own.unlink(missing_ok=True)
    own.write_text(json.dumps({name: kept[name] for name in kept if name.endswith("token_id")} | entries))
    return where


def run(asked: Asked, rounds: int) -> dict[str, Any]:
    """Seconds of each way, and how many answers are not those of `generate`."""
    ways = {"with": asked.options, "without": []}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    told: list[Talk] = []
    for _ in range(rounds):
        for name, options in ways.items():
            talks, seconds = measured(asked, options)
            waits = sorted(wait for talk in talks for wait in talk.waits)
            row = {
                "median_to_the_first_piece": round(statistics.median(waits), 3),
                "worst_to_the_first_piece": round(waits[-1], 3),
                "seconds_in_all": round(seconds, 1),
            }
            print(name, "continuous batching", row, flush=True)
            found[name].append(row)
            told += talks
    wrong = answers_that_differ(asked, told)
    print(f"{wrong} of {len(told) * asked.turns} answers differ from those of generate")
    return {**found, "answers": len(told) * asked.turns, "answers_that_differ": wrong}


def measured(asked: Asked, options: Sequence[str]) -> tuple[list[Talk], float]:
    """All talks with one server, and the seconds that they took."""
    from openai import OpenAI  # here: it is not needed to compare

    with _server(asked.folder, options) as url, OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800) as client:
        answer(client, asked, [{"role": "user", "content": text(0, 0)}])  # what is done once
        start = time.perf_counter()
        with ThreadPoolExecutor(asked.clients) as pool:
            talks = list(pool.map(lambda number: talk(client, asked, number), range(asked.clients)))
        return talks, time.perf_counter() - start


@contextlib.contextmanager
def _server(folder: Path, options: Sequence[str]) -> Iterator[str]:
    logs = tempfile.TemporaryDirectory()
    with logs as where, contextlib.redirect_stdout(None), serving(folder, Path(where), options=options) as url:
        yield url


def text(client: int, turn: int) -> str:
    """What a client says; words of the tiny tokenizer are unknown to others, and the other way round."""
    return f"w{10 + client} w{30 + turn} {TEXTS[(client + turn) % len(TEXTS)]}"


def talk(client: Any, asked: Asked, number: int) -> Talk:
    done = Talk([], [])
    for turn in range(asked.turns):
        done.messages.append({"role": "user", "content": text(number, turn)})
        said, wait = answer(client, asked, done.messages)
        done.messages.append({"role": "assistant", "content": said})
        done.waits.append(wait)
    return done


def answer(client: Any, asked: Asked, messages: Messages) -> tuple[str, float]:
    """A streamed answer, and the seconds to its first piece."""
    start, first, pieces = time.perf_counter(), None, []
    model = str(asked.folder)
    for event in client.chat.completions.create(model=model, messages=messages, max_tokens=asked.new, stream=True):
        if event.choices and event.choices[0].delta.content:
            first = first or time.perf_counter()
            pieces.append(event.choices[0].delta.content)
    assert first is not None, "the server has said nothing"
    return "".join(pieces), first - start


def answers_that_differ(asked: Asked, talks: Sequence[Talk]) -> int:
    """How many answers are not those of `generate`."""
    answered = alone(asked)
    count = 0
    for one in talks:
        for place in range(1, len(one.messages), 2):
            count += one.messages[place]["content"] != answered(one.messages[:place])
    return count


def alone(asked: Asked) -> Callable[[Messages], str]:
    """What `generate` answers to messages."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(asked.folder), AutoTokenizer.from_pretrained(asked.folder)
    known: dict[str, str] = {}

    def answered(messages: Messages) -> str:
        key = json.dumps(messages)
        if key not in known:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            made = model.generate(**inputs, max_new_tokens=asked.new)
            known[key] = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return known[key]

    return answered


if __name__ == "__main__":
    main()
