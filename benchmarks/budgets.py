"""What is kept of a trained network at a share of its latency, by ways to decide what goes; nothing is trained.

    python -m benchmarks.budgets                    # ResNet-56, about an hour on two cores; needs ../shared/data
    python -m benchmarks.budgets resnet20
    python -m benchmarks.budgets --quick            # ResNet-20, one budget, functional

Every way is given the same made-up inputs (dead leaves, no gradient), the same latencies, measured inside of the whole
graph, and the same reconstruction behind (without second solves, which would take ten times as long). Residual streams
stay whole, but where "uniform" and "global" do not reach the budget otherwise. What is left of the latency is measured
in turns with the float network. Ways:

* "uniform" and "global": `prune-channels` by L2, and by the residual of least squares per MAC, at the share of the MACs
  with which the latency model predicts the budget;
* "knapsack": channels, HALP's linear costs; "milp, blocks": channels and blocks, MDP's joint costs;
* "collaborative": channels and ranks by CC's heuristic and search; "sequence": half of the saving by channels, the rest
  by ranks; "milp, all": channels, ranks and blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

import graphopt
from benchmarks.datafree_sections import Remembered
from benchmarks.datafree_setting import Net, Setting, sizes, traced
from benchmarks.results import Column, Goal, Options, Results, Row, progress, ratio, read_options, stopwatch
from graphopt.criteria import criterion
from graphopt.errors import TargetMissedError
from graphopt.inputs.probes import probe_feeds, symbolic_sizes
from graphopt.passes.budget_search import BLOCKS, CHANNELS, RANKS, BudgetSearch
from graphopt.passes.contract import Context
from graphopt.passes.fold_reconstruction import FoldReconstruction
from graphopt.passes.meet_budget import MeetBudget
from graphopt.passes.prune_channels import PruneChannels
from graphopt.passes.prune_groups import DEFAULT_SKIP
from graphopt.passes.prune_plan import PrunePlan
from graphopt.search import allocation

MODELS = ("resnet56", "resnet20")
LATENCIES, QUICK_LATENCIES = (0.8, 0.7, 0.6, 0.5), (0.6,)
SAMPLES = 256
LEAST_MACS, BISECTIONS = 0.2, 7
"""Where the share of the MACs is looked for that leaves a share of the latency."""
JOINT = ("milp, blocks", "milp, all", "collaborative")
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "img" / "budgets.svg"
BUDGETED: dict[str, dict[str, Any]] = {
    "knapsack": {"solver": "knapsack", "choices": (CHANNELS,)},
    "milp, blocks": {"solver": "milp", "choices": (CHANNELS, BLOCKS)},
    "milp, all": {"solver": "milp", "choices": (CHANNELS, RANKS, BLOCKS)},
    "collaborative": {"solver": "collaborative", "choices": (CHANNELS, RANKS)},
    "sequence": {"solver": "sequence", "choices": (CHANNELS, RANKS)},
}
RESIDUAL = Remembered(criterion("residual"))
RANKED: dict[str, dict[str, Any]] = {
    "uniform": {"criterion": "l2", "allocation": "uniform"},
    "global": {
        "criterion": Remembered(criterion("residual")),
        "allocation": allocation("global", normalise="none", gain="mac"),
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/budgets.json` and draw the curves."""
    options = read_options("budgets", __doc__, arguments, models=MODELS, quick_models=("resnet20",))
    chosen = options.models if options.models != MODELS else MODELS[:1]
    results = Results("budgets", "accuracy at a share of the latency", options.command, options.complete)
    for name in chosen:
        rows: list[Row] = []
        for row in measure(name, options):
            progress(" ".join(f"{key} {value}" for key, value in row.items()))
            rows.append(row)
        results.rows += rows
        results.goals += goals(name, rows)
    results.show_and_write(COLUMNS)
    if options.complete:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        draw(results.rows)


