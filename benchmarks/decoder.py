"""A decoder of any size as an exporter emits it, built from primitives with onnx_ir; its weights are lazy zeros.

RMSNorm, rotary positions by rotated halves from shared tables, grouped keys and values by Unsqueeze, Expand and
Reshape, a causal mask, a gated MLP; batch and sequence are open, and sizes are computed from Shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

_SMALL = 4096
"""Elements of tensors that are stored at once: tables of sizes and scalars, no weights."""


@dataclass(frozen=True)
class Size:
    """How large a decoder is; the defaults are 1.1 billion parameters."""

    layers: int = 22
    hidden: int = 2048
    heads: int = 32
    groups: int = 4
    width: int = 64
    mlp: int = 5632
    vocabulary: int = 32000
    positions: int = 2048


def small(layers: int) -> Size:
    """The same structure with a hidden size of 64."""
    return Size(layers, hidden=64, heads=4, groups=2, width=16, mlp=176, vocabulary=256, positions=128)


class Decoder:
    """Builds one model.

    Args:
        size: its sizes.
        read: called with the name of a weight whenever one is evaluated.
    """

    def __init__(self, size: Size, read: Callable[[str], None] = lambda name: None) -> None:
        self.size, self.read = size, read
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._count = 0

    def model(self) -> ir.Model:
        """The model, not in canonical form."""
        size = self.size
        tokens = ir.Value(
            name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"])
        )
        stream = self.op("Gather", self.weight("tokens.weight", size.vocabulary, size.hidden), tokens)
        cosine, sine = self.tables(tokens)
        mask = self.mask(tokens)
        for layer in range(size.layers):
            name = f"layers.{layer}"
            normed = self.norm(f"{name}.norm1", stream)
            stream = self.op("Add", stream, self.attention(f"{name}.attention", normed, cosine, sine, mask))
            stream = self.op("Add", stream, self.gated(f"{name}.mlp", self.norm(f"{name}.norm2", stream)))
        logits = self.linear("head", self.norm("norm", stream), size.hidden, size.vocabulary)
        logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["batch", "sequence", size.vocabulary])
        graph = ir.Graph(
            [tokens], [logits], nodes=self.nodes, initializers=self.initializers, opset_imports={"": 21}, name="decoder"
        )
        return ir.Model(graph, ir_version=10, producer_name="graphopt benchmarks")

    # Parts --------------------------------------------------------------------------------------------------

    def norm(self, name: str, x: ir.Value) -> ir.Value:
        """x / sqrt(mean(x**2) + 1e-6) * weight."""
        mean = self.op("ReduceMean", self.op("Pow", x, self.number(2.0)), self.numbers(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.number(1e-6)))
        return self.op(
            "Mul", self.op("Mul", x, self.op("Reciprocal", root)), self.weight(f"{name}.weight", self.size.hidden)
        )

    def linear(self, name: str, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        """MatMul with a weight."""
        return self.op("MatMul", x, self.weight(f"{name}.weight", inputs, outputs))

    def gated(self, name: str, x: ir.Value) -> ir.Value:
        """down(silu(gate(x)) * up(x))."""
        hidden, mlp = self.size.hidden, self.size.mlp
        gate = self.linear(f"{name}.gate", x, hidden, mlp)
        gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.linear(f"{name}.down", self.op("Mul", gate, self.linear(f"{name}.up", x, hidden, mlp)), mlp, hidden)

    def attention(self, name: str, x: ir.Value, cosine: ir.Value, sine: ir.Value, mask: ir.Value) -> ir.Value:
        """Grouped attention with rotary positions."""
        size = self.size
        batch, sequence = self.dimension(x, 0), self.dimension(x, 1)

        def project(key: str, count: int) -> ir.Value:
            y = self.linear(f"{name}.{key}", x, size.hidden, count * size.width)
            shape = self.op("Concat", batch, sequence, self.numbers(count), self.numbers(size.width), axis=0)
            return self.op("Transpose", self.op("Reshape", y, shape), perm=[0, 2, 1, 3])

        q = self.rotate(project("q", size.heads), cosine, sine)
        k = self.rotate(project("k", size.groups), cosine, sine)
        k, v = self.repeat(k, batch), self.repeat(project("v", size.groups), batch)
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Add", self.op("Mul", scores, self.number(size.width**-0.5)), mask)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        mixed = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = self.op("Concat", batch, sequence, self.numbers(size.heads * size.width), axis=0)
        return self.linear(f"{name}.o", self.op("Reshape", mixed, flat), size.heads * size.width, size.hidden)

    def repeat(self, x: ir.Value, batch: ir.Value) -> ir.Value:
        """Each key or value head once for every query head of its group."""
        size = self.size
        count, sequence = size.heads // size.groups, self.dimension(x, 2)
        wide = (batch, self.numbers(size.groups), self.numbers(count), sequence, self.numbers(size.width))
        x = self.op("Expand", self.op("Unsqueeze", x, self.numbers(2)), self.op("Concat", *wide, axis=0))
        flat = (batch, self.numbers(size.heads), sequence, self.numbers(size.width))
        return self.op("Reshape", x, self.op("Concat", *flat, axis=0))

    def rotate(self, x: ir.Value, cosine: ir.Value, sine: ir.Value) -> ir.Value:
        """x * cos + rotated(x) * sin, where rotated is the negated second half before the first."""
        half = self.size.width // 2
        first = self.op("Slice", x, self.numbers(0), self.numbers(half), self.numbers(3), self.numbers(1))
        second = self.op("Slice", x, self.numbers(half), self.numbers(2**62), self.numbers(3), self.numbers(1))
        rotated = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return self.op("Add", self.op("Mul", x, cosine), self.op("Mul", rotated, sine))

    def tables(self, tokens: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of all positions, `[1, 1, sequence, width]`, which all layers share."""
        positions = self.op("Range", self.number(0), self.scalar_dimension(tokens, 1), self.number(1))
        column = self.op("Unsqueeze", self.op("Cast", positions, to=int(ir.DataType.FLOAT)), self.numbers(1))
        half = self.op("Mul", column, self.weight("frequencies", 1, self.size.width // 2))
        angles = self.op("Unsqueeze", self.op("Concat", half, half, axis=-1), self.numbers(0, 1))
        return self.op("Cos", angles), self.op("Sin", angles)

    def mask(self, tokens: ir.Value) -> ir.Value:
        """0 where a position may be seen, a large negative number after it: `[sequence, sequence]`."""
        length = self.scalar_dimension(tokens, 1)
        positions = self.op("Range", self.number(0), length, self.number(1))
        later = self.op(
            "Less", self.op("Unsqueeze", positions, self.numbers(1)), self.op("Unsqueeze", positions, self.numbers(0))
        )
        return self.op("Where", later, self.number(-1e9), self.number(0.0))

    # Nodes and tensors --------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append a node and return its output."""
        node = ir.node(op_type, list(inputs), attributes=attributes, name=self._name(op_type))
        node.outputs[0].name = f"{node.name}_output"
        self.nodes.append(node)
        return node.outputs[0]

    def dimension(self, x: ir.Value, axis: int) -> ir.Value:
        """Size of an axis as a list of one number."""
        return self.op("Unsqueeze", self.scalar_dimension(x, axis), self.numbers(0))

    def scalar_dimension(self, x: ir.Value, axis: int) -> ir.Value:
        """Size of an axis as a scalar."""
        return self.op("Gather", self.op("Shape", x), self.number(axis), axis=0)

    def weight(self, name: str, *shape: int) -> ir.Value:
        """Zeros that are made when they are asked for."""

        def zeros() -> ir.Tensor:
            self.read(name)
            return ir.Tensor(np.zeros(shape, np.float32), name=name)

        tensor = ir.LazyTensor(zeros, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
        return self._initializer(name, tensor, ir.DataType.FLOAT, shape)

    def numbers(self, *numbers: int) -> ir.Value:
        """A constant list of whole numbers."""
        return self._constant(np.array(numbers, np.int64))

    def number(self, number: float) -> ir.Value:
        """A constant scalar: int64 of a whole number, float32 of the others."""
        return self._constant(np.array(number, np.int64 if isinstance(number, int) else np.float32))

    def _constant(self, array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(array, name=self._name("constant"))
        node = ir.node("Constant", [], attributes={"value": tensor}, name=tensor.name)
        node.outputs[0].name = f"{node.name}_output"
        self.nodes.append(node)
        return node.outputs[0]

    def _initializer(self, name: str, tensor: Any, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.initializers.append(value)
        return value

    def _name(self, base: str) -> str:
        self._count += 1
        return f"{base}_{self._count}"


def weights(model: ir.Model) -> Iterator[ir.Value]:
    """Initializers that are too large for sizes and scalars."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.size > _SMALL:
            yield value


def parameters(model: ir.Model) -> int:
    """Elements of all floating-point initializers."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return sum(tensor.size for tensor in tensors if tensor.dtype.is_floating_point())
