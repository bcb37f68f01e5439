"""Pass pool-reduce-mean: the mean over the spatial axes becomes the operator that has int8 kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.rewrite import DeclinedError, Rewriter, constant, integers, is_op, rank
from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class PoolReduceMean(Pass):
    """Write ReduceMean over all spatial axes as GlobalAveragePool.

    Both compute the same mean; onnxruntime has a quantized kernel for GlobalAveragePool only, and exporters
    write ReduceMean::

        ReduceMean[axes = 2..r-1, keepdims = 1](x)  =  GlobalAveragePool(x)
        ReduceMean[axes = 2..r-1, keepdims = 0](x)  =  Flatten[axis = 1](GlobalAveragePool(x))

    Tensors of rank 4 and 5 only: over rank 3 the last axis is more often features than space, and means over
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
        Rewriter(model).until_stable(_pool, "pool ReduceMean", context.missed)


def _pool(rewriter: Rewriter, node: ir.Node) -> bool:
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
