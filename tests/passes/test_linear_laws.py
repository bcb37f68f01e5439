"""Laws of the passes on linear operators: outputs stay whatever the attributes, and what must fold does fold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from golden import apply_exact, feeds
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.ir.session import open_session
from graphopt.passes.eliminate_identity import EliminateIdentity
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.fold_batchnorm import FoldBatchnorm
from graphopt.passes.fuse_pad import FusePad
from graphopt.passes.merge_branches import MergeBranches
from graphopt.passes.merge_linear import MergeLinear

_SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
_SIZE = 7


class Builder:
    """A graph under construction: nodes by operator name, seeded weights, one input x."""

    def __init__(self, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        self.dtype = dtype
        self.random = np.random.default_rng(0)
        self.x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []

    def weight(self, *shape: int, positive: bool = False) -> ir.Value:
        array = self.random.standard_normal(shape)
        array = np.abs(array) + 0.5 if positive else array
        value = ir.Value(name=f"w{len(self.weights)}")
        value.const_value = ir.Tensor(array.astype(self.dtype.numpy()), dtype=self.dtype, name=value.name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(self.dtype)
        self.weights.append(value)
        return value

    def constant(self, numbers: Any) -> ir.Value:
        value = self.weight(1)
        value.const_value = tensor = ir.Tensor(np.asarray(numbers), name=value.name)
        value.shape, value.type = ir.Shape(tensor.numpy().shape), ir.TensorType(tensor.dtype)
        return value

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes=attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def batchnorm(self, value: ir.Value, channels: int) -> ir.Value:
        gamma, beta, mean = (self.weight(channels) for _ in range(3))
        return self.op("BatchNormalization", value, gamma, beta, mean, self.weight(channels, positive=True))

    def model(self, *outputs: ir.Value) -> ir.Model:
        for value in outputs:
            value.type = ir.TensorType(self.dtype)
        graph = ir.Graph(
            [self.x], list(outputs), nodes=self.nodes, initializers=self.weights, opset_imports={"": 21}, name="g"
        )
        inferred = ir.passes.common.ShapeInferencePass()(ir.Model(graph, ir_version=10)).model
        try:
            open_session(inferred, optimized=False).run_feeds(feeds(inferred))
            open_session(inferred)
        except GraphoptError:
            # The attributes do not fit the size of x, or onnxruntime itself fuses Pad into a pool that refuses it.
            assume(False)
        return inferred


@dataclass(frozen=True)
class LinearSpec:
    """A random linear operator: how to build it, its channels, and the shape of x."""

    op_type: str
    groups: int
    in_channels: int
    out_channels: int
    attributes: dict[str, Any]
    kernel: tuple[int, ...]
    bias: str

    @property
    def shape(self) -> tuple[int | str, ...]:
        if self.op_type == "Gemm":
            return (self.in_channels, "N")[:: 1 if self.attributes["transA"] else -1]  # type: ignore[return-value]
        if self.op_type == "MatMul":
            return ("N", 5, self.in_channels)
        if self.op_type == "MatMulLeft":
            return ("N", self.in_channels, 5)
        return ("N", self.in_channels, *([_SIZE] * len(self.kernel)))

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def channel_axis(self) -> int:
        return self.rank - 1 if self.op_type == "MatMul" else 1

    def build(self, builder: Builder, x: ir.Value) -> ir.Value:
        if self.op_type == "Gemm":
            return self._gemm(builder, x)
        if self.op_type.startswith("MatMul"):
            return self._matmul(builder, x)
        wide, narrow = self.in_channels, self.out_channels // self.groups
        shape = (wide, narrow) if self.op_type == "ConvTranspose" else (self.out_channels, wide // self.groups)
        bias = builder.weight(self.out_channels) if self.bias != "none" else None
        operands = [x, builder.weight(*shape, *self.kernel), *([bias] if bias is not None else [])]
        return builder.op(self.op_type, *operands, group=self.groups, **self.attributes)

    def _gemm(self, builder: Builder, x: ir.Value) -> ir.Value:
        shape = (self.in_channels, self.out_channels)[:: -1 if self.attributes["transB"] else 1]
        biases = {"vector": (self.out_channels,), "row": (1, self.out_channels), "scalar": (), "one": (1,)}
        operands = [x, builder.weight(*shape)]
        if self.bias != "none":
            operands.append(builder.weight(*biases[self.bias]))
        return builder.op("Gemm", *operands, **self.attributes)

    def _matmul(self, builder: Builder, x: ir.Value) -> ir.Value:
        left = self.op_type == "MatMulLeft"
        shape = (self.in_channels, self.out_channels)[:: -1 if left else 1]
        weight = builder.weight(*shape)
        product = builder.op("MatMul", *((weight, x) if left else (x, weight)))
        if self.bias == "none":
            return product
        bias = builder.weight(*((self.out_channels, 1) if left else (self.out_channels,)))
        return builder.op("Add", *((bias, product) if self.bias == "row" else (product, bias)))


@st.composite
def linears(
    draw: st.DrawFn,
    ops: Sequence[str] = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulLeft"),
) -> LinearSpec:
    op_type = draw(st.sampled_from(ops))
    convolution = op_type.startswith("Conv")
    groups = draw(st.sampled_from([1, 1, 2, 4])) if convolution else 1
    in_channels = groups * draw(st.integers(1, 3))
    out_channels = groups * draw(st.integers(1, 3))
    attributes: dict[str, Any] = {}
    kernel: tuple[int, ...] = ()
    if convolution:
        axes = draw(st.integers(1, 2))
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
        attributes["strides"] = [draw(st.integers(1, 2)) for _ in range(axes)]
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(axes)]
        attributes["pads"] = draw(
            st.one_of(st.just([0] * 2 * axes), st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
        )
    elif op_type == "Gemm":
        attributes = {
            "alpha": draw(st.sampled_from([1.0, 0.5, -2.0])),
            "beta": draw(st.sampled_from([1.0, 0.25, 2.0])),
            "transA": draw(st.sampled_from([0, 0, 1])),
            "transB": draw(st.integers(0, 1)),
        }
    bias = draw(st.sampled_from(["none", "vector", "row", "scalar", "one"]))
    return LinearSpec(op_type, groups, in_channels, out_channels, attributes, kernel, bias)


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@_SETTINGS
@given(linears())
def test_batchnorm_behind_a_linear_op_folds(spec: LinearSpec) -> None:
    builder = Builder(spec.shape)
    y = builder.batchnorm(spec.build(builder, builder.x), spec.out_channels)
    foldable = spec.op_type != "MatMul"
    if not foldable:
        assume(spec.out_channels == 5)
    changed, remarks = apply_exact(FoldBatchnorm(), builder.model(y))
    assert ("BatchNormalization" not in _operators(changed)) == foldable
    assert bool(remarks) != foldable


@_SETTINGS
@given(linears())
def test_batchnorm_before_a_linear_op_folds_or_says_why(spec: LinearSpec) -> None:
    builder = Builder(spec.shape)
    channels = spec.shape[1]
    assume(isinstance(channels, int))
    y = spec.build(builder, builder.batchnorm(builder.x, channels))  # type: ignore[arg-type]
    changed, remarks = apply_exact(FoldBatchnorm(), builder.model(y))
    assert ("BatchNormalization" in _operators(changed)) == bool(remarks)
    if spec.op_type == "Conv" and not any(spec.attributes["pads"]):
        assert _operators(changed) == ["Conv"]


@_SETTINGS
@given(
    linears(),
    st.sampled_from(["Mul", "Add", "Sub", "Div"]),
    st.sampled_from(["scalar", "one", "channel", "full", "other"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.FLOAT16]),
)
def test_constant_arithmetic_around_a_linear_op(
    spec: LinearSpec, op_type: str, kind: str, constant_first: bool, behind: bool, dtype: ir.DataType
) -> None:
    builder = Builder(spec.shape, dtype)
    channels = spec.out_channels if behind else spec.in_channels
    shapes = {
        "scalar": (),
        "one": (1,) * spec.rank,
        "channel": (channels, *([1] * (spec.rank - 1 - spec.channel_axis))),
        "full": tuple(channels if axis == spec.channel_axis else 1 for axis in range(spec.rank)),
        "other": (5,) if spec.op_type == "MatMulLeft" else (spec.rank * 0 + _SIZE, 1),
    }
    constant = builder.weight(*shapes[kind], positive=True)

    def arithmetic(value: ir.Value) -> ir.Value:
        return builder.op(op_type, *((constant, value) if constant_first else (value, constant)))

    y = builder.x if behind else arithmetic(builder.x)
    y = spec.build(builder, y)
    y = arithmetic(y) if behind else y
    changed, _ = apply_exact(FoldAffine(), builder.model(y))
    transposed = spec.op_type == "Gemm" and spec.attributes["transA"]
    if behind and kind in ("scalar", "channel", "full") and op_type == "Mul" and not transposed:
        assert "Mul" not in _operators(changed)


@_SETTINGS
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Mul", "Add", "Sub", "Div", "Neg"]),
            st.sampled_from([(), (1,), (3, 1), (4,), (1, 3, 4)]),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_affine_chain_collapses(steps: list[tuple[str, tuple[int, ...], bool]]) -> None:
    builder = Builder(("N", 3, 4))
    value = builder.x
    for op_type, shape, constant_first in steps:
        if op_type == "Neg":
            value = builder.op("Neg", value)
            continue
        constant = builder.weight(*shape, positive=True)
        value = builder.op(op_type, *((constant, value) if constant_first and op_type != "Div" else (value, constant)))
    changed, remarks = apply_exact(FoldAffine(), builder.model(value))
    assert len(changed.graph) <= len(steps)
    assert len(changed.graph) <= 2 or remarks


@_SETTINGS
@given(linears(ops=("Conv",)), st.data())
def test_summed_convolutions_merge_or_stay_equal(spec: LinearSpec, data: st.DataObject) -> None:
    builder = Builder(spec.shape)
    axes = len(spec.kernel)
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(axes))
    dilations = [data.draw(st.integers(1, 2)) for _ in range(axes)]
    begins = [data.draw(st.integers(0, 2)) for _ in range(axes)]
    slack = [
        spec.attributes["pads"][axis] + spec.attributes["pads"][axes + axis]
        - spec.attributes["dilations"][axis] * (spec.kernel[axis] - 1)
        for axis in range(axes)
    ]  # fmt: skip
    ends = [slack[axis] - begins[axis] + dilations[axis] * (kernel[axis] - 1) for axis in range(axes)]
    assume(min(ends) >= 0)
    groups = data.draw(st.sampled_from([1, spec.groups]))
    attributes = {"strides": spec.attributes["strides"], "dilations": dilations, "pads": begins + ends}
    twin = LinearSpec("Conv", groups, spec.in_channels, spec.out_channels, attributes, kernel, "vector")
    first, second = spec.build(builder, builder.x), twin.build(builder, builder.x)
    total = builder.op("Add", first, second)
    if data.draw(st.booleans()) and spec.in_channels == spec.out_channels:
        total = builder.op("Add", builder.x, total)
    changed, remarks = apply_exact(MergeBranches(), builder.model(total))
    assert "Add" not in _operators(changed) or remarks
    if twin.kernel == spec.kernel and attributes == spec.attributes and groups == spec.groups:
        assert _operators(changed).count("Conv") == 1


@_SETTINGS
@given(linears(ops=("Gemm", "MatMul", "MatMulLeft")), st.booleans())
def test_summed_products_merge(spec: LinearSpec, identity: bool) -> None:
    builder = Builder(spec.shape)
    total = builder.op("Sum", spec.build(builder, builder.x), spec.build(builder, builder.x))
    if identity and spec.in_channels == spec.out_channels:
        assume(not spec.attributes.get("transA"))
        total = builder.op("Add", total, builder.x)
    changed, _ = apply_exact(MergeBranches(), builder.model(total))
    assert len(changed.graph) <= 2


@_SETTINGS
@given(linears(ops=("Conv", "Gemm", "MatMul", "MatMulLeft")), st.integers(1, 3))
def test_parallel_branches_become_one_and_a_split(spec: LinearSpec, more: int) -> None:
    builder = Builder(spec.shape)
    branches = [spec.build(builder, builder.x) for _ in range(1 + more)]
    outputs = [builder.op("Relu", value) for value in branches[:-1]] + branches[-1:]
    changed, _ = apply_exact(MergeBranches(split_parallel=True), builder.model(*outputs))
    assert (_operators(changed).count("Split") == 1) == (spec.groups == 1)


@_SETTINGS
@given(linears(ops=("Conv",)), linears(ops=("Conv",)), st.booleans())
def test_convolutions_in_a_row(first: LinearSpec, second: LinearSpec, wide: bool) -> None:
    middle = first.out_channels * (8 if wide else 1)
    axes = len(first.kernel)
    kernel = tuple(1 for _ in range(axes)) if 1 not in first.kernel else (second.kernel * 2)[:axes]
    attributes = {name: (listed * 2)[: len(first.attributes[name])] for name, listed in second.attributes.items()}
    builder = Builder(first.shape)
    opening = LinearSpec("Conv", first.groups, first.in_channels, middle, first.attributes, first.kernel, first.bias)
    closing = LinearSpec("Conv", first.groups, middle, first.groups, attributes, kernel, second.bias)
    y = closing.build(builder, opening.build(builder, builder.x))
    changed, remarks = apply_exact(MergeLinear(), builder.model(y))
    assert len(changed.graph) == 1 or remarks


@_SETTINGS
@given(linears(ops=("Gemm", "MatMul", "MatMulLeft")), linears(ops=("Gemm", "MatMul", "MatMulLeft")))
def test_products_in_a_row(first: LinearSpec, second: LinearSpec) -> None:
    assume(first.rank == second.rank and not second.attributes.get("transA"))
    builder = Builder(first.shape)
    middle = 12 if first.op_type == second.op_type else 5
    opening = LinearSpec(first.op_type, 1, first.in_channels, middle, first.attributes, (), first.bias)
    closing = LinearSpec(second.op_type, 1, middle, 2, second.attributes, (), second.bias)
    y = closing.build(builder, opening.build(builder, builder.x))
    changed, _ = apply_exact(MergeLinear(), builder.model(y))
    if first.op_type == second.op_type and not first.attributes.get("transA"):
        assert len(changed.graph) <= 2


@_SETTINGS
@given(
    st.sampled_from(["Conv", "AveragePool", "MaxPool"]),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.lists(st.integers(0, 1), min_size=4, max_size=4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([0.0, 0.0, 0.0, 1.0, -np.inf]),
    st.booleans(),
    st.sampled_from(["Relu", "Neg"]),
    st.sampled_from([{}, {"strides": [2, 1]}, {"count_include_pad": 1}, {"ceil_mode": 1, "strides": [2, 2]}]),
)
def test_pad_fuses_or_stays(
    op_type: str,
    amounts: list[int],
    own: list[int],
    kernel: tuple[int, int],
    fill: float,
    with_axes: bool,
    before: str,
    attributes: dict[str, Any],
) -> None:
    builder = Builder(("N", 2, _SIZE, _SIZE))
    if with_axes:
        axes, pads = [-1, 2], [amounts[1], amounts[0], amounts[3], amounts[2]]
    else:
        axes, pads = None, [0, 0, *amounts[:2], 0, 0, *amounts[2:]]
    operands = [builder.op(before, builder.x), builder.constant(pads), builder.constant(np.float32(fill))]
    padded = builder.op("Pad", *operands, *([] if axes is None else [builder.constant(axes)]))
    attributes = {**attributes, "kernel_shape": list(kernel), "pads": own}
    if op_type == "Conv":
        attributes = {key: value for key, value in attributes.items() if key not in ("count_include_pad", "ceil_mode")}
        y = builder.op("Conv", padded, builder.weight(3, 2, *kernel), **attributes)
    else:
        if op_type == "MaxPool":
            attributes.pop("count_include_pad", None)
        y = builder.op(op_type, padded, **attributes)
    changed, remarks = apply_exact(FusePad(), builder.model(y))
    assert ("Pad" in _operators(changed)) == bool(remarks)
    if op_type == "Conv" and fill == 0.0:
        assert "Pad" not in _operators(changed)


@_SETTINGS
@given(
    st.lists(
        st.one_of(
            st.permutations([0, 1, 2]).map(lambda order: ("Transpose", order)),
            st.sampled_from([(0, -1, 0), (-1, 0, 0), (2, -1, 3), (-1, 3, 2), (3, 2, -1)]).map(
                lambda target: ("Reshape", target)
            ),
            st.tuples(st.integers(0, 1), st.sampled_from([1, 2, 3, 4, 2**31, 2**63 - 1])).map(
                lambda bounds: ("Slice", bounds)
            ),
            st.sampled_from([(1,), (3, 4), (1, 4), (2, 1, 1), (2, 3, 4)]).map(lambda shape: ("Expand", shape)),
            st.sampled_from([("Flatten", ()), ("Identity", ()), ("Cast", ())]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_detours_of_layout_shorten(steps: list[tuple[str, Sequence[int]]]) -> None:
    builder = Builder((2, 3, "M"))
    value = builder.x
    for op_type, how in steps:
        if op_type == "Transpose":
            value = builder.op(op_type, value, perm=list(how))
        elif op_type in ("Reshape", "Expand"):
            value = builder.op(op_type, value, builder.constant(list(how)))
        elif op_type == "Slice":
            start, end = how
            value = builder.op(op_type, value, *map(builder.constant, ([start], [end], [1])))
        else:
            value = builder.op(op_type, value, **({"to": 1} if op_type == "Cast" else {}))
    changed, _ = apply_exact(EliminateIdentity(), builder.model(builder.op("Relu", value)))
    operators = _operators(changed)
    assert len(operators) <= len(steps) + 1
    assert not {"Identity", "Cast"} & set(operators)
    assert ("Transpose", "Transpose") not in itertools.pairwise(operators)
