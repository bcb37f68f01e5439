"""Mixed precision: what breaks a network goes back to 8 bits or to float, the least that will do.

The fully quantized graph is measured. Where it is within the budget nothing else happens. Where it is not, every
operator is quantized alone (`graphopt.passes.quantize_diagnosis`) and ranked by the square of what that does to the
outputs, over what float costs there: its share of the multiply-accumulates and of the number of operators. The start
of that list that is needed is found by doubling and bisection; then whatever of it can be taken back into int8 is, in
halves, quarters and one by one, the dearest first. Each try is planned as if it were asked for and judged as it will
run, by the guard's own judge, so that the two cannot disagree.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.batches import usual_samples
from graphopt.ir.cost import cost
from graphopt.ir.rewrite import constant
from graphopt.passes.contract import Context, Verdict
from graphopt.passes.quantize_diagnosis import Diagnosis, diagnose
from graphopt.passes.quantize_effects import Batches, Measure, units
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_placement import node_name
from graphopt.passes.quantize_plan import KEPT, OperatorPlan, Overrides, QuantizePlan
from graphopt.passes.quantize_protection import OutputParts, protection
from graphopt.passes.quantize_weight_sites import WeightSite, weight_sites
from graphopt.passes.quantize_weights import WeightOptions, plan_weights

MOST_TRIES = 64
"""After so many tries nothing more is taken back into int8; what is within the budget by then stays."""
_SAMPLES, _LARGE_SAMPLES = 32, 8
"""How many samples the operators are ranked on: small ones and large ones."""
_NAMED = 8
"""How many operators a summary names."""
_SHOWN = 4
"""How many tries of the Pareto front a summary shows."""

Judge = Callable[[ir.Model], Verdict]
Decide = Callable[[Overrides], QuantizePlan]
Write = Callable[[ir.Model, QuantizePlan], None]


@dataclass(frozen=True)
class Try:
    """One graph that was judged.

    Attributes:
        kept_float: the operators that were kept in float, by name, in graph order.
        widened: those that were raised to 8 bits.
        error: how far the outputs moved: root mean square, relative; infinite where they cannot be compared.
        metric: the user's metric, None where the error alone decided.
        within: whether it was within the budget.
        share: of the multiply-accumulates of the net that run on integers, 0 to 1.
    """

    kept_float: tuple[str, ...]
    widened: tuple[str, ...]
    error: float
    metric: float | None
    within: bool
    share: float

    def __str__(self) -> str:
        kind = f"{len(self.kept_float)} in float" + (f", {len(self.widened)} raised" if self.widened else "")
        metric = "" if self.metric is None else f", metric {self.metric:.4g}"
        judged = "" if self.within else ", too much"
        return f"{kind}: error {self.error:.2g}{metric}, {self.share:.0%} of MACs in int8{judged}"


@dataclass(frozen=True)
class Search:
    """What was tried, and what came of it; print it, or `to_json`.

    Attributes:
        budget: in words.
        tries: every graph that was judged, in order; the first is the fully quantized one.
        chosen: index of the one that was taken, None where none is within the budget.
        effects: by operator that was kept in float or raised, how far it alone moved the outputs.
    """

    budget: str
    tries: tuple[Try, ...]
    chosen: int | None
    effects: Mapping[str, float] = field(default_factory=dict[str, float])

    def pareto(self) -> tuple[Try, ...]:
        """The tries that no other beats in error, share of MACs in int8 and number of raised operators at once.

        The smallest error comes first.

        Example:
            >>> tries = [Try((), (), 0.5, None, False, 1.0), Try(("a", "b"), (), 0.1, None, True, 0.6),
            ...     Try(("b",), (), 0.2, None, True, 0.5)]
            >>> [one.error for one in Search("tolerance 0.2", tuple(tries), 1).pareto()]
            [0.1, 0.5]
        """
        costs = {one: (one.error, -one.share, len(one.widened)) for one in self.tries}

        def is_beaten(one: Try) -> bool:
            own = costs[one]
            return any(cost != own and all(a <= b for a, b in zip(cost, own, strict=True)) for cost in costs.values())

        return tuple(sorted((one for one in self.tries if not is_beaten(one)), key=lambda one: costs[one]))

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is infinite becomes None."""
        return {
            "budget": self.budget,
            "chosen": self.chosen,
            "tries": [_plain(one) for one in self.tries],
            "pareto": [_plain(one) for one in self.pareto()],
            "effects": {name: alone if math.isfinite(alone) else None for name, alone in self.effects.items()},
        }

    def summary(self) -> list[str]:
        """What went back and what that cost, then the tries in one line."""
        first = self.tries[0]
        head = f"mixed precision: fully quantized it has error {first.error:.2g}, not within {self.budget}"
        if self.chosen is None:
            return [f"{head}; no operator can be quantized within it ({len(self.tries)} tries)"]
        one = self.tries[self.chosen]
        went = [
            f"{len(names)} {what}: {self._named(names)}"
            for names, what in ((one.kept_float, "back to float"), (one.widened, "raised to 8 bits"))
            if names
        ]
        taken = f"{'; '.join(went)} (the figure: what it moves alone); {one.share:.0%} of MACs in int8"
        metric = "" if one.metric is None else f", metric {one.metric:.4g}"
        pareto = self.pareto()
        front = "; ".join(map(str, pareto[:_SHOWN])) + (
            f"; {len(pareto) - _SHOWN} more" if len(pareto) > _SHOWN else ""
        )
        return [f"{head}", f"  {taken}, error {one.error:.2g}{metric}", f"  best of {len(self.tries)} tries: {front}"]

    def _named(self, names: Sequence[str]) -> str:
        ordered = sorted(names, key=lambda name: -self.effects.get(name, 0.0))
        shown = [f"{name} {self.effects.get(name, 0.0):.2g}" for name in ordered[:_NAMED]]
        return ", ".join(shown) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

    def __str__(self) -> str:
        return "\n".join([*self.summary(), *(f"  {one}" for one in self.tries)])


