"""What `FakeQuant` puts into a lifted graph: a module a place, gradients as in LSQ, ranges by least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from graphopt.errors import LiftError
from graphopt.ir.quantizer import TensorPlan

_CANDIDATES = 100
"""Clipping points that are tried for the range with the least mean squared error."""
SAMPLED = 2**18
"""Elements of a tensor that its range is found on."""
_SMALLEST_SCALE = 1e-8
_INT32 = 2.0**31 - 128
"""The largest float32 that fits into int32."""


class Quantizer(nn.Module):
    """One place. `base`, `log_ratio` and `zero_point` are [1] or, along `plan.axis`, [channels].

    With `bounds`, the interval of a clamp that its saturation stands for, the zero point stays and the range does not
    grow beyond the interval; one that was wider from the beginning does not grow at all.
    """

    base: torch.Tensor

    def __init__(self, plan: TensorPlan, *, learn: bool, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.planned, self.active, self.learn, self.bounds = plan, True, learn, bounds
        self.fitted = bool(plan.scale)
        scale = torch.tensor(plan.scale or [1.0], dtype=torch.float32)
        self._set(scale, torch.tensor(plan.zero_point or [0] * scale.numel(), dtype=torch.float32))

    def _set(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        self.register_buffer("base", scale)
        self.log_ratio = nn.Parameter(torch.zeros_like(scale), requires_grad=self.learn)
        self.zero_point = nn.Parameter(zero_point, requires_grad=self.learn and not self.fixed_zero)

    @property
    def fixed_zero(self) -> bool:
        """Whether the zero point is none to learn: symmetric, or the end of a clamp's interval."""
        return self.planned.signed or self.bounds is not None

    @property
    def scale(self) -> torch.Tensor:
        """The scale as it is now; its gradient passes the limit that `bounds` sets."""
        scale = self.base * self.log_ratio.exp()
        if self.bounds is None:
            return scale
        kept = torch.minimum(scale, torch.maximum(self.base, self._largest_scale())).detach()
        return kept + (scale - scale.detach())

    def _largest_scale(self) -> torch.Tensor:
        """The scale whose range just fits into `bounds`, in the shape of the scales."""
        assert self.bounds is not None
        low, high = self.planned.limits
        zero = self.zero_point.detach().round()
        above, below = (high - zero).clamp_min(1e-6), (zero - low).clamp_min(1e-6)
        return torch.minimum(self.bounds[1] / above, torch.where(zero > low, -self.bounds[0] / below, torch.inf))

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the grid of its integers; unchanged while ranges are being found."""
        if not self.active:
            return tensor
        if not self.fitted:
            raise without_range(self.planned.name)
        low, high = self.planned.limits
        per_scale = tensor.numel() // self.base.numel()
        samples = tensor.shape[0] if self.planned.role == "activation" and tensor.dim() > 0 else 1
        damping = 1.0 / math.sqrt(max(per_scale // max(samples, 1), 1) * high)
        return _Learned.apply(tensor, self.scale, self.zero_point, low, high, damping, self.planned.axis)  # pyright: ignore[reportReturnType]

    def fit(self, tensor: torch.Tensor) -> None:
        """Take the range with the least mean squared error on a weight."""
        rows = rows_of(tensor, self.planned.axis)
        self.fit_rows(sample(rows, SAMPLED) if self.planned.axis is None else rows)

    def fit_rows(self, rows: torch.Tensor) -> None:
        """Take the ranges with the least mean squared error on samples [scales, n]."""
        low, high = self.planned.limits
        scale, zero = _least_squares_range(rows.float(), low, high, symmetric=self.planned.signed)
        self._set(scale.to(self.base.device), zero.to(self.base.device))
        self.fitted = True

    def learned(self) -> TensorPlan:
        """The plan with the scales and zero points of now."""
        scale = [float(str(one)) for one in self.scale.detach().float().cpu().numpy()]  # the shortest decimals
        zero = self.zero_point.detach().float().round().clamp(*_zero_limits(self.planned)).int().cpu().tolist()
        return replace(self.planned, scale=tuple(scale), zero_point=tuple(zero), source="training")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Ranges come in the size that they were saved in, and count as found."""
        saved = state_dict.get(f"{prefix}base")
        if saved is not None:
            if saved.shape != self.base.shape:
                self._set(*(torch.ones_like(saved, device=self.base.device) for _ in range(2)))
            self.fitted = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportArgumentType]


