"""The share of the cache in a profile: `python -m tests.bench.profile [--model NAME] [--window 256] [--json PATH]`.

torch.profiler records 20 decoded tokens with each of: our cache, our cache in compiled decoding, a DynamicCache at a
context of W and a compiled StaticCache. For each: milliseconds per token on the host without the profiler, milliseconds
inside calls of the cache (with the profiler, which makes short calls longer), operations per token, and, on a GPU,
kernels, milliseconds of kernels and how often the host waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import DynamicCache

import sink_patch
from sink_patch.streaming.streams import Streams
from tests.bench import models, records
from tests.bench.decode import Bench

TOKENS = 20
PEERS = ("ours", "dynamic", "ours compiled", "static compiled")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@contextlib.contextmanager
def named(kind: type, *methods: str) -> Iterator[None]:
    """Calls of these methods appear as ranges "cache" in a profile."""
    kept = {name: kind.__dict__.get(name) for name in methods}

    def ranged(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function("cache"):
                return method(*args, **kwargs)

        return call

    for name in methods:
        setattr(kind, name, ranged(getattr(kind, name)))
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(kind, name, method) if method is not None else delattr(kind, name)


@torch.no_grad()
def measure(bench: Bench, peer: str) -> tuple[dict[str, float], str]:
    """Figures per token, and the profiler's own table."""
    bench.seconds(peer, 5)
    plain = min(bench.seconds(peer, TOKENS) for _ in range(5))
    on_gpu = bench.model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    eager = contextlib.ExitStack()
    if not peer.endswith("compiled"):  # in a graph there are no calls
        eager.enter_context(named(Streams, "begin", "end"))
        eager.enter_context(named(sink_patch.SinkCache, "update"))
        eager.enter_context(named(DynamicCache, "update"))
    with eager, profile(activities=activities) as profiler:
        for _ in range(TOKENS):
            bench.peers[peer]()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in kernels if event.key != "cache"]
    found = {
        "ms_a_token": round(1000 * plain, 3),
        "ms_in_the_cache_profiled": round(sum(e.cpu_time_total for e in events if e.key == "cache") / 1000 / TOKENS, 3),
        "operations": round(sum(e.count for e in events if e.key.startswith("aten::")) / TOKENS, 1),
    }
    if on_gpu:
        found["kernels"] = round(sum(event.count for event in kernels) / TOKENS, 1)
        found["ms_of_kernels"] = round(sum(event.self_device_time_total for event in kernels) / 1000 / TOKENS, 3)
        found["waits"] = round(
            max(0, sum(e.count for e in events if e.key in WAITS) - 1) / TOKENS, 2
        )  # one is that of this benchmark
    return found, profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--tables", action="store_true", help="print the profiler's tables too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about, model = models.load(arguments)
    bench, rows = Bench(model, arguments.window, compiled=True, block=TOKENS), {}
    with torch.no_grad():
        bench.add_ours(arguments.window)
        bench.add_others()
    for peer in PEERS:
        rows[peer], table = measure(bench, peer)
        print(f"{peer:>16}  " + "  ".join(f"{key} {value:g}" for key, value in rows[peer].items()), flush=True)
        if arguments.tables:
            print(table)
    records.write(arguments.json, **about, a_token=rows)


if __name__ == "__main__":
    main()
