"""Pass meet-budget: widths, ranks and blocks in one decision, as much of each as a budget in milliseconds asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.criteria.contract import check_seed
from graphopt.errors import DataError, GraphoptError, TargetMissedError
from graphopt.inputs.source import SOURCES
from graphopt.ir.channels import ChannelGroup, channel_groups
from graphopt.ir.dimensions import known_sizes
from graphopt.ir.origin import remember_origin, set_origin
from graphopt.ir.regions import regions
from graphopt.passes.budget_aims import NEAR
from graphopt.passes.budget_integers import INTEGER_FORMS, quantize_chosen
from graphopt.passes.budget_plan import BlockPlan, BudgetPlan, IntegerPlan, RankPlan, Try
from graphopt.passes.budget_search import (
    CHANNELS,
    CHOICES,
    DEFAULT_CHOICES,
    INTEGERS,
    LATENCY,
    SOLVERS,
    BudgetSearch,
    Found,
    Wish,
    cut,
)
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.decompose import Decompose
from graphopt.passes.decompose_plan import DecomposePlan
from graphopt.passes.fold_reconstruction import LEAST_SQUARES, RECONSTRUCTIONS, FoldReconstruction
from graphopt.passes.lazy_inputs import LazyInputs
from graphopt.passes.prune_groups import DEFAULT_SKIP, check_keep, check_patterns, choose, remark_skipped, with_blockers
from graphopt.passes.prune_plan import GroupPlan, SkippedGroup, digest_of
from graphopt.search.collaborative_surrogates import Surrogate, surrogate
from graphopt.search.rounding import check_round_to

WHAT = "meet the budget"
DEFAULT_LATENCY = 0.7
"""Share of the latency that is left where nothing else is asked for."""


@dataclass(frozen=True)
class MeetBudget(Pass):
    """Decide at once how many channels stay, which layers become two smaller ones and which blocks go.

    With y the options taken (units kept of each group g, dense or rank r of each layer l, keep or drop z of each block
    b), what is lost and the budget are sums over layers, each a table over the few options that meet in it:

        min over y, z:  sum over l of  z_b(l) I_l(in, out, r)  +  sum over b of (1 - z_b) D_b
        so that         sum over l of  z_b(l) T_l(in, out, r)  <=  share * T

    I_l is what least squares cannot make up for at the width in and the rank r (`SecondOrder`), D_b the share of the
    variance behind a block that was its own, T_l the latency, measured inside of the whole graph at a dozen widths and
    fitted node by node, or a count. "milp" solves it exactly (after Sun et al. 2025, "MDP: Multidimensional Vision
    Model Pruning with Latency Constraint", arXiv 2504.02168, linearised), "knapsack" with costs linearised at the
    present state (after Shen et al. 2022, "Structural Pruning via Latency-Saliency Knapsack", arXiv 2210.06659),
    "collaborative" as Collaborative Compression does, without blocks (Li et al. 2021, arXiv 2105.11228). The solution
    is built and measured beside the model; where it is over the budget, or far below, it is solved again with the error
    taken into account. What is taken was measured within the budget, before the compensation, which adds biases at
    most; `graphopt.optimize` measures its final result once more.

    Options:
        latency: the share of the latency that may be left, in (0, 1]; 0.7 where nothing is asked for.
        latency_ms: the same in milliseconds of a run at the sizes of the example inputs.
        macs, params, bytes: the same of multiply-accumulates, parameters, bytes of weights. One of the five.
        choices: what may be decided, of "channels", "ranks", "blocks" (residual branches that a shortcut can stand
            for) and "int8" (which operators compute on integers; with budgets of latency and bytes, and the solvers
            "milp" and "knapsack"). The first three if nothing is said.
        solver: "milp", "knapsack", "collaborative", or "sequence": channels for half of the saving, then ranks.
        surrogate: what a layer is worth, in `graphopt.search.collaborative_surrogates.SURROGATES`: "second-order" (on
            inputs, no gradients), "gradient" (torch), "magnitude" (weights alone).
        round_to, keep, skip, min_units: as for `prune-channels`. Layers that `keep` names, by node or weight, are not
            taken apart either, and blocks that it names, or that hold such a layer, stay.
        compensation: "none", or the form of a `fold-reconstruction` that follows at once.
        source: where inputs come from: "auto", "calibration", "probes", "synthetic".
        samples: how many inputs losses are measured on.
        seconds: that one solve may take.
        seed: of everything random.

    With macs=0.2, of a residual block that adds little and a product whose weight has rank 16:

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,64] x, float[64,64] w_a, float[64,64] w_b, float[64,64] w_c) => (float[N,64] z) {
          a = MatMul (x, w_a)
          r = Relu (a)
          b = MatMul (r, w_b)
          y = Add (x, b)
          z = MatMul (y, w_c)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,64] x, float[64,16] w_c_factor_0, float[16,64] w_c_factor_1) => (float[N,64] z) {
          z_factor_0 = MatMul (x, w_c_factor_0)
          z = MatMul (z_factor_0, w_c_factor_1)
        }
    """

    name: ClassVar[str] = "meet-budget"
    semantics: ClassVar[Semantics] = Semantics.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = ("eliminate-identity", "fold-constants")

    latency: float | None = None
    latency_ms: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    choices: tuple[str, ...] = DEFAULT_CHOICES
    solver: str = "milp"
    surrogate: str | Surrogate = "second-order"
    round_to: int | None = None
    keep: tuple[str, ...] = ()
    min_units: int = 1
    skip: tuple[str, ...] = DEFAULT_SKIP
    compensation: str = LEAST_SQUARES
    source: str = "auto"
    samples: int = 256
    seconds: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) > 1:
            raise GraphoptError(f"several budgets are given: {', '.join(given)}", help="give one of them")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise GraphoptError(f"{name} is {value!r}, it must be a number", help=f"{name} = 0.6")
            if value <= 0 or (value > 1 and name != "latency_ms"):
                most = "" if name == "latency_ms" else " and at most 1"
                raise GraphoptError(f"{name} is {value}, it must be above 0{most}", where=name, help="0.6 leaves 60 %")
        if isinstance(self.choices, str) or not self.choices or not set(self.choices) <= set(CHOICES):
            wrong = (
                [self.choices] if isinstance(self.choices, str) else [one for one in self.choices if one not in CHOICES]
            )
            raise GraphoptError(
                f"choices is {self.choices!r}{f', and {wrong[0]!r} is none' if wrong else ''}",
                help=f"give a list of some of {', '.join(CHOICES)}",
            )
        if self.solver not in SOLVERS:
            raise GraphoptError(f"unknown solver {self.solver!r}", help=f"one of {', '.join(SOLVERS)}")
        if self.compensation not in ("none", *RECONSTRUCTIONS):
            raise GraphoptError(
                f"unknown compensation {self.compensation!r}", help=f"one of none, {', '.join(RECONSTRUCTIONS)}"
            )
        if self.source not in SOURCES:
            raise GraphoptError(f"unknown source {self.source!r}", help=f"one of {', '.join(SOURCES)}")
        if not self.seconds > 0:
            raise GraphoptError(f"seconds is {self.seconds}", help="give a number above 0: 20 is the default")
        if INTEGERS in self.choices and (self.kind in ("macs", "params") or self.solver not in ("milp", "knapsack")):
            raise GraphoptError(
                f"choices names {INTEGERS!r}, which saves no {self.kind}"
                if self.kind in ("macs", "params")
                else f"the solver {self.solver!r} does not decide about {INTEGERS!r}",
                where="choices",
                help="ask for latency or bytes, with the solver milp or knapsack",
            )
        surrogate(self.surrogate)
        check_seed(self.seed)
        check_round_to(self.round_to)
        check_patterns("keep", self.keep)
        check_patterns("skip", self.skip)
        for name in ("min_units", "samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise GraphoptError(f"{name} is {value!r}", help="give a whole number of at least 1")

    def _given(self) -> dict[str, float]:
        names = ("latency", "latency_ms", "macs", "params", "bytes")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def is_target_given(self) -> bool:
        """Whether a budget is set; without, `DEFAULT_LATENCY` of the latency may be left."""
        return bool(self._given())

    @property
    def kind(self) -> str:
        """What the budget counts: "latency", "macs", "params" or "bytes"."""
        (name,) = self._given() or (LATENCY,)
        return LATENCY if name == "latency_ms" else name

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Plan and apply; what was chosen, predicted and measured is left as evidence."""
        plan = self.plan(model, context)
        self.apply(model, plan, context)
        context.evidence["budget"] = plan

    def plan(self, model: ir.Model, context: Context | None = None) -> BudgetPlan:
        """Decide everything, and change nothing.

        Args:
            model: canonical.
            context: `sizes` binds symbolic dimensions, `target` and `threads` say what latencies are measured for;
                inputs come from it.

        Returns:
            The plan; what it leaves was measured.

        Raises:
            GraphoptError: a pattern matches nothing, nothing may be changed, or solving ran out of time.
            TargetMissedError: the budget cannot be met; the message says what can.
            DataError: losses need inputs that cannot be had.
        """
        context = context or Context()
        search = self.search(model, context)
        for note in search.notes:
            context.note(WHAT, note, "model")
        return self.planned(search, self._share(search.whole))

    def search(self, model: ir.Model, context: Context) -> BudgetSearch:
        """Everything that is measured of a model before anything is decided. Raises what `plan` raises."""
        self._check_source(context)
        chosen, skipped = self._groups(model, context)
        inputs = LazyInputs(model, context, self.source, WHAT, self.samples)
        wish = Wish(
            self.kind,
            self.choices,
            self.solver,
            self.surrogate,
            self.round_to,
            self.min_units,
            self.seconds,
            self.seed,
            self.keep,
            self.compensation != "none",
        )
        return BudgetSearch(model, chosen, skipped, wish, inputs, context)

    def planned(self, search: BudgetSearch, share: float) -> BudgetPlan:
        """The plan for a share of the cost, from what was measured. Raises what `plan` raises."""
        try:
            found, tries = search.solve(share)
        except TargetMissedError as error:
            raise with_blockers(error, search.skipped) from error
        dropped = set(found.dropped)
        return BudgetPlan(
            digest_of(search.model),
            self.kind,
            share,
            search.whole,
            groups=self._group_plans(search, found),
            ranks=tuple(
                RankPlan(node, form.form, form.rank, search.forms.full_rank(node, form.form))
                for node, form in found.forms.items()
            ),
            blocks=tuple(BlockPlan(block.name, block.loss, block.name in dropped) for block in search.blocks),
            skipped=tuple(search.skipped),
            solver=search.wish.solver,
            tries=tries,
            source=search.inputs.sentence,
            **self._integer_plans(search, found),
            compensation=self.compensation,
            notes=(*search.notes, *_unused(share, tries)),
        )

    def _share(self, whole: float) -> float:
        ((name, value),) = self._given().items() or ((LATENCY, DEFAULT_LATENCY),)
        return min(value * 1e3 / whole, 1.0) if name == "latency_ms" else value

    def _check_source(self, context: Context) -> None:
        if self.source == "calibration" and context.calibration is None:
            raise DataError(
                "source is 'calibration', and there is none",
                where="source",
                help="pass calibration data (`calibration=`, or Context(calibration=...)), or choose another source",
            )

    def _groups(self, model: ir.Model, context: Context) -> tuple[Sequence[ChannelGroup], list[SkippedGroup]]:
        """The groups that may lose units; none where channels are no choice, or others remain without them."""
        if CHANNELS not in self.choices and not self.keep:
            return (), []
        groups = channel_groups(model, sizes=known_sizes(model, context.sizes))
        check_keep(groups, self.keep)
        if CHANNELS not in self.choices:
            return (), []
        try:
            chosen, skipped = choose(groups, keep=self.keep, skip=self.skip, min_units=self.min_units)
        except GraphoptError:
            if self.choices == (CHANNELS,):
                raise
            return (), []
        remark_skipped(skipped, context)
        return chosen, skipped

    @staticmethod
    def _group_plans(search: BudgetSearch, found: Found) -> tuple[GroupPlan, ...]:
        return tuple(
            GroupPlan(one.name, one.group.role, one.units, found.selection.get(one.name, ()))
            for one in search.candidates
        )

    @staticmethod
    def _integer_plans(search: BudgetSearch, found: Found) -> dict[str, Any]:
        if search.integers is None:
            return {}
        forms, dropped = search.integers.forms, set(found.dropped)
        gone = {node for block in search.blocks if block.name in dropped for node in block.nodes}
        plans = tuple(
            IntegerPlan(node, loss, node in found.integers)
            for node, loss in forms.losses.items()
            if node in forms.decided and node not in gone
        )
        return {"integers": plans, "integer_form": forms.form}

    def apply(self, model: ir.Model, plan: BudgetPlan, context: Context | None = None) -> None:
        """Rewrite `model` in place as the plan says.

        Args:
            model: the model that the plan was made for.
            plan: what `plan` returned, or `BudgetPlan.from_json`.
            context: inputs for ranks and for the compensation, and `sizes` where the model needs them.

        Raises:
            GraphoptError: the plan was made for another model, or names a block that there is not. Nothing has changed
                then.
            DataError: inputs are needed that `context` does not have.
        """
        context = context or Context()
        plan.check(model)
        self._check_source(context)
        if plan.is_empty:
            return
        known = {region.name: region for region in regions(model)}
        missing = [name for name in plan.dropped if name not in known]
        if missing:
            raise GraphoptError(f"the model has no block {missing[0]!r}", where=model.graph.name, help="plan anew")
        absent = set(plan.on_integers) - {node.name for node in model.graph}
        if absent or plan.integer_form not in INTEGER_FORMS:
            what = f"the model has no operator {min(absent)!r}" if absent else f"no form {plan.integer_form!r}"
            raise GraphoptError(what, where="integers of the plan", help="plan anew")
        origin = remember_origin(model)
        before = model.clone()
        groups = channel_groups(before, sizes=known_sizes(before, context.sizes))
        graph = cut(before, groups, plan.selection, [known[name] for name in plan.dropped])
        set_origin(graph, origin.without(groups, plan.selection) if plan.selection else origin)
        if plan.ranks:
            self._rebuild(graph, plan, context)
            by_hand = DecomposePlan.by_hand(
                graph,
                {one.node: (one.form, one.rank) for one in plan.ranks},
                compensation=plan.compensation != "none",
            )
            Decompose(source=self.source, samples=self.samples).apply(graph, by_hand, context)
        self._rebuild(graph, plan, context)
        if plan.on_integers:
            batches = list(context.inputs(model, self.source, self.samples).batches)
            ranges = replace(context, calibration=batches, remarks=[], evidence={})
            graph, _ = quantize_chosen(graph, plan.integer_form, plan.on_integers, ranges)
        model.graph = graph.graph

    def _rebuild(self, graph: ir.Model, plan: BudgetPlan, context: Context) -> None:
        if plan.compensation != "none":
            FoldReconstruction(form=plan.compensation, source=self.source).rewrite(graph, context)


def _unused(share: float, tries: Sequence[Try]) -> list[str]:
    """Why a part of the budget is left, where one is."""
    left = tries[-1].measured
    if left >= share * (1 - NEAR) or tries[-1].predicted >= 1:
        return []
    return [
        f"{left:.3f} is left where {share:.3f} may be: of {len(tries)} built it is the best within the budget; "
        "what may be decided goes in steps"
    ]