class RuledQuantizer(Quantizer):
    """A weight whose scales the writer makes from the weight: the same rule on the weight of now, gradient through it.

    The rule is NumPy: on a device the weight travels to the host and back at every step.
    """

    def __init__(self, plan: TensorPlan, rule: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(plan, learn=False)
        self.fitted, self._rule = True, rule

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as the integers will have it; unchanged while ranges are being found."""
        if not self.active:
            return tensor
        rounded = np.ascontiguousarray(self._rule(tensor.detach().float().cpu().numpy()), np.float32)
        return torch.from_numpy(rounded).to(tensor) + (tensor - tensor.detach())

    def learned(self) -> TensorPlan:
        """The plan as it was: its rule is applied to what was learned."""
        return self.planned


class BiasQuantizer(nn.Module):
    """A bias in the integers of the sum that it starts, b = round(b / (s_x s_w)) s_x s_w, gradient straight through."""

    def __init__(self, data: Quantizer, weight: Quantizer, factor: float = 1.0) -> None:
        super().__init__()
        self._factors = (data, weight)  # in a tuple, so that they are not children a second time
        self._factor = factor  # what the scale of the data was multiplied with on its way

    @property
    def scale(self) -> torch.Tensor:
        """[1], or one for each output channel."""
        data, weight = self._factors
        return data.scale * self._factor * weight.scale

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        """The bias as the integer kernel adds it; unchanged while ranges are being found."""
        if not all(each.active and each.fitted for each in self._factors):
            return bias
        with torch.no_grad():
            scale = self.scale.to(bias.device)
            rounded = (bias.to(scale.dtype) / scale).round().clamp(-_INT32, _INT32).mul_(scale).to(bias.dtype)
        return bias + (rounded - bias).detach()


class DynamicQuantizer(nn.Module):
    """ONNX DynamicQuantizeLinear and its inverse: the range is that of the tensor at hand, in 8 bits. Nothing to learn.

    Example:
        >>> DynamicQuantizer()(torch.tensor([0.0, 0.5, 255.0]))
        tensor([  0.,   0., 255.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = True

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the grid of its integers, gradient straight through; unchanged while ranges are being found."""
        if not self.active or not tensor.numel():
            return tensor
        with torch.no_grad():
            wide = tensor.float()
            low, high = wide.amin().clamp_max(0.0), wide.amax().clamp_min(0.0)
            scale = (high - low) / 255
            scale = torch.where(scale > 0, scale, 1.0)
            zero = (-low / scale).round().clamp(0, 255)
            rounded = (wide / scale).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(scale).to(tensor.dtype)
        return rounded + (tensor - tensor.detach())


class _Learned(torch.autograd.Function):
    """The quantizer and its straight-through gradient, see `FakeQuant`."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        low: int,
        high: int,
        damping: float,
        axis: int | None,
    ) -> torch.Tensor:
        step, zero = _shaped(scale, zero_point, low, high, tensor, axis)
        integers = torch.div(tensor.to(step.dtype), step).round_().add_(zero).clamp_(low, high)
        result = integers.sub_(zero).mul_(step).to(tensor.dtype)
        ctx.save_for_backward(tensor, result, scale, zero_point)
        ctx.settings = low, high, damping, axis
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        tensor, result, scale, zero_point = ctx.saved_tensors
        low, high, damping, axis = ctx.settings
        step, zero = _shaped(scale, zero_point, low, high, tensor, axis)
        inside = (tensor >= (low - 0.5 - zero) * step) & (tensor <= (high + 0.5 - zero) * step)
        to_tensor = torch.where(inside, gradient, 0.0)
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            # dy/ds = (y - x) / s where nothing is clamped, y / s where it is
            moved = torch.where(inside, tensor, 0.0).neg_().add_(result).mul_(gradient)
            to_scale = _summed(moved, scale, axis) / scale * damping
        if ctx.needs_input_grad[2]:
            clamped = _summed(gradient, scale, axis) - _summed(to_tensor, scale, axis)
            to_zero = -clamped * scale * damping
        return to_tensor, to_scale, to_zero, None, None, None, None


def without_range(name: str) -> LiftError:
    """The error of a quantizer that is used before it has a range."""
    return LiftError("a quantizer has no range yet", where=name, help="call FakeQuant.prepare with some inputs")


def _shaped(
    scale: torch.Tensor, zero_point: torch.Tensor, low: int, high: int, tensor: torch.Tensor, axis: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and whole zero point, shaped to broadcast with the tensor."""
    shape = [1] * tensor.dim()
    if axis is not None:
        shape[axis] = -1
    zero = zero_point.round().clamp(min(low, 0), high)
    return scale.reshape(shape), zero.reshape(shape)


def _summed(tensor: torch.Tensor, like: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The sum over all axes but that of the scales, in the shape of the scales."""
    axes = [other for other in range(tensor.dim()) if axis is None or other != axis % tensor.dim()]
    return tensor.sum(axes, dtype=like.dtype).reshape(like.shape)


def _zero_limits(plan: TensorPlan) -> tuple[int, int]:
    low, high = plan.limits
    return min(low, 0), high


def _least_squares_range(
    rows: torch.Tensor, low: int, high: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row [channels, n] with the least squared error, over clipped ranges."""
    smallest, largest = rows.amin(1).clamp_max(0.0), rows.amax(1).clamp_min(0.0)
    if symmetric:
        largest = torch.maximum(-smallest, largest)
        smallest = -largest
    best = torch.full_like(largest, torch.inf)
    best_scale, best_zero = torch.ones_like(largest), torch.zeros_like(largest)
    for candidate in range(_CANDIDATES, _CANDIDATES // 10, -1):
        share = candidate / _CANDIDATES
        scale = ((largest - smallest) * share / (high - low)).clamp_min(_SMALLEST_SCALE)
        zero = torch.zeros_like(scale) if symmetric else (low - smallest * share / scale).round().clamp(low, high)
        integers = ((rows / scale[:, None]).round_() + zero[:, None]).clamp_(low, high)
        error = ((integers - zero[:, None]) * scale[:, None] - rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def rows_of(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The elements that share a scale as rows, [scales, n]."""
    return tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def sample(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most about `count` elements, evenly taken from all rows."""
    return rows[:, :: max(rows.numel() // max(count, 1), 1)]
