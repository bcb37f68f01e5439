"""Pass merge-branches: parallel linear operators over one input become one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.affine import batchnorm_affine
from graphopt.ir.linear import Linear, Spatial, channel_axis, linear_at, linear_producing, set_spatial, spatial
from graphopt.ir.rewrite import (
    DeclinedError,
    Rewriter,
    constant_tensor,
    discard_if_dead,
    is_op,
    require_sole_consumer,
    set_attributes,
)
from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class MergeBranches(Pass):
    """Merge linear branches over one input: summed ones into one operator, parallel ones into one plus Split.

    A sum of linear maps of the same x is a linear map (RepVGG, Ding et al. 2021, section 3.3)::

        (W1 x + b1) + (W2 x + b2)  =  (W1 + W2) x + (b1 + b2)            x itself counts as W = identity, 1x1

    For convolutions both kernels are laid on the union of their taps. Tap k of a kernel reads the input at
    `k * dilation - pad`, so kernels align where their taps fall on one grid, their strides are equal and
    `pads - dilation * (kernel - 1)` (which fixes the output size) is equal. Grouped kernels are spread to the
    common divisor of the groups. A union that costs more MACs than its parts (1x3 and 3x1) is declined.

    With `split_parallel`, branches over one input that are *not* summed (query, key and value of attention,
    Inception's 1x1) become one operator and a Split along the channels::

        W1 x, W2 x  =  Split([W1; W2] x)

    Options:
        split_parallel: off by default, since it does not pay on onnxruntime's CPU provider. Time of three products
            over time of one product and Split, fp32 attention block, onnxruntime 1.31.1, one thread, three runs
            (`benchmarks/split_parallel.py`): ViT-S with 197 tokens 0.96-0.97, BERT-base with 128 tokens 0.98,
            batch 8 0.95-0.96, 16 tokens 0.98-0.99, one token (a decoder step) 1.01-1.05.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2,6,6] x, float[2,2,3,3] w_wide, float[2] w_shift, float[2,2,1,1] w_narrow)
            => (float[N,2,6,6] y) {
          wide = Conv <pads = [1, 1, 1, 1]> (x, w_wide, w_shift)
          narrow = Conv (x, w_narrow)
          both = Add (wide, narrow)
          y = Add (both, x)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2,6,6] x, float[2,2,3,3] w_wide, float[2] w_shift) => (float[N,2,6,6] y) {
          y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w_wide, w_shift)
        }
    """

    split_parallel: bool = False

    name: ClassVar[str] = "merge-branches"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("fold-batchnorm", "fold-affine", "fuse-pad")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Merge summed branches, then, where asked for, parallel ones."""
        rewriter = Rewriter(model)
        rewriter.until_stable(_merge_sum, "merge summed branches", context.missed)
        if self.split_parallel:
            rewriter.until_stable(_merge_parallel, "merge parallel branches", context.missed)


def _merge_sum(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "Add", "Sum"):
        return False
    refusal: DeclinedError | None = None
    for left, right in combinations(range(len(node.inputs)), 2):
        try:
            if _merge_operands(rewriter, node, left, right):
                return True
        except DeclinedError as reason:
            refusal = refusal or reason
    if refusal is not None:
        raise refusal
    return False


def _merge_operands(rewriter: Rewriter, node: ir.Node, left: int, right: int) -> bool:
    """Merge two operands of the sum where both are linear in the same x; False where they are not."""
    pair = [value for value in (node.inputs[left], node.inputs[right]) if value is not None]
    rest = [value for index, value in enumerate(node.inputs) if index not in (left, right)]
    linears = [linear_producing(value) for value in pair]
    if _weight_elements(linears[0]) < _weight_elements(linears[1]):
        pair.reverse()
        linears.reverse()
    keeper, other = linears
    if keeper is None:
        return False
    same = None if other is not None else _identity(pair[1], keeper)
    if other is None and same is None:
        return False
    if other is not None and (other.data is not keeper.data or other.node.op_type != keeper.node.op_type):
        return False
    for linear in (keeper, other):
        if linear is not None:
            require_sole_consumer(linear.result, node)
    if same is not None and same.node is not None:
        require_sole_consumer(pair[1], node)
    if is_op(keeper.node, "Conv"):
        merged = _merge_convolutions(rewriter, keeper, other, same)
    else:
        merged = _merge_products(rewriter, keeper, other, same)
    if not rest:
        rewriter.supersede(node.outputs[0], merged)
    else:
        for index, operand in enumerate([merged, *rest]):
            node.replace_input_with(index, operand)
        node.resize_inputs(1 + len(rest))
    dropped = (other.bias_node or other.node) if other is not None else same and same.node
    if dropped:
        discard_if_dead(dropped)
    return True