def _plain(one: Try) -> dict[str, Any]:
    return {**vars(one), "error": one.error if math.isfinite(one.error) else None}


def repair(model: ir.Model, plan: QuantizePlan, context: Context, *, decide: Decide, write: Write) -> QuantizePlan:
    """The plan itself where its graph is within the budget, else one with as little as possible in more bits.

    Args:
        model: the float model; it is not changed.
        plan: everything quantized, as the options say.
        context: `judge` says what is within the budget. Without one, what ruins the outputs is not (see
            `graphopt.passes.quantize_protection`). The search and the diagnosis are left in `evidence`.
        decide: the plan under overrides.
        write: rewrites a model as a plan says.

    Returns:
        A plan within the budget. Where there is none with an operator in int8, with a judge the first plan, which the
        guard will then reject with its figures, and without one a plan that leaves everything in float.
    """
    if not units(plan):
        return plan
    judge = context.judge or protection(model, plan, context)
    if judge is None:
        return plan
    trials = _Trials(model, judge, decide, write, context, _macs(model, context, static=plan.static))
    first = trials.add(Overrides(), plan)
    if first.within:
        return plan
    by_part = context.judge is None or first.metric is not None  # a tolerance looks at whole outputs
    try:
        chosen, diagnosis = _search(model, plan, trials, OutputParts(model).rms if by_part else "rms")
    except GraphoptError as error:
        context.missed("search for mixed precision", error.what, error.where or "model")
        return plan
    effects = {one.node: one.alone for one in diagnosis.operators}
    context.evidence["search"] = trials.record(chosen, effects)
    context.evidence["diagnosis"] = diagnosis.top(16)
    if chosen is None:
        return _nothing_fits(plan, context)
    context.note("quantize", f"mixed precision: {_counts(chosen, plan)}", "model")
    return _explained(plan, decide(chosen), chosen, effects, trials.budget)


