"""Rows of pooling and region sampling: 0 MACs, because the mean or maximum of a window is no contraction."""

from __future__ import annotations

from functools import partial

from graphopt.ir.ops.channels import pool as channels
from graphopt.ir.ops.conv import window_sizes
from graphopt.ir.ops.families import MICROSOFT, no_macs, unary
from graphopt.ir.ops.row import OpRow, Shape, Site, TorchFunction, UnknownShapeError


def pool_shape(site: Site, channels_last: bool = False) -> list[Shape]:
    """[N, C, spatial...] of a pooling window, or [N, spatial..., C]."""
    data = site.input_shape(0)
    kernel = site.attribute("kernel_shape")
    if channels_last or site.attribute("channels_last", 0):
        return [(data[0], *window_sizes(site, data[1:-1], kernel), data[-1])]
    return [(*data[:2], *window_sizes(site, data[2:], kernel))]


def global_pool_shape(site: Site) -> list[Shape]:
    """[N, C, 1, ...], or [N, 1, ..., C] where the attribute channels_last is set."""
    data = site.input_shape(0)
    ones = (1,) * (len(data) - 2)
    return [(data[0], *ones, data[-1]) if site.attribute("channels_last", 0) else (*data[:2], *ones)]


def unpool_shape(site: Site) -> list[Shape]:
    """The shape in input 2 (MaxUnpool 9, 11, 22), else the size that the window came from."""
    if len(site.inputs) > 2 and site.inputs[2] is not None:
        target = site.constants[2]
        if target is None:
            raise UnknownShapeError(site.node, "output 0, which input 2 sets at run time,")
        return [tuple(int(size) for size in target)]
    data, kernel = site.input_shape(0), site.attribute("kernel_shape")
    rank = len(kernel)
    strides = site.attribute("strides") or [1] * rank
    pads = site.attribute("pads") or [0] * (2 * rank)
    spatial = [
        (data[axis + 2] - 1) * strides[axis] - pads[axis] - pads[axis + rank] + kernel[axis] for axis in range(rank)
    ]
    return [(*data[:2], *spatial)]


def crop_and_resize_shape(site: Site) -> list[Shape]:
    """[regions, C, height, width] of CropAndResize, height and width from input 3."""
    size = site.constants[3]
    if size is None:
        raise UnknownShapeError(site.node, "output 0, which input 3 sets at run time,")
    return [(site.input_shape(1)[0], site.input_shape(0)[1], int(size[0]), int(size[1]))]


ROWS: tuple[OpRow, ...] = (
    *unary("AveragePool", "MaxPool", "LpPool", channels=channels.pooling, torch="pool"),
    *unary("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", channels=channels.pooling, torch="pool"),
    *unary("MaxRoiPool", "RoiAlign", channels=channels.region_pooling, torch="regions"),
    OpRow(
        "MaxUnpool",
        structural=(2,),
        cost=no_macs,
        shape=unpool_shape,
        frozen="its indices count through all channels",
        torch=TorchFunction("pool", "MaxUnpool"),
    ),
    *unary("QLinearAveragePool", domain=MICROSOFT, shape=pool_shape, quantization=(1, 2, 3, 4)),
    *unary("QLinearGlobalAveragePool", domain=MICROSOFT, shape=global_pool_shape, quantization=(1, 2, 3, 4)),
    *unary("NhwcMaxPool", domain=MICROSOFT, shape=partial(pool_shape, channels_last=True)),
    *unary("MaxpoolWithMask", domain=MICROSOFT, shape=pool_shape),
    *unary("CropAndResize", domain=MICROSOFT, shape=crop_and_resize_shape, structural=(3,)),
)
