"""Pass merge-linear: two linear operators in a row become one, where that is less work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.linear import (
    Linear,
    Spatial,
    channel_axis,
    is_padded,
    linear_at,
    linear_producing,
    set_spatial,
    spatial,
)
from graphopt.ir.rewrite import DeclinedError, Rewriter, is_op, require_sole_consumer
from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class MergeLinear(Pass):
    """Merge a Conv, Gemm or MatMul with the one before it when nothing stands between and it saves MACs.

    With constant weights the composition of two linear maps is a linear map::

        W2 (W1 x + b1) + b2  =  (W2 W1) x + (b2 + W2 b1)

    For convolutions one kernel must be 1x1: then the merged kernel is the other one with its channels mixed::

        W[m, c, k] = sum over h of W2[m, h, k2] W1[h, c, k1]          k = the one of k1, k2 that is not 1x1

    A 1x1 first and padding in the second needs b1 = 0, since padded zeros never saw b1. Merging pays where
    the channels between are many: K -> H -> M costs H (K + M) before and K M after, for each position. A narrow
    middle (a low-rank pair, a bottleneck) is declined: it is the cheaper form.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[4,16] w_up, float[16] w_shift, float[16,4] w_down) => (float[N,4] y) {
          h = Gemm (x, w_up, w_shift)
          y = MatMul (h, w_down)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[4,4] w_down, float[4] w_down_bias) => (float[N,4] y) {
          y_product = MatMul (x, w_down)
          y = Add (y_product, w_down_bias)
        }
    """

    name: ClassVar[str] = "merge-linear"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("fold-batchnorm", "fold-affine", "fuse-pad", "merge-branches")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Merge pairs until none is left that saves MACs."""
        Rewriter(model).until_stable(_merge, "merge linear operators", context.missed)


def _merge(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return False
    second = linear_at(node)
    if second is None or not is_op(second.data.producer(), "Conv", "Gemm", "MatMul", "Add"):
        return False
    first = linear_producing(second.data)
    if first is None:
        return False
    require_sole_consumer(first.result, node)
    _require_same_channels(first, second)
    _require_saving(first, second)
    place = _place(first, second) if is_op(node, "Conv") else None
    second.store(rewriter, *_compose(first, second))
    if place is not None:
        set_spatial(node, place, kernel=_merged_kernel(first, second))
    rewriter.redirect(node, second.data_index, first.data)
    return True


def _require_same_channels(first: Linear, second: Linear) -> None:
    if is_op(first.node, "Conv") != is_op(second.node, "Conv"):
        raise DeclinedError(f"{first.node.op_type} and {second.node.op_type} do not compose")
    if first.groups != second.groups:
        raise DeclinedError(f"they have {first.groups} and {second.groups} groups")
    if first.dtype != second.dtype:
        raise DeclinedError("their weights have different element types")
    if first.in_axis == 0 or second.in_axis == 0:
        raise DeclinedError("Gemm transposes its data operand")
    axes = (first.out_axis, first.in_axis, second.in_axis, second.out_axis)
    if len(set(axes)) > 1:
        of_rank = first.rank if first.rank is not None else second.rank
        if len({channel_axis(axis, of_rank) for axis in axes}) > 1:
            raise DeclinedError("they multiply along different axes")


def _compose(first: Linear, second: Linear) -> tuple[np.ndarray, np.ndarray]:
    """Weight [M, C / groups, *kernel] and bias [M] of the second after the first; one kernel is all ones."""
    groups = first.groups
    inner = first.weight()
    outer = second.weight()
    kernel = _merged_kernel(first, second)
    middle = first.out_channels // groups
    # [g, M/g, H/g, k2] x [g, H/g, C/g, k1], spatial axes flattened: one of k1, k2 is 1.
    blocks2 = outer.reshape(groups, -1, middle, math.prod(outer.shape[2:]))
    blocks1 = inner.reshape(groups, middle, inner.shape[1], math.prod(inner.shape[2:]))
    merged = np.einsum("gmhq,ghcp->gmcqp", blocks2, blocks1, optimize=True)
    passed = np.einsum("gmhq,gh->gm", blocks2, first.bias().reshape(groups, middle))
    weight = merged.reshape(second.out_channels, inner.shape[1], *kernel)
    return weight, second.bias() + passed.reshape(-1)


def _merged_kernel(first: Linear, second: Linear) -> tuple[int, ...]:
    return first.kernel if math.prod(second.kernel) == 1 else second.kernel


def _place(first: Linear, second: Linear) -> Spatial:
    """How the merged convolution places its kernel."""
    place1, place2 = spatial(first.node, first.kernel), spatial(second.node, second.kernel)
    strides = tuple(a * b for a, b in zip(place1.strides, place2.strides, strict=True))
    padded2 = any(place2.begins) or any(place2.ends)
    if math.prod(second.kernel) == 1:
        if padded2:
            raise DeclinedError("the 1x1 behind pads")
        return replace(place1, strides=strides)
    if math.prod(first.kernel) != 1:
        raise DeclinedError("neither kernel is 1x1")
    if any(place1.begins) or any(place1.ends):
        raise DeclinedError("the 1x1 in front pads")
    if any(stride != 1 for stride in place1.strides):
        raise DeclinedError("the 1x1 in front has a stride")
    if padded2 and first.bias().any():
        raise DeclinedError("the one behind pads with zeros, which the bias in front does not reach")
    return replace(place2, strides=strides)


def _require_saving(first: Linear, second: Linear) -> None:
    """MACs for each output position of the second; the first has at least as many, unless the second pads."""
    padded = is_op(second.node, "Conv") and is_padded(second.node)
    cost1 = 0 if padded else first.out_channels * first.in_channels * math.prod(first.kernel)
    cost2 = second.out_channels * second.in_channels * math.prod(second.kernel)
    merged = second.out_channels * first.in_channels * math.prod(_merged_kernel(first, second))
    if merged > cost1 + cost2 or (merged == cost1 + cost2 and not padded):
        raise DeclinedError(
            f"it would not save MACs: {first.in_channels} -> {first.out_channels} -> {second.out_channels} channels"
        )
