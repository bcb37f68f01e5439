"""What a benchmark found: rows and goals, as a table and as a JSON file that says where the figures come from."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.models import CACHE

FOLDER = Path(__file__).parent / "results"
"""Committed results of complete runs. What a partial run finds (`--quick`, some models) goes to the cache instead."""
PARTIAL_FOLDER = CACHE / "results"
_PACKAGES = (
    *("graphopt", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "onnxslim"),
    *("torch", "torch-pruning", "transformers", "numpy"),
)
_WIDTH_OF_FILES = 160

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""Heading, and the text of a row's cell."""


@dataclass(frozen=True)
class Goal:
    """One claim and whether the measurement bears it out."""

    claim: str
    measured: str
    reached: bool


@dataclass
class Results:
    """Everything one benchmark found.

    Attributes:
        name: module name, also the file's.
        question: what is asked, one line.
        command: how to run it again.
        complete: whether the run covered every model at full length, so that it may be committed.
        rows: one dict of plain data a measurement.
        goals: the claims.
    """

    name: str
    question: str
    command: str
    complete: bool
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data with machine, versions, date and command; infinities become None."""
        return {
            "benchmark": self.name,
            "question": self.question,
            "command": self.command,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "complete": self.complete,
            "goals": [vars(goal) for goal in self.goals],
            "rows": _finite(self.rows),
        }

    def show_and_write(self, columns: Sequence[Column]) -> Path:
        """Print the table and the goals, write the JSON file and return its path."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _WIDTH_OF_FILES
        console.print(self.question, style="bold", soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, (heading, _) in enumerate(columns):
            table.add_column(heading, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*(Text(cell(row)) for _, cell in columns))
        console.print(table)
        show_goals(console, [vars(goal) for goal in self.goals])
        folder = FOLDER if self.complete else PARTIAL_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        console.print(f"written to {path}\n", soft_wrap=True)
        return path


def show_goals(console: Console, goals: Sequence[Mapping[str, Any]]) -> None:
    """One line a goal."""
    for goal in goals:
        mark = "[green]reached[/]" if goal["reached"] else "[bold red]MISSED [/]"
        console.print(f"  {mark}  {escape(goal['claim'])}: {escape(goal['measured'])}", soft_wrap=True)


@dataclass(frozen=True)
class Options:
    """What the command line of every benchmark says.

    Attributes:
        models: which networks.
        seconds: how long each pair of models is timed.
        quick: a functional run on little, no figures to quote.
        command: the command line.
        complete: every model at full length.
    """

    models: tuple[str, ...]
    seconds: float
    quick: bool
    command: str
    complete: bool


def read_options(
    name: str,
    about: str | None,
    arguments: Sequence[str] | None,
    *,
    models: Sequence[str] = (),
    quick_models: Sequence[str] = (),
    seconds: float = 12.0,
) -> Options:
    """Parse the command line that all benchmarks share: names of models, `--seconds`, `--quick`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(about or "").split("\n")[0])
    if models:
        parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(models)}; all when empty")
    parser.add_argument("--seconds", type=float, default=None, help=f"timing of each pair (default {seconds:g})")
    parser.add_argument("--quick", action="store_true", help="little and short: to see that it works")
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(given)
    chosen = tuple(getattr(parsed, "models", ()))
    unknown = [model for model in chosen if model not in models]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; models are {', '.join(models)}")
    return Options(
        models=chosen or tuple(quick_models if parsed.quick else models),
        seconds=parsed.seconds if parsed.seconds is not None else (1.5 if parsed.quick else seconds),
        quick=parsed.quick,
        command=" ".join(["python -m", f"benchmarks.{name}", *given]),
        complete=not parsed.quick and not chosen and parsed.seconds is None,
    )


def progress(text: str) -> None:
    """Say on the standard error stream what is being done now."""
    print(f"{datetime.datetime.now():%H:%M:%S}  {text}", file=sys.stderr, flush=True)


@dataclass
class Stopwatch:
    """Wall-clock seconds of a `with` block, read after it."""

    seconds: float = math.nan


@contextmanager
def stopwatch() -> Generator[Stopwatch, None, None]:
    """Time a block by the wall clock."""
    watch, start = Stopwatch(), perf_counter()
    try:
        yield watch
    finally:
        watch.seconds = perf_counter() - start


def ratio(speed: Mapping[str, float]) -> str:
    """A speed ratio with its quartiles, for instance "1.32 (1.30-1.35)"."""
    return f"{speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})"


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, and how busy it was."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": _processor(),
        "instruction_sets": _instruction_sets(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Python and the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    """Which of the vector extensions that onnxruntime's kernels choose by are there (Linux)."""
    known = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm"}
    for line in _cpuinfo():
        if line.lower().startswith(("flags", "features")):
            return sorted(known & set(line.partition(":")[2].split()))
    return []


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(entry) for key, entry in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(entry) for entry in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
