"""The int8 side of a budget: which operators may compute on integers, what each loses, and how a choice is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphopt.passes.contract import Context, Pass
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.fold_batchnorm import FoldBatchnorm
from graphopt.passes.fuse_pad import FusePad
from graphopt.passes.pool_reduce_mean import PoolReduceMean
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_effects import measure_named, single_effects, units
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_plan import OperatorPlan, Overrides
from graphopt.search.integers import ON_INTEGERS, IntegerForms, find_borders
from graphopt.search.sensitivity import first_samples

PREPARATION: tuple[Pass, ...] = (PoolReduceMean(), FusePad(), FoldBatchnorm(), FoldAffine())
"""Exact passes that int8 kernels need; they leave the names of the operators that they do not remove."""
_CHOSEN = ("static", "integer", "dynamic", "table")
"""Forms that are chosen operator by operator; folded activations follow the operator before them."""
_SAMPLES = 16
"""Inputs that effects are measured on."""


class IntegerOperators:
    """Integers as a choice of each operator of one model.

    Attributes:
        form: of `Quantize.form`, the fastest with everything on integers.
        forms: what may be chosen, and what it loses.
    """

    def __init__(self, model: ir.Model, inputs: Iterable[Mapping[str, np.ndarray]], context: Context) -> None:
        """Find the fastest form of the model as a whole, and measure each operator in it.

        Args:
            model: canonical; it is not changed.
            inputs: for ranges and effects.
            context: sizes, target and threads.
        """
        self._context = context
        batches = first_samples(inputs, _SAMPLES)
        self._quick = self._observing(batches[:1])
        prepared = _prepared(model)
        self.form = Quantize().fastest_form(prepared, self._observing(batches))
        plan = Quantize(form=self.form).planned(prepared, self._observing(batches))
        names = {node.name or "" for node in model.graph}
        losses = {one.node: 0.0 for one in plan.operators if one.form in _CHOSEN and one.node in names}
        legalize(prepared, static=plan.static)
        measured = [one.node for one in units(plan) if one.node in losses]
        for name, effect in single_effects(
            prepared, plan, batches, names=measured, measure=measure_named("rms"), outputs=True, threads=context.threads
        ):
            losses[name] = float(np.square(min(effect.alone or 0.0, 1.0)))
        forms = {one.node: one.form for one in plan.operators}
        borders = find_borders(list(prepared.graph), forms, list(prepared.graph.outputs), names)
        self.forms = IntegerForms(losses, tuple(borders))

    def timed(self, graph: ir.Model, chosen: Collection[str]) -> tuple[ir.Model, frozenset[str]]:
        """A graph to be timed, ranges of few inputs, and what came to be on integers; see `quantize_chosen`."""
        return quantize_chosen(graph, self.form, chosen, self.forms.losses, self._quick)

    def _observing(self, batches: Sequence[Mapping[str, np.ndarray]]) -> Context:
        return replace(self._context, calibration=list(batches), remarks=[], evidence={}, progress=None)


def quantize_chosen(
    graph: ir.Model, form: str, chosen: Collection[str], among: Collection[str], context: Context
) -> tuple[ir.Model, frozenset[str]]:
    """A copy of a graph with some operators on integers.

    Args:
        graph: float.
        form: of `Quantize.form`.
        chosen: names of operators, or of those whose place a chain has taken.
        among: names that could be chosen; what is not called after one of them follows its surroundings.
        context: its calibration gives the ranges.

    Returns:
        The copy, and what of `chosen` came to be on integers.
    """
    prepared = _prepared(graph)
    stems = {node.name or "": stem_of(node.name or "", among) for node in prepared.graph}
    kept = {name: "chosen so" for name, stem in stems.items() if stem is not None and stem not in chosen}
    quantize = Quantize(form=form)
    plan = quantize.planned(prepared, context, Overrides(kept))
    quantize.apply(prepared, plan)
    return prepared, frozenset(_stems_on_integers(plan.operators, stems) & set(chosen))


def _stems_on_integers(operators: Iterable[OperatorPlan], stems: Mapping[str, str | None]) -> set[str]:
    found = {stems.get(one.node) for one in operators if one.form in (*ON_INTEGERS, "dynamic", "table")}
    return {one for one in found if one is not None}


def stem_of(name: str, among: Collection[str]) -> str | None:
    """The operator that a node is, or has taken the place of as part of a chain; None where it is none of these.

    Example:
        >>> stem_of("conv/factor_1", {"conv"}), stem_of("relu", {"conv"})
        ('conv', None)
    """
    for one in (name, name.rpartition("/factor_")[0]):
        if one in among:
            return one
    return None


def _prepared(model: ir.Model) -> ir.Model:
    copy = model.clone()
    silent = Context()
    for single in PREPARATION:
        single.rewrite(copy, silent)
    return copy
