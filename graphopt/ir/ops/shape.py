"""Rows of the ops that move, select, repeat or describe elements without computing on them."""

from __future__ import annotations

import numpy as np

from graphopt.ir.ops.channels import index, layout, pool
from graphopt.ir.ops.families import MICROSOFT, elements, no_macs, unary
from graphopt.ir.ops.row import OpRow, Shape, Site, TorchFunction, UnknownShapeError


def affine_grid_macs(site: Site) -> int:
    """Output elements x columns of theta."""
    return elements(site.output_shape()) * site.input_shape(0)[-1]


def required_constant(site: Site, index: int) -> np.ndarray:
    """The value of input `index`. Raises `UnknownShapeError` where the output's shape waits for run time."""
    value = site.constants[index] if index < len(site.constants) else None
    if value is None:
        raise UnknownShapeError(site.node, f"output 0, which input {index} sets at run time,")
    return value


def compress_shape(site: Site) -> list[Shape]:
    """Input 0 with as many positions along `axis` as the condition holds true (flattened without axis)."""
    shape, axis = site.input_shape(0), site.attribute("axis")
    condition = required_constant(site, 1)
    if axis is None:
        return [(int(np.count_nonzero(condition[: elements(shape)])),)]
    kept = int(np.count_nonzero(condition[: shape[axis]]))
    axis %= len(shape)
    return [(*shape[:axis], kept, *shape[axis + 1 :])]


def one_hot_shape(site: Site) -> list[Shape]:
    """Input 0 with an axis of `depth` inserted at `axis`."""
    shape = site.input_shape(0)
    depth = int(required_constant(site, 1).reshape(()))
    axis = site.attribute("axis", -1) % (len(shape) + 1)
    return [(*shape[:axis], depth, *shape[axis:])]


def non_zero_shape(site: Site) -> list[Shape]:
    """[rank, number of non-zero elements]."""
    value = required_constant(site, 0)
    return [(value.ndim, int(np.count_nonzero(value)))]


def range_shape(site: Site) -> list[Shape]:
    """[ceil((limit - start) / delta)], at least 0."""
    start, limit, delta = (float(required_constant(site, index).reshape(())) for index in range(3))
    return [(max(int(np.ceil((limit - start) / delta)), 0),)]


def padded_shape(site: Site) -> list[Shape]:
    """Input 0 plus the pads of input 1."""
    shape = site.input_shape(0)
    pads = required_constant(site, 1).reshape(-1)
    rank = len(shape)
    return [tuple(int(shape[axis] + pads[axis] + pads[axis + rank]) for axis in range(rank))]


def inserted_axis_shape(site: Site) -> list[Shape]:
    """Input 0 with an axis of 1 inserted at input 1."""
    shape = site.input_shape(0)
    axis = int(required_constant(site, 1).reshape(())) % (len(shape) + 1)
    return [(*shape[:axis], 1, *shape[axis:])]


def gathered_rows_shape(site: Site) -> list[Shape]:
    """GatherND without batch axes: indices[:-1] followed by the axes that the indices leave."""
    data, indices = site.input_shape(0), site.input_shape(1)
    return [(*indices[:-1], *data[indices[-1] :])]


def embedding_shape(site: Site) -> list[Shape]:
    """Shape of the indices, then the width of the table."""
    return [(*site.input_shape(1), *site.input_shape(0)[1:])]


def grid_sample_shape(site: Site) -> list[Shape]:
    """[N, C] of the image, then the spatial axes of the grid."""
    return [(*site.input_shape(0)[:2], *site.input_shape(1)[1:-1])]


_BY_VALUES = "the shape of its result depends on the values of its input"

