"""Where a quantization loses: every tensor and every operator measured, ranked by what it does to the outputs.

The worth of an operator is told by quantizing it alone, all else in float. What each does alone is close to additive
in squares, and an operator that breaks the net shows even where another one breaks it too (leaving one of two in float
shows nothing). For the worst the reverse is measured as well: all quantized but this one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.observe import bound_sizes
from graphopt.ir.cost import cost
from graphopt.ir.figures import drawing
from graphopt.ir.session import open_session
from graphopt.passes.quantize_effects import (
    MEASURES,
    Batches,
    Effect,
    Measure,
    Rounding,
    measure_named,
    roundings,
    single_effects,
    units,
    without,
    write_plan,
)
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_placement import node_name
from graphopt.passes.quantize_plan import OperatorPlan, QuantizePlan

EXACT_OPERATORS = 128
"""Up to so many operators the effect of each on the outputs is measured; of more, that of the worst alone."""
WORST = 16
"""How many operators count as the worst."""
_SHOWN = 16


@dataclass(frozen=True)
class TensorDiagnosis:
    """What one quantizer does.

    Attributes:
        name: of the tensor.
        role: "activation", "weight" or "constant".
        bits: its width.
        sqnr: signal to quantization noise of the quantizer itself on the float values, dB.
        channels: the same channel by channel, the value that a quarter of them stay below; None for weights. Far below
            `sqnr` where few large channels set the range and the others drown.
        accumulated: the same as `sqnr` for the tensor as it comes out of the fully quantized net; None for weights.
        cosine: of the angle between the float tensor and that of the quantized net (for weights, the quantized one).
        clipped: share of the float values outside of the range.
        bits_used: entropy of its integers in bits. One outlier in 8 bits may leave less than 3.
        source: where the range came from.
    """

    name: str
    role: str
    bits: int
    sqnr: float
    channels: float | None
    accumulated: float | None
    cosine: float
    clipped: float
    bits_used: float
    source: str


@dataclass(frozen=True)
class OperatorDiagnosis:
    """What quantizing one operator does.

    Attributes:
        node: its name.
        op_type: its operator.
        form: how it runs, see `OperatorPlan`.
        macs: its share of the multiply-accumulates of the net, 0 to 1.
        sqnr: of its result where it alone is quantized, dB.
        cosine: of the angle between that result and the float one.
        alone: how far the outputs move where it alone is quantized, in the measure of the diagnosis.
        is_exact: whether `alone` was measured. Else it stands for the relative error of the operator's own result,
            as if the rest of the net passed on relative errors unchanged.
        left_out: how far the outputs move where everything but this one is quantized; None where not measured.
        weakest: the tensor among its own that loses most, and how.
    """

    node: str
    op_type: str
    form: str
    macs: float
    sqnr: float
    cosine: float
    alone: float
    is_exact: bool
    left_out: float | None
    weakest: str


@dataclass(frozen=True)
class Diagnosis:
    """Where a quantization loses; print it, or `to_json`.

    Attributes:
        error: how far the outputs of the fully quantized net are from those of the float one.
        measure: what `error`, `alone` and `left_out` are: "rms", "kl" or the name of a function.
        samples: number of batches it was measured on.
        operators: the worst first.
        tensors: the one that loses most first.
    """

    error: float
    measure: str
    samples: int
    operators: tuple[OperatorDiagnosis, ...] = ()
    tensors: tuple[TensorDiagnosis, ...] = ()

    def top(self, count: int) -> Diagnosis:
        """The same with the first `count` operators and tensors."""
        return replace(self, operators=self.operators[:count], tensors=self.tensors[:count])

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads, also as text; infinities are the strings "inf" and "-inf"."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diagnosis:
        """The diagnosis that `to_json` wrote, also after a round trip through text.

        Raises:
            GraphoptError: the data is no such diagnosis.

        Example:
            >>> found = Diagnosis(0.1, "rms", 4)
            >>> Diagnosis.from_json(found.to_json()) == found
            True
        """
        try:
            operators = tuple(_made(OperatorDiagnosis, one) for one in data["operators"])
            tensors = tuple(_made(TensorDiagnosis, one) for one in data["tensors"])
            return cls(float(data["error"]), str(data["measure"]), int(data["samples"]), operators, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise GraphoptError(f"not a diagnosis: {error}", help="pass what Diagnosis.to_json wrote") from error

    def summary(self) -> list[str]:
        """One line for each of the three worst operators."""
        return [
            f"diagnosis: {one.op_type} {one.node} alone moves the outputs by {one.alone:.2g} ({self.measure}); "
            f"{one.weakest}"
            for one in self.operators[:3]
        ]

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the effect of each operator and the noise of each tensor.

        Args:
            path: ends in .svg, .png or .pdf.

        Raises:
            GraphoptError: matplotlib is not installed, or it knows no such format.
            WriteError: the path cannot be written.
        """
        return _plot(self, Path(path))

    def __str__(self) -> str:
        head = f"quantized: outputs move by {self.error:.3g} ({self.measure}), measured on {self.samples} batches"
        rows = [("operator", "type", "form", "MACs", "SQNR", "cosine", "alone", "left out", "loses most in")]
        rows += [_operator_row(one) for one in self.operators[:_SHOWN]]
        tensors = [
            ("tensor", "role", "bits", "used", "SQNR", "channels", "in the net", "cosine", "clipped", "range from")
        ]
        tensors += [_tensor_row(one) for one in self.tensors[:_SHOWN]]
        shown = [(rows, self.operators), (tensors, self.tensors)]
        parts = [head, *(_table(lines) + _more(entries) for lines, entries in shown if entries)]
        if any(not one.is_exact for one in self.operators):
            parts.append("~ estimated from the operator's own result")
        return "\n\n".join(parts)


