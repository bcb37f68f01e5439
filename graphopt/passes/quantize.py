"""Pass quantize: 8-bit integers wherever onnxruntime has a fast kernel for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.observe import Statistics
from graphopt.ir.linear import linear_at
from graphopt.ir.origin import remember_origin
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.rewrite import constant, is_op
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.dequantize_model import dequantize_model
from graphopt.passes.dequantize_regions import quantized_regions
from graphopt.passes.quantize_apply import apply_plan, linear_operator, weight_axis
from graphopt.passes.quantize_datafree import RANGE_SOURCES, observe_ranges, range_origin
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_placement import (
    OPERANDS,
    WIDE,
    Placement,
    already_quantized,
    data_inputs,
    node_name,
    place,
    scaling_factor,
)
from graphopt.passes.quantize_plan import Overrides, QuantizePlan, remark
from graphopt.passes.quantize_ranges import (
    RANGES,
    WEIGHT_SCALES,
    activation_range,
    asymmetric_quantizer,
    symmetric_scales,
)
from graphopt.passes.quantize_saturation import SAFE_BITS, kernels_of, saturating_kernels
from graphopt.passes.quantize_search import repair, weights_under
from graphopt.passes.quantize_speed import COMPARED, COMPARED_ON, fastest
from graphopt.passes.quantize_weights import WeightOptions, plan_weights
from graphopt.passes.quantize_weights_apply import apply_weights

Observed = dict[str, tuple[Statistics, str]]
"""Statistics of activations by name, each with the source of the inputs that it was observed on."""
PLACEMENTS = ("auto", "static", "dynamic", OPERANDS, "weights")
"""What may be asked for as `Quantize.form`."""
_WIDE = (
    "activations have 16 bits: onnxruntime's CPU kernels compute in floats between them, slower than floats alone; "
    "for targets that have kernels of 16 bits"
)
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

    Weights alone, for what is bound by memory or size (language models): products compute in floats, their weights are
    integers with a scale (and zero point) for each block of inputs, in the layout that onnxruntime makes MatMulNBits of

        w_d = DequantizeLinear <axis = 0, block_size = 32> (w_q, w_s, w_z)         y = MatMul (x, w_d)

    Integers of 2 and 4 bits have types of their own, tables of embeddings have rows of packed bytes. Weights are read
    one at a time, so files larger than memory will do; see `graphopt.passes.quantize_weights`.

    Options:
        ranges: "minmax", "percentile", "entropy" or "mse": how observed values become a range.
        form: "auto" (Conv static; Gemm and MatMul static where their input arrives on integers, else dynamic),
            "static" or "dynamic" for all linear operators, "operands" for what products read (those of two activations
            too) and nothing else, for compilers that place the rest (OpenVINO), "weights" for weights alone.
        exclude: shell patterns of node names, weight names or operator types that stay float.
        percentile: percent of the values that "percentile" keeps inside the range.
        bits: width of activations and weights, 2 to 8, stored in 8.
        activation_bits: width of activations, 2 to 8, None for `bits`; or 16, for targets that compute so, in form
            "static": onnxruntime's CPU kernels compute in floats between such integers, slower than floats alone.
        weight_bits: width of the weights of linear operators and of tables, None for `bits`.
        measure: whether form "auto" is the one of all forms that runs fastest on this machine, with the operators in
            float that are faster so, timed on the whole graph (`graphopt.passes.quantize_speed`); else rules say it.
        weight_scales: "max" or "mse": whether the scale of a channel of a weight covers its largest magnitude, or has
            the least squared error.
        source: where the inputs come from that ranges are observed on, see `graphopt.passes.quantize_datafree`:
            "auto" is calibration where given, else "steered".
        search: whether the result is measured, and the operators that break it returned to 8 bits or to float: until
            the budget of the run is met, or without one until outputs are no longer ruined
            (`graphopt.passes.quantize_search`).
        weight_range: "reduced" keeps the weights of linear operators to 7 bits, -63 to 63, with which no sum of
            two products saturates in 16 bits on any machine; "full" uses `bits`; "auto" reduces those whose
            kernels saturate on this machine, which is measured (`graphopt.passes.quantize_saturation`).
        block_size: of form "weights": how many inputs share a scale: 16, 32, 64, 128 or 256; 0 for one scale an output.
        symmetric: of form "weights": signed integers without zero points, a tenth less exact at 4 bits.
        rounding: of form "weights": "nearest", or "error-feedback" on inputs (`Context.inputs`).
        contrib: of form "weights": MatMulNBits and GatherBlockQuantized of com.microsoft instead of standard
            operators, for models that cannot be lifted to opset 21 and to fix the accuracy level.
        accuracy_level: of MatMulNBits with `contrib`: 0 or 1 compute in float32, 4 rounds activations to int8, as
            onnxruntime does by default. Without `contrib` the session config
            "session.qdq_matmulnbits_accuracy_level" says it; a remark tells the error of each level, measured.
        requantize: turn a quantized model back to float first, as pass `dequantize` does. Without it such a model is
            left alone; where only its weights are quantized, operators of other kinds are quantized all the same.

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
        "legalize",
        "merge-branches",
        "pool-reduce-mean",
        "prune-channels",
        "decompose",
        "meet-budget",
        "dequantize",
        "equalize-channels",
        "migrate-scales",
    )

    ranges: str = "minmax"
    form: str = "auto"
    exclude: tuple[str, ...] = ()
    percentile: float = 99.99
    bits: int = 8
    activation_bits: int | None = None
    weight_range: str = "auto"
    weight_bits: int | None = None
    measure: bool = False
    weight_scales: str = "max"
    source: str = "auto"
    search: bool = True
    block_size: int = 32
    symmetric: bool = False
    rounding: str = "nearest"
    contrib: bool = False
    accuracy_level: int = 4
    requantize: bool = False

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
        if self.activation_bits == WIDE and self.form not in ("auto", "static"):
            raise GraphoptError(
                f"activations of {WIDE} bits have no form {self.form!r}", help="leave form out, or say 'static'"
            )
        widths = {"bits": self.bits, "weight_bits": self.width}
        widths |= {} if self.activation_bits == WIDE else {"activation_bits": self.data_width}
        for name, value in widths.items():
            if isinstance(value, bool) or value != int(value) or not 2 <= value <= 8:
                raise GraphoptError(f"{name} is {value!r}, it must be a whole number between 2 and 8")
        if self.weight_scales not in WEIGHT_SCALES:
            raise GraphoptError(
                f"unknown weight_scales {self.weight_scales!r}", help=f"one of {', '.join(WEIGHT_SCALES)}"
            )
        if self.source not in RANGE_SOURCES:
            raise GraphoptError(f"unknown source {self.source!r}", help=f"one of {', '.join(RANGE_SOURCES)}")
        self._weight_options()

    @property
    def width(self) -> int:
        """Bits of weights."""
        return self.bits if self.weight_bits is None else self.weight_bits

    @property
    def data_width(self) -> int:
        """Bits of activations."""
        return self.bits if self.activation_bits is None else self.activation_bits

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Plan, return to float what breaks the net, and apply; the remarks say what was declined and why."""
        if self.form == "weights":  # nothing is run without a budget: the model may be larger than memory
            self._rewrite_weights(model, context)
            return
        observed: Observed = {}
        source = self.unquantized(model, context)
        chosen, kept = self._fastest(source, context, observed)
        plan = chosen._decide(source, context, Overrides(kept), observed)
        if self.search:

            def decide(more: Overrides) -> QuantizePlan:
                overrides = Overrides({**kept, **more.kept_float}, more.widened)
                return chosen._decide(source, context.silent(), overrides, observed)

            plan = repair(source, plan, context, decide=decide, write=self.apply)
        if plan.operators or already_quantized(source) is None:
            remark(plan, self.exclude, context)
        self.apply(model, plan)

    def _rewrite_weights(self, model: ir.Model, context: Context) -> None:
        source, options = self.unquantized(model, context), self._weight_options()
        plan = plan_weights(source, options, context)
        if self.search and context.judge is not None:
            silent = context.silent()
            plan = repair(
                source,
                plan,
                context,
                decide=lambda overrides: weights_under(source, options, silent, overrides),
                write=lambda candidate, chosen: self._apply(candidate, chosen, silent),
            )
        self._apply(model, plan, context)

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
        model = self.unquantized(model, context)
        if self.form == "weights":
            return plan_weights(model, self._weight_options(), context)
        observed: Observed = {}
        chosen, kept = self._fastest(model, context, observed)
        plan = chosen._decide(model, context, Overrides(kept), observed)
        if plan.operators or already_quantized(model) is None:
            remark(plan, self.exclude, context)
        return plan

    def planned(self, model: ir.Model, context: Context, overrides: Overrides = Overrides()) -> QuantizePlan:  # noqa: B008
        """The plan for a float model in `form` as it is, with some operators decided beforehand, without remarks.

        Args:
            model: as for `plan`.
            context: as for `plan`.
            overrides: what is decided.

        Raises:
            DataError: the calibration data is empty or does not fit the model.
        """
        return self._decide(model, context.silent(), overrides, {})

    def fastest_form(self, model: ir.Model, context: Context) -> str:
        """Which of "auto", "static" and "dynamic" runs fastest on this machine, everything quantized."""
        silent, observed = context.silent(), Observed()

        def decide(form: str, overrides: Overrides) -> QuantizePlan:
            return replace(self, form=form)._decide(model, silent, overrides, observed)

        return fastest(model, COMPARED, silent, decide=decide, write=self.apply, by_kind=False).form

    def unquantized(self, model: ir.Model, context: Context) -> ir.Model:
        """What is planned for: the model itself, or with `requantize` a float copy of one that is quantized already."""
        if not self.requantize or already_quantized(model) is None:
            return model
        copy = model.clone()
        dequantize_model(copy, context.missed)
        return copy

    def _fastest(self, model: ir.Model, context: Context, observed: Observed) -> tuple[Quantize, Mapping[str, str]]:
        """This pass in the form that is the fastest here, and what is faster in float, with the reasons."""
        if self.data_width == WIDE:
            context.note("quantize", _WIDE, "model")
            return replace(self, form="static"), {}
        if not self.measure or self.form != "auto":
            return self, {}
        silent = context.silent()

        def decide(form: str, overrides: Overrides) -> QuantizePlan:
            return replace(self, form=form)._decide(model, silent, overrides, observed)

        found = fastest(model, COMPARED_ON.get(context.target, COMPARED), context, decide=decide, write=self.apply)
        context.evidence["speed"] = found
        for line in found.summary():
            context.note("quantize", line, "model")
        return replace(self, form=found.form), found.kept_float

    def _decide(self, model: ir.Model, context: Context, overrides: Overrides, observed: Observed) -> QuantizePlan:
        """The plan under `overrides`; ranges that were observed before are taken from `observed` and added there."""
        regions, kept_float = quantized_regions(model), overrides.kept_float
        if regions is not None:
            context.note("quantize", str(regions), regions.first)
            if not regions.weights_alone or self.form == "weights":
                return QuantizePlan()
            kept_float = {**regions.kept, **kept_float}
        original, model, wide = model, model.clone(), self.data_width == WIDE
        legalize(model, static=self.form != "dynamic")
        placement = place(model, form=self.form, exclude=tuple(self.exclude), kept_float=kept_float, wide=wide)
        if "static" not in placement.forms.values():
            model = original.clone()
            legalize(model, static=False)
            placement = place(model, form=self.form, exclude=tuple(self.exclude), kept_float=kept_float, wide=wide)
        activations = self._activations(model, placement, context, overrides, observed)
        tensors = activations + self._constants(placement) + self._weights(placement, activations, context, overrides)
        bits = {tensor.name: tensor.bits for tensor in tensors if tensor.role == "weight"}
        weight_bits = {
            node_name(node): next((bits[v.name] for v in node.inputs if v is not None and v.name in bits), None)
            for node in placement.forms
        }
        operators = (replace(one, weight_bits=weight_bits.get(one.node)) for one in placement.operators)
        return QuantizePlan(tuple(tensors), tuple(operators))

    def apply(self, model: ir.Model, plan: QuantizePlan) -> None:
        """Rewrite `model` in place as the plan says.

        What a plan of form "weights" leaves to the weights (scales) is made from them again, and what it leaves to
        inputs (`rounding="error-feedback"`) from inputs that are made up; `contrib` is an option of this pass.

        Raises:
            GraphoptError: the plan was made for another model. The model may then be half rewritten.
        """
        self._apply(model, plan, Context())

    def _apply(self, model: ir.Model, plan: QuantizePlan, context: Context) -> None:
        if not any(operator.form != "float" for operator in plan.operators):
            return
        if self.requantize:
            dequantize_model(model, lambda what, why, where: None)
        if not plan.weights_alone:
            legalize(model, static=plan.static)
        remember_origin(model)
        done = apply_weights(model, plan, context, contrib=self.contrib, accuracy_level=self.accuracy_level)
        if not plan.weights_alone:
            others = tuple(operator for operator in plan.operators if operator.node not in done)
            apply_plan(model, replace(plan, operators=others))

    def _weight_options(self) -> WeightOptions:
        return WeightOptions(
            self.width,
            self.block_size,
            self.symmetric,
            self.rounding,
            self.contrib,
            self.accuracy_level,
            tuple(self.exclude),
        )

    def _activations(
        self, model: ir.Model, placement: Placement, context: Context, overrides: Overrides, observed: Observed
    ) -> list[TensorPlan]:
        names = {value.name or "": range_origin(value).name or "" for value in placement.quantized}
        aliases = {name: origin for name, origin in names.items() if name not in observed}
        if aliases:
            found, sources = observe_ranges(
                model, aliases, context, source=self.source, histograms=self.ranges != "minmax"
            )
            observed.update({name: (found[name], sources[name]) for name in aliases})
        wide = {
            value.name
            for node in placement.forms
            if node_name(node) in overrides.widened
            for value in (*data_inputs(node), *node.outputs, *(user.outputs[0] for user in node.outputs[0].consumers()))
        }
        bits = {name: max(8, self.data_width) if name in wide else self.data_width for name in names}
        return [self._activation(name, *observed[name], bits[name], placement, context) for name in names]

    def _activation(
        self, name: str, statistics: Statistics, source: str, bits: int, placement: Placement, context: Context
    ) -> TensorPlan:
        if statistics.non_finite:
            context.note("quantize", f"{statistics.non_finite} values are NaN or infinite, left out of the range", name)
        low, high = activation_range(statistics, self.ranges, self.percentile, bits)
        half = 2 ** (bits - 1)
        balanced = name in placement.balanced or (name in placement.signed and low < 0.0)
        if balanced:  # the integer in the middle is 0.0
            high = max(-low, high)
            low = -high * half / (half - 1)
        scale, zero = asymmetric_quantizer(low, high, bits)
        signed = balanced and name in placement.signed
        return TensorPlan(name, "activation", bits, signed, None, (scale,), (0 if signed else zero,), source)

    def _constants(self, placement: Placement) -> list[TensorPlan]:
        plans: list[TensorPlan] = []
        for value in placement.constants:
            array = constant(value)
            assert array is not None
            scale, zero = asymmetric_quantizer(float(array.min()), float(array.max()), self.data_width)
            plans.append(
                TensorPlan(value.name or "", "constant", self.data_width, False, None, (scale,), (zero,), "weights")
            )
        return plans

    def _reduced(self, placement: Placement, context: Context) -> set[ir.Node]:
        """The linear operators whose weights have `SAFE_BITS`; a note says which and why."""
        kernels = {node: kernels_of(node, form) for node, form in placement.forms.items() if linear_operator(node)}
        if not kernels or self.width <= SAFE_BITS or self.data_width == WIDE:  # products of floats do not saturate
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
            why = f"weights have {self.width} bits{' as asked' if self.weight_range == 'full' else ''}, {measured}"
            why += "; sums may be wrong" if saturated else "; x86 without VNNI needs weight_range='reduced'"
        context.note("quantize", why, "model")
        return saturated if self.weight_range == "auto" else set()

    def _widest(self, node: ir.Node, form: str, context: Context) -> int:
        """The bits that the weights of a linear operator can have without sums that saturate."""
        wrong = self.weight_range == "auto" and kernels_of(node, form) & saturating_kernels(context.target)
        return SAFE_BITS if wrong or self.weight_range == "reduced" else 8

    def _weights(
        self, placement: Placement, activations: list[TensorPlan], context: Context, overrides: Overrides
    ) -> list[TensorPlan]:
        """One plan for each weight and axis; readers that share a weight share its bits and larger scale a channel."""
        scale_of = {tensor.name: tensor.scale[0] for tensor in activations}
        reduced = self._reduced(placement, context)
        scales: dict[tuple[str, int], np.ndarray] = {}
        widths: dict[tuple[str, int], int] = {}
        for node, form in placement.forms.items():
            table = node.inputs[0]
            if form == "table" and table is not None:
                scales[table.name or "", 1] = symmetric_scales(_stored(table), 1, self.width, method=self.weight_scales)
            linear = linear_at(node) if form in ("static", "dynamic") else None
            weight = constant(node.inputs[1]) if linear is not None else None
            if linear is None or weight is None or linear.weight_index != 1:
                continue
            value, axis = node.inputs[1], weight_axis(node)
            bits = SAFE_BITS if node in reduced else self.width
            if node_name(node) in overrides.widened:
                bits = self._widest(node, form, context)
            stored_bias = form == "static" and not is_op(node, "MatMul")
            found = symmetric_scales(
                weight,
                axis,
                bits,
                linear.bias() if stored_bias else None,
                _input_scale(linear.data, placement, scale_of),
                self.weight_scales,
            )
            assert value is not None
            key = (value.name or "", axis)
            scales[key] = np.maximum(scales[key], found) if key in scales else found
            widths[key] = min(widths.get(key, bits), bits)
        plans: list[TensorPlan] = []
        for key, found in scales.items():
            (name, axis), bits = key, widths.get(key, self.width)
            scale = tuple(map(float, found))
            plans.append(TensorPlan(name, "weight", bits, True, axis, scale, (0,) * found.size, "weights"))
        return plans


def _stored(value: ir.Value) -> np.ndarray:
    array = constant(value)
    assert array is not None
    return array


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
