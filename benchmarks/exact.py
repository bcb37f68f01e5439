"""Recipe `exact` against the plain torch export and what other graph optimizers make of it.

    python -m benchmarks.exact                  # all models
    python -m benchmarks.exact vit-s --seconds 30

Every file is opened in this process and timed in turns with graphopt's (`benchmarks.contest`), one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import graphopt
from benchmarks.contest import BEYOND_NOISE, Contest, contest, node_count
from benchmarks.models import exported
from benchmarks.results import Column, Goal, Results, Row, progress, ratio, read_options
from benchmarks.rivals import optimize_with_onnxscript, slim, write_all

MODELS = ("resnet50", "mobilenetv2", "vit-s", "bert-base")
OURS, PLAIN = "graphopt", "plain export"
TOOLS: dict[str, Callable[[Path, Path], object]] = {
    OURS: lambda source, path: graphopt.optimize(source, recipe="exact", quiet=True).save(path),
    "onnxslim": slim,
    "onnxscript": optimize_with_onnxscript,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/exact.json`."""
    options = read_options("exact", __doc__, arguments, models=MODELS, quick_models=("mobilenetv2",))
    results = Results(
        "exact",
        "recipe exact: nodes, load time and speed against the plain export and other graph optimizers",
        options.command,
        options.complete,
    )
    for name in options.models:
        rows, goal = measure(name, options.seconds)
        results.rows += rows
        results.goals.append(goal)
    results.show_and_write(COLUMNS)


def measure(name: str, seconds: float) -> tuple[list[Row], Goal]:
    """One row a tool, and whether none of them is faster than graphopt."""
    source = exported(name)
    with tempfile.TemporaryDirectory() as temporary:
        written = write_all(name, {tool: partial(write, source) for tool, write in TOOLS.items()}, Path(temporary))
        files = {OURS: written.files[OURS], PLAIN: source, **written.files}
        progress(f"{name}: timing")
        measured = contest(files, reference=source, seconds=seconds)
        rows = [
            {
                "model": name,
                "tool": tool,
                "nodes": node_count(path),
                "tool_seconds": written.seconds.get(tool, 0.0),
                "load_seconds": measured.load_seconds[tool],
                "error": measured.errors[tool],
                "speed_over_plain": _speed_over_plain(measured, tool),
                **({} if tool == OURS else measured.to_json()["rivals"][tool]),
            }
            for tool, path in files.items()
        ]
    rows += [{"model": name, "tool": tool, "failure": reason} for tool, reason in written.failures.items()]
    return rows, _goal(name, measured)


def _speed_over_plain(measured: Contest, tool: str) -> float:
    if tool == OURS:
        return measured.speed_over(PLAIN).median
    return measured.rival_speed(tool, over=PLAIN)


def _goal(name: str, measured: Contest) -> Goal:
    faster = [rival for rival in measured.pairs if measured.is_beaten_by(rival)]
    figures = ", ".join(f"{ratio(vars(measured.speed_over(rival)))} of {rival}" for rival in measured.pairs)
    return Goal(
        f"{name}: exact is not slower than any other beyond noise (ratio {BEYOND_NOISE})",
        f"speed {figures}" + (f"; SLOWER than {', '.join(faster)}" if faster else ""),
        not faster,
    )


def _verdict(row: Row) -> str:
    if "failure" in row:
        return row["failure"][:60]
    return "graphopt is slower beyond noise" if row.get("faster_beyond_noise") else ""


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("tool", lambda row: row["tool"]),
    ("nodes", lambda row: str(row.get("nodes", "-"))),
    ("load s", lambda row: f"{row['load_seconds']:.3f}" if "load_seconds" in row else "-"),
    ("x plain", lambda row: f"{row['speed_over_plain']:.3f}" if "speed_over_plain" in row else "-"),
    ("graphopt x it", lambda row: ratio(row["subject_is_faster"]) if "subject_is_faster" in row else "-"),
    ("error", lambda row: f"{row['error']:.1e}" if "error" in row else "-"),
    ("tool s", lambda row: f"{row['tool_seconds']:.1f}" if "tool_seconds" in row else "-"),
    ("", _verdict),
)


if __name__ == "__main__":
    main()