def diagnose(
    model: ir.Model,
    plan: QuantizePlan,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    measure: str | Measure = "rms",
    exact: int = EXACT_OPERATORS,
    threads: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Diagnosis:
    """Measure what a plan does to each tensor, to each operator and to the outputs.

    Each node runs once for each batch, beside the tail of the net behind each operator. The batches are held in
    memory; other values as far as `graphopt.ir.pieces.MEMORY_BYTES` go, and in a temporary folder beyond.

    Args:
        model: the float model that the plan was made for; it is not changed.
        plan: what `Quantize.plan` decided.
        batches: inputs by name.
        measure: "rms", "kl" (for class logits), or a function of two lists of outputs, the float ones first, that
            returns how far the others are away.
        exact: up to how many operators the outputs are computed with each quantized alone. Of more operators only the
            `WORST` are, after a first-order estimate of each; see `OperatorDiagnosis.is_exact`.
        threads: of onnxruntime, 0 for all cores.
        progress: called with what is done, out of how much, and a text.

    Raises:
        DataError: there is no batch, or one does not fit.
        GraphoptError: the measure is unknown, or the plan was made for another model.

    Example:
        >>> from graphopt.passes.contract import Context
        >>> from graphopt.passes.quantize import Quantize
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[1,2] x) => (float[1,2] y)
        ...     <float[2,2] w = {1, 2, 3, 4}> { y = MatMul (x, w) }''')
        >>> data = [{"x": np.array([[1, 2]], np.float32)}]
        >>> found = diagnose(model, Quantize(form="static").plan(model, Context(calibration=data)), data)
        >>> [(one.op_type, one.alone < 0.05) for one in found.operators]
        [('MatMul', True)]
    """
    name, measured = _measure(measure)
    held: Batches = list(batches)
    if not held:
        raise DataError("there is not a single set of inputs to diagnose on", help="pass at least one batch")
    legal = model.clone()
    if not plan.weights_alone:
        legalize(legal, static=plan.static)
    chosen = units(plan)
    if not chosen:
        return Diagnosis(0.0, name, len(held))
    nodes = {node_name(node): node for node in legal.graph}
    costs = {entry.node: entry.macs for entry in cost(legal, bound_sizes(legal, held[0])).nodes}
    total = max(sum(costs.values()), 1)
    runner = _Runner(legal, plan, held, measured, threads)
    error = runner.error(plan)
    rounded = {(one.planned.name, one.planned.axis): one for one in runner.roundings()}
    found: list[OperatorDiagnosis] = []
    for done, (operator, effect) in enumerate(runner.effects(chosen, exact)):
        node = nodes[operator.node]
        found.append(_operator(operator, effect, costs.get(node, 0) / total, _weakest(legal, plan, node, rounded)))
        if progress is not None:
            progress(done, len(chosen), f"quantize {operator.node} alone")
    found.sort(key=lambda one: -one.alone)
    found = runner.measure_worst(found)
    tensors = sorted(
        (_tensor(one) for one in rounded.values() if one.codes.any()),
        key=lambda one: min(one.sqnr, one.sqnr if one.channels is None else one.channels),
    )
    return Diagnosis(error, name, len(held), tuple(found), tuple(tensors))


class _Runner:
    """The runs of one diagnosis."""

    def __init__(self, model: ir.Model, plan: QuantizePlan, batches: Batches, measure: Measure, threads: int) -> None:
        self.model, self.plan, self.batches = model, plan, batches
        self.measure, self.threads = measure, threads
        session = open_session(model, threads=threads)
        self.reference = [session.run_feeds(feeds) for feeds in batches]

    def roundings(self) -> list[Rounding]:
        return roundings(self.model, self.plan, self.batches, threads=self.threads)

    def effects(self, operators: Sequence[OperatorPlan], exact: int) -> Iterable[tuple[OperatorPlan, Effect]]:
        by_name = {operator.node: operator for operator in operators}
        for name, effect in self._effects(list(by_name), outputs=len(operators) <= exact):
            yield by_name[name], effect

    def _effects(self, names: Sequence[str], *, outputs: bool) -> Iterable[tuple[str, Effect]]:
        return single_effects(
            self.model,
            self.plan,
            self.batches,
            names=names,
            measure=self.measure,
            outputs=outputs,
            threads=self.threads,
        )

    def error(self, plan: QuantizePlan) -> float:
        """How far the outputs move under a plan."""
        quantized = self.model.clone()
        write_plan(quantized, plan)
        session = open_session(quantized, threads=self.threads)
        runs = (session.run_feeds(feeds) for feeds in self.batches)
        return max(self.measure(whole, run) for whole, run in zip(self.reference, runs, strict=True))

    def measure_worst(self, found: Sequence[OperatorDiagnosis]) -> list[OperatorDiagnosis]:
        """The first ones measured in full, and put in order; the others as they are, behind them."""
        worst, others = list(found[:WORST]), list(found[WORST:])
        estimated = [one.node for one in worst if not one.is_exact]
        if estimated:
            moved = {name: effect.alone for name, effect in self._effects(estimated, outputs=True)}
            worst = [replace(one, alone=moved.get(one.node) or 0.0, is_exact=True) for one in worst]
            worst.sort(key=lambda one: -one.alone)
        left = [self.error(without(self.model, self.plan, [one.node])) for one in worst]
        return [replace(one, left_out=error) for one, error in zip(worst, left, strict=True)] + others


def _measure(measure: str | Measure) -> tuple[str, Measure]:
    if not isinstance(measure, str):
        return getattr(measure, "__name__", type(measure).__name__), measure
    if measure not in MEASURES:
        raise GraphoptError(f"unknown measure {measure!r}", help=f"one of {', '.join(MEASURES)}, or a function")
    return measure, measure_named(measure)


def _operator(operator: OperatorPlan, effect: Effect, macs: float, weakest: str) -> OperatorDiagnosis:
    return OperatorDiagnosis(
        operator.node,
        operator.op_type,
        operator.form,
        macs,
        effect.local.sqnr,
        effect.local.cosine,
        effect.local.relative if effect.alone is None else effect.alone,
        effect.alone is not None,
        None,
        weakest,
    )


def _weakest(
    model: ir.Model, plan: QuantizePlan, node: ir.Node, rounded: Mapping[tuple[str, int | None], Rounding]
) -> str:
    """The tensor with the lowest ratio among those that an operator reads and writes, in words."""
    readers = [reader for value in node.outputs for reader in value.consumers()]
    folded = {operator.node for operator in plan.operators if operator.form == "folded"}
    results = [*node.outputs, *(reader.outputs[0] for reader in readers if node_name(reader) in folded)]
    names = {value.name for value in (*node.inputs, *results) if value is not None}
    own = [one for (name, _), one in rounded.items() if name in names and one.codes.any()]
    if not own:
        return "-"
    worst = min(own, key=_least_sqnr)
    planned = worst.planned
    clipped = f", {worst.share_clipped:.1%} clipped" if worst.share_clipped >= 0.001 else ""
    ratio = f"{worst.own.sqnr:.0f} dB"
    if worst.channel_sqnr is not None and worst.channel_sqnr < worst.own.sqnr - 6.0:
        ratio += f", a quarter of its channels below {worst.channel_sqnr:.0f} dB"
    used = f"{worst.bits_used:.1f} of {planned.bits} bits"
    return f"{planned.role} {planned.name} ({ratio}, {used}{clipped})"


def _least_sqnr(one: Rounding) -> float:
    return one.own.sqnr if one.channel_sqnr is None else min(one.own.sqnr, one.channel_sqnr)


def _tensor(one: Rounding) -> TensorDiagnosis:
    planned, is_activation = one.planned, one.planned.role == "activation"
    cosine = (one.accumulated if is_activation else one.own).cosine
    accumulated = one.accumulated.sqnr if is_activation else None
    return TensorDiagnosis(
        planned.name,
        planned.role,
        planned.bits,
        one.own.sqnr,
        one.channel_sqnr,
        accumulated,
        cosine,
        one.share_clipped,
        one.bits_used,
        planned.source,
    )


def _operator_row(one: OperatorDiagnosis) -> tuple[str, ...]:
    left = "-" if one.left_out is None else f"{one.left_out:.3g}"
    alone = f"{'' if one.is_exact else '~'}{one.alone:.3g}"
    macs = f"{one.macs:.1%}"
    return one.node, one.op_type, one.form, macs, f"{one.sqnr:.1f}", f"{one.cosine:.4f}", alone, left, one.weakest


def _tensor_row(one: TensorDiagnosis) -> tuple[str, ...]:
    accumulated = "-" if one.accumulated is None else f"{one.accumulated:.1f}"
    channels = "-" if one.channels is None else f"{one.channels:.1f}"
    figures = (
        f"{one.bits_used:.1f}",
        f"{one.sqnr:.1f}",
        channels,
        accumulated,
        f"{one.cosine:.4f}",
        f"{one.clipped:.2%}",
    )
    return one.name, one.role, str(one.bits), *figures, one.source


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _more(entries: Sequence[Any]) -> str:
    return f"\n... {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _made(kind: type[Any], data: Mapping[str, Any]) -> Any:
    numbers = {"macs", "sqnr", "channels", "accumulated", "cosine", "alone", "left_out", "clipped", "bits_used"}
    if set(data) != {entry.name for entry in fields(kind)}:
        raise ValueError(f"fields are {', '.join(sorted(data))}")
    return kind(**{k: float(v) if k in numbers and v is not None else v for k, v in data.items()})


def _plot(diagnosis: Diagnosis, path: Path) -> Path:
    rows = max(min(len(diagnosis.operators), 40), min(len(diagnosis.tensors), 40), 4)
    with drawing(path, width=14, height=1.5 + 0.22 * rows) as figure:
        left, right = figure.subplots(1, 2)
        operators, tensors = diagnosis.operators[:40][::-1], diagnosis.tensors[:40][::-1]
        left.barh([one.node for one in operators], [_finite(one.alone) for one in operators])
        left.axvline(_finite(diagnosis.error), color="black", linestyle=":", label="everything quantized")
        left.set_xlabel(f"outputs move by ({diagnosis.measure}), this operator alone quantized")
        left.legend(loc="lower right")
        right.barh([one.name for one in tensors], [_finite(one.sqnr) for one in tensors], label="quantizer alone")
        inside = [one for one in tensors if one.accumulated is not None]
        right.plot(
            [_finite(one.accumulated or 0.0) for one in inside], [one.name for one in inside], "k.", label="in the net"
        )
        right.set_xlabel("SQNR, dB")
        right.legend(loc="lower right")
    return path


def _finite(number: float) -> float:
    return min(max(number, -100.0), 100.0) if not math.isnan(number) else 0.0
