"""What `graphopt optimize` itself costs: wall time, peak memory and seconds a step, in a fresh process.

    python -m benchmarks.cost

The model is ResNet-50 as an ONNX file, the recipe `default`; the clock starts before Python does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import exported
from benchmarks.results import Column, Goal, Results, read_options

MODELS = ("resnet50",)
QUICK_MODELS = ("mobilenetv2",)
SECONDS_LIMIT = 60.0
MODEL_COPIES, FIXED_MEGABYTES = 2.5, 500
"""Peak memory may be this many times the file's size, and this much for the libraries."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/cost.json`."""
    options = read_options("cost", __doc__, arguments, models=MODELS, quick_models=QUICK_MODELS)
    results = Results(
        "cost", "graphopt optimize, recipe default: wall time and peak memory", options.command, options.complete
    )
    for name in options.models:
        source = exported(name)
        found = measure(source)
        results.rows += [{"model": name, **step} for step in found["steps"]]
        results.rows.append({"model": name, "name": "(whole process)", **found["process"]})
        limit = MODEL_COPIES * source.stat().st_size / 1e6 + FIXED_MEGABYTES
        seconds, peak = found["process"]["seconds"], found["process"]["peak_megabytes"]
        results.goals += [
            Goal(f"{name}: under {SECONDS_LIMIT:g} s", f"{seconds:.1f} s", seconds < SECONDS_LIMIT),
            Goal(
                f"{name}: peak memory under {MODEL_COPIES} times the model + {FIXED_MEGABYTES} MB = {limit:.0f} MB",
                f"{peak:.0f} MB",
                peak < limit,
            ),
        ]
    results.show_and_write(COLUMNS)


def measure(source: Path) -> dict[str, Any]:
    """Seconds and peak resident megabytes of one run, and the steps of its report.

    Raises:
        subprocess.CalledProcessError: graphopt failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        command = [sys.executable, "-m", "graphopt", "optimize", str(source), "--quiet"]
        command += ["-o", str(Path(temporary) / "result.onnx"), "--report", str(report)]
        start = time.perf_counter()
        process = subprocess.Popen(command)
        # The kernel counts what this process held when it forked into the child's peak: this module stays small.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, command)
        steps = json.loads(report.read_text(encoding="utf-8"))["steps"]
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, kibibytes on Linux
    return {
        "steps": [{key: step[key] for key in ("name", "status", "nodes", "seconds")} for step in steps],
        "process": {
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_megabytes": usage.ru_maxrss * unit / 1e6,
        },
    }


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("step", lambda row: row["name"]),
    ("", lambda row: row.get("status", "")),
    ("nodes", lambda row: str(row.get("nodes", ""))),
    ("seconds", lambda row: f"{row['seconds']:.2f}"),
    ("CPU seconds", lambda row: f"{row['cpu_seconds']:.2f}" if "cpu_seconds" in row else ""),
    ("peak MB", lambda row: f"{row['peak_megabytes']:.0f}" if "peak_megabytes" in row else ""),
)


if __name__ == "__main__":
    main()
