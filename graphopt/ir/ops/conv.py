"""Rows of the convolutions, float and quantized, with the window arithmetic that pooling shares.

MACs count border padding like any other element, as every published count does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from graphopt.ir.ops.channels import conv as channels
from graphopt.ir.ops.families import MICROSOFT, elements
from graphopt.ir.ops.row import OpRow, Shape, Site, TorchFunction


def convolution_macs(site: Site, weight: int = 1) -> int:
    """Output elements x weights of one filter.

    W is [M, C / group, k1, ...] (ONNX Conv 1, 11, 22): each output element is one sum over a filter, so that
    groups, strides and dilations need no term of their own. Holds for channels-last outputs too.
    """
    return elements(site.output_shape()) * elements(site.input_shape(weight)[1:])


def transposed_convolution_macs(site: Site, weight: int = 1) -> int:
    """Input elements x weights of one input channel.

    W is [C, M / group, k1, ...] (ONNX ConvTranspose 1, 11, 22): each input element is scattered through the
    weights of its channel. Products that fall into cropped borders are counted.
    """
    return elements(site.input_shape(0)) * elements(site.input_shape(weight)[1:])


def depthwise_state_macs(site: Site) -> int:
    """Output elements x kernel length (causal depthwise convolution)."""
    return elements(site.output_shape()) * site.input_shape(1)[-1]


def convolution_shape(site: Site, weight: int = 1, channels_last: bool = False) -> list[Shape]:
    """[N, M, spatial...] of a convolution, or [N, spatial..., M] with `channels_last`."""
    data, filters = site.input_shape(0), site.input_shape(weight)
    if channels_last or site.attribute("channels_last", 0):
        spatial, kernel_axes = data[1:-1], filters[2:]
        return [(data[0], *window_sizes(site, spatial, kernel_axes), filters[0])]
    return [(data[0], filters[0], *window_sizes(site, data[2:], filters[2:]))]


def window_sizes(site: Site, spatial: Sequence[int], kernel: Sequence[int]) -> Shape:
    """Spatial output sizes of a sliding window: strides, dilations, pads, auto_pad and ceil_mode as in ONNX.

    Args:
        site: node with the window attributes.
        spatial: input sizes, one a spatial axis.
        kernel: window sizes, one a spatial axis, not dilated.
    """
    rank = len(spatial)
    strides = site.attribute("strides") or [1] * rank
    dilations = site.attribute("dilations") or [1] * rank
    pads = site.attribute("pads") or [0] * (2 * rank)
    auto_pad = site.attribute("auto_pad", "NOTSET")
    ceil_mode = bool(site.attribute("ceil_mode", 0))
    sizes: list[int] = []
    for axis in range(rank):
        extent = dilations[axis] * (kernel[axis] - 1) + 1
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            sizes.append(math.ceil(spatial[axis] / strides[axis]))
            continue
        padding = 0 if auto_pad == "VALID" else pads[axis] + pads[axis + rank]
        room = spatial[axis] + padding - extent
        size = (-(-room // strides[axis]) if ceil_mode else room // strides[axis]) + 1
        if ceil_mode and (size - 1) * strides[axis] >= spatial[axis] + pads[axis]:
            size -= 1  # the last window would start in the trailing padding
        sizes.append(size)
    return tuple(sizes)


_grouped = partial(OpRow, repair=channels.repair_groups)

ROWS: tuple[OpRow, ...] = (
    _grouped("Conv", cost=convolution_macs, channels=channels.convolution, torch=TorchFunction("conv", "Conv")),
    _grouped(
        "ConvTranspose",
        cost=transposed_convolution_macs,
        channels=channels.transposed_convolution,
        torch=TorchFunction("conv", "ConvTranspose"),
    ),
    # Sampling at the offsets is interpolation, and as such 0.
    _grouped(
        "DeformConv",
        cost=convolution_macs,
        channels=channels.deformable_convolution,
        torch=TorchFunction("deformable", "DeformConv"),
    ),
    _grouped(
        "ConvInteger",
        cost=convolution_macs,
        quantization=(2, 3),
        channels=channels.integer_convolution,
        torch=TorchFunction("conv", "ConvInteger"),
    ),
    _grouped(
        "QLinearConv",
        cost=partial(convolution_macs, weight=3),
        quantization=(1, 2, 4, 5, 6, 7),
        channels=channels.quantized_convolution,
        torch=TorchFunction("conv", "QLinearConv"),
    ),
    OpRow("CausalConvWithState", cost=depthwise_state_macs, channels=channels.causal_convolution),
    OpRow(
        "FusedConv",
        domain=MICROSOFT,
        cost=convolution_macs,
        shape=convolution_shape,
        torch=TorchFunction("conv", "FusedConv"),
    ),
    *(
        OpRow(
            name,
            domain=MICROSOFT,
            cost=convolution_macs,
            shape=partial(convolution_shape, channels_last=True),
        )
        for name in ("NhwcConv", "NhwcFusedConv")
    ),
    OpRow(
        "QLinearConv",
        domain=MICROSOFT,
        cost=partial(convolution_macs, weight=3),
        shape=partial(convolution_shape, weight=3),
        quantization=(1, 2, 4, 5, 6, 7),
        element_type=7,
    ),
    OpRow("ConvTransposeWithDynamicPads", domain=MICROSOFT, structural=(2,), cost=transposed_convolution_macs),
)
