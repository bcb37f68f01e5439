"""Finding what goes so that a budget is met: everything is measured once, then solved, built and measured again."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from graphopt.criteria import Knowledge
from graphopt.errors import GraphoptError, TargetMissedError
from graphopt.inputs.batches import resized
from graphopt.inputs.probes import probe_feeds, symbolic_sizes
from graphopt.ir.channels import ChannelGroup, ChannelGroups, Selection, channel_groups
from graphopt.ir.cost import cost
from graphopt.ir.dimensions import known_sizes
from graphopt.ir.linear import linear_at
from graphopt.ir.propagate import propagate
from graphopt.ir.regions import Region, drop_regions, regions
from graphopt.ir.removal import remove_channels
from graphopt.ir.rewrite import DeclinedError
from graphopt.ir.session import Feeds, open_session
from graphopt.ir.timing import interleave
from graphopt.passes.budget_aims import MARGIN, Aims
from graphopt.passes.budget_integers import IntegerOperators
from graphopt.passes.budget_plan import Try
from graphopt.passes.contract import Context
from graphopt.passes.decompose import Decompose
from graphopt.passes.decompose_layers import find_sites
from graphopt.passes.decompose_plan import DecomposePlan
from graphopt.passes.lazy_inputs import LazyInputs
from graphopt.passes.prune_plan import SkippedGroup
from graphopt.search import Candidate, CostModel, Costs, unit_step
from graphopt.search.block_losses import block_losses
from graphopt.search.collaborative import Collaborative, Collaborator
from graphopt.search.collaborative_surrogates import Surrogate
from graphopt.search.integers import IntegerForms
from graphopt.search.joint import Block, JointProblem
from graphopt.search.knapsack import solve_knapsack
from graphopt.search.latency_model import Variant
from graphopt.search.latency_variants import measure_latency
from graphopt.search.layer_forms import LayerForm, LayerForms, low_rank_form
from graphopt.search.milp import solve_milp
from graphopt.search.node_costs import CountedCosts, NodeCosting

CHANNELS, RANKS, BLOCKS, INTEGERS = "channels", "ranks", "blocks", "int8"
DEFAULT_CHOICES = (CHANNELS, RANKS, BLOCKS)
CHOICES = (*DEFAULT_CHOICES, INTEGERS)
"""What may be decided."""
LATENCY = "latency"
COLLABORATIVE, SEQUENCE = "collaborative", "sequence"
SOLVERS = ("milp", "knapsack", COLLABORATIVE, SEQUENCE)
"""What may decide."""
_GAP = 1e-3
_MOST_TRIES, _MOST_AIMS = 6, 12
"""Solutions that are built, and aims that are solved for: several may have the same solution."""
_BIAS_BYTES = 8
"""Of each output: its bias, and the scale of that on integers."""
_MORE = "let more be decided (choices: channels, ranks, blocks, int8; skip=())"
_TIMING_SECONDS, _FIT_SECONDS, _INTEGER_SECONDS = 2.0, 24.0, 24.0
"""Of one timing, of the latencies at several widths and ranks, and of those on integers."""
_BLOCK_SAMPLES = 64


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        kind: "latency" or one of `graphopt.search.node_costs.COUNTED`.
        choices: of `CHOICES`.
        solver: one of `SOLVERS`.
        surrogate: of what is lost.
        round_to: multiples of widths and ranks, None for what kernels like.
        min_units: of each group that stay.
        seconds: that one solve may take.
        seed: of everything random.
        keep: shell patterns of names of nodes and weights that stay as they are.
        is_compensated: whether a reconstruction follows.
    """

    kind: str
    choices: tuple[str, ...]
    solver: str
    surrogate: str | Surrogate
    round_to: int | None
    min_units: int
    seconds: float
    seed: int
    keep: tuple[str, ...] = ()
    is_compensated: bool = False


@dataclass(frozen=True)
class Found:
    """What goes.

    Attributes:
        selection: units by group.
        forms: by node.
        dropped: names of regions.
        integers: names of operators.
        last: what it costs and loses.
    """

    selection: Mapping[str, tuple[int, ...]]
    forms: Mapping[str, LayerForm]
    dropped: tuple[str, ...]
    integers: frozenset[str]
    last: Try


