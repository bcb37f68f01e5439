"""How well the latency of pruned models is predicted from a few measured widths.

    python -m benchmarks.latency                    # all models
    python -m benchmarks.latency vit-s --seconds 60
    python -m benchmarks.latency --quick            # one small model

The model is measured node by node at a dozen widths (`graphopt.search.latency_model`). Then `PRUNINGS` others, each
group cut by a share of its own that was never measured, are predicted, and timed in turns with the whole model. What
is compared is the share of the latency that is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

import graphopt
from benchmarks.models import exported
from benchmarks.results import Column, Goal, Results, Row, progress, read_options, stopwatch
from graphopt.inputs.probes import probe_feeds, runnable_sizes
from graphopt.ir.channels import Selection
from graphopt.ir.dimensions import known_sizes
from graphopt.ir.load import load
from graphopt.ir.removal import remove_channels
from graphopt.passes.prune_groups import DEFAULT_SKIP, choose
from graphopt.search.contract import Candidate
from graphopt.search.costs import CostModel
from graphopt.search.latency_model import Variant
from graphopt.search.latency_variants import measure_latency
from graphopt.search.rounding import unit_step

MODELS = ("resnet50", "mobilenetv2", "vit-s", "bert-base")
QUICK_MODELS = ("mobilenetv2",)
PRUNINGS = 5
MOST_GONE = 0.7
"""Of a group, at most, in the prunings that are predicted."""
MEDIAN_ERROR, WORST_ERROR = 0.05, 0.12


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/latency.json`."""
    options = read_options("latency", __doc__, arguments, models=MODELS, quick_models=QUICK_MODELS)
    results = Results("latency", "predicted against measured latency", options.command, options.complete)
    for name in options.models:
        results.rows += measure(name, options.seconds)
    errors = [abs(row["error"]) for row in results.rows]
    for claim, found, most in (
        ("median error", float(np.median(errors)), MEDIAN_ERROR),
        ("worst error", max(errors), WORST_ERROR),
    ):
        results.goals.append(Goal(f"{claim} at most {most:.0%}", f"{found:.1%} of {len(errors)}", found <= most))
    results.show_and_write(COLUMNS)


def measure(name: str, seconds: float) -> Iterator[Row]:
    """One row a pruning; one thread."""
    source = load(exported(name))
    sizes = runnable_sizes(source)
    feeds = probe_feeds(source, sizes=sizes)[0]
    groups = graphopt.channel_groups(source, sizes=known_sizes(source, sizes))
    chosen, _ = choose(groups, keep=(), skip=DEFAULT_SKIP, min_units=1)
    candidates = [Candidate(group, np.arange(group.units, dtype=float), step=unit_step(group)) for group in chosen]
    progress(f"{name}: measuring {len(candidates)} groups")
    with stopwatch() as watch:
        latency = measure_latency(CostModel(source, groups, sizes), candidates, feeds, threads=1, seconds=3 * seconds)
    generator = np.random.default_rng(1)
    for number in range(PRUNINGS):
        removed = {
            candidate.name: candidate.units - int(generator.choice(candidate.choices[_least(candidate) :]))
            for candidate in candidates
        }
        selection: Selection = {candidate.name: candidate.lowest(removed[candidate.name]) for candidate in candidates}
        pruned = remove_channels(source, selection, groups=groups)
        progress(f"{name}: pruning {number + 1} of {PRUNINGS}")
        speed = graphopt.benchmark(source, pruned, inputs=feeds, seconds=seconds, threads=1).speeds[1]
        predicted, found = latency.estimate(Variant(removed)) / latency.estimate(Variant()), 1 / speed.median
        yield {
            "model": name,
            "pruning": number,
            "predicted": predicted,
            "measured": found,
            "spread": (speed.high - speed.low) / 2 / speed.median,
            "error": predicted / found - 1,
            "seconds": watch.seconds,
        }


def _least(candidate: Candidate) -> int:
    """Index of the narrowest width that may be drawn."""
    return int(np.searchsorted(candidate.choices, (1 - MOST_GONE) * candidate.units))


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("pruning", lambda row: str(row["pruning"])),
    ("predicted", lambda row: f"{row['predicted']:.3f}"),
    ("measured", lambda row: f"{row['measured']:.3f} ± {row['spread']:.1%}"),
    ("error", lambda row: f"{row['error']:+.1%}"),
    ("to measure", lambda row: f"{row['seconds']:.0f} s"),
)


if __name__ == "__main__":
    main()
