"""Torch functions of the activations. All work position by position and return the shape and dtype of x."""

from __future__ import annotations

import torch
from torch.nn import functional

from graphopt.ir.ops.torch import unsigned

relu = torch.relu
sigmoid = torch.sigmoid
tanh = torch.tanh
erf = torch.erf
softsign = functional.softsign
hard_swish = functional.hardswish
mish = functional.mish
gelu = functional.gelu  # its `approximate` is that of ONNX; Gelu of com.microsoft is the exact one


def leaky_relu(x: torch.Tensor, *, alpha: float = 0.01) -> torch.Tensor:
    """LeakyRelu 16."""
    return functional.leaky_relu(x, alpha)


def p_relu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """PRelu 16: a slope of the same rank or lower that broadcasts to x."""
    if x.dtype in unsigned.SIGNED:
        return x  # never negative
    per_channel = x.ndim > 1 and slope.ndim == x.ndim - 1 and slope.shape[0] == slope.numel() == x.shape[1]
    if x.is_floating_point() and (per_channel or slope.numel() == 1):
        return functional.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


def thresholded_relu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """ThresholdedRelu 10+: x above alpha, else 0."""
    return functional.threshold(x, alpha, 0.0)


def elu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """Elu 6+."""
    return functional.elu(x, alpha)


def celu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """Celu 12+."""
    return functional.celu(x, alpha)


def selu(x: torch.Tensor, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> torch.Tensor:
    """Selu 6+; the constants of ONNX are those of torch in float32."""
    return gamma * functional.elu(x, alpha)


def shrink(x: torch.Tensor, *, lambd: float = 0.5, bias: float = 0.0) -> torch.Tensor:
    """Shrink 9: x moved towards 0 by `bias`, 0 where it is within `lambd` of it."""
    shrunk = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))
    return shrunk.to(x.dtype)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Softplus 1+: log(1 + exp(x)). From 36 on it is x in float64 too; torch switches at 20 by default."""
    return functional.softplus(x, threshold=36.0)


def hard_sigmoid(x: torch.Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> torch.Tensor:
    """HardSigmoid 6+: alpha * x + beta cut off at 0 and 1."""
    if beta == 0.5 and abs(alpha - 1 / 6) < 1e-8:  # 1/6 as a float32 attribute
        return functional.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def swish(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """Swish 24: x * sigmoid(alpha * x)."""
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def swi_glu(gate: torch.Tensor, value: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """SwiGLU 28: the value times Swish of the gate."""
    return swish(gate, alpha=alpha) * value


def quick_gelu(x: torch.Tensor, *, alpha: float = 1.702) -> torch.Tensor:
    """QuickGelu of com.microsoft: Swish, with a default close to Gelu."""
    return swish(x, alpha=alpha)


def scaled_si_lu(x: torch.Tensor, scale: torch.Tensor | None = None, *, alpha: float = 1.0) -> torch.Tensor:
    """ScaledSiLU of com.microsoft: SiLU of x times a scale, which is an input or an attribute."""
    return functional.silu(x * (alpha if scale is None else scale))


def fast_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """FastGelu of com.microsoft: Gelu by tanh, of x plus a bias for the last axis."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """BiasGelu of com.microsoft: Gelu of x plus a bias for the last axis."""
    return functional.gelu(x + bias)
