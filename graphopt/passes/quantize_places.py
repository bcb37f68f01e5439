"""Where the quantizers of a plan stand in the legalized float graph: what `quantize_apply` writes, for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.quantizer_places import DynamicPlace, LayerPlace, QuantizerPlace, QuantizerPlaces
from graphopt.ir.rewrite import constant
from graphopt.passes.quantize_apply import linear_operator, weight_axis
from graphopt.passes.quantize_blocks import Grid, block_scales
from graphopt.passes.quantize_placement import clamp_bounds, data_inputs, node_name, scaling_factor
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_weight_sites import WeightSite, weight_sites
from graphopt.passes.quantize_weights_apply import is_weight_alone


def quantizer_places(model: ir.Model, plan: QuantizePlan) -> QuantizerPlaces:
    """The quantizers of `plan`, one for each of its tensors and in their order.

    A quantizer behind an int8 kernel is read by everybody; one in front of a kernel, of a value that float operators
    make, by kernels only. A Relu or Clip that is folded into a quantizer stays before it: as long as the range lies
    inside the clamp's interval, both do the same.

    Args:
        model: the float graph, legalized as for the plan (`graphopt.passes.quantize_legalize`). It is not changed.
        plan: made for it.

    Raises:
        GraphoptError: the plan was made for another model.

    Example:
        >>> from graphopt.passes.contract import Context
        >>> from graphopt.passes.quantize import Quantize
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[1,2] x) => (float[1,2] y)
        ...     <float[2,2] w = {1, 2, 3, 4}> { [product] y = MatMul(x, w) }''')
        >>> plan = Quantize(form="static").plan(model, Context())
        >>> [(place.tensor.name, place.consumers) for place in quantizer_places(model, plan).quantizers]
        [('x', ('product',)), ('w', ('product',))]
    """
    return _Places(model, plan).found()


class _Places:
    def __init__(self, model: ir.Model, plan: QuantizePlan) -> None:
        self.nodes = list(model.graph)
        self.tensors = plan.tensors
        self.forms = {operator.node: operator.form for operator in plan.operators}
        self.values = {value.name: value for node in self.nodes for value in (*node.inputs, *node.outputs) if value}
        self.activations = {t.name: index for index, t in enumerate(plan.tensors) if t.role != "weight"}
        self.weights = {(t.name, t.axis): index for index, t in enumerate(plan.tensors) if t.role == "weight"}
        self.readers: dict[int, list[str]] = {}
        alone = any(map(is_weight_alone, plan.tensors))
        self.sites = weight_sites(model) if alone else {}

    def found(self) -> QuantizerPlaces:
        layers: list[LayerPlace] = []
        dynamic: dict[str, list[str]] = {}
        for node in self.nodes:
            form = self._form(node)
            if form in ("static", "integer"):
                for value in data_inputs(node):
                    self._read(value, node)
            if form in ("static", "dynamic") and linear_operator(node):
                self._read_weight(node.inputs[1], weight_axis(node), node)
            if form in ("weights", "table"):
                site = self.sites.get(node)
                self._read_weight(site.stored if isinstance(site, WeightSite) else node.inputs[0], 1, node)
            if form == "dynamic" and node.inputs[0] is not None:
                dynamic.setdefault(node.inputs[0].name or "", []).append(node.name or "")
            if form == "static" and linear_operator(node):
                layers.append(self._layer(node))
        quantizers = tuple(self._place(index, tensor) for index, tensor in enumerate(self.tensors))
        return QuantizerPlaces(quantizers, tuple(layers), tuple(DynamicPlace(n, tuple(r)) for n, r in dynamic.items()))

    def _read(self, value: ir.Value, node: ir.Node) -> None:
        index = self.activations.get(value.name or "")
        if index is not None:
            self.readers.setdefault(index, []).append(node.name or "")

    def _read_weight(self, value: ir.Value | None, axis: int, node: ir.Node) -> None:
        self.readers.setdefault(self._weight(value, axis), []).append(node.name or "")

    def _weight(self, value: ir.Value | None, axis: int) -> int:
        name = "" if value is None else value.name or ""
        index = self.weights.get((name, axis))
        if index is None:
            index = next((index for (other, _), index in self.weights.items() if other == name), None)
        if index is None:
            raise _other_model(f"no scales for weight {name!r}")
        return index

    def _layer(self, node: ir.Node) -> LayerPlace:
        value, factor = node.inputs[0], 1.0
        assert value is not None
        while (value.name or "") not in self.activations:
            producer = value.producer()
            if producer is None or self._form(producer) != "integer":
                raise _other_model(f"no range for {value.name!r}")
            factor *= scaling_factor(producer) or 1.0
            value = data_inputs(producer)[0]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        named = bias.name if bias is not None and constant(bias) is not None else None
        weight = self._weight(node.inputs[1], weight_axis(node))
        return LayerPlace(node.name or "", self.activations[value.name or ""], weight, factor, named)

    def _place(self, index: int, tensor: TensorPlan) -> QuantizerPlace:
        value = self.values.get(tensor.name)
        if value is None:
            raise _other_model(f"no value {tensor.name!r}")
        consumers: Sequence[str] | None = self.readers.get(index)
        producer, bounds = value.producer(), None
        if producer is not None and self._form(producer) in ("static", "folded"):
            consumers = None
            if self._form(producer) == "folded":
                bounds = clamp_bounds(producer)
        elif consumers is None:
            raise _other_model(f"no integer operator reads {tensor.name!r}")
        if is_weight_alone(tensor):  # whoever reads it reads the integers
            sites = (site for site in self.sites.values() if isinstance(site, WeightSite) and site.stored is value)
            return QuantizerPlace(tensor, None, None, _rule(tensor, next(sites)))
        return QuantizerPlace(tensor, None if consumers is None else tuple(dict.fromkeys(consumers)), bounds)

    def _form(self, node: ir.Node) -> str:
        return self.forms.get(node_name(node), "float")


def _rule(tensor: TensorPlan, site: WeightSite) -> _Rule:
    grid = Grid(tensor.bits, tensor.signed, tensor.block_size)
    return _Rule(grid, site.input_axis, site.factor, np.dtype(site.dtype.numpy()))


@dataclass(frozen=True)
class _Rule:
    """What `quantize_weights_apply` makes of a weight, rounded to nearest, as floats."""

    grid: Grid
    input_axis: int
    factor: float
    dtype: np.dtype[np.generic]

    def __call__(self, weight: np.ndarray) -> np.ndarray:
        stored = weight.astype(self.dtype)
        matrix = stored if self.input_axis == 0 else stored.T
        if self.factor != 1.0:
            matrix = matrix * self.dtype.type(self.factor)
        rounded = block_scales(matrix, self.grid, self.dtype).matrix() / self.factor
        return rounded if self.input_axis == 0 else rounded.T


def _other_model(where: str) -> GraphoptError:
    return GraphoptError(
        "the quantization plan was made for another model",
        where=where,
        help="use a plan with the very model that it was made from",
    )