class BudgetSearch:
    """One model, its losses and its costs, measured once.

    Attributes:
        model: it.
        wish: what is asked for.
        skipped: groups that stay whole.
        inputs: that losses were measured on.
        whole: cost of the model as it is: microseconds, or a count.
        candidates: groups that may lose units.
        blocks: that may go, with what would be lost.
        forms: that layers may have.
        integers: what may compute on integers; None where that is no choice.
        notes: sentences about the measurements.
    """

    def __init__(
        self,
        model: ir.Model,
        chosen: Sequence[ChannelGroup],
        skipped: Sequence[SkippedGroup],
        wish: Wish,
        inputs: LazyInputs,
        context: Context,
    ) -> None:
        """Measure.

        Args:
            model: canonical; it is not changed.
            chosen: groups of `channel_groups(model)` with the same sizes that may lose units.
            skipped: the others.
            wish: what is asked for.
            inputs: for losses.
            context: sizes, target and threads for latencies.
        """
        self.wish, self.model, self._context = wish, model, context
        self.skipped, self.inputs = tuple(skipped), inputs
        self.notes: list[str] = []
        self._known: dict[str, tuple[float, frozenset[str]]] = {}
        self._sizes = {**symbolic_sizes(model), **(known_sizes(model, context.sizes) or {})}
        if wish.kind != LATENCY:
            self._sizes = resized(model, self._sizes, 1)
        self._groups = channel_groups(model, sizes=known_sizes(model, context.sizes))
        named = {group.name: group for group in self._groups}
        self.candidates = tuple(
            Candidate(
                named[group.name], np.arange(group.units, dtype=float), unit_step(group, wish.round_to), wish.min_units
            )
            for group in (chosen if CHANNELS in wish.choices else ())
        )
        self._costs = CostModel(model, self._groups, self._sizes)
        threads = max(context.threads, 0)
        knowledge = Knowledge(model, self._groups, inputs, threads, wish.seed)
        self._tell(0, "look at what each layer is worth")
        others = INTEGERS in wish.choices  # then there may be something to decide all the same
        self._collaborator = Collaborator(
            knowledge, self.candidates, self._costs, wish.surrogate, dense=self._dense(), may_be_empty=others
        )
        self._how = Collaborative(round_to=wish.round_to, mode=self._mode)
        self._tables = self._collaborator.tables(self._how)
        read = {name for layer in self._tables.layers for name, _ in layer.reads}
        self.candidates = tuple(candidate for candidate in self.candidates if candidate.name in read)
        self._regions = {region.name: region for region in self._outermost()}
        losses = block_losses(model, list(self._regions.values()), inputs, threads=threads) if self._regions else {}
        self.blocks = tuple(Block(name, self._nodes_of(region), losses[name]) for name, region in self._regions.items())
        self.integers = (
            IntegerOperators(model, inputs, context, kept=self._kept(), timed=self._is_timed) if others else None
        )
        self._feeds: Feeds = probe_feeds(model, sizes=self._sizes, specs=context.specs)[0] if self._is_timed else {}
        self._problem = self._stated()

    @property
    def _is_timed(self) -> bool:
        return self.wish.kind == LATENCY

    @property
    def _mode(self) -> str:
        if CHANNELS in self.wish.choices:
            both = "sequence" if self.wish.solver == SEQUENCE else "joint"
            return both if RANKS in self.wish.choices else "prune"
        return "decompose"

    def _tell(self, done: int, text: str) -> None:
        if self._context.progress is not None:
            self._context.progress(done, 4, text)

    def _dense(self) -> set[str]:
        """Names of the operators that `Decompose` cannot take apart by themselves, or that are to be kept."""
        nodes = {node.name or "" for node in self.model.graph}
        sites, _ = find_sites(self.model, (), propagate(self.model, self._sizes))
        return nodes - {site.name for site in sites if len(site.linears) == 1} | self._kept()

    def _kept(self) -> set[str]:
        """Names of the nodes that `keep` names, or that read a weight that it names."""
        found: set[str] = set()
        for node in self.model.graph if self.wish.keep else ():
            names = [node.name or "", *(value.name or "" for value in node.inputs if value and value.is_initializer())]
            if any(fnmatchcase(name, pattern) for name in names for pattern in self.wish.keep):
                found.add(node.name or "")
        return found

    def _outermost(self) -> list[Region]:
        """Residual branches that may go, none inside of another."""
        if BLOCKS not in self.wish.choices:
            return []
        found: list[Region] = []
        kept = self._kept()
        for region in sorted(regions(self.model), key=lambda region: -len(region.nodes)):
            free = all(not set(region.nodes) & set(other.nodes) for other in found)
            stays = self._nodes_of(region) & kept or any(fnmatchcase(region.name, one) for one in self.wish.keep)
            if region.replaceable and region.kind == "residual branch" and free and not stays:
                found.append(region)
        order = {node.name: place for place, node in enumerate(self.model.graph)}
        return sorted(found, key=lambda region: order[region.nodes[0]])

    def _nodes_of(self, region: Region) -> frozenset[str]:
        """Names of what goes with a region: its nodes, and what makes the value that is replaced."""
        joins = [node.name or "" for node in self.model.graph if region.replaced in {out.name for out in node.outputs}]
        return frozenset((*region.nodes, *joins))

    def _stated(self) -> JointProblem:
        low_rank = RANKS in self.wish.choices
        self.forms = LayerForms(self._tables, self._collaborator.states, self._costs, self.wish.round_to)
        integers = IntegerForms() if self.integers is None else self.integers.forms
        if self._is_timed:
            node_costs = measure_latency(
                self._costs,
                self.candidates,
                self._feeds,
                forms=self.forms if low_rank else None,
                integers=integers,
                build=self._variant,
                target=self._context.target,
                threads=self._context.threads,
                seconds=_FIT_SECONDS + (_INTEGER_SECONDS if integers.losses else 0.0),
                seed=self.wish.seed,
                progress=self._context.progress,
            )
            self.notes += node_costs.notes
        else:
            node_costs = CountedCosts(self._costs, self.wish.kind, self.forms)
        self._collaborator.costing = NodeCosting(self._tables.layers, self._costs, node_costs)
        problem = JointProblem(self.candidates, self.forms, node_costs, self.blocks, low_rank, integers)
        self.whole = node_costs.fixed + sum(node_costs.at(node, {}) for node in node_costs.places)
        return problem

    def restricted(self, choices: tuple[str, ...], solver: str) -> BudgetSearch:
        """The same measurements, with fewer choices or another solver."""
        other = copy.copy(self)
        other.wish = replace(self.wish, choices=choices, solver=solver)
        other.blocks = self.blocks if BLOCKS in choices else ()
        other._how = replace(self._how, mode=other._mode)
        other.integers = self.integers if INTEGERS in choices else None
        integers = IntegerForms() if other.integers is None else other.integers.forms
        other._problem = replace(self._problem, blocks=other.blocks, low_rank=RANKS in choices, integers=integers)
        return other

    def predicted(self, removed: Mapping[str, int]) -> float:
        """Share of the cost that is expected to be left without that many units of each group."""
        costs = self._problem.costs
        return (costs.fixed + sum(costs.at(node, removed) for node in costs.places)) / self.whole

    def solve(self, share: float) -> tuple[Found, tuple[Try, ...]]:
        """What goes so that at most `share` of the cost is left, measured.

        Each solution is built and measured. One that is over the budget is aimed lower the next time, one that leaves
        much of it unused higher, by what prediction and measurement differed.

        Returns:
            What goes, and all that was built and measured on the way, what was taken last.

        Raises:
            TargetMissedError: it cannot be met; the message says what is reachable.
            GraphoptError: the time ended before anything was found.
        """
        aims, tries = Aims(share), list[Try]()
        aim: float | None = share
        best: Found | None = None
        self._known.clear()
        for _ in range(_MOST_AIMS):
            if aim is None or len(self._known) >= _MOST_TRIES:
                break
            self._tell(2, f"solve for {aim:.3f} of the {self.wish.kind}")
            found = self._attempt(aim, share, reached=best is not None)
            if found is None:
                break
            if all(one.predicted != found.last.predicted for one in tries):
                tries.append(found.last)
            if found.last.measured <= share and (best is None or found.last.loss < best.last.loss):
                best = found
            if aims.is_near(found.last) or (self._is_exact and best is not None):
                break
            aim = aims.after(aim, found.last)
        if best is None:
            raise TargetMissedError(
                f"{share:.3f} of the {self.wish.kind} was asked for, and "
                f"{min(one.measured for one in tries):.3f} is the least that was measured",
                where=self.wish.kind,
                help=f"ask for that much, or {_MORE}",
            )
        return best, (*(one for one in tries if one != best.last), best.last)

    @property
    def _is_exact(self) -> bool:
        """Whether what is predicted is what is measured."""
        return not self._is_timed and self.integers is None

    def _attempt(self, aim: float, share: float, *, reached: bool) -> Found | None:
        """One solution and what it measures; None where there is none and an earlier one will do."""
        by_steps = self.wish.solver in (COLLABORATIVE, SEQUENCE)
        try:
            found = self._collaborated(aim) if by_steps else self._solved(aim)
        except TargetMissedError as error:
            if reached:
                return None
            if by_steps or error.least is None or self._is_exact or aim * self.whole >= error.least:
                raise self._unreachable(share, error) from error
            found = self._solved(error.least * (1 + MARGIN) / self.whole)  # predictions err, so the least is measured
            found = self._measured(found)
            if found.last.measured > share:
                raise self._unreachable(share, error, found.last.measured) from error
            return found
        return self._measured(found)

    def _measured(self, found: Found) -> Found:
        """What a solution measures, and what came to be on integers in it; each solution is built once."""
        parts = (found.selection, found.forms, found.dropped, sorted(found.integers))
        key = repr(parts)
        if key not in self._known:
            graph, integers = self._built_with(found.selection, found.forms, found.dropped, found.integers)
            self._known[key] = self._share_of(graph), integers
        measured, integers = self._known[key]
        return replace(found, integers=integers, last=replace(found.last, measured=measured))

    def _solved(self, aim: float) -> Found:
        problem = self._problem.within(aim * self.whole)
        if self.wish.solver == "knapsack":
            assignment = solve_knapsack(problem)
        else:
            assignment = solve_milp(problem, seconds=self.wish.seconds, gap=_GAP)
        taken = self._problem.taken(assignment)
        last = Try(
            assignment.cost / self.whole,
            math.nan,
            -assignment.value,
            assignment.gap,
            assignment.seconds,
            assignment.note or "",
        )
        decided = taken.integers & self._problem.integers.decided
        return Found(self._selection(taken.removed), taken.forms, taken.dropped, decided, last)

    def _collaborated(self, aim: float) -> Found:
        start = time.perf_counter()
        found = self._collaborator.solve(aim, self._how)
        last = Try(found.share, math.nan, found.loss, seconds=time.perf_counter() - start)
        layers = {layer.name: layer for layer in self._tables.layers}
        forms = {node: LayerForm(low_rank_form(layers[node]), rank) for node, rank in found.ranks.items()}
        removed = {name: len(units) for name, units in found.selection.items()}
        forms = {node: form for node, form in forms.items() if self.forms.fits(node, removed, form)}
        return Found(found.selection, forms, (), frozenset(), last)

    def _unreachable(self, share: float, error: TargetMissedError, measured: float | None = None) -> TargetMissedError:
        """The same in shares of the whole, and for latencies in milliseconds, as budgets are given."""
        whole = f"{self.whole / 1e3:.4g} ms is the whole" if self._is_timed else f"{self.whole:,.0f} is the whole"
        what, way = error.what, "ask for more to be left"
        if error.least is not None:
            reachable = error.least / self.whole if measured is None else measured
            least = f"{reachable * self.whole / 1e3:.4g} ms" if self._is_timed else f"{reachable * self.whole:,.0f}"
            what, way = (
                f"{reachable:.3f} of it is the least, {least}",
                f"ask for {math.ceil(reachable * 1e3) / 1e3:.3f} of it or more",
            )
            if reachable >= 1:
                what, way = "nothing that may be decided leaves less than the whole", "ask for the whole"
        return TargetMissedError(
            f"{share:.3g} of the {self.wish.kind} cannot be reached ({whole}): {what}",
            where=self.wish.kind,
            help=f"{way}, or {_MORE}",
        )

    def _selection(self, removed: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        orders = self._tables.orders
        return {name: tuple(sorted(map(int, orders[name][:count]))) for name, count in removed.items() if count}

    def _variant(self, variant: Variant) -> tuple[ir.Model, Variant] | None:
        try:
            graph = self.built(self._selection(variant.removed), variant.forms, ())
            if not variant.integers or self.integers is None:
                return graph, variant
            graph, integers = self.integers.timed(graph, variant.integers & self.integers.forms.decided)
            return graph, replace(variant, integers=integers & set(self.integers.forms.losses))
        except GraphoptError as error:  # its widths or chains are predicted from the others, or never pay
            self.notes.append(f"a variant could not be built, and its latency was not measured: {error.what}")
            return None

    def built(
        self, selection: Mapping[str, tuple[int, ...]], forms: Mapping[str, LayerForm], dropped: Sequence[str]
    ) -> ir.Model:
        """The model without these units and blocks, with layers of these forms; nothing is made up for."""
        graph = cut(self.model, self._groups, selection, [self._regions[name] for name in dropped])
        if forms:
            by_hand = {node: (form.form, form.rank) for node, form in forms.items()}
            plan = DecomposePlan.by_hand(graph, by_hand, compensation=False)
            Decompose(source="none").apply(graph, plan, self._context.silent())
        return graph

    def _built_with(
        self,
        selection: Mapping[str, tuple[int, ...]],
        forms: Mapping[str, LayerForm],
        dropped: Sequence[str],
        integers: frozenset[str],
    ) -> tuple[ir.Model, frozenset[str]]:
        """The same with operators on integers, and which of them came to be."""
        graph = self.built(selection, forms, dropped)
        if not integers or self.integers is None:
            return graph, frozenset()
        graph, found = self.integers.timed(graph, integers)
        return graph, found & integers

    def _biases(self, graph: ir.Model) -> float:
        """What the compensation may add to what is counted: a bias to each product that has none."""
        if not self.wish.is_compensated or self.wish.kind == "macs" or graph is self.model:
            return 0.0
        each = 1 if self.wish.kind == "params" else _BIAS_BYTES
        return each * float(sum(map(_without_bias, graph.graph)))

    def _share_of(self, graph: ir.Model) -> float:
        if not self._is_timed:
            table = self._groups.analysis.table
            counted = [Costs.of(cost(one, self._sizes, table=table)).get(self.wish.kind) for one in (self.model, graph)]
            return (counted[1] + self._biases(graph)) / max(counted[0], 1)
        target, threads = self._context.target, self._context.threads
        sessions = [open_session(one, target=target, threads=threads) for one in (self.model, graph)]
        start = time.perf_counter()
        sessions[0].run_feeds(self._feeds)
        once = time.perf_counter() - start
        timed = interleave(
            sessions,
            self._feeds,
            names=("model", "candidate"),
            seconds=max(_TIMING_SECONDS, min(30 * once, 20.0)),
            threads=threads,
            target=target,
        )
        return 1 / timed.speeds[1].median


def _without_bias(node: ir.Node) -> int:
    """Outputs of a product that a bias may be added to, 0 where there is one, or a normalization behind that has."""
    try:
        linear = linear_at(node)
    except DeclinedError:
        return 0
    behind = {reader.op_type for reader in node.outputs[0].consumers()}
    has_bias = linear is None or linear.bias().any() or behind & {"BatchNormalization", "Add"}
    return 0 if linear is None or has_bias else linear.out_channels


def cut(
    model: ir.Model, groups: ChannelGroups, selection: Mapping[str, tuple[int, ...]], dropped: Sequence[Region]
) -> ir.Model:
    """A new model without some units and regions."""
    units: Selection = {name: chosen for name, chosen in selection.items()}  # noqa: C416
    graph = remove_channels(model, units, groups=groups) if units else model.clone()
    return drop_regions(graph, dropped) if dropped else graph
