"""What is kept of a trained network at a share of its latency, by ways to decide what goes; and after one epoch behind.

    python -m benchmarks.budgets                    # ResNet-56, some hours on two cores; needs ../shared/data
    python -m benchmarks.budgets resnet20
    python -m benchmarks.budgets --quick            # ResNet-20, one budget, functional

Every way is given the same made-up inputs (dead leaves, no gradient), the same latencies, measured inside of the whole
graph, and the same reconstruction behind (without second solves, which would take ten times as long). Residual streams
stay whole, but where "uniform" and "global" do not reach the budget otherwise. What is left of the latency is measured
in turns with the float network. One epoch of recovery is on training images without labels, the original teaches. What
was measured is kept in the folder of caches, by the code of the package: a run that was stopped goes on where it was.
Ways:

* "uniform" and "global": `prune-channels` by L2, and by the residual of least squares per MAC, at the share of the MACs
  with which the latency model predicts the budget;
* "knapsack": channels, HALP's linear costs; "milp, blocks": channels and blocks, MDP's joint costs;
* "collaborative": channels and ranks by CC's heuristic and search; "sequence": half of the saving by channels, the rest
  by ranks; "milp, all": channels, ranks and blocks; "milp, int8": the same, and which operators compute on integers
  (quantized behind the reconstruction; not recovered).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

import graphopt
from benchmarks.datafree_sections import LEARNING_RATE, Remembered, streams
from benchmarks.datafree_setting import Net, Setting, sizes, traced
from benchmarks.kept import code_digest, kept
from benchmarks.models import CACHE
from benchmarks.results import Column, Goal, Options, Results, Row, progress, ratio, read_options, stopwatch
from benchmarks.training import EPOCH, Images
from graphopt.criteria import criterion
from graphopt.errors import TargetMissedError
from graphopt.inputs.probes import probe_feeds, symbolic_sizes
from graphopt.passes.budget_integers import quantize_chosen
from graphopt.passes.budget_search import BLOCKS, CHANNELS, CHOICES, RANKS, BudgetSearch
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
JOINT = ("milp, blocks", "milp, all", "collaborative", "milp, int8")
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "img" / "budgets.svg"
BUDGETED: dict[str, dict[str, Any]] = {
    "knapsack": {"solver": "knapsack", "choices": (CHANNELS,)},
    "milp, blocks": {"solver": "milp", "choices": (CHANNELS, BLOCKS)},
    "milp, all": {"solver": "milp", "choices": (CHANNELS, RANKS, BLOCKS)},
    "collaborative": {"solver": "collaborative", "choices": (CHANNELS, RANKS)},
    "sequence": {"solver": "sequence", "choices": (CHANNELS, RANKS)},
    "milp, int8": {"solver": "milp", "choices": CHOICES},
}
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
        rows = list(measure(name, options))
        results.rows += rows
        results.goals += goals(name, rows)
    results.show_and_write(COLUMNS)
    if options.complete:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        draw(results.rows)


def measure(name: str, options: Options) -> Iterator[Row]:
    """One row for the float network, then one a budget and way, what one epoch makes of it included."""
    study = Study(name, options)
    yield {"way": "float", **study.net.measured(study.net.model), **sizes(study.net.model)}
    shares = QUICK_LATENCIES if options.quick else LATENCIES
    places = [(share, way) for share in shares for way in (*RANKED, *BUDGETED)]
    rows = {place: study.kept("budget", *place) for place in places}
    for share, way in reversed(places):  # the hardest first
        if "left" in rows[share, way] and "integers" not in rows[share, way]:
            rows[share, way] = {**rows[share, way], **study.kept("recovery", share, way)}
    yield from rows.values()


@dataclass
class Study:
    """One network, and all that is measured of it once.

    Attributes:
        name: of the network.
        options: of the command line.
    """

    name: str
    options: Options

    @cached_property
    def setting(self) -> Setting:
        """Images."""
        return Setting(self.options)

    @cached_property
    def net(self) -> Net:
        """The trained network."""
        return Net(self.name, traced(int(self.name.removeprefix("resnet"))), {}, self.setting.images, self.setting.test)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Of the dynamic dimensions."""
        return dict.fromkeys(symbolic_sizes(self.net.model), 1)

    @cached_property
    def samples(self) -> int:
        """Made-up inputs."""
        return 32 if self.options.quick else SAMPLES

    @cached_property
    def context(self) -> Context:
        """The same inputs for everybody."""
        context = Context(reference=self.net.model, threads=1, sizes=self.sizes)
        context.calibration = list(context.inputs(self.net.model, "probes", self.samples).batches)
        return context

    @cached_property
    def single(self) -> MeetBudget:
        """The pass, with every choice."""
        return MeetBudget(latency=1.0, choices=CHOICES, source="calibration", compensation="none", samples=self.samples)

    @cached_property
    def search(self) -> BudgetSearch:
        """Losses and latencies."""
        progress(f"{self.name}: losses, and latency at several widths")
        return self.single.search(self.net.model, self.context)

    def kept(self, part: str, share: float, way: str) -> Row:
        """A row of "budget" or "recovery", from the cache where this very code has measured it before."""
        parts = (part, self.name, way, share, self.samples, self.options.seconds, len(self.setting.test[1]))
        return kept("budgets", parts, lambda: self._measured(part, share, way))

    def _measured(self, part: str, share: float, way: str) -> Row:
        progress(f"{self.name}, {share:.0%} of the latency, {part}: {way}")
        path = self._path(share, way)
        row = self._budget(share, way, path) if part == "budget" else self._recovery(path)
        progress(" ".join(f"{name} {value}" for name, value in row.items()))
        return row

    def _path(self, share: float, way: str) -> Path:
        """Where the network of a way is kept for its recovery."""
        folder = CACHE / "budgets" / code_digest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        quick = "-quick" if self.options.quick else ""
        return folder / f"{self.name}-{share}-{way.replace(', ', '-')}{quick}.onnx"

    def _budget(self, share: float, way: str, path: Path) -> Row:
        row: Row = {"way": way, "model": self.name, "budget": share}
        net, feeds = self.net, probe_feeds(self.net.model, sizes=self.sizes)[0]
        rebuild = FoldReconstruction(source="calibration", samples=self.samples, refits=0)
        with stopwatch() as watch:
            try:
                graph, predicted, integers = made(way, share, self.single, self.search, self.context)
            except TargetMissedError as error:
                return {**row, "failure": error.what}
        rebuild.rewrite(graph, self.context)
        row |= {"integers": len(integers)} if integers else {}
        whole = sizes(graph)
        if integers:
            found = self.search.integers
            assert found is not None
            graph, _ = quantize_chosen(graph, found.form, integers, found.forms.losses, self.context)
        timed = graphopt.benchmark(net.model, graph, inputs=feeds, seconds=self.options.seconds, threads=1)
        graphopt.save(graph, path)
        row |= {"predicted": predicted, "speed": vars(timed.speeds[1]), "left": 1 / timed.speeds[1].median}
        return {**row, "seconds": watch.seconds, **net.measured(graph), **whole}

    def _recovery(self, path: Path) -> Row:
        model = graphopt.load(path)
        steps = 2 if self.options.quick else EPOCH
        with stopwatch() as watch:
            done = graphopt.recover(
                model,
                Images(self.setting.training),
                steps=steps,
                teacher=self.net.model,
                match=_shared_streams(model, self.net.model),
                learning_rate=LEARNING_RATE,
                quiet=True,
            )
        return {"recovered": self.net.measured(done.model)["top1"], "recovery_seconds": watch.seconds, "steps": steps}


