"""Torch functions of the normalisations and softmaxes."""

from __future__ import annotations

import torch
from torch.nn import functional

from graphopt.ir.ops.torch.dtypes import ElementType, torch_dtype


def batch_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    outputs: int = 1,
    training: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """BatchNormalization 15 of x [batch, channels, ...] or [batch].

    Inference form: as `torch.nn.BatchNorm2d`. While `training` it normalises by the statistics of the batch and
    updates `mean` and `var` in place. With `training_mode` the new statistics are outputs 1 and 2 instead.
    """
    if scale.dtype != mean.dtype:  # half-precision models that keep the statistics in float32
        scale, bias = scale.to(mean.dtype), bias.to(mean.dtype)
    if not training_mode and (
        mean.requires_grad or var.requires_grad
    ):  # computed in the graph, such as those of weights
        shape = [-1, *[1] * (x.ndim - 2)] if x.ndim > 1 else [-1]
        factor = scale * torch.rsqrt(var + epsilon)
        return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)
    if not training_mode:
        if x.ndim == 1:  # [batch] has one channel
            return functional.batch_norm(x[:, None], mean, var, scale, bias, training, 1.0 - momentum, epsilon)[:, 0]
        return functional.batch_norm(x, mean, var, scale, bias, training, 1.0 - momentum, epsilon)
    columns = x[:, None] if x.ndim == 1 else x
    cudnn = torch.backends.cudnn.enabled
    result = torch.batch_norm(columns, scale, bias, None, None, True, 0.0, epsilon, cudnn).view_as(x)
    if outputs == 1:
        return result
    axes = [axis for axis in range(columns.ndim) if axis != 1]
    batch_var, batch_mean = torch.var_mean(columns.to(mean.dtype), axes, correction=0)
    running_mean = mean * momentum + batch_mean * (1.0 - momentum)
    running_var = var * momentum + batch_var * (1.0 - momentum)
    return (result, running_mean, running_var)[:outputs]


def instance_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, epsilon: float = 1e-5
) -> torch.Tensor:
    """InstanceNormalization 6+ of x [batch, channels, ...]."""
    # Not functional.instance_norm, which refuses one position a channel.
    return torch.instance_norm(x, scale, bias, None, None, True, 0.0, epsilon, torch.backends.cudnn.enabled)


def group_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:
    """GroupNormalization 21 of x [batch, channels, ...]; torch computes half precision in float32."""
    # Not functional.group_norm, which refuses one value a group.
    return torch.group_norm(x, num_groups, scale, bias, epsilon, torch.backends.cudnn.enabled)


def group_normalization18(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> torch.Tensor:
    """GroupNormalization 18: scale and bias have one element a group."""
    size = x.shape[1] // num_groups
    scale, bias = scale.repeat_interleave(size), bias.repeat_interleave(size)
    return group_normalization(x, scale, bias, num_groups=num_groups, epsilon=epsilon)


def layer_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: ElementType = 1,
    outputs: int = 1,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """LayerNormalization 17 over the axes from `axis` on; outputs 1 and 2 are means and inverse deviations."""
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        result = functional.layer_norm(x, shape, scale, bias, epsilon)
    else:  # they broadcast
        result = functional.layer_norm(x, shape, None, None, epsilon) * scale
        result = result if bias is None else result + bias
    if outputs == 1:
        return result
    axes = list(range(axis % x.ndim, x.ndim))
    var, mean = torch.var_mean(_stashed(x, stash_type), axes, correction=0, keepdim=True)
    statistics = mean, torch.rsqrt(var + epsilon)
    return (result, *(statistic.to(torch_dtype(stash_type)) for statistic in statistics))[:outputs]


def rms_normalization(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: ElementType = 1
) -> torch.Tensor:
    """RMSNormalization 23 over the axes from `axis` on; the result has the type of the scale."""
    shape = x.shape[axis:]
    if scale.shape == shape and scale.dtype == x.dtype:
        return functional.rms_norm(x, shape, scale, epsilon)
    return functional.rms_norm(x, shape, None, epsilon).to(scale.dtype) * scale


def simplified_layer_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: ElementType = 1,
    outputs: int = 1,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """SimplifiedLayerNormalization of onnxruntime: RMSNormalization; output 1 is the inverse root mean square."""
    result = rms_normalization(x, scale, axis=axis, epsilon=epsilon)
    if outputs == 1:
        return result
    axes = list(range(axis % x.ndim, x.ndim))
    mean_square = torch.mean(torch.square(_stashed(x, stash_type)), axes, keepdim=True)
    return result, torch.rsqrt(mean_square + epsilon).to(torch_dtype(stash_type))


def skip_layer_normalization(
    x: torch.Tensor,
    skip: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
    """SkipLayerNormalization of com.microsoft: LayerNormalization of the sum of input, skip and bias.

    Output 3 is the sum. Outputs 1 and 2 are None: onnxruntime computes no statistics at inference either.
    """
    total = x + skip if bias is None else x + skip + bias
    result = functional.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    return result if outputs == 1 else (result, None, None, total)[:outputs]


def skip_simplified_layer_normalization(
    x: torch.Tensor,
    skip: torch.Tensor,
    gamma: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
    """SkipSimplifiedLayerNormalization of com.microsoft: the same with RMSNormalization."""
    total = x + skip if bias is None else x + skip + bias
    result = rms_normalization(total, gamma, epsilon=epsilon)
    return result if outputs == 1 else (result, None, None, total)[:outputs]


def mean_variance_normalization(x: torch.Tensor, *, axes: list[int] | tuple[int, ...] = (0, 2, 3)) -> torch.Tensor:
    """MeanVarianceNormalization 13: mean 0 and variance 1 along `axes`."""
    var, mean = torch.var_mean(x, list(axes), correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)


def lrn(x: torch.Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> torch.Tensor:
    """LRN 13 of x [batch, channels, ...]: divides by a power of the mean square of `size` channels around.

    `functional.local_response_norm` puts the odd channel of an even size on the other side.
    """
    before = (size - 1) // 2
    squares = torch.square(x).reshape(x.shape[0], 1, x.shape[1], -1)
    padded = functional.pad(squares, (0, 0, before, size - 1 - before))
    means = functional.avg_pool2d(padded, (size, 1), stride=1).reshape(x.shape)
    return x / torch.pow(means * alpha + bias, beta)


def lp_normalization(x: torch.Tensor, *, axis: int = -1, p: int = 2) -> torch.Tensor:
    """LpNormalization 1+: x by its norm along `axis`; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    """Softmax 13."""
    return torch.softmax(x, axis)


def log_softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    """LogSoftmax 13."""
    return torch.log_softmax(x, axis)


def hardmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    """Hardmax 13: 1 at the first largest element along `axis`, else 0."""
    return torch.zeros_like(x).scatter(axis, torch.argmax(x, axis, keepdim=True), 1.0)


def _stashed(x: torch.Tensor, stash_type: ElementType) -> torch.Tensor:
    """In the type that statistics are computed in; float64 is not narrowed."""
    return x if x.dtype == torch.float64 else x.to(torch_dtype(stash_type))