@dataclass(frozen=True)
class _Identity:
    """A branch that hands on its channels: scale * x + shift, each [channels]. `node` is its BatchNormalization."""

    scale: np.ndarray
    shift: np.ndarray
    node: ir.Node | None = None


def _identity(value: ir.Value, keeper: Linear) -> _Identity | None:
    """The branch `value` as a map of the keeper's data, channel by channel; None where it is something else."""
    if value is keeper.data:
        return _Identity(np.ones(keeper.in_channels), np.zeros(keeper.in_channels))
    node = value.producer()
    if node is None or not is_op(node, "BatchNormalization") or node.inputs[0] is not keeper.data:
        return None
    if keeper.rank is None or channel_axis(keeper.in_axis, keeper.rank) != 1:
        raise DeclinedError("BatchNormalization of the other branch has another channel axis")
    return _Identity(*batchnorm_affine(node), node)


def _weight_elements(linear: Linear | None) -> int:
    tensor = None if linear is None else constant_tensor(linear.node.inputs[linear.weight_index])
    return 0 if tensor is None else tensor.size


def _merge_products(rewriter: Rewriter, keeper: Linear, other: Linear | None, same: _Identity | None) -> ir.Value:
    if is_op(keeper.node, "ConvTranspose"):
        raise DeclinedError("branches of ConvTranspose are not merged")
    axes = (keeper.out_axis, keeper.in_axis)
    if same is not None:
        if keeper.out_channels != keeper.in_channels or keeper.out_axis != keeper.in_axis:
            raise DeclinedError("the identity branch has another number of channels")
        return keeper.store(rewriter, keeper.weight() + np.diag(same.scale), keeper.bias() + same.shift)
    assert other is not None
    if (other.out_axis, other.in_axis) != axes:
        raise DeclinedError("the branches multiply along different axes")
    _require_same_results(keeper, other)
    return keeper.store(rewriter, keeper.weight() + other.weight(), keeper.bias() + other.bias())


def _require_same_results(keeper: Linear, other: Linear) -> None:
    if other.out_channels != keeper.out_channels:
        raise DeclinedError("the branches have different numbers of channels")
    if other.dtype != keeper.dtype:
        raise DeclinedError("the weights of the branches have different element types")


def _merge_convolutions(rewriter: Rewriter, keeper: Linear, other: Linear | None, same: _Identity | None) -> ir.Value:
    place = spatial(keeper.node, keeper.kernel)
    weight, bias, groups = keeper.weight(), keeper.bias(), keeper.groups
    if same is not None:
        if keeper.out_channels != keeper.in_channels:
            raise DeclinedError("the identity branch has another number of channels")
        ones, zeros = (1,) * len(keeper.kernel), (0,) * len(keeper.kernel)
        other_place, other_groups = Spatial(ones, ones, zeros, zeros), keeper.in_channels
        other_weight, other_macs = same.scale.reshape(-1, 1, *ones), 0
        bias = bias + same.shift
    else:
        assert other is not None
        _require_same_results(keeper, other)
        other_place, other_groups = spatial(other.node, other.kernel), other.groups
        other_weight, other_macs = other.weight(), other.weight().size
        bias = bias + other.bias()
    merged_place, indices, other_indices = _union(place, weight.shape[2:], other_place, other_weight.shape[2:])
    kernel = tuple(1 + max(*first, *second) for first, second in zip(indices, other_indices, strict=True))
    common = math.gcd(groups, other_groups)
    channels = keeper.in_channels // common
    if keeper.out_channels * channels * math.prod(kernel) > weight.size + other_macs:
        raise DeclinedError("the merged kernel would cost more than its parts")
    merged = np.zeros((keeper.out_channels, channels, *kernel))
    rows, columns = range(keeper.out_channels), range(channels)
    merged[np.ix_(rows, columns, *indices)] += _spread(weight, groups, common)
    merged[np.ix_(rows, columns, *other_indices)] += _spread(other_weight, other_groups, common)
    result = keeper.store(rewriter, merged, bias)
    set_spatial(keeper.node, merged_place, kernel=kernel)
    set_attributes(keeper.node, group=None if common == 1 else common)
    return result


Indices = list[list[int]]
"""For each spatial axis, where the taps of a kernel lie in the merged kernel."""