ROWS: tuple[OpRow, ...] = (
    *unary("Reshape", structural=(1,), channels=layout.regrouping, repair=layout.repair_reshape, torch="shape"),
    *unary("Flatten", channels=layout.regrouping, torch="shape"),
    *unary("Squeeze", structural=(1,), channels=layout.squeezing, torch="shape"),
    *unary("Unsqueeze", structural=(1,), channels=layout.unsqueezing, torch="shape"),
    *unary("Transpose", channels=layout.transposition, torch="shape"),
    *unary("Concat", channels=index.concatenation, torch="shape"),
    *unary("DepthToSpace", channels=layout.depth_to_space, torch="shape"),
    *unary("SpaceToDepth", channels=layout.space_to_depth, torch="shape"),
    *unary("Split", structural=(1,), channels=index.splitting, repair=index.repair_split, torch="shape"),
    *unary("Expand", structural=(1,), channels=layout.expansion, repair=layout.repair_expand, torch="shape"),
    *unary("Tile", structural=(1,), channels=layout.tiling, repair=layout.repair_tile, torch="shape"),
    *unary("Trilu", structural=(1,), channels=layout.diagonal, torch="shape"),
    *unary("CenterCropPad", structural=(1,), channels=pool.resampling, repair=pool.repair_crop, torch="window"),
    *unary("ReverseSequence", structural=(1,), channels=layout.reversal, torch="shape"),
    *unary(
        "Slice",
        structural=(1, 2, 3, 4),
        reads_all=False,
        channels=index.slicing,
        repair=index.repair_slice,
        torch="window",
    ),
    # Input 2 is the value of the border: data, not structure.
    *unary("Pad", structural=(1, 3), channels=index.padding, repair=index.repair_pad, torch="window"),
    *unary("Gather", reads_all=False, channels=index.gathering, repair=index.repair_gather, torch="index"),
    *unary("GatherElements", reads_all=False, channels=index.gathering_elements, torch="index"),
    *unary("GatherND", reads_all=False, channels=index.gathering_tuples, torch="index"),
    *unary("Scatter", "ScatterElements", channels=index.scattering_elements, torch="index"),
    *unary("ScatterND", channels=index.scattering_tuples, torch="index"),
    *unary("TensorScatter", structural=(2,), channels=index.cache_update, torch="index"),
    *unary("Shape", "Size", reads_all=False, channels=layout.sizes_only, torch="shape"),
    *unary("Constant", channels=layout.positions, torch="shape"),
    *unary("ConstantOfShape", structural=(0,), channels=layout.filled, repair=layout.repair_filled, torch="shape"),
    *unary("EyeLike", reads_all=False, channels=layout.positions, torch="shape"),
    OpRow(
        "Range",
        structural=(0, 1, 2),
        cost=no_macs,
        shape=range_shape,
        channels=layout.positions,
        torch=TorchFunction("shape", "Range"),
    ),
    OpRow(
        "OneHot",
        structural=(1,),
        cost=no_macs,
        shape=one_hot_shape,
        channels=index.one_hot,
        torch=TorchFunction("index", "OneHot"),
    ),
    OpRow(
        "Compress",
        reads_all=False,
        cost=no_macs,
        shape=compress_shape,
        frozen=_BY_VALUES,
        torch=TorchFunction("index", "Compress"),
    ),
    OpRow("NonZero", cost=no_macs, shape=non_zero_shape, frozen=_BY_VALUES, torch=TorchFunction("index", "NonZero")),
    *unary("Unique", frozen=_BY_VALUES, torch="index"),
    *unary("NonMaxSuppression", structural=(2, 3, 4), frozen=_BY_VALUES, torch="suppression"),
    # Interpolation: fixed weights on few neighbours, 0 by convention.
    *unary("Resize", structural=(1, 2, 3), channels=pool.resampling, repair=pool.repair_resize, torch="resize"),
    *unary("Upsample", structural=(1,), channels=pool.resampling, torch="resize"),
    *unary("GridSample", channels=pool.grid_sampling, torch="resample"),
    OpRow(
        "AffineGrid",
        structural=(1,),
        cost=affine_grid_macs,
        channels=layout.positions,
        torch=TorchFunction("resample", "AffineGrid"),
    ),
    *unary("Col2Im", structural=(1, 2), channels=pool.column_to_image, torch="resample"),
    *unary("Pad", domain=MICROSOFT, structural=(1,), shape=padded_shape),
    *unary("ExpandDims", domain=MICROSOFT, structural=(1,), shape=inserted_axis_shape),
    *unary("Range", domain=MICROSOFT, structural=(0, 1, 2), shape=range_shape),
    *unary("Trilu", domain=MICROSOFT, structural=(1,)),
    *unary("GatherND", domain=MICROSOFT, reads_all=False, shape=gathered_rows_shape),
    *unary(
        "TorchEmbedding",
        domain=MICROSOFT,
        structural=(2, 3),
        reads_all=False,
        shape=embedding_shape,
        channels=index.embedding_bag,
    ),
    *unary("GridSample", domain=MICROSOFT, shape=grid_sample_shape),
)
