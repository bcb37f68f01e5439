"""Every benchmark behind the README's figures, each in a process of its own, and one summary.

    python -m benchmarks.run                    # hours, most of them for datafree; writes benchmarks/results
    python -m benchmarks.run --quick            # functional, some minutes; figures are not worth quoting
    python -m benchmarks.run --all              # and openvino_int8, which needs the network, and the studies behind
                                                # single passes (forms, split_parallel, solve)

Exit code: 1 where a goal was missed, 2 where a benchmark failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.models import DATA
from benchmarks.results import FOLDER, PARTIAL_FOLDER, show_goals, stopwatch

BENCHMARKS = (
    *("cost", "exact", "old_file", "int8", "channels", "channels_scale", "lift", "weights", "latency"),
    *(("accuracy", "training", "datafree", "decomposition", "budgets") if DATA.exists() else ()),
)
NETWORKED = ("openvino_int8",)
"""Those that install what they compare with."""
STUDIES = ("forms", "split_parallel", "solve")
_ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run them one after the other, never two at once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="All benchmarks, one summary.")
    parser.add_argument("--quick", action="store_true", help="little and short: to see that they work")
    parser.add_argument("--all", action="store_true", help="also what needs the network, and the studies behind passes")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    failed: list[str] = []
    with stopwatch() as watch:
        named = (*BENCHMARKS, *(NETWORKED if options.all else ()))
        for name in named:
            if not _run(console, name, ["--quick"] if options.quick else []):
                failed.append(name)
        for name in STUDIES if options.all else ():
            if not _run(console, name, []):
                failed.append(name)
    missed = _summary(console, named, PARTIAL_FOLDER if options.quick else FOLDER, failed)
    console.print(f"{watch.seconds / 60:.1f} minutes")
    sys.exit(2 if failed else int(missed))


def _run(console: Console, name: str, arguments: list[str]) -> bool:
    console.rule(name)
    return (
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=_ROOT, check=False).returncode == 0
    )


def _summary(console: Console, named: Sequence[str], folder: Path, failed: Sequence[str]) -> bool:
    """Print every goal; whether one was missed."""
    console.rule("summary")
    missed = False
    for name in named:
        if name in failed:
            console.print(f"{name}: the benchmark itself FAILED", style="bold red")
            continue
        document = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        console.print(document["question"], style="bold", soft_wrap=True)
        show_goals(console, document["goals"])
        missed |= not all(goal["reached"] for goal in document["goals"])
    return missed


if __name__ == "__main__":
    main()