def _shared_streams(model: ir.Model, teacher: ir.Model) -> list[str]:
    """Names of what the blocks put out, where the teacher's has the same shape."""
    there, here = (
        {value.name: list(value.shape or ())[1:] for node in graph.graph for value in node.outputs}
        for graph in (teacher, model)
    )
    return [name for name in streams(model) if there.get(name) == here[name]]


def made(
    way: str, share: float, single: MeetBudget, search: BudgetSearch, context: Context
) -> tuple[ir.Model, float, tuple[str, ...]]:
    """The network within a share of its latency, nothing made up for and still in floats, the share that was predicted,
    and what is to compute on integers."""
    graph = search.model.clone()
    if way in BUDGETED:
        plan = single.planned(search.restricted(**BUDGETED[way]), share)
        single.apply(graph, replace(plan, integers=()), context)
        return graph, plan.tries[-1].predicted, plan.on_integers
    for skip in (DEFAULT_SKIP, ()):
        found = _ranked(PruneChannels(macs=1.0, source="calibration", skip=skip, **RANKED[way]), share, search, context)
        if found is not None:
            PruneChannels().apply(graph, found[1], context)
            return graph, found[0], ()
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
    for figure, told in (("top1", ""), ("recovered", " after one epoch")):
        for share in dict.fromkeys(row["budget"] for row in done):
            own = {row["way"]: row[figure] for row in done if row["budget"] == share and figure in row}
            best = max((own[way] for way in JOINT if way in own), default=0.0)
            others = max((top1 for way, top1 in own.items() if way not in JOINT), default=0.0)
            beside = ", ".join(f"{way} {top1:.2f}" for way, top1 in own.items())
            yield Goal(f"{name} at {share:.0%} of the latency{told}: a joint way is on or above the others", beside,
                       best >= others)  # fmt: skip
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
    ("one epoch", lambda row: f"{row['recovered']:.2f}" if "recovered" in row else ""),
    ("s", lambda row: f"{row['seconds']:.0f}" if "seconds" in row else ""),
)


if __name__ == "__main__":
    main()