def _union(
    first: Spatial, kernel: Sequence[int], second: Spatial, other_kernel: Sequence[int]
) -> tuple[Spatial, Indices, Indices]:
    """The smallest placement that holds the taps of both kernels, and where each tap lies in it."""
    if first.strides != second.strides:
        raise DeclinedError(f"the branches have strides {first.strides} and {second.strides}")
    dilations, begins, ends = [], [], []
    indices: Indices = []
    other_indices: Indices = []
    for axis, (size, other_size) in enumerate(zip(kernel, other_kernel, strict=True)):
        taps, extra = _taps(first, axis, size)
        other_taps, other_extra = _taps(second, axis, other_size)
        if extra != other_extra:
            raise DeclinedError("the branches pad to different sizes")
        start, stop = min(*taps, *other_taps), max(*taps, *other_taps)
        step = math.gcd(*(tap - start for tap in (*taps, *other_taps))) or 1
        dilations.append(step)
        begins.append(-start)
        ends.append(extra + stop)
        indices.append([(tap - start) // step for tap in taps])
        other_indices.append([(tap - start) // step for tap in other_taps])
    if min(*begins, *ends) < 0:
        raise DeclinedError("the merged kernel would need negative padding")
    return Spatial(first.strides, tuple(dilations), tuple(begins), tuple(ends)), indices, other_indices


def _taps(place: Spatial, axis: int, size: int) -> tuple[list[int], int]:
    """Where the taps of a kernel read, relative to stride * position, and the slack of the padded input.

    The output has `(input + slack) // stride + 1` positions.
    """
    step, begin, end = place.dilations[axis], place.begins[axis], place.ends[axis]
    return [tap * step - begin for tap in range(size)], begin + end - step * (size - 1)


def _spread(weight: np.ndarray, groups: int, common: int) -> np.ndarray:
    """A kernel of `groups` groups as one of `common` groups, which divides them: zeros between the blocks."""
    rows, block = weight.shape[0] // groups, weight.shape[1]
    per_group = groups // common
    wide = np.zeros((weight.shape[0], block * per_group, *weight.shape[2:]))
    for group in range(groups):
        column = group % per_group * block
        wide[group * rows : (group + 1) * rows, column : column + block] = weight[group * rows : (group + 1) * rows]
    return wide


def _merge_parallel(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return False
    keeper = linear_at(node)
    if keeper is None:
        return False
    siblings = [keeper]
    for use in tuple(keeper.data.uses()):
        if use.node is node or use.node.graph is not node.graph or use.node.op_type != node.op_type:
            continue
        linear = linear_at(use.node)
        if linear is not None and linear.data is keeper.data and _parallel(keeper, linear):
            siblings.append(linear)
    if len(siblings) < 2:
        return False
    if keeper.groups != 1:
        raise DeclinedError("grouped branches are not merged")
    if rewriter.model.opset_imports.get("", 0) < 13:
        raise DeclinedError("Split takes its sizes as an input from opset 13 on")
    _join(rewriter, siblings)
    return True


def _parallel(keeper: Linear, other: Linear) -> bool:
    """Whether two linear nodes over one input differ in their weights and number of output channels only."""
    ignored = ("alpha", "beta", "transB")

    def shared(linear: Linear) -> dict[str, object]:
        return {name: attr.value for name, attr in linear.node.attributes.items() if name not in ignored}

    return (
        (keeper.out_axis, keeper.in_axis, keeper.kernel, keeper.dtype, keeper.groups)
        == (other.out_axis, other.in_axis, other.kernel, other.dtype, other.groups)
        and keeper.node.domain == other.node.domain
        and shared(keeper) == shared(other)
    )


def _join(rewriter: Rewriter, siblings: Sequence[Linear]) -> None:
    """Make the first sibling compute all of them, and Split hand out what the others computed."""
    keeper = siblings[0]
    node = keeper.node
    assert node.graph is not None
    sizes = [linear.out_channels for linear in siblings]
    shape = keeper.result.shape
    weight = np.concatenate([linear.weight() for linear in siblings])
    joined = keeper.store(rewriter, weight, np.concatenate([linear.bias() for linear in siblings]))
    producer = joined.producer()
    assert producer is not None
    tensor = ir.Tensor(np.array(sizes, dtype=np.int64))
    split_sizes = rewriter.initializer(node.graph, f"{joined.name}_sizes", tensor)
    attributes = {"axis": keeper.out_axis}
    split = rewriter.insert(
        producer,
        "Split",
        [joined, split_sizes],
        like=joined,
        suffix="joined",
        attributes=attributes,
        outputs=len(siblings),
    )
    rewriter.interpose(joined, split)
    wide = None if shape is None else ir.Shape(shape)
    if wide is not None:
        wide[keeper.out_axis] = sum(sizes)
    for value in {node.outputs[0], joined}:
        value.shape = wide
    for linear, part in zip(siblings[1:], split.outputs[1:], strict=True):
        rewriter.supersede(linear.result, part)
    node.graph.sort()
