"""Torch functions of the ops that draw numbers. They draw from torch's generator, which `torch.manual_seed` seeds.

The attribute `seed` is not used: onnxruntime seeds a stream with it once, not every run, and a Dropout that drops the
same positions at every step would not train.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from graphopt.ir.ops.torch.dtypes import ElementType, torch_dtype
from graphopt.ir.ops.torch.operands import Numbers, number


def dropout(
    data: torch.Tensor,
    ratio: Numbers | None = None,
    training_mode: Numbers | None = None,
    *,
    seed: float | None = None,
    outputs: int = 1,
    training: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Dropout 13+: active while the module is in training mode, and always where its `training_mode` is true.

    Outputs: the data, kept elements scaled by 1 / (1 - ratio), and which elements are kept.
    """
    probability = 0.5 if ratio is None else float(number(ratio))
    active = training or (training_mode is not None and bool(number(training_mode)))
    if outputs == 1:
        return functional.dropout(data, probability, active)
    if not active:
        return data, torch.ones_like(data, dtype=torch.bool)
    kept = torch.rand_like(data, dtype=torch.float32) >= probability
    return data * kept / (1.0 - probability), kept


def random_normal(
    *,
    shape: Sequence[int],
    mean: float = 0.0,
    scale: float = 1.0,
    dtype: ElementType = 1,
    seed: float | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """RandomNormal 1+: samples of the given shape."""
    return torch.randn(list(shape), dtype=torch_dtype(dtype), device=device) * scale + mean


def random_uniform(
    *,
    shape: Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    dtype: ElementType = 1,
    seed: float | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """RandomUniform 1+: samples of the given shape."""
    return torch.rand(list(shape), dtype=torch_dtype(dtype), device=device) * (high - low) + low


def random_normal_like(
    x: torch.Tensor,
    *,
    mean: float = 0.0,
    scale: float = 1.0,
    dtype: ElementType | None = None,
    seed: float | None = None,
) -> torch.Tensor:
    """RandomNormalLike 1+: samples of the shape of x, and of its type unless `dtype` is given."""
    return torch.randn_like(x, dtype=_dtype(dtype, x)) * scale + mean


def random_uniform_like(
    x: torch.Tensor,
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: ElementType | None = None,
    seed: float | None = None,
) -> torch.Tensor:
    """RandomUniformLike 1+: samples of the shape of x, and of its type unless `dtype` is given."""
    return torch.rand_like(x, dtype=_dtype(dtype, x)) * (high - low) + low


def bernoulli(x: torch.Tensor, *, dtype: ElementType | None = None, seed: float | None = None) -> torch.Tensor:
    """Bernoulli 15+: 1 with the probability that x has at the position, else 0."""
    return torch.bernoulli(x).to(_dtype(dtype, x))


def multinomial(
    x: torch.Tensor, *, sample_size: int = 1, dtype: ElementType = 6, seed: float | None = None
) -> torch.Tensor:
    """Multinomial 7+: x [batch, classes] of log probabilities (up to a constant) to classes [batch, sample_size]."""
    drawn = torch.multinomial(torch.softmax(x, dim=-1), sample_size, replacement=True)
    return drawn.to(torch_dtype(dtype))


def _dtype(element_type: ElementType | None, like: torch.Tensor) -> torch.dtype:
    return like.dtype if element_type is None else torch_dtype(element_type)
