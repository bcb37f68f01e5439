"""Pass prune-channels: fewer channels, chosen by a criterion, as many as a target asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.criteria import Criterion, Knowledge, checked_scores, criterion
from graphopt.criteria.contract import check_seed
from graphopt.errors import DataError, GraphoptError, TargetMissedError
from graphopt.inputs.batches import resized
from graphopt.inputs.probes import symbolic_sizes
from graphopt.inputs.source import SOURCES
from graphopt.ir.channels import channel_groups
from graphopt.ir.dimensions import known_sizes
from graphopt.ir.origin import remember_origin, set_origin
from graphopt.passes.contract import Context, Pass, Remark, Semantics
from graphopt.passes.fold_reconstruction import LEAST_SQUARES, RECONSTRUCTIONS, FoldReconstruction
from graphopt.passes.lazy_inputs import LazyInputs
from graphopt.passes.prune_groups import DEFAULT_SKIP, check_patterns, choose, remark_skipped, with_blockers
from graphopt.passes.prune_plan import GroupPlan, PrunePlan, SkippedGroup, digest_of
from graphopt.search import Allocation, Candidate, CostModel, Problem, Solution, Target, allocation, solve, unit_step
from graphopt.search.rounding import check_round_to
from graphopt.search.solve import TOLERANCE

DEFAULT_RATIO = 0.3
"""Share of the units that go where nothing else is asked for."""


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the least important channels, planned first, then cut out of every weight that holds a part of them.

    A unit is whatever can only go together: an output channel of each layer that writes into a residual stream, its
    BatchNormalization, its input channel of each layer that reads it; a head with its rows of all projections. With
    y = B f(A x) and R the units that go,

        y = sum over kept k of B[:, k] f(A[k, :] x)

    which is what the full graph computes when all that the units of R own is 0 (cut equals masked, for every exact
    group). Units are ranked inside a group by `criterion`; `allocation` says how many go of each group, and the width
    that stays is rounded to what kernels compute fast. Groups and units: `graphopt.channel_groups`, after DepGraph
    (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900).

    What a model outputs, and every channel that something unknown reads, stays: the analysis freezes it.

    Options:
        ratio: share of the units that goes, in [0, 1); of every group alike with allocation "uniform". 0.3 where no
            target is given. Widths are rounded to the nearest, so that less or more may go.
        macs, params, bytes: the share of multiply-accumulates, parameters or weight bytes of the whole model that is
            to be left, in (0, 1]: macs=0.5 halves them. Met within 1 % where the widths allow. At most one of the four.
        criterion: name in `graphopt.criteria.CRITERIA`, or a criterion; in TOML also a table with its name and options.
        allocation: name in `graphopt.search.ALLOCATIONS`, or an allocation; in TOML also a table.
        round_to: widths are multiples of this; 1 for any width, None for what the target's kernels are fast at:
            multiples of 16, of less in narrow groups (`graphopt.search.rounding.step_of`).
        keep: shell patterns of names of groups, weights or nodes; whatever owns a part of these stays whole.
        min_units: how many units of each group stay at least.
        skip: shell patterns of roles that are left whole. By default what cuts twice or cannot be cut exactly:
            "residual stream" (all layers lose it at once), "head width" and "value width" (heads go whole),
            "query heads per key head", "groups" (of a convolution; "group width" goes) and "inexact", which stands for
            all groups where removing differs from masking, because a normalisation or a mean runs over them.
            `skip=()` prunes all of it.
        compensation: "none", or the form of a `fold-reconstruction` that follows at once: "least-squares" is the
            best by far. As a part of this pass the guard judges both together.
        source: where inputs come from, where criterion, allocation or compensation need some: "auto", "calibration",
            "probes", "synthetic".
        seed: of everything random.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,8,8] x, float[16,3,3,3] w_a, float[16] w_b, float[4,16,3,3] w_c) => (float[N,4,4,4] y) {
          a = Conv (x, w_a, w_b)
          r = Relu (a)
          y = Conv (r, w_c)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,8,8] x, float[8,3,3,3] w_a, float[8] w_b, float[4,8,3,3] w_c) => (float[N,4,4,4] y) {
          a = Conv (x, w_a, w_b)
          r = Relu (a)
          y = Conv (r, w_c)
        }
    """

    name: ClassVar[str] = "prune-channels"
    semantics: ClassVar[Semantics] = Semantics.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = ("eliminate-identity", "fold-constants")

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    criterion: str | Criterion = "l2"
    allocation: str | Allocation = "uniform"
    round_to: int | None = None
    keep: tuple[str, ...] = ()
    min_units: int = 1
    skip: tuple[str, ...] = DEFAULT_SKIP
    compensation: str = "none"
    source: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) > 1:
            raise GraphoptError(
                f"several targets are given: {', '.join(given)}",
                help="give one of ratio, macs, params and bytes; a second pass can follow for another",
            )
        for name, share in given.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise GraphoptError(
                    f"{name} is {share!r}, it must be a number", help=f"write it without quotes: {name} = 0.3"
                )
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise GraphoptError(f"ratio is {self.ratio}, it must be at least 0 and below 1", help="0.3 removes 30 %")
        _ = self.target
        for option in ("criterion", "allocation"):
            value = getattr(self, option)
            if isinstance(value, Mapping):  # a table of TOML
                object.__setattr__(self, option, _from_table(option, value))
        criterion(self.criterion)
        allocation(self.allocation)
        if self.compensation not in ("none", *RECONSTRUCTIONS):
            raise GraphoptError(
                f"unknown compensation {self.compensation!r}", help=f"one of none, {', '.join(RECONSTRUCTIONS)}"
            )
        if self.source not in SOURCES:
            raise GraphoptError(f"unknown source {self.source!r}", help=f"one of {', '.join(SOURCES)}")
        check_seed(self.seed)
        check_round_to(self.round_to)
        check_patterns("keep", self.keep)
        check_patterns("skip", self.skip)
        if isinstance(self.min_units, bool) or not isinstance(self.min_units, int) or self.min_units < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GraphoptError(
                f"min_units is {self.min_units!r}, it must be a whole number of at least 1",
                help="1 is the default; 16 keeps 16 units of each group",
            )

    def _given(self) -> dict[str, float]:
        found = {"ratio": self.ratio, "macs": self.macs, "params": self.params, "bytes": self.bytes}
        return {name: share for name, share in found.items() if share is not None}

    @property
    def is_target_given(self) -> bool:
        """Whether one of ratio, macs, params and bytes is set; without, the ratio is `DEFAULT_RATIO`."""
        return bool(self._given())

    @property
    def target(self) -> Target:
        """What is to be left."""
        ((name, share),) = self._given().items() or (("ratio", DEFAULT_RATIO),)
        return Target("units", 1 - share) if name == "ratio" else Target(name, share)

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Plan and apply; the remarks say which groups stay, and why."""
        self.apply(model, self.plan(model, context), context)

    def plan(self, model: ir.Model, context: Context | None = None) -> PrunePlan:
        """Decide everything, and change nothing.

        Args:
            model: canonical.
            context: `sizes` binds symbolic dimensions, on which MACs depend (those of one sample are counted); inputs
                come from it where they are needed.

        Returns:
            The plan.

        Raises:
            GraphoptError: a pattern matches nothing, or nothing can be pruned (the message lists the blockers).
            TargetMissedError: the target cannot be met.
            DataError: criterion, allocation or compensation need inputs that cannot be had.
        """
        context = context or Context()
        self._check_source(context, self.compensation)
        groups = channel_groups(model, sizes=known_sizes(model, context.sizes))
        chosen, skipped = choose(groups, keep=self.keep, skip=self.skip, min_units=self.min_units)
        remark_skipped(skipped, context)
        feeds = LazyInputs(model, context, self.source, "prune channels")
        ranking = criterion(self.criterion)
        knowledge = Knowledge(
            model, groups, None if ranking.needs == "weights" else feeds, max(context.threads, 0), self.seed
        )
        scores = checked_scores(ranking, knowledge, chosen)
        candidates = tuple(
            Candidate(group, scores[group.name], step=unit_step(group, self.round_to), least=self.min_units)
            for group in chosen
        )
        sizes = resized(model, {**symbolic_sizes(model), **(known_sizes(model, context.sizes) or {})}, 1)
        costs = CostModel(model, groups, sizes)
        problem = Problem(model, groups, candidates, self.target, costs, lambda: feeds, max(context.threads, 0))
        try:
            solution = solve(problem, allocation(self.allocation), sizes)
        except TargetMissedError as error:
            raise with_blockers(error, skipped) from error
        remarks = [
            *(
                Remark("note", "prune channels", f"criterion {ranking.name}: {line}", "model")
                for line in ranking.remarks(knowledge, chosen)
            ),
            *_remarks(problem, solution),
        ]
        context.remarks.extend(remarks)
        return self._planned(model, problem, solution, skipped, feeds, remarks)

    def _check_source(self, context: Context, compensation: str) -> None:
        """Raise `DataError` where the compensation is to use calibration, and there is none."""
        if self.source == "calibration" and context.calibration is None and compensation == LEAST_SQUARES:
            raise DataError(
                "source is 'calibration', and there is none for the compensation",
                where="source",
                help="pass calibration data (`calibration=`, or Context(calibration=Calibration(model, batches))), "
                "or choose another source",
            )

    def _planned(
        self,
        model: ir.Model,
        problem: Problem,
        solution: Solution,
        skipped: list[SkippedGroup],
        feeds: LazyInputs,
        remarks: Sequence[Remark],
    ) -> PrunePlan:
        target = self.target
        asked = f"{1 - target.share:.3g} of the units" if target.kind == "units" else f"to {target}"
        return PrunePlan(
            digest_of(model),
            tuple(_group_plan(candidate, solution.removed[candidate.name]) for candidate in problem.candidates),
            tuple(skipped),
            criterion=str(self.criterion),
            allocation=str(self.allocation),
            target=asked,
            share=solution.share,
            compensation=self.compensation,
            source=feeds.sentence,
            before=solution.before,
            after=solution.after,
            notes=tuple(
                remark.why if remark.where == "model" else f"{remark.where}: {remark.why}" for remark in remarks
            ),
        )

    def apply(self, model: ir.Model, plan: PrunePlan, context: Context | None = None) -> None:
        """Rewrite `model` in place as the plan says.

        Args:
            model: the model that the plan was made for.
            plan: what `plan` returned, or `PrunePlan.from_json`.
            context: inputs for the compensation, where the plan has one, and `sizes` where the model needs them.

        Raises:
            GraphoptError: the plan was made for another model. Nothing has changed then.
            DataError: the compensation needs calibration, and `context` has none. Nothing has changed then.
        """
        context = context or Context()
        plan.check(model)
        self._check_source(context, plan.compensation)
        if not plan.selection:
            return
        origin = remember_origin(model)
        before = model.clone()
        groups = channel_groups(before, sizes=known_sizes(before, context.sizes))
        pruned = plan.pruned(before, groups)
        set_origin(pruned, origin.without(groups, plan.selection))
        model.graph = pruned.graph
        if plan.compensation != "none":
            FoldReconstruction(form=plan.compensation, source=self.source).rewrite(model, context)


def _from_table(option: str, table: Mapping[str, Any]) -> Criterion | Allocation:
    """A criterion or allocation written as a table with its name and options."""
    values = dict(table)
    if not isinstance(values.get("name"), str):
        raise GraphoptError(f"{option} is a table without a name", help=f'{option} = {{name = "...", ...}}')
    name = values.pop("name")
    return criterion(name, **values) if option == "criterion" else allocation(name, **values)


def _group_plan(candidate: Candidate, removed: tuple[int, ...]) -> GroupPlan:
    boundary = None
    if removed:
        gone = np.isin(np.arange(candidate.units), removed)
        boundary = float(candidate.scores[gone].max()), float(candidate.scores[~gone].min())
    return GroupPlan(candidate.name, candidate.group.role, candidate.units, removed, boundary)


def _remarks(problem: Problem, solution: Solution) -> list[Remark]:
    """What the user should know where less or more goes than was asked for."""
    what, target = "prune channels", problem.target
    why = "several groups share an axis, and something must be left on it"
    found = [Remark("missed", what, why, name) for name in solution.limited]
    if target.share < 1 and not any(solution.removed.values()):
        steps = sorted({candidate.step for candidate in problem.candidates})
        why = f"no group loses a unit: widths are rounded to multiples of {', '.join(map(str, steps))} units"
        found.append(Remark("missed", what, f"{why}; round_to=1 allows any", "model"))
    elif abs(solution.share - target.share) > TOLERANCE * target.share:
        why = f"{solution.share:.3f} of the {target.kind} is left: the widths come no nearer to {target.share:.3f}"
        if target.kind == "units":
            why = f"{1 - solution.share:.3g} of the units go, {1 - target.share:.3g} were asked for: "
            why += "each group keeps the nearest width that is allowed"
            rounded = any(candidate.step > 1 for candidate in problem.candidates)
            why += "; round_to=1 allows any" if rounded else ""
        found.append(Remark("note", what, why, "model"))
    return found
