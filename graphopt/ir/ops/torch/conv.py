"""Convolutions, plain, transposed, integer and quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from graphopt.errors import GraphoptError
from graphopt.ir.ops.torch.integers import accumulated, requantized
from graphopt.ir.ops.torch.named_activations import activation_function
from graphopt.ir.ops.torch.sliding import Window, pad, split_padding, window

_CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def conv(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """Conv 11+: [N, C, spatial...] by filters [M, C / group, kernel...] to [N, M, spatial...]."""
    described = window(x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad)
    padding = described.begin
    if described.begin != described.end:
        x, padding = pad(x, described.begin, described.end), [0] * len(padding)
    convolve = _of_rank(_CONVOLUTIONS, x)
    return convolve(x, w, b, described.strides, padding, described.dilations, group)


def conv_transpose(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """ConvTranspose 11+: [N, C, spatial...] by filters [C, M / group, kernel...] to [N, M, spatial...]."""
    rank = w.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    spread = Window(w.shape[2:], strides, dilations, [0] * rank, [0] * rank)
    full = [(x.shape[axis + 2] - 1) * strides[axis] + spread.extent[axis] for axis in range(rank)]
    begin, sizes = _transposed_placement(
        x.shape[2:], full, strides, output_padding or [0] * rank, output_shape, pads or [0] * (2 * rank), auto_pad
    )
    convolve = _of_rank(_TRANSPOSED, x)
    # What torch calls output padding is the difference of the padding before and behind.
    extra = [sizes[axis] - full[axis] + 2 * begin[axis] for axis in range(rank)]
    if all(begin[axis] >= 0 and 0 <= extra[axis] < max(strides[axis], dilations[axis]) for axis in range(rank)):
        return convolve(x, w, b, strides, begin, extra, group, dilations)
    scattered = convolve(x, w, None, strides, [0] * rank, [0] * rank, group, dilations)
    before = [-amount for amount in begin]
    behind = [sizes[axis] - full[axis] + begin[axis] for axis in range(rank)]
    result = pad(scattered, before, behind)
    return result if b is None else result + _per_channel(b, result.ndim, axis=1)


def conv_integer(
    x: torch.Tensor,
    w: torch.Tensor,
    x_zero_point: torch.Tensor | None = None,
    w_zero_point: torch.Tensor | None = None,
    **attributes: Any,
) -> torch.Tensor:
    """ConvInteger 10: `conv` of integers less their zero points, in int32; its attributes are those of Conv."""
    return _integer_convolution(x, w, x_zero_point, w_zero_point, attributes).to(torch.int32)


def q_linear_conv(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    w_zero_point: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero_point: torch.Tensor,
    b: torch.Tensor | None = None,
    **attributes: Any,
) -> torch.Tensor:
    """QLinearConv 10: `conv` of quantized data, quantized again; its attributes are those of Conv."""
    result = _integer_convolution(x, w, x_zero_point, w_zero_point, attributes)
    if b is not None:
        result = result + _per_channel(b, result.ndim, axis=1)
    scale = x_scale * _per_channel(w_scale, result.ndim, axis=1) / y_scale
    return requantized(result, scale, y_zero_point)


def fused_conv(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    **attributes: Any,
) -> torch.Tensor:
    """FusedConv of com.microsoft: activation(conv(x, w, b) + z); the other attributes are those of Conv."""
    result = conv(x, w, b, **attributes)
    result = result if z is None else result + z
    return activation_function(activation, *activation_params)(result) if activation else result


def _of_rank(functions: dict[int, Callable[..., torch.Tensor]], x: torch.Tensor) -> Callable[..., torch.Tensor]:
    rank = x.ndim - 2
    if rank not in functions:
        raise GraphoptError(f"torch has no convolution over {rank} spatial axes", help="1, 2 and 3 axes can be lifted")
    return functions[rank]


def _transposed_placement(
    spatial: Sequence[int],
    full: Sequence[int],
    strides: Sequence[int],
    output_padding: Sequence[int],
    output_shape: Sequence[int] | None,
    pads: Sequence[int],
    auto_pad: str,
) -> tuple[list[int], list[int]]:
    """What ConvTranspose keeps of its full result: elements cut off before, and output sizes."""
    rank = len(full)
    same = auto_pad in ("SAME_UPPER", "SAME_LOWER")
    if not same and not output_shape:
        pads = [0] * (2 * rank) if auto_pad == "VALID" else pads
        sizes = [full[axis] + output_padding[axis] - pads[axis] - pads[axis + rank] for axis in range(rank)]
        return list(pads[:rank]), sizes
    # An output_shape that is given with batch and channels counts from behind.
    wanted = list(output_shape[-rank:]) if output_shape else [spatial[axis] * strides[axis] for axis in range(rank)]
    totals = [max(full[axis] + output_padding[axis] - wanted[axis], 0) for axis in range(rank)]
    # SAME does not lengthen a result that is shorter than input size * stride; an output_shape does.
    sizes = wanted if output_shape else [full[axis] + output_padding[axis] - totals[axis] for axis in range(rank)]
    return split_padding(totals, auto_pad)[0], sizes


def _integer_convolution(
    x: torch.Tensor,
    w: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    w_zero_point: torch.Tensor | None,
    attributes: dict[str, Any],
) -> torch.Tensor:
    filters = None if w_zero_point is None else _per_channel(w_zero_point, w.ndim, axis=0)
    return conv(accumulated(x, x_zero_point), accumulated(w, filters), **attributes)


def _per_channel(operand: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """A vector laid along one axis of `rank`; a single element as it broadcasts to anything."""
    if operand.numel() == 1:
        return operand.reshape(())
    return operand.reshape([-1 if index == axis else 1 for index in range(rank)])
