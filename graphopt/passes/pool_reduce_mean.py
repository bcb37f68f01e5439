"""Pass pool-reduce-mean: the mean over the spatial axes, however it is written, becomes GlobalAveragePool."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.linear import spatial
from graphopt.ir.rewrite import DeclinedError, Rewriter, constant, integers, is_op, rank
from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class PoolReduceMean(Pass):
    """Write ReduceMean over all spatial axes, and AveragePool with one window over all of them, as GlobalAveragePool.

    All compute the same mean; onnxruntime has a quantized kernel for GlobalAveragePool, none for ReduceMean, and
    exporters write ReduceMean::

        ReduceMean[axes = 2..r-1, keepdims = 1](x)  =  GlobalAveragePool(x)
        ReduceMean[axes = 2..r-1, keepdims = 0](x)  =  Flatten[axis = 1](GlobalAveragePool(x))
        AveragePool[kernel_shape >= sizes of x](x)  =  GlobalAveragePool(x)

    A window that is larger than the tensor is cut to it in `ceil_mode` (torch's EfficientNet is written so; OpenVINO
    refuses such a window). It has to be without padding, the sizes known.

    ReduceMean of rank 4 and 5 only: over rank 3 the last axis is more often features than space, and means over
    features belong to normalisations.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,4,4] x) => (float[N,3] y) <int64[2] axes = {2, 3}> {
          y = ReduceMean <keepdims = 0> (x, axes)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,4,4] x) => (float[N,3] y) {
          y_mean = GlobalAveragePool (x)
          y = Flatten (y_mean)
        }
    """

    name: ClassVar[str] = "pool-reduce-mean"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("fuse-normalization",)

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Rewrite every mean over exactly the spatial axes."""
        rewriter = Rewriter(model)
        rewriter.until_stable(_pool_reduced, "pool ReduceMean", context.missed)
        rewriter.until_stable(_pool_whole, "pool AveragePool", context.missed)


def _pool_whole(rewriter: Rewriter, node: ir.Node) -> bool:
    """AveragePool with a single window, which covers everything."""
    data = node.inputs[0] if is_op(node, "AveragePool") else None
    kernel = integers(node, "kernel_shape")
    shape = None if data is None else data.shape
    if data is None or kernel is None or shape is None:
        return False
    sizes = tuple(size for size in list(shape)[2:] if isinstance(size, int))
    if len(sizes) != len(kernel) or any(map(operator.lt, kernel, sizes)):
        return False
    place, ceil = spatial(node, kernel), node.attributes.get("ceil_mode")
    if any(place.begins + place.ends) or set(place.dilations) != {1}:
        return False
    cut = [size + stride for size, stride in zip(sizes, place.strides, strict=True)]
    if kernel != sizes and (ceil is None or not ceil.as_int() or any(map(operator.ge, kernel, cut))):
        return False  # there is no such window
    result = node.outputs[0]
    rewriter.supersede(
        result, rewriter.insert(node, "GlobalAveragePool", [data], like=result, suffix="mean").outputs[0]
    )
    return True


def _pool_reduced(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "ReduceMean"):
        return False
    data = node.inputs[0]
    assert data is not None
    of_rank = rank(data)
    if of_rank is None:
        raise DeclinedError("the rank of its operand is unknown")
    axes = _axes(node)
    if of_rank not in (4, 5) or axes is None:
        return False
    if {axis % of_rank for axis in axes} != set(range(2, of_rank)):
        return False
    if data.dtype is None or not data.dtype.is_floating_point():
        raise DeclinedError("it averages integers")
    keepdims = node.attributes.get("keepdims")
    result = node.outputs[0]
    pooled = rewriter.insert(node, "GlobalAveragePool", [data], like=result, suffix="mean").outputs[0]
    if keepdims is not None and not keepdims.as_int():
        kept = data.shape
        assert kept is not None
        pooled.shape = ir.Shape([kept[0], kept[1], *([1] * (of_rank - 2))])
        producer = pooled.producer()
        assert producer is not None
        pooled = rewriter.insert(producer, "Flatten", [pooled], like=result, suffix="flat").outputs[0]
    rewriter.supersede(result, pooled)
    return True


def _axes(node: ir.Node) -> tuple[int, ...] | None:
    """The reduced axes, None for all of them."""
    listed = integers(node, "axes")
    if listed is not None:
        return listed
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None:
        return None
    array = constant(value)
    if array is None:
        raise DeclinedError("its axes are computed at run time")
    return tuple(int(axis) for axis in array) or None
