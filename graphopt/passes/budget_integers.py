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
from graphopt.passes.quantize_apply import linear_operator
from graphopt.passes.quantize_effects import measure_named, single_effects, units
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_placement import is_table_lookup, node_name
from graphopt.passes.quantize_plan import Overrides
from graphopt.search.integers import ON_INTEGERS, IntegerForms, find_borders
from graphopt.search.sensitivity import first_samples

PREPARATION: tuple[Pass, ...] = (PoolReduceMean(), FusePad(), FoldBatchnorm(), FoldAffine())
"""Exact passes that int8 kernels need; they leave the names of the operators that they do not remove."""
INTEGER_FORMS = ("auto", "static", "dynamic")
"""Forms of `Quantize` in which weights and activations are integers."""
_WITH_WEIGHT = ("static", "dynamic", "table")
_SAMPLES = 16
"""Inputs that effects are measured on."""


class IntegerOperators:
    """Integers as a choice of each operator of one model.

    Operators with a weight are decided; sums, pools and what moves elements follow, as `Quantize` has it.

    Attributes:
        forms: what may be chosen, and what it loses.
    """

    def __init__(
        self,
        model: ir.Model,
        inputs: Iterable[Mapping[str, np.ndarray]],
        context: Context,
        *,
        kept: Collection[str] = (),
        timed: bool = True,
    ) -> None:
        """Choose a form for the model as a whole, and measure each operator in it.

        Args:
            model: canonical; it is not changed.
            inputs: for ranges and effects.
            context: sizes, target and threads.
            kept: names of operators that stay on floats.
            timed: whether the form is the fastest one here; else it is the one of the rules.
        """
        self._context = context
        batches = first_samples(inputs, _SAMPLES)
        self._quick, observing = self._observing(batches[:1]), self._observing(batches)
        prepared = prepare(model)
        form = Quantize().fastest_form(prepared, observing) if timed else "auto"
        shared = {node_name(node): "its weight is shared" for node in model.graph if _shares_weight(node)}
        stay = {**shared, **dict.fromkeys(kept, "kept")}
        plan = Quantize(form=form).planned(prepared, observing, Overrides(stay))
        names = {node.name or "" for node in model.graph}
        losses = {
            one.node: 0.0
            for one in plan.operators
            if one.form in (*ON_INTEGERS, *_WITH_WEIGHT) and one.node in names and one.node not in stay
        }
        legalize(prepared, static=plan.static)
        measured = [one.node for one in units(plan) if one.node in losses]
        for name, effect in single_effects(
            prepared, plan, batches, names=measured, measure=measure_named("rms"), outputs=True, threads=context.threads
        ):
            losses[name] = float(np.square(min(effect.alone or 0.0, 1.0)))
        forms = {one.node: one.form for one in plan.operators}
        borders = find_borders(list(prepared.graph), forms, list(prepared.graph.outputs), names)
        decided = {node_name(node) for node in prepared.graph if _is_decided(node)} & set(losses)
        self.forms = IntegerForms(losses, tuple(borders), frozenset(decided), form)

    def timed(self, graph: ir.Model, chosen: Collection[str]) -> tuple[ir.Model, frozenset[str]]:
        """A graph to be timed, ranges of few inputs, and what came to be on integers; see `quantize_chosen`."""
        return quantize_chosen(graph, self.forms.form, chosen, self._quick)

    def _observing(self, batches: Sequence[Mapping[str, np.ndarray]]) -> Context:
        return replace(self._context, calibration=list(batches), remarks=[], evidence={}, progress=None)


def quantize_chosen(
    graph: ir.Model, form: str, chosen: Collection[str], context: Context
) -> tuple[ir.Model, frozenset[str]]:
    """A copy of a graph with some operators on integers, and no others that have a weight.

    Args:
        graph: float.
        form: one of `INTEGER_FORMS`.
        chosen: names of operators with a weight, or of those whose place a chain has taken.
        context: its calibration gives the ranges.

    Returns:
        The copy, and the names of what came to be on integers: of `chosen`, and of operators that follow.
    """
    prepared = prepare(graph)
    quantize = Quantize(form=form)
    kept = {
        node_name(node) for node in prepared.graph if _is_decided(node) and stem_of(node_name(node), chosen) is None
    }
    while True:  # what rewrites for integer kernels have renamed is seen in the plan alone
        plan = quantize.planned(prepared, context, Overrides(dict.fromkeys(kept, "chosen so")))
        others = {one.node for one in plan.operators if one.form in _WITH_WEIGHT and one.weight_bits is not None}
        others = {name for name in others if stem_of(name, chosen) is None}
        if others <= kept:
            break
        kept |= others
    quantize.apply(prepared, plan)
    found = {one.node for one in plan.operators if one.form in (*ON_INTEGERS, *_WITH_WEIGHT)}
    return prepared, frozenset(stem_of(name, chosen) or name for name in found)


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


def prepare(model: ir.Model) -> ir.Model:
    """A copy after the exact passes of `PREPARATION`."""
    copy = model.clone()
    silent = Context()
    for single in PREPARATION:
        single.rewrite(copy, silent)
    return copy


def _is_decided(node: ir.Node) -> bool:
    return linear_operator(node) or is_table_lookup(node)


def _shares_weight(node: ir.Node) -> bool:
    """Whether somebody else reads the weight of an operator, too: the float copy would stay."""
    weight = node.inputs[0 if is_table_lookup(node) else 1] if _is_decided(node) and len(node.inputs) > 1 else None
    return weight is not None and weight.is_initializer() and len(weight.uses()) > 1