def _search(
    model: ir.Model, plan: QuantizePlan, trials: _Trials, measure: str | Measure
) -> tuple[Overrides | None, Diagnosis]:
    """More bits where fewer than 8 were asked for; where those do not do, float. None: not even that does."""
    context, decide = trials.context, trials.decide
    narrow = [one.node for one in units(plan) if decide(Overrides(widened=frozenset([one.node]))) != plan]
    wide = Overrides(widened=frozenset(narrow))
    is_wide_enough = bool(narrow) and trials.add(wide).within
    base = plan if is_wide_enough or not narrow else decide(wide)
    diagnosis = diagnose(
        model,
        base,
        _batches(model, context),
        measure=measure,
        threads=context.threads,
        progress=context.progress,
    )
    ranked = _ranked(base, diagnosis, trials.macs)
    if is_wide_enough:
        least = trials.least(
            [name for name in ranked if name in wide.widened], lambda names: Overrides(widened=frozenset(names))
        )
        return (None if least is None else Overrides(widened=frozenset(least))), diagnosis
    effects = {one.node: one.alone for one in diagnosis.operators}

    def keep(names: Iterable[str]) -> Overrides:
        reasons = {name: f"{KEPT}: alone on integers it moves the outputs by {effects[name]:.2g}" for name in names}
        return Overrides(reasons, wide.widened - frozenset(reasons))

    least = trials.least(ranked, keep)
    chosen = None if least is None else keep(least)
    return (chosen if chosen is not None and units(decide(chosen)) else None), diagnosis


def weights_under(model: ir.Model, options: WeightOptions, context: Context, overrides: Overrides) -> QuantizePlan:
    """The plan of weights alone under overrides; what is raised has 8 bits."""
    kept = tuple(glob.escape(name) for name in overrides.kept_float)
    options = replace(options, exclude=(*options.exclude, *kept))
    plan = plan_weights(model, options, context)
    operators = tuple(
        replace(one, reason=overrides.kept_float.get(one.node, one.reason)) if one.form == "float" else one
        for one in plan.operators
    )
    if not overrides.widened:
        return replace(plan, operators=operators)
    names = {
        site.stored.name
        for node, site in weight_sites(model).items()
        if isinstance(site, WeightSite) and node_name(node) in overrides.widened
    }
    wide = {tensor.name: tensor for tensor in plan_weights(model, replace(options, bits=8), context.silent()).tensors}
    tensors = tuple(wide.get(one.name, one) if one.name in names else one for one in plan.tensors)
    return QuantizePlan(
        tensors, tuple(replace(one, weight_bits=8) if one.node in overrides.widened else one for one in operators)
    )


class _Trials:
    """The graphs that were judged, each once."""

    def __init__(
        self,
        model: ir.Model,
        judge: Judge,
        decide: Decide,
        write: Write,
        context: Context,
        macs: Mapping[str, int],
    ) -> None:
        self.model, self.judge, self.decide, self.write, self.context = model, judge, decide, write, context
        self.macs = macs
        self.order = list(macs)
        self.budget = ""
        self._tries: dict[tuple[frozenset[str], frozenset[str]], Try] = {}

    def add(self, overrides: Overrides, plan: QuantizePlan | None = None) -> Try:
        key = frozenset(overrides.kept_float), overrides.widened
        if key in self._tries:
            return self._tries[key]
        plan = self.decide(overrides) if plan is None else plan
        candidate = self.model.clone()
        self.write(candidate, plan)
        verdict = self.judge(candidate)
        self.budget = self.budget or verdict.budget
        kept, widened = (tuple(sorted(names, key=self._place)) for names in key)
        share = sum(self.macs.get(one.node, 0) for one in units(plan)) / max(sum(self.macs.values()), 1)
        found = Try(kept, widened, verdict.error, verdict.metric, verdict.within, share)
        self._tries[key] = found
        if self.context.progress is not None:
            self.context.progress(min(len(self._tries), MOST_TRIES), MOST_TRIES, f"try {found}")
        return found

    def _place(self, name: str) -> tuple[int, str]:
        return self.order.index(name) if name in self.macs else len(self.order), name

    def least(self, ranked: Sequence[str], make: Callable[[Sequence[str]], Overrides]) -> list[str] | None:
        """As few of `ranked` as it takes; None where not even all of them do."""
        failed, count = 0, 1
        while count < len(ranked) and not self.add(make(ranked[:count])).within:
            failed, count = count, 2 * count
        count = min(count, len(ranked))
        if count == len(ranked) and not self.add(make(ranked)).within:
            return None
        while count - failed > 1:
            middle = (failed + count) // 2
            if self.add(make(ranked[:middle])).within:
                count = middle
            else:
                failed = middle
        return self._taken_back(list(ranked[:count]), make)

    def _taken_back(self, kept: list[str], make: Callable[[Sequence[str]], Overrides]) -> list[str]:
        """The same without what is not needed: halves, quarters and so on, at last one by one, the dearest first."""
        size = (len(kept) + 1) // 2
        while size >= 1 and len(kept) > 1:
            order = kept[::-1] if size > 1 else sorted(kept, key=lambda name: -self.macs.get(name, 0))
            for start in range(0, len(order), size):
                left = [name for name in kept if name not in order[start : start + size]]
                if len(self._tries) >= MOST_TRIES:
                    return kept
                if left and len(left) < len(kept) and self.add(make(left)).within:
                    kept = left
            size //= 2
        return kept

    def record(self, chosen: Overrides | None, effects: Mapping[str, float]) -> Search:
        tries = list(self._tries)
        index = None
        if chosen is not None:
            index = tries.index((frozenset(chosen.kept_float), chosen.widened))
        changed = set[str]() if chosen is None else {*chosen.kept_float, *chosen.widened}
        found = {name: alone for name, alone in effects.items() if name in changed}
        return Search(self.budget, tuple(self._tries.values()), index, found)


