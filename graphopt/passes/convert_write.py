"""Write half precision into a graph: weights stored in it behind a Cast, or operators that compute in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.ir.rewrite import Rewriter, constant_tensor, discard_if_dead, discard_if_unread, is_op
from graphopt.passes.convert_kernels import DTYPE_ATTRIBUTES, Ports
from graphopt.passes.convert_ranges import HalfType
from graphopt.passes.dequantize_values import derived


def store(model: ir.Model, weights: Collection[ir.Value], half: HalfType) -> None:
    """Keep these float32 initializers in half precision, each with one Cast to float32 in front of its readers.

    Rows that Gather picks are cast behind it, so that a table stays half at run time too.
    """
    rewriter = Rewriter(model)
    for value in weights:
        tensor = value.const_value
        assert tensor is not None
        uses = tuple(value.uses())
        picks = all(is_op(use.node, "Gather") and use.idx == 0 for use in uses)
        value.const_value = derived(tensor, half.cast, half.dtype)
        value.type = ir.TensorType(half.dtype)
        if picks:
            for node in dict.fromkeys(use.node for use in uses):
                result = node.outputs[0]
                cast = rewriter.insert(node, "Cast", [result], like=result, suffix="half", attributes={"to": 1})
                rewriter.interpose(result, cast)
                result.type = ir.TensorType(half.dtype)
            continue
        result = ir.Value(name=rewriter.unique_name(f"{value.name}_float32"), shape=value.shape)
        result.type = ir.TensorType(ir.DataType.FLOAT)
        cast = ir.node("Cast", [value], attributes={"to": 1}, outputs=[result])
        cast.name = result.name
        for use in uses:
            use.node.replace_input_with(use.idx, result)
        model.graph.insert_before(model.graph[0], cast)


class HalfWriter:
    """Turns chosen operators to half precision: constants converted, one Cast for each value that changes sides."""

    def __init__(self, model: ir.Model, half: HalfType, masks: Collection[ir.Value]) -> None:
        self.model, self.half, self.masks = model, half, masks
        self.rewriter = Rewriter(model)
        self._stored: dict[ir.Value, ir.Value] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._own: set[ir.Node] = set()

    def write(self, ports: Mapping[ir.Node, Ports]) -> None:
        """Convert the operators in `ports`; every other reader of what they make gets it back as float32."""
        made = [node.outputs[index] for node, changed in ports.items() for index in sorted(changed.outputs)]
        nodes = list(self.model.graph)
        for value in made:
            value.type = ir.TensorType(self.half.dtype)
        for node, changed in ports.items():
            self._convert_attributes(node)
            for index in sorted(changed.inputs):
                value = node.inputs[index]
                if value is not None:
                    node.replace_input_with(index, self._as_half(value))
        for value in made:
            self._give_back(value, ports)
        for node in nodes:
            if node in ports and is_op(node, "Cast") and node.inputs[0] is not None and node.graph is not None:
                self._drop_no_op(node, node.inputs[0])

    def _as_half(self, value: ir.Value) -> ir.Value:
        if value.dtype == self.half.dtype:
            return value
        tensor = constant_tensor(value)
        if tensor is None:
            return self._cast(value, self.half.dtype)
        if value not in self._stored:
            function: Callable[[np.ndarray], np.ndarray] = self.half.masked if value in self.masks else self.half.cast
            name = f"{value.name}_{self.half.dtype.name.lower()}"
            converted = derived(tensor, function, self.half.dtype)
            self._stored[value] = self.rewriter.initializer(self.model.graph, name, converted)
        return self._stored[value]

    def _give_back(self, value: ir.Value, ports: Mapping[ir.Node, Ports]) -> None:
        """A float32 copy for the readers that want one, subgraphs and the interface included."""
        for use in tuple(value.uses()):
            kept = use.node in ports and use.idx in ports[use.node].inputs
            if not kept and use.node not in self._own:
                use.node.replace_input_with(use.idx, self._cast(value, ir.DataType.FLOAT))
        if value.is_graph_output():
            copy = self._cast(value, ir.DataType.FLOAT)
            outputs = self.model.graph.outputs
            for index, output in enumerate(outputs):
                if output is value:
                    outputs[index] = copy
            copy.name, value.name = value.name, copy.name
            copy.shape = value.shape

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self._casts:
            name = self.rewriter.unique_name(
                f"{value.name}_{'float32' if to == ir.DataType.FLOAT else to.name.lower()}"
            )
            result = ir.Value(name=name, shape=value.shape)
            result.type = ir.TensorType(to)
            node = ir.node("Cast", [value], attributes={"to": int(to)}, outputs=[result])
            node.name = name
            graph, producer = self.model.graph, value.producer()
            if producer is not None:
                graph.insert_after(producer, node)
            else:
                graph.insert_before(graph[0], node)
            self._casts[value, to] = result
            self._own.add(node)
        return self._casts[value, to]

    def _convert_attributes(self, node: ir.Node) -> None:
        name = DTYPE_ATTRIBUTES.get(node.op_type)
        found = None if name is None else node.attributes.get(name)
        if name is not None and node.outputs[0].dtype == self.half.dtype:
            if found is None or found.as_int() == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrInt64(name, int(self.half.dtype))
        elif node.op_type == "ConstantOfShape":
            filling = node.attributes.get("value")
            array = np.zeros(1, np.float32) if filling is None else filling.as_tensor().numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(self.half.cast(array), dtype=self.half.dtype))

    def _drop_no_op(self, node: ir.Node, source: ir.Value) -> None:
        """A Cast of the model between types that are now the same, such as one from float16 to float32."""
        result = node.outputs[0]
        if source.dtype == result.dtype and self.rewriter.bypass(result, source):
            discard_if_dead(node)


def discard_unread_weights(model: ir.Model) -> None:
    """Remove the initializers that nothing reads any more."""
    for value in tuple(model.graph.initializers.values()):
        discard_if_unread(value)
