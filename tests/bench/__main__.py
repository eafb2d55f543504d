"""All benchmarks one after the other, and their figures: `python -m tests.bench [gpu] [--old PYTHON] [--only NAME]`.

`--old` is a python with transformers 4.52.4 and this torch, such as .matrix/4.52.4/bin/python of `tests.matrix`; the
old SinkCache is measured there. Each file says what it measures and prints; records go to results/.
All run on one core. `gpu` runs those of a GPU instead, in about ten minutes, and the tests that need one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Benchmark:
    """One run.

    Args:
        name: for `--only`.
        module: of tests.bench.
        record: the file of its record.
        arguments: of the module.
        old: whether it needs the old SinkCache.
        gpu: whether it is of a GPU; its record is named after that.
    """

    name: str
    module: str
    record: str
    arguments: tuple[str, ...] = ()
    old: bool = False
    gpu: bool = False


_ON_GPU = ("--window", "1024", "--device", "cuda", "--dtype", "bfloat16")
GPU_TESTS = ("tests/streaming/test_cuda.py", "tests/streaming/test_flash.py")
BENCHMARKS = (
    Benchmark("update", "update", "update-cpu.json"),
    Benchmark("update-old", "update", "update-4.52.4-cpu.json", ("--rounds", "5"), old=True),
    Benchmark("decode", "decode", "decode-smollm2-w256-cpu.json", ("--window", "256")),
    Benchmark("decode-1024", "decode", "decode-smollm2-w1024-cpu.json", ("--window", "1024", "--longest", "10000")),
    Benchmark(
        "decode-tiny",
        "decode",
        "decode-tiny-w256-cpu.json",
        ("--model", "tiny-30-layers", "--longest", "256", "--no-compile", "--rounds", "60", "--block", "20"),
    ),
    Benchmark("memory", "memory", "memory-smollm2-w256-cpu.json"),
    Benchmark("profile", "profile", "profile-smollm2-w256-cpu.json"),
    Benchmark("precision", "precision", "precision-100000-cpu.json", old=True),
    Benchmark("prefill", "prefill", "prefill-cpu.json"),
    Benchmark("slots", "slots", "slots-smollm2-w64-cpu.json", ("--window", "64", "--new", "40")),
    Benchmark(
        "slots-tiny",
        "slots",
        "slots-tiny-w64-cpu.json",
        ("--model", "tiny-30-layers", "--window", "64", "--new", "60"),
    ),
    Benchmark("stream", "stream", "stream-20000-cpu.json"),
    Benchmark("endless", "endless", "endless-1000000-cpu.json"),
    Benchmark(
        "batching-tiny", "batching", "batching-tiny-w128-cpu.json", ("--model", "tiny-30-layers", "--window", "128")
    ),
    Benchmark("batching", "batching", "batching-smollm2-w128-cpu.json", ("--window", "128", "--requests", "4")),
    Benchmark(
        "batching-talks",
        "batching_talks",
        "batching-talks-tiny-w128-cpu.json",
        ("--model", "tiny-30-layers", "--window", "128"),
    ),
    Benchmark("batching-memory", "batching_memory", "batching-memory-100000-cpu.json"),
    Benchmark("serving", "serving", "serving-tiny-w48-cpu.json"),
    Benchmark("forever", "forever", "stream-4000000-cpu.json"),
    Benchmark("update-gpu", "update", "update-gpu.json", ("--device", "cuda"), gpu=True),
    *(
        Benchmark(
            f"{module}-{size}",
            module,
            f"{module}-llama-{size}-w1024-gpu.json",
            ("--model", f"llama-{size}", *_ON_GPU, *more),
            gpu=True,
        )
        for size in ("1b", "8b")
        for module, more in (("decode", ("--longest", "1024")), ("by_default", ()))
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", nargs="?", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--old", metavar="PYTHON")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[one.name for one in BENCHMARKS])
    arguments = parser.parse_args()
    failed = []
    for one in BENCHMARKS:
        python = arguments.old if one.old else sys.executable
        if one.gpu != (arguments.where == "gpu"):
            continue
        if python is None or one.name not in (arguments.only or [one.name]):
            print(f"skipped: {one.name}")
            continue
        print(f"== {one.name}", flush=True)
        command = [python, "-W", "ignore", "-m", f"tests.bench.{one.module}", *one.arguments]
        done = subprocess.run([*command, "--json", str(RESULTS / one.record)], check=False)
        failed += [one.name] if done.returncode else []
    if arguments.where == "gpu":
        tested = subprocess.run([sys.executable, "-m", "pytest", "-q", *GPU_TESTS], check=False)
        failed += ["tests"] if tested.returncode else []
    elif not arguments.only:
        subprocess.run([sys.executable, "-m", "tests.bench.plots"], check=True)
    print(f"failed: {failed or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