def _ranked(plan: QuantizePlan, diagnosis: Diagnosis, macs: Mapping[str, int]) -> list[str]:
    """Operators by what float buys there: the square of the effect over the cost, both a share of the whole."""
    names = [operator.node for operator in units(plan)]
    total = max(sum(macs.get(name, 0) for name in names), 1)
    place = {name: index for index, name in enumerate(names)}

    def worth(node: str, alone: float) -> float:
        return min(alone, 1e6) ** 2 / (macs.get(node, 0) / total + 1 / len(names))

    ranked = sorted(diagnosis.operators, key=lambda one: (-worth(one.node, one.alone), place[one.node]))
    return [one.node for one in ranked]


def _macs(model: ir.Model, context: Context, *, static: bool) -> dict[str, int]:
    """Multiply-accumulates of each operator that has a weight or could run on integers, in graph order."""
    legal = model.clone()
    legalize(legal, static=static)
    entries = cost(legal, context.sizes).nodes
    return {
        node_name(entry.node): entry.macs
        for entry in entries
        if entry.macs and any(constant(value) is not None for value in entry.node.inputs if value is not None)
    }


def _batches(model: ir.Model, context: Context) -> Batches:
    samples = usual_samples(model, context.sizes, context.specs, most=_SAMPLES, least=_LARGE_SAMPLES)
    source = "probes" if context.calibration is None else "calibration"
    return list(context.inputs(model, source, samples).batches)


def _explained(
    first: QuantizePlan, plan: QuantizePlan, chosen: Overrides, effects: Mapping[str, float], budget: str
) -> QuantizePlan:
    """The plan with a reason for each operator that the first plan had on integers and this one has not."""
    operators = list[OperatorPlan]()
    for operator in plan.operators:
        if operator.node in chosen.widened and operator.form != "float":
            why = f"raised to 8 bits to be within {budget}: in fewer, alone, it moves the outputs by"
            operator = replace(operator, reason=f"{why} {effects[operator.node]:.2g}")
        operators.append(operator)
    known = {operator.node for operator in operators}
    beside = "what it works on went back to float"
    operators += [replace(one, form="float", reason=beside) for one in first.operators if one.node not in known]
    place = {one.node: index for index, one in enumerate(first.operators)}
    operators.sort(key=lambda one: place.get(one.node, len(place)))
    return replace(plan, operators=tuple(operators))


def _nothing_fits(plan: QuantizePlan, context: Context) -> QuantizePlan:
    context.missed("quantize", "no operator can run on integers within the budget", "model")
    if context.judge is not None:
        return plan
    reason = f"{KEPT}: nothing else is"
    return QuantizePlan((), tuple(replace(one, form="float", reason=reason) for one in plan.operators))


def _counts(chosen: Overrides, plan: QuantizePlan) -> str:
    parts = [f"{len(chosen.kept_float)} back to float"] if chosen.kept_float else []
    parts += [f"{len(chosen.widened)} raised to 8 bits"] if chosen.widened else []
    return f"{', '.join(parts)}, of {len(units(plan))} operators"
