"""Pass quantize: 8-bit integers wherever onnxruntime has a fast kernel for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.observe import Statistics, observe
from graphopt.ir.linear import linear_at
from graphopt.ir.origin import remember_origin
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.rewrite import constant, is_op
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.quantize_apply import apply_plan, linear_operator, weight_axis
from graphopt.passes.quantize_datafree import observe_probes
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_placement import Placement, already_quantized, data_inputs, place, scaling_factor
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_ranges import RANGES, activation_range, asymmetric_quantizer, symmetric_scales
from graphopt.passes.quantize_saturation import SAFE_BITS, kernels_of, saturating_kernels

PLACEMENTS = ("auto", "static", "dynamic")
"""What may be asked for as `Quantize.form`."""
WEIGHT_RANGES = ("auto", "full", "reduced")
"""What may be asked for as `Quantize.weight_range`."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize to int8 in the form that onnxruntime's CPU kernels run fastest, planned first, then applied.

    Static, for convolutional networks: activations are uint8 with a zero point, q = saturate(round(x / s) + z),
    weights int8 with one scale a channel and zero point 0, biases int32 in units of s_x * s_w, so that

        y = s_x s_w (sum of (q_x - z_x) q_w + q_b)

    (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference"). Every operator between the linear ones runs on integers too; Relu and Clip are left to the
    saturation of the quantizer. Dynamic, for the linear layers of transformers: the input's range is taken at
    run time, products of two activations and softmax stay float. Embedding tables are stored as int8 with one
    scale a column; their rows are picked first and dequantized behind.

    Options:
        ranges: "minmax", "percentile" or "entropy": how observed values become a range.
        form: "auto" (Conv static; Gemm and MatMul static where their input arrives on integers, else dynamic),
            "static" or "dynamic" for all linear operators.
        exclude: shell patterns of node names, weight names or operator types that stay float.
        percentile: percent of the values that "percentile" keeps inside the range.
        bits: width of activations and weights, 2 to 8, stored in 8.
        weight_range: "reduced" keeps the weights of linear operators to 7 bits, -63 to 63, with which no sum of
            two products saturates in 16 bits on any machine; "full" uses `bits`; "auto" reduces those whose
            kernels saturate on this machine, which is measured (`graphopt.passes.quantize_saturation`).

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[1,3,8,8] x, float[4,3,1,1] w) => (float[1,4,8,8] y) { c = Conv(x, w) y = Relu(c) }

    After::

        x_q = QuantizeLinear (x, x_s, x_z)         x_d = DequantizeLinear (x_q, x_s, x_z)
        w_d = DequantizeLinear <axis = 0> (w_q, w_s, w_z)
        c = Conv (x_d, w_d)
        y_q = QuantizeLinear (c, y_s, y_z)         y = DequantizeLinear (y_q, y_s, y_z)
    """

    name: ClassVar[str] = "quantize"
    semantics: ClassVar[Semantics] = Semantics.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = (
        "fold-constants",
        "fold-batchnorm",
        "fold-affine",
        "fuse-pad",
        "merge-linear",
        "merge-branches",
        "pool-reduce-mean",
        "prune-channels",
    )

    ranges: str = "minmax"
    form: str = "auto"
    exclude: tuple[str, ...] = ()
    percentile: float = 99.99
    bits: int = 8
    weight_range: str = "auto"

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise GraphoptError(f"unknown ranges {self.ranges!r}", help=f"one of {', '.join(RANGES)}")
        if isinstance(self.exclude, str):
            raise GraphoptError("exclude is one string", help=f"give a list of patterns: exclude = [{self.exclude!r}]")
        if self.form not in PLACEMENTS:
            raise GraphoptError(f"unknown form {self.form!r}", help=f"one of {', '.join(PLACEMENTS)}")
        if self.weight_range not in WEIGHT_RANGES:
            raise GraphoptError(
                f"unknown weight_range {self.weight_range!r}", help=f"one of {', '.join(WEIGHT_RANGES)}"
            )
        if not 50.0 < self.percentile <= 100.0:
            raise GraphoptError(f"percentile is {self.percentile}, it must be above 50 and at most 100")
        if not 2 <= self.bits <= 8:
            raise GraphoptError(f"bits is {self.bits}, it must be between 2 and 8")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Plan and apply; the remarks say what was declined and where the ranges came from."""
        self.apply(model, self.plan(model, context))

    def plan(self, model: ir.Model, context: Context) -> QuantizePlan:
        """Decide everything, and change nothing.

        Args:
            model: canonical, BatchNormalization folded.
            context: `calibration` gives ranges, without it probes do; `sizes` binds symbolic dimensions.

        Returns:
            The plan; empty for a model that is quantized already or has nothing to quantize.

        Raises:
            DataError: the calibration data is empty or does not fit the model.
        """
        node = already_quantized(model)
        if node is not None:
            context.note("quantize", f"the model is quantized already ({node.op_type})", node)
            return QuantizePlan()
        original, model = model, model.clone()
        legalize(model, static=self.form != "dynamic")
        placement = place(model, form=self.form, exclude=tuple(self.exclude))
        if "static" not in placement.forms.values():
            model = original.clone()
            legalize(model, static=False)
            placement = place(model, form=self.form, exclude=tuple(self.exclude))
        activations = self._activations(model, placement, context)
        tensors = activations + self._constants(placement) + self._weights(placement, activations, context)
        plan = QuantizePlan(tuple(tensors), tuple(placement.operators))
        _remark(plan, context)
        return plan

    def apply(self, model: ir.Model, plan: QuantizePlan) -> None:
        """Rewrite `model` in place as the plan says.

        Raises:
            GraphoptError: the plan was made for another model. The model may then be half rewritten.
        """
        if not any(operator.form != "float" for operator in plan.operators):
            return
        legalize(model, static=plan.static)
        remember_origin(model)
        apply_plan(model, plan)

    def _activations(self, model: ir.Model, placement: Placement, context: Context) -> list[TensorPlan]:
        names = [value.name or "" for value in placement.quantized]
        if not names:
            return []
        histograms = self.ranges != "minmax"
        if context.calibration is not None:
            found = observe(model, names, context.calibration, histograms=histograms, threads=context.threads)
            sources = dict.fromkeys(names, "calibration")
        else:
            found, anchored = observe_probes(
                model, names, context.sizes, histograms=histograms, threads=context.threads, specs=context.specs
            )
            sources = {
                value.name or "": "batchnorm" if _origin(value).name in anchored else "probes"
                for value in placement.quantized
            }
        return [self._activation(name, found[name], sources[name], context) for name in names]

    def _activation(self, name: str, statistics: Statistics, source: str, context: Context) -> TensorPlan:
        if statistics.non_finite:
            context.note("quantize", f"{statistics.non_finite} values are NaN or infinite, left out of the range", name)
        low, high = activation_range(statistics, self.ranges, self.percentile, self.bits)
        scale, zero = asymmetric_quantizer(low, high, self.bits)
        return TensorPlan(name, "activation", self.bits, False, None, (scale,), (zero,), source)

    def _constants(self, placement: Placement) -> list[TensorPlan]:
        plans: list[TensorPlan] = []
        for value in placement.constants:
            array = constant(value)
            assert array is not None
            scale, zero = asymmetric_quantizer(float(array.min()), float(array.max()), self.bits)
            plans.append(TensorPlan(value.name or "", "constant", self.bits, False, None, (scale,), (zero,), "weights"))
        return plans

    def _reduced(self, placement: Placement, context: Context) -> set[ir.Node]:
        """The linear operators whose weights have `SAFE_BITS`; a note says which and why."""
        kernels = {node: kernels_of(node, form) for node, form in placement.forms.items() if linear_operator(node)}
        if not kernels or self.bits <= SAFE_BITS:
            return set()
        if self.weight_range == "reduced":
            context.note("quantize", f"weights have {SAFE_BITS} bits as asked, {len(kernels)} operators", "model")
            return set(kernels)
        wrong = frozenset[str]().union(*kernels.values()) & saturating_kernels(context.target)
        saturated = {node for node, used in kernels.items() if used & wrong}
        measured = f"saturation on this machine (measured): {', '.join(sorted(wrong)) or 'none'}"
        if self.weight_range == "auto" and saturated:
            why = f"weights have {SAFE_BITS} bits in {len(saturated)} of {len(kernels)} operators, {measured}"
        else:
            why = f"weights have {self.bits} bits{' as asked' if self.weight_range == 'full' else ''}, {measured}"
            why += "; sums may be wrong" if saturated else "; x86 without VNNI needs weight_range='reduced'"
        context.note("quantize", why, "model")
        return saturated if self.weight_range == "auto" else set()

    def _weights(self, placement: Placement, activations: list[TensorPlan], context: Context) -> list[TensorPlan]:
        """One plan for each weight and axis; readers that share a weight share its bits and larger scale a channel."""
        scale_of = {tensor.name: tensor.scale[0] for tensor in activations}
        reduced = self._reduced(placement, context)
        scales: dict[tuple[str, int], np.ndarray] = {}
        widths: dict[tuple[str, int], int] = {}
        for node, form in placement.forms.items():
            table = node.inputs[0]
            if form == "table" and table is not None:
                scales[table.name or "", 1] = symmetric_scales(_stored(table), 1, self.bits)
            linear = linear_at(node) if form in ("static", "dynamic") else None
            weight = constant(node.inputs[1]) if linear is not None else None
            if linear is None or weight is None or linear.weight_index != 1:
                continue
            value, axis = node.inputs[1], weight_axis(node)
            bits = SAFE_BITS if node in reduced else self.bits
            stored_bias = form == "static" and not is_op(node, "MatMul")
            found = symmetric_scales(
                weight,
                axis,
                bits,
                linear.bias() if stored_bias else None,
                _input_scale(linear.data, placement, scale_of),
            )
            assert value is not None
            key = (value.name or "", axis)
            scales[key] = np.maximum(scales[key], found) if key in scales else found
            widths[key] = min(widths.get(key, bits), bits)
        plans: list[TensorPlan] = []
        for key, found in scales.items():
            (name, axis), bits = key, widths.get(key, self.bits)
            scale = tuple(map(float, found))
            plans.append(TensorPlan(name, "weight", bits, True, axis, scale, (0,) * found.size, "weights"))
        return plans


