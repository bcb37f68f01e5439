"""Random graphs for the dependency engine: every operator that cuts, joins, permutes or ties channels, by chance.

A graph grows from values [batch, channels, length]; each step takes values that exist and adds one. Channel counts
are small and have several divisors, so that splits, groups and merges meet each other.
"""

from __future__ import annotations

from random import Random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LENGTH = 4
Value = tuple[str, int]
"""Name and number of channels of a value [batch, channels, LENGTH]."""


class GraphGrower:
    """Grows one graph; `model()` gives it as a proto."""

    def __init__(self, seed: int) -> None:
        self.random, self.numbers = Random(seed), np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: list[Value] = []
        self.count = 0
        self.values.append(self.conv(("x", 3), channels=self.random.choice((8, 12))))

    def model(self, steps: int) -> onnx.ModelProto:
        for _ in range(steps):
            name = self.random.choice(STEPS)
            made = getattr(self, name)(self.random.choice(self.values[-4:]))
            self.values.extend(value for value in (made if isinstance(made, list) else [made]) if 0 < value[1] <= 48)
        last = self.conv(self.values[-1], channels=5)
        pooled = self.node("ReduceMean", [last[0], self.integers([2])], keepdims=0)
        second = self.conv(self.values[len(self.values) // 2], channels=3)
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, LENGTH])],
            [
                helper.make_tensor_value_info(pooled, TensorProto.FLOAT, ["batch", 5]),
                helper.make_tensor_value_info(second[0], TensorProto.FLOAT, ["batch", 3, LENGTH]),
            ],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    # Pieces ---------------------------------------------------------------------------------------------------

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def node(self, op_type: str, inputs: list[str], **attributes: object) -> str:
        name = self.fresh("v")
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def weight(self, *shape: int, around: float = 0.0) -> str:
        name = self.fresh("w")
        scale = 1.0 / np.sqrt(max(int(np.prod(shape[1:])), 1))
        array = (around + scale * self.numbers.standard_normal(shape)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, values: list[int]) -> str:
        name = self.fresh("i")
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def divisors(self, number: int) -> list[int]:
        return [size for size in range(2, number) if number % size == 0]

    # Steps ----------------------------------------------------------------------------------------------------

    def conv(self, value: Value, channels: int | None = None) -> Value:
        name, size = value
        wanted = channels or self.random.choice((6, 8, 12, 16))
        groups = 1
        if channels is None:
            groups = self.random.choice([1, 1, *[d for d in self.divisors(size) if wanted % d == 0]])
        kernel = self.random.choice((1, 3))
        inputs = [name, self.weight(wanted, size // groups, kernel)]
        if self.random.random() < 0.5:
            inputs.append(self.weight(wanted))
        pads = [kernel // 2] * 2
        return self.node("Conv", inputs, group=groups, pads=pads, kernel_shape=[kernel]), wanted

    def depthwise(self, value: Value) -> Value:
        name, size = value
        multiplier = self.random.choice((1, 1, 2))
        weight = self.weight(size * multiplier, 1, 3)
        return self.node("Conv", [name, weight], group=size, pads=[1, 1], kernel_shape=[3]), size * multiplier

    def transposed(self, value: Value) -> Value:
        name, size = value
        groups = self.random.choice([1, *self.divisors(size)[:1]])
        each = self.random.choice((2, 4))
        node = self.node("ConvTranspose", [name, self.weight(size, each, 1)], group=groups, kernel_shape=[1])
        return node, each * groups

    def unary(self, value: Value) -> Value:
        op = self.random.choice(("Relu", "Tanh", "Sigmoid", "Neg", "Softplus", "HardSwish", "Erf", "Cos"))
        return self.node(op, [value[0]]), value[1]

    def batchnorm(self, value: Value) -> Value:
        size = value[1]
        parameters = [self.weight(size, around=1.0), self.weight(size), self.weight(size)]
        self.weights.append(
            numpy_helper.from_array(self.numbers.uniform(0.5, 2, size).astype(np.float32), self.fresh("w"))
        )
        return self.node("BatchNormalization", [value[0], *parameters, self.weights[-1].name]), size

    def group_norm(self, value: Value) -> Value:
        name, size = value
        groups = self.random.choice(self.divisors(size) or [1])
        flat = self.node("Reshape", [name, self.integers([0, groups, -1])])
        centred = self.node("Sub", [flat, self.node("ReduceMean", [flat, self.integers([2])])])
        back = self.node("Reshape", [centred, self.integers([0, size, LENGTH])])
        return self.node("Mul", [back, self.weight(size, 1, around=1.0)]), size

    def scaled(self, value: Value) -> Value:
        op = self.random.choice(("Mul", "Add"))
        return self.node(op, [value[0], self.weight(value[1], 1, around=1.0)]), value[1]

    def meeting(self, value: Value) -> Value:
        same = [other for other in self.values if other[1] == value[1]]
        other = self.random.choice(same)
        return self.node(self.random.choice(("Add", "Mul", "Sub", "Max")), [value[0], other[0]]), value[1]

    def joined(self, value: Value) -> Value:
        other = self.random.choice(self.values)
        return self.node("Concat", [value[0], other[0]], axis=1), value[1] + other[1]

    def sliced(self, value: Value) -> Value:
        name, size = value
        start, step = self.random.choice((0, 1, 2)), self.random.choice((1, 1, 2, 3, -1))
        if step < 0:
            start, end = size - 1, -size - 1
        else:
            end = self.random.choice((size, size - 1))
        length = len(range(size)[start : None if step < 0 else end : step])
        operands = [self.integers([number]) for number in (start, end, 1, step)]
        return self.node("Slice", [name, *operands]), length

    def halves(self, value: Value) -> list[Value]:
        name, size = value
        if size < 2:
            return [value]
        first = self.random.randrange(1, size)
        outputs = [self.fresh("v"), self.fresh("v")]
        sizes = self.integers([first, size - first])
        self.nodes.append(helper.make_node("Split", [name, sizes], outputs, name=f"n_{outputs[0]}", axis=1))
        return [(outputs[0], first), (outputs[1], size - first)]

    def gathered(self, value: Value) -> Value:
        name, size = value
        count = self.random.choice((size, size // 2 + 1, 6))
        indices = [self.random.randrange(-size, size) for _ in range(count)]
        return self.node("Gather", [name, self.integers(indices)], axis=1), count

    def same_picks(self, value: Value) -> Value:
        """One channel, several times, then cut in two: a class that covers a whole axis."""
        name, size = value
        picked = self.node("Gather", [name, self.integers([self.random.randrange(size)] * 4)], axis=1)
        cut = self.node("Relu", [self.node("Reshape", [picked, self.integers([0, 2, 2, LENGTH])])])
        return self.node("Reshape", [cut, self.integers([0, 4, LENGTH])]), 4

    def rolled(self, value: Value) -> Value:
        """The value and itself moved by one channel, added: all channels are one class."""
        name, size = value
        last, first = (
            self.node("Slice", [name, *(self.integers([number]) for number in (start, end, 1))])
            for start, end in ((size - 1, size), (0, size - 1))
        )
        return self.node("Add", [name, self.node("Concat", [last, first], axis=1)]), size

    def outer(self, value: Value) -> Value:
        """All products of two channels of the same axis, cut anew and put together again."""
        name, size = value
        small = self.conv((name, size), channels=self.random.choice((4, 6)))
        product = self.node(
            "Mul",
            [
                self.node("Unsqueeze", [small[0], self.integers([1])]),
                self.node("Unsqueeze", [small[0], self.integers([2])]),
            ],
        )
        wide = small[1] ** 2
        flat = self.node("Reshape", [product, self.integers([0, wide, LENGTH])])
        half = small[1] // 2
        cut = self.node("Reshape", [flat, self.integers([0, 2, half, 2, half, LENGTH])])
        scaled = self.node("Mul", [cut, self.weight(2, 1, 1, 1, 1, around=1.0)])
        return self.node("Reshape", [scaled, self.integers([0, wide, LENGTH])]), wide

    def counted(self, value: Value) -> Value:
        """Divided by the root of its own number of elements, which the graph counts."""
        count = self.node("Cast", [self.node("Size", [value[0]])], to=TensorProto.FLOAT)
        return self.node("Div", [value[0], self.node("Sqrt", [count])]), value[1]

    def permuted(self, value: Value) -> Value:
        name, size = value
        order = self.numbers.permutation(size).tolist()
        return self.node("Gather", [name, self.integers(order)], axis=1), size

    def padded(self, value: Value) -> Value:
        name, size = value
        before, after = self.random.choice(((0, 2), (1, 1), (2, 0)))
        return self.node("Pad", [name, self.integers([0, before, 0, 0, after, 0])]), size + before + after

    def tiled(self, value: Value) -> Value:
        return self.node("Tile", [value[0], self.integers([1, 2, 1])]), 2 * value[1]

    def regrouped(self, value: Value) -> Value:
        """Cut into heads x width, do something along one of the two, put together again in either order."""
        name, size = value
        heads = self.random.choice(self.divisors(size) or [1])
        width = size // heads
        cut = self.node("Reshape", [name, self.integers([0, heads, width, LENGTH])])
        kind = self.random.randrange(6)
        if kind == 0:
            cut = self.node("Mul", [cut, self.weight(heads, 1, 1, around=1.0)])
        elif kind == 1:
            cut = self.node("Add", [cut, self.weight(width, 1)])
        elif kind == 2:
            cut = self.node("Add", [cut, self.node("ReduceSum", [cut, self.integers([1])])])
        elif kind == 3:
            cut = self.node("Mul", [cut, self.node("Sigmoid", [self.node("ReduceMean", [cut, self.integers([2])])])])
        elif kind == 4:
            cut = self.node("Transpose", [cut], perm=[0, 2, 1, 3])
        else:
            cut = self.node("Softmax", [cut], axis=3)
        return self.node("Reshape", [cut, self.integers([0, size, LENGTH])]), size

    def attention(self, value: Value) -> Value:
        """Heads of two views of the value, multiplied with each other and with a third."""
        name, size = value
        heads = self.random.choice(self.divisors(size) or [1])
        parts = [self.conv((name, size), channels=size)[0] for _ in range(3)]
        cut = [self.node("Reshape", [part, self.integers([0, heads, size // heads, LENGTH])]) for part in parts]
        query = self.node("Transpose", [cut[0]], perm=[0, 1, 3, 2])
        scores = self.node("MatMul", [query, cut[1]])
        if self.random.random() < 0.3:
            scores = self.node("Sigmoid", [scores])
        mixed = self.node("MatMul", [cut[2], self.node("Softmax", [scores], axis=-1)])
        return self.node("Reshape", [mixed, self.integers([0, size, LENGTH])]), size

    def gated(self, value: Value) -> Value:
        name, size = value
        pooled = self.node("ReduceMean", [name, self.integers([2])])
        squeezed = self.node("Relu", [self.conv_of_one(pooled, size, 4)])
        return self.node("Mul", [name, self.node("Sigmoid", [self.conv_of_one(squeezed, 4, size)])]), size

    def conv_of_one(self, name: str, size: int, wanted: int) -> str:
        return self.node("Conv", [name, self.weight(wanted, size, 1), self.weight(wanted)], kernel_shape=[1])

    def summed(self, value: Value) -> Value:
        """A reduction over the channels, added to every channel."""
        op = self.random.choice(("ReduceSum", "ReduceMean", "ReduceMax"))
        return self.node("Add", [value[0], self.node(op, [value[0], self.integers([1])])]), value[1]

    def product_with_itself(self, value: Value) -> Value:
        turned = self.node("Transpose", [value[0]], perm=[0, 2, 1])
        gram = self.node("MatMul", [turned, value[0]])
        return self.node("MatMul", [value[0], gram]), value[1]

    def linear(self, value: Value) -> Value:
        name, size = value
        wanted = self.random.choice((6, 8, 12))
        turned = self.node("Transpose", [name], perm=[0, 2, 1])
        made = self.node("MatMul", [turned, self.weight(size, wanted)])
        return self.node("Transpose", [made], perm=[0, 2, 1]), wanted


STEPS = (
    "conv", "conv", "conv", "depthwise", "transposed", "unary", "batchnorm", "group_norm", "scaled", "meeting",
    "meeting", "joined", "sliced", "halves", "gathered", "permuted", "padded", "tiled", "regrouped", "regrouped",
    "attention", "gated", "summed", "product_with_itself", "linear", "same_picks", "rolled", "outer", "counted",
)  # fmt: skip


def random_model(seed: int, steps: int = 9) -> onnx.ModelProto:
    """A graph of about `steps` steps; the same seed gives the same graph."""
    return GraphGrower(seed).model(steps)
