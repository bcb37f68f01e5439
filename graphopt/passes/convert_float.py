"""Pass convert-float: half precision, computed in where there are kernels for it, else stored in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.observe import Statistics, observe
from graphopt.ir.rewrite import constant, constant_tensor, is_op
from graphopt.ir.session import PROVIDERS
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.convert_kernels import half_ports, has_kernels
from graphopt.passes.convert_places import GAINING, Sides, choose_half, keep_transposed_products
from graphopt.passes.convert_ranges import HalfType, epsilon_region, mask_values, overflowing, unfit
from graphopt.passes.convert_write import HalfWriter, discard_unread_weights, store
from graphopt.passes.dequantize_model import is_quantized

FORMS = ("auto", "compute", "storage")
"""What may be asked for as `ConvertFloat.form`."""
_TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_SMALLEST_WEIGHT = 256
"""Elements from which a weight is worth a Cast of its own."""
_SAMPLES = 32
"""Inputs on which ranges are observed."""


@dataclass(frozen=True)
class ConvertFloat(Pass):
    """Half precision: weights stored in it, or operators that compute in it. Inputs and outputs keep their types.

    "storage": each weight is kept in half precision, with one Cast to float32 before its readers. onnxruntime folds the
    Casts when it loads the model, so it computes what it did, and as fast; the file is half as large. Rows picked from
    a table are cast behind the Gather, so that the table stays half in memory too.

    "compute": operators run in half precision where the provider has kernels, which onnxruntime is asked for
    (`graphopt.passes.convert_kernels`). The others are islands in float32, with the fewest Casts around them that a
    minimum cut finds (`graphopt.passes.convert_places`).

    What half precision does not hold stays in float32, with the reason: weights beyond 65504 or too small, operators
    whose values came within a factor of two of the end when the model was observed, and numbers such as the 1e-12
    under a root, together with the squares before it and the quotient behind it. Numbers far below zero that only tell
    a softmax what to leave out are cut to half of the lowest number, so that two of them can still be added.

    Options:
        dtype: "float16" or "bfloat16".
        form: "storage", "compute", or "auto": compute on cuda, storage on cpu, where onnxruntime 1.31 has no kernel
            of Conv, Gemm or MatMul in half precision.
        exclude: shell patterns of node names, weight names or operator types that stay in float32.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,16] x, float[16,16] w_fc) => (float16[N,16] y) {
          h = MatMul (x, w_fc)
          y = Cast <to = 10> (h)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,16] x, float16[16,16] w_fc) => (float16[N,16] y) {
          w_fc_float32 = Cast <to = 1> (w_fc)
          h = MatMul (x, w_fc_float32)
          y = Cast <to = 10> (h)
        }
    """

    name: ClassVar[str] = "convert-float"
    semantics: ClassVar[Semantics] = Semantics.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = (
        "eliminate-identity",
        "fold-constants",
        "fuse-attention",
        "fuse-normalization",
        "fuse-activations",
        "fold-batchnorm",
        "fold-affine",
        "merge-branches",
        "merge-linear",
        "merge-common-subexpressions",
        "prune-channels",
        "decompose",
        "meet-budget",
        "dequantize",
        "quantize",
        "fold-reconstruction",
    )

    dtype: str = "float16"
    form: str = "auto"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise GraphoptError(f"unknown dtype {self.dtype!r}", help=f"one of {', '.join(_TYPES)}")
        if self.form not in FORMS:
            raise GraphoptError(f"unknown form {self.form!r}", help=f"one of {', '.join(FORMS)}")
        if isinstance(self.exclude, str):
            raise GraphoptError("exclude is one string", help=f"give a list of patterns: exclude = [{self.exclude!r}]")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Convert in the form asked for; the remarks say what stays in float32."""
        half = HalfType.of(_TYPES[self.dtype])
        form = self.form
        if form == "auto":
            form = "compute" if context.target == "cuda" else "storage"
            why = (
                f"form {form!r}: its kernels compute in {self.dtype}"
                if form == "compute"
                else f"form {form!r}: onnxruntime's CPU kernels of Conv, Gemm and MatMul compute in float32 only"
            )
            context.note("convert-float", why, "model")
        if form == "storage":
            self._store(model, half, context)
        else:
            self._compute(model, half, context)

    # Storage.

    def _store(self, model: ir.Model, half: HalfType, context: Context) -> None:
        weights: list[ir.Value] = []
        for value in model.graph.initializers.values():
            if value.dtype != ir.DataType.FLOAT or value.is_graph_input() or value.is_graph_output():
                continue
            tensor = value.const_value
            if tensor is None or tensor.size < _SMALLEST_WEIGHT or not value.uses():
                continue
            reason = self._why_not_stored(value, half)
            if reason is None:
                weights.append(value)
            else:
                context.missed(f"store weight as {self.dtype}", reason, value)
        store(model, weights, half)
        saved = sum(2 * (value.const_value.size if value.const_value is not None else 0) for value in weights)
        if weights:
            context.note("convert-float", f"{self.dtype} weights: {len(weights)}, {saved / 1e6:.3g} MB less", "model")

    def _why_not_stored(self, value: ir.Value, half: HalfType) -> str | None:
        pattern = self._excluding(value.name or "")
        if pattern is not None:
            return f"excluded by {pattern!r}"
        for use in value.uses():
            pattern = self._excluding(use.node.name or "", use.node.op_type)
            if pattern is not None:
                return f"its reader is excluded by {pattern!r}"
            if is_quantized(use.node):
                return f"it belongs to a quantized tensor ({use.node.op_type})"
            if is_op(use.node, "Cast"):
                return "it is cast by the model itself"
        array = constant(value)
        assert array is not None
        return unfit(array, half)

    # Compute.

    def _compute(self, model: ir.Model, half: HalfType, context: Context) -> None:
        if not has_kernels(context.target):
            provider = PROVIDERS.get(context.target, context.target)
            if self.dtype == "bfloat16":
                why = f"this onnxruntime has no {provider} to ask for kernels, without which bfloat16 does not load"
                context.missed("compute in bfloat16", why, "model")
                return
            why = f"this onnxruntime has no {provider} to ask for kernels: taken are the operators defined for the type"
            context.note("convert-float", why, "model")
        nodes = list(model.graph)
        sides = self._sides(model, half, context)
        constants = {
            value: None
            for node, ports in sides.ports.items()
            for index in sorted(ports.inputs)
            if (value := node.inputs[index]) is not None and constant_tensor(value) is not None
        }
        masks, carriers = mask_values(constants, half)
        self._keep_constants(sides, [value for value in constants if value not in masks], half)
        self._keep_observed(model, sides, half, carriers, context)
        keep_transposed_products(sides)
        chosen = choose_half(nodes, sides, context.sizes)
        for node in nodes:
            if node in sides.kept:
                context.missed(f"compute {node.op_type} in {self.dtype}", sides.kept[node], node)
            elif node in sides.ports and node not in chosen:
                why = "it stands among operators in float32, and Casts would cost more than it saves"
                context.missed(f"compute {node.op_type} in {self.dtype}", why, node)
        if not any(node.op_type in GAINING for node in chosen):
            context.missed(f"compute in {self.dtype}", "no operator that takes time has a kernel here", "model")
        HalfWriter(model, half, masks).write({node: sides.ports[node] for node in nodes if node in chosen})
        discard_unread_weights(model)
        for value in masks:
            lowest = -half.largest / 2
            context.note("convert-float", f"numbers below {self.dtype} are cut to {lowest:.6g}: it is a mask", value)
        if chosen:
            context.note("convert-float", f"{len(chosen)} of {len(nodes)} operators compute in {self.dtype}", "model")

    def _sides(self, model: ir.Model, half: HalfType, context: Context) -> Sides:
        sides = Sides()
        for node in model.graph:
            ports = half_ports(node, model.opset_imports, half.dtype, context.target)
            if ports is None:
                continue
            names = [value.name or "" for value in node.inputs if value is not None and value.is_initializer()]
            pattern = self._excluding(node.name or "", node.op_type, *names)
            if pattern is not None:
                sides.kept[node] = f"excluded by {pattern!r}"
            elif isinstance(ports, str):
                sides.kept[node] = ports
            elif is_quantized(node) and node.domain == "":
                sides.kept[node] = "it quantizes from or to float32"
            else:
                sides.ports[node] = ports
        return sides

    def _keep_constants(self, sides: Sides, constants: Collection[ir.Value], half: HalfType) -> None:
        for value in constants:
            array = constant(value)
            reason = None if array is None else unfit(array, half)
            if reason is None:
                continue
            for use in value.uses():
                if use.node not in sides.ports or use.idx not in sides.ports[use.node].inputs:
                    continue
                sides.kept.setdefault(use.node, f"its constant {value.name!r} does not fit: {reason}")
                if "which is 0" in reason:
                    for node in epsilon_region(use.node) & sides.ports.keys():
                        sides.kept.setdefault(node, f"it stands beside {use.node.name!r}, whose constant does not fit")

    def _keep_observed(
        self, model: ir.Model, sides: Sides, half: HalfType, carriers: Collection[ir.Value], context: Context
    ) -> None:
        found = overflowing(self._observe(model, sides, context), half, carriers)
        for node in sides.ports:
            for values, verb in ((node.outputs, "makes"), (node.inputs, "reads")):
                for value in values:
                    if value is not None and value.name in found:
                        reached = f"it {verb} {found[value.name]:.4g}, {self.dtype} ends at {half.largest:.6g}"
                        sides.kept.setdefault(node, reached)

    def _observe(self, model: ir.Model, sides: Sides, context: Context) -> Mapping[str, Statistics]:
        """Statistics of what the convertible operators read and make, over calibration or probes."""
        values = {
            value.name: None
            for node in sides.ports
            for value in (*node.inputs, *node.outputs)
            if value is not None and value.dtype == ir.DataType.FLOAT and constant_tensor(value) is None and value.name
        }
        if not values or self.dtype == "bfloat16":
            return {}
        source = "calibration" if context.calibration is not None else "probes"
        try:
            inputs = context.inputs(model, source, samples=_SAMPLES)
            found = observe(model, [name for name in values if name], inputs.batches, threads=context.threads)
        except DataError as error:
            if source == "calibration":
                raise
            context.note("convert-float", f"no value was observed: {error.what}", "model")
            return {}
        context.note("convert-float", f"ranges observed on {inputs.source}", "model")
        return found

    def _excluding(self, *names: str) -> str | None:
        return next((pattern for pattern in self.exclude if any(fnmatchcase(name, pattern) for name in names)), None)