def _stored(value: ir.Value) -> np.ndarray:
    array = constant(value)
    assert array is not None
    return array


def _origin(value: ir.Value) -> ir.Value:
    """The value that a folded clamp reads, else the value itself."""
    producer = value.producer()
    if producer is not None and is_op(producer, "Relu", "Clip") and producer.inputs[0] is not None:
        return producer.inputs[0]
    return value


def _input_scale(value: ir.Value, placement: Placement, scale_of: Mapping[str, float]) -> float:
    """Scale of the integers that `value` arrives on: its own quantizer, or the one it was moved from."""
    factor = 1.0
    while (value.name or "") not in scale_of:
        producer = value.producer()
        if producer is None or placement.forms.get(producer) != "integer":
            return 1.0
        factor *= scaling_factor(producer) or 1.0
        value = data_inputs(producer)[0]
    return scale_of[value.name or ""] * factor


def _remark(plan: QuantizePlan, context: Context) -> None:
    for operator in plan.operators:
        if operator.form == "float":
            context.missed(f"quantize {operator.op_type}", operator.reason, operator.node)
    sources = plan.sources()
    if sources:
        counted = ", ".join(f"{count} from {source}" for source, count in sorted(sources.items()))
        samples = getattr(context.calibration, "samples", None)
        counted += f" ({samples} samples)" if samples else ""
        context.note("quantize", f"ranges of {sum(sources.values())} activations: {counted}", "model")
    if not any(operator.form != "float" for operator in plan.operators):
        context.missed("quantize", "no operator has an int8 form here", "model")
