"""What a lifted module costs beside the module that it came from: forward, and forward with backward.

    python -m benchmarks.lift                    # on the GPU where there is one, else on the CPU
    python -m benchmarks.lift --seconds 5 resnet50

Both run in turns in one process; the ratio is that of the medians of neighbouring runs. The lifted graph is the
exported and canonical one, no pass has run. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import graphopt
from benchmarks.models import NETWORKS
from benchmarks.results import Column, Goal, Results, Row, progress, ratio, read_options

MODELS = ("resnet50", "bert-base")
LIMITS = {"eager": 1.15, "compiled": 1.05}
"""How many times slower a lifted module may be."""
BATCH = {"cpu": 4, "cuda": 32}
_FEWEST = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/lift.json`."""
    options = read_options("lift", __doc__, arguments, models=MODELS, quick_models=MODELS[:1], seconds=20.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    results = Results(
        "lift", f"time of the lifted module over that of the torch module ({named})", options.command, options.complete
    )
    for name in options.models:
        for way in ("eager",) if options.quick else ("eager", "compiled"):
            results.rows += measure(name, way, device, options.seconds)
    for row in results.rows:
        limit = LIMITS[row["way"]]
        claim = f"{row['model']} {row['way']}, {row['step']}: at most {limit} times"
        results.goals.append(Goal(claim, ratio(row["ratio"]), row["ratio"]["median"] <= limit))
    results.show_and_write(COLUMNS)


def measure(name: str, way: str, device: str, seconds: float) -> list[Row]:
    """Two rows: forward alone, and forward with backward."""
    progress(f"{name}: {way}")
    module, inputs = NETWORKS[name]()
    example = next(iter(inputs.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        model = graphopt.trace(
            module.eval(), (example.repeat(2, *[1] * (example.dim() - 1)),), dynamic_shapes=({0: batch},)
        )
    lifted = graphopt.lift(model)
    data = example.repeat(BATCH[device], *[1] * (example.dim() - 1)).to(device)
    pair: list[Any] = [copy.deepcopy(module).to(device), lifted.to(device)]
    with torch.no_grad():
        worst = (pair[0](data) - pair[1](data)).abs().max() / pair[0](data).abs().max()
    if way == "compiled":
        pair = [torch.compile(one) for one in pair]
    rows: list[Row] = []
    for step, run in (("forward", _forward), ("forward + backward", _forward_and_backward)):
        speed = _in_turns([lambda one=one, run=run: run(one, data) for one in pair], device, seconds)
        rows.append({"model": name, "way": way, "step": step, "device": device, "batch": BATCH[device], **speed})
        rows[-1]["error"] = float(worst)
    return rows


def _forward(module: Any, data: torch.Tensor) -> None:
    with torch.no_grad():
        module(data)


def _forward_and_backward(module: Any, data: torch.Tensor) -> None:
    module.zero_grad()
    module(data).square().mean().backward()


def _in_turns(runs: list[Callable[[], None]], device: str, seconds: float) -> Row:
    """Seconds of both, and the ratio of the second to the first over neighbouring runs."""
    for run in runs * 3:
        run()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < _FEWEST:
        first, second = (_timed(run, device) for run in (runs if len(times) % 2 == 0 else runs[::-1]))
        times.append((first, second) if len(times) % 2 == 0 else (second, first))
    ratios = sorted(lifted / original for original, lifted in times)
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "original_ms": 1000 * statistics.median(original for original, _ in times),
        "lifted_ms": 1000 * statistics.median(lifted for _, lifted in times),
        "ratio": {"median": median, "low": low, "high": high},
        "runs": len(times),
    }


def _timed(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("way", lambda row: row["way"]),
    ("step", lambda row: row["step"]),
    ("device", lambda row: f"{row['device']} x{row['batch']}"),
    ("torch ms", lambda row: f"{row['original_ms']:.1f}"),
    ("lifted ms", lambda row: f"{row['lifted_ms']:.1f}"),
    ("ratio", lambda row: ratio(row["ratio"])),
    ("error", lambda row: f"{row['error']:.1e}"),
)


if __name__ == "__main__":
    main()
