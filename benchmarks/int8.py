"""Recipe `int8`, data-free, against fp32 and against onnxruntime's own quantization of the same model.

    python -m benchmarks.int8                   # all models
    python -m benchmarks.int8 vit-s --seconds 30
    python -m benchmarks.int8 --quick           # batch 1 and one thread alone, two models

Every way to quantize with onnxruntime's tools that suits the network (`benchmarks.rivals.QUANTIZERS`) is measured;
the fastest of them is "ORT best". Speed only: onnxruntime calibrates on noise here; for accuracy see
`benchmarks.accuracy`. All files are opened in this process and timed in turns with graphopt's: batch 1 and 8 with one
thread, batch 1 with two. What was measured of a network is kept in the folder of caches, by the code of the package: a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import graphopt
from benchmarks.contest import BEYOND_NOISE, Contest, contest, node_count
from benchmarks.kept import kept
from benchmarks.models import DATA, exported
from benchmarks.results import Column, Goal, Results, Row, progress, ratio, read_options
from benchmarks.rivals import Feeds, Quantizer, Written, quantizers_for, write_all
from graphopt.inputs.probes import probe_feeds
from graphopt.ir.load import read

CIFAR_MODELS = ("resnet20", "resnet56")
MODELS = (
    *("resnet50", "mobilenetv2", "mobilenetv3", "efficientnet", "convnext", "vit-s", "swin", "bert-base", "edsr"),
    *(CIFAR_MODELS if DATA.exists() else ()),
)
SETTINGS, QUICK_SETTINGS = ((1, 1), (8, 1), (1, 2)), ((1, 1),)
"""Batch and threads."""
QUICK_MODELS = ("mobilenetv2", *(CIFAR_MODELS[:1] if DATA.exists() else ()))
OURS, FLOAT = "graphopt", "fp32"
CALIBRATION_SAMPLES = 4
MEAN_OVER_BEST = 1.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/int8.json`."""
    options = read_options("int8", __doc__, arguments, models=MODELS, quick_models=QUICK_MODELS)
    results = Results(
        "int8",
        "recipe int8, data-free: speed against fp32 and onnxruntime's own quantization",
        options.command,
        options.complete,
    )
    for name in options.models:
        for batch in dict.fromkeys(batch for batch, _ in (QUICK_SETTINGS if options.quick else SETTINGS)):
            threads = [one for own, one in (QUICK_SETTINGS if options.quick else SETTINGS) if own == batch]
            parts = (name, batch, threads, options.seconds)
            for rows, goal in kept("int8", parts, lambda: list(measure(name, batch, threads, options.seconds))):  # noqa: B023
                results.rows += rows
                results.goals.append(Goal(**goal))
    results.goals.append(_mean_goal(results.rows))
    results.show_and_write(COLUMNS)


def measure(name: str, batch: int, threads: Sequence[int], seconds: float) -> Iterator[tuple[list[Row], Row]]:
    """For each number of threads one row a quantizer, and whether onnxruntime's fastest is no faster than graphopt."""
    source = exported(name, batch)
    probes = probe_feeds(read(source), count=CALIBRATION_SAMPLES)
    with tempfile.TemporaryDirectory() as temporary:
        written = write_all(name, _writers(source, probes), Path(temporary))
        files = {OURS: written.files[OURS], FLOAT: source, **written.files}
        for count in threads:
            progress(f"{name}, batch {batch}, {count} threads: timing")
            measured = contest(files, reference=source, seconds=seconds, feeds=probes[0], threads=count)
            shared: Row = {"model": name, "batch": batch, "threads": count}
            rows = [{**shared, **row} for row in _rows(files, measured, written)]
            rows += [{**shared, "tool": tool, "failure": reason} for tool, reason in written.failures.items()]
            yield rows, vars(_goal(f"{name}, batch {batch}, {count} threads", measured, _fastest(measured)))


def _rows(files: Mapping[str, Path], measured: Contest, written: Written) -> Iterator[Row]:
    best = _fastest(measured)
    for tool, path in files.items():
        yield {
            "tool": tool,
            "ort_best": tool == best,
            "nodes": node_count(path),
            "megabytes": path.stat().st_size / 1e6,
            "tool_seconds": written.seconds.get(tool, 0.0),
            "load_seconds": measured.load_seconds[tool],
            "speed_over_float": measured.speed_over(FLOAT).median
            if tool == OURS
            else measured.rival_speed(tool, over=FLOAT),
            **({} if tool == OURS else measured.to_json()["rivals"][tool]),
        }


def _mean_goal(rows: Sequence[Row]) -> Goal:
    """The geometric mean over onnxruntime's best of each model and setting."""
    ratios = [row["subject_is_faster"]["median"] for row in rows if row.get("ort_best")]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.inf
    claim = f"geometric mean over ORT's best: at least {MEAN_OVER_BEST}"
    return Goal(claim, f"{mean:.3f} of {len(ratios)} models and settings", mean >= MEAN_OVER_BEST)


def _writers(source: Path, probes: Sequence[Feeds]) -> dict[str, Callable[[Path], object]]:
    """graphopt, which sees no data, and onnxruntime's quantizers, which calibrate on the probes."""
    writers: dict[str, Callable[[Path], object]] = {
        OURS: lambda path: graphopt.optimize(source, recipe="int8", quiet=True).save(path)
    }
    for quantizer in quantizers_for(source):
        writers[quantizer.name] = partial(_quantize, quantizer, source, probes)
    return writers


def _quantize(quantizer: Quantizer, source: Path, probes: Sequence[Feeds], path: Path) -> None:
    quantizer.run(source, path, probes)


def _fastest(measured: Contest) -> str | None:
    """onnxruntime's fastest, None where all its ways failed."""
    rivals = [rival for rival in measured.pairs if rival != FLOAT]
    return min(rivals, key=lambda rival: measured.speed_over(rival).median, default=None)


def _goal(name: str, measured: Contest, best: str | None) -> Goal:
    claim = f"{name}: int8 is not slower than fp32, nor than ORT's best beyond noise (ratio {BEYOND_NOISE})"
    over_float = f"{ratio(vars(measured.speed_over(FLOAT)))} of fp32"
    if best is None:
        return Goal(claim, f"speed {over_float}; every quantizer of onnxruntime failed", True)
    beaten = measured.is_beaten_by(best) or measured.is_beaten_by(FLOAT)
    figures = f"speed {over_float}, {ratio(vars(measured.speed_over(best)))} of {best}"
    return Goal(claim, figures + ("; SLOWER" if beaten else ""), not beaten)


def _verdict(row: Row) -> str:
    if "failure" in row:
        return row["failure"][:60]
    best = "ORT best" if row["ort_best"] else ""
    return f"{best}, graphopt is slower beyond noise" if row.get("faster_beyond_noise") else best


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("batch", lambda row: str(row["batch"])),
    ("threads", lambda row: str(row["threads"])),
    ("tool", lambda row: row["tool"]),
    ("nodes", lambda row: str(row.get("nodes", "-"))),
    ("MB", lambda row: f"{row['megabytes']:.1f}" if "megabytes" in row else "-"),
    ("load s", lambda row: f"{row['load_seconds']:.3f}" if "load_seconds" in row else "-"),
    ("x fp32", lambda row: f"{row['speed_over_float']:.2f}" if "speed_over_float" in row else "-"),
    ("graphopt x it", lambda row: ratio(row["subject_is_faster"]) if "subject_is_faster" in row else "-"),
    ("tool s", lambda row: f"{row['tool_seconds']:.1f}" if "tool_seconds" in row else "-"),
    ("", _verdict),
)


if __name__ == "__main__":
    main()