def measure(name: str, options: Options) -> Iterator[Row]:
    """One row for the float network, then one a budget and way."""
    setting = Setting(options)
    net = Net(name, traced(int(name.removeprefix("resnet"))), {}, setting.images, setting.test)
    one = dict.fromkeys(symbolic_sizes(net.model), 1)
    context = Context(reference=net.model, threads=1, sizes=one)
    samples = 32 if options.quick else SAMPLES
    context.calibration = list(context.inputs(net.model, "probes", samples).batches)
    yield {"way": "float", **net.measured(net.model), **sizes(net.model)}
    progress(f"{name}: losses, and latency at several widths")
    single = MeetBudget(source="calibration", compensation="none", samples=samples)
    search = single.search(net.model, context)
    feeds = probe_feeds(net.model, sizes=one)[0]
    for share in QUICK_LATENCIES if options.quick else LATENCIES:
        for way in (*RANKED, *BUDGETED):
            progress(f"{name}, {share:.0%} of the latency: {way}")
            row: Row = {"way": way, "model": name, "budget": share}
            with stopwatch() as watch:
                try:
                    graph, predicted = made(way, share, single, search, context)
                except TargetMissedError as error:
                    yield {**row, "failure": error.what}
                    continue
            timed = graphopt.benchmark(net.model, graph, inputs=feeds, seconds=options.seconds, threads=1)
            FoldReconstruction(source="calibration", samples=samples, refits=0).rewrite(graph, context)
            row |= {"predicted": predicted, "speed": vars(timed.speeds[1]), "left": 1 / timed.speeds[1].median}
            yield {**row, "seconds": watch.seconds, **net.measured(graph), **sizes(graph)}


def made(way: str, share: float, single: MeetBudget, search: BudgetSearch, context: Context) -> tuple[ir.Model, float]:
    """The network within a share of its latency, nothing made up for, and the share that was predicted."""
    graph = search.model.clone()
    if way in BUDGETED:
        plan = single.planned(search.restricted(**BUDGETED[way]), share)
        single.apply(graph, plan, context)
        return graph, plan.tries[-1].predicted
    for skip in (DEFAULT_SKIP, ()):
        found = _ranked(PruneChannels(macs=1.0, source="calibration", skip=skip, **RANKED[way]), share, search, context)
        if found is not None:
            PruneChannels().apply(graph, found[1], context)
            return graph, found[0]
    raise TargetMissedError(f"{share} is not reached with all gone that may go", where=way)


def _ranked(
    pruner: PruneChannels, share: float, search: BudgetSearch, context: Context
) -> tuple[float, PrunePlan] | None:
    """The plan with the most MACs that is predicted within a share of the latency; None where there is none."""
    low, high = LEAST_MACS, 1.0
    best: tuple[float, PrunePlan] | None = None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        try:
            found = replace(pruner, macs=middle).plan(search.model, context.silent())
        except TargetMissedError:
            low = middle
            continue
        predicted = search.predicted({name: len(units) for name, units in found.selection.items()})
        if predicted <= share:
            low, best = middle, (predicted, found)
        else:
            high = middle
    return best


def goals(name: str, rows: Sequence[Row]) -> Iterator[Goal]:
    """At each budget the joint ways against all others, and every measured latency against its budget."""
    done = [row for row in rows if "left" in row]
    for share in dict.fromkeys(row["budget"] for row in done):
        own = {row["way"]: row for row in done if row["budget"] == share}
        best = max((own[way]["top1"] for way in JOINT if way in own), default=0.0)
        others = {way: row["top1"] for way, row in own.items() if way not in JOINT}
        beside = ", ".join(f"{way} {row['top1']:.2f}" for way, row in own.items())
        yield Goal(f"{name} at {share:.0%} of the latency: a joint way is on or above the others", beside,
                   best >= max(others.values(), default=0.0))  # fmt: skip
    over = [row for row in done if row["way"] in BUDGETED and 1 / row["speed"]["high"] > row["budget"] * 1.01]
    told = ", ".join(f"{row['way']} {row['left']:.3f} of {row['budget']}" for row in over) or "none is over"
    yield Goal(f"{name}: no way with a budget is over it beyond noise", told, not over)


def draw(rows: Sequence[Row]) -> None:
    """Accuracy against the measured share of the latency."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "left" in row:
            curves.setdefault(row["way"], []).append((row["left"], row["top1"]))
    graphopt.plot_pareto(curves, PICTURE, metric="top-1 %, no training", reference=rows[0]["top1"])


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("budget", lambda row: f"{row['budget']:.0%}" if "budget" in row else ""),
    ("way", lambda row: row["way"]),
    ("predicted", lambda row: f"{row['predicted']:.3f}" if "predicted" in row else ""),
    ("left", lambda row: f"{row['left']:.3f}" if "left" in row else ""),
    ("speed", lambda row: ratio(row["speed"]) if "speed" in row else ""),
    ("MACs", lambda row: f"{row['macs'] / 1e6:.1f} M" if "macs" in row else ""),
    ("top-1 %", lambda row: f"{row['top1']:.2f}" if "top1" in row else row.get("failure", "")[:60]),
    ("lost", lambda row: f"{row['lost']:.2f}" if "lost" in row else ""),
    ("s", lambda row: f"{row['seconds']:.0f}" if "seconds" in row else ""),
)


if __name__ == "__main__":
    main()
