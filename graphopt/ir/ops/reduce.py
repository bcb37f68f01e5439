"""Rows of the ops that reduce, scan or rank along axes, and of the losses that inference graphs may carry."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from graphopt.ir.ops.channels import reduce as channels
from graphopt.ir.ops.families import MICROSOFT, unary, uncounted
from graphopt.ir.ops.row import OpRow, Shape, Site


def reduced_shape(site: Site) -> list[Shape]:
    """Input 0 with the axes of attribute `axes` (all where absent) set to 1, or dropped with keepdims 0."""
    shape = site.input_shape(0)
    axes = {axis % len(shape) for axis in site.attribute("axes") or range(len(shape))}
    if site.attribute("keepdims", 1):
        return [tuple(1 if axis in axes else size for axis, size in enumerate(shape))]
    return [tuple(size for axis, size in enumerate(shape) if axis not in axes)]


def scalar_shape(site: Site) -> list[Shape]:
    """A scalar."""
    return [()]


ROWS: tuple[OpRow, ...] = (
    *unary(
        "ReduceSum",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        structural=(1,),
        channels=partial(channels.reduction, skips_zero=True),
        torch="reduce",
    ),
    *unary(
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        structural=(1,),
        channels=partial(channels.reduction, skips_zero=False),
        torch="reduce",
    ),
    *unary(
        "ReduceLogSum",
        structural=(1,),
        channels=partial(channels.reduction, skips_zero=False, keeps_zero=False, takes_logarithm=True),
        torch="reduce",
    ),
    *unary(
        "ReduceLogSumExp",
        structural=(1,),
        channels=partial(channels.reduction, skips_zero=False, keeps_zero=False),
        torch="reduce",
    ),
    *unary("ArgMax", "ArgMin", channels=channels.ranking, torch="reduce"),
    *unary("TopK", structural=(1,), channels=partial(channels.ranking, axis=-1, outputs=2), torch="reduce"),
    *unary("CumSum", "CumProd", structural=(1,), channels=channels.cumulative, torch="reduce"),
    *unary(
        "NegativeLogLikelihoodLoss",
        "SoftmaxCrossEntropyLoss",
        frozen="its classes are given by the labels",
        torch="losses",
    ),
    # A determinant is an elimination, whose count is the implementation's.
    *uncounted("Det", frozen="a determinant takes whole matrices", torch="reduce"),
    *unary("ReduceSumInteger", domain=MICROSOFT, shape=reduced_shape, element_type=ir.DataType.INT32),
    *unary("QLinearReduceMean", domain=MICROSOFT, shape=reduced_shape, quantization=(1, 2, 3, 4)),
    *unary("IsAllFinite", domain=MICROSOFT, shape=scalar_shape, element_type=ir.DataType.BOOL),
)
