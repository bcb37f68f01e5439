"""Rounding a weight in the metric of what it is multiplied with, and which float weight is to be rounded.

    min over integers q, scales s:  sum over channels of (s q - w) C (s q - w)^T

for C the covariance of the inputs: the bias takes the mean up. With C = R^T R, R upper triangular, the error of one
channel is |R (s q - w)|^2, and the columns are rounded from the last to the first, each one making up for what those
behind it have left:

    q_j = round((w_j + sum over k > j of R_jk / R_jj (w_k - s q_k)) / s)

That is Babai's nearest plane, the same as GPTQ (Frantar et al. 2022, arXiv 2210.17323) in reverse order. The inputs
that vary most come first, while there is still room to make up for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.inputs.moments import SecondMoments
from graphopt.ir.linear import linear_producing
from graphopt.ir.origin import Origin
from graphopt.ir.quantized_linear import QuantizedLinear
from graphopt.ir.rewrite import DeclinedError, constant, constant_float64, is_op, sole_consumer

_SHRINKS = np.linspace(1.0, 0.6, 9)
"""Scales that are tried, relative to the one with which nothing saturates."""
_TRIED = 3
"""How many of them are rounded with feedback."""
_BLOCK = 64
"""Columns between two products of whole matrices."""
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 10.0
_SILENT_STEPS = 2.0**6
"""How far the scale of a channel of zeros lies above the smallest one."""
_HALF_STEP = 0.51
"""Up to which share of a step a weight is the rounded self of another; a little more than half for float32."""


@dataclass(frozen=True)
class Rounded:
    """A weight as integers.

    Attributes:
        integers: float64 of integral values [G, M / G, K].
        scales: float64 [M], > 0.
    """

    integers: np.ndarray
    scales: np.ndarray

    def weight(self) -> np.ndarray:
        """s q, float64 [G, M / G, K]."""
        return self.integers * _by_group(self.scales, self.integers)

    def error(self, weight: np.ndarray, metric: np.ndarray) -> np.ndarray:
        """(s q - w) C (s q - w)^T, float64 [M]."""
        return _quadratic(self.weight() - weight, metric)


def input_metric(moments: SecondMoments, ridge: float) -> np.ndarray:
    """C of a solve with this ridge: the covariance of the inputs, its diagonal raised as there. float64 [G, K, K].

    An infinite ridge, which says that the inputs are too few to be trusted, counts as a large one.
    """
    covariance = moments.input_covariance()
    level = np.trace(covariance, axis1=1, axis2=2) / max(covariance.shape[-1], 1)
    damping = float(np.clip(ridge, _LEAST_DAMPING, _MOST_DAMPING))
    level = np.where(level > 0, damping * level, 1.0)
    return covariance + level[:, None, None] * np.eye(covariance.shape[-1])


def round_with_feedback(
    weight: np.ndarray, metric: np.ndarray, scales: np.ndarray, limits: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Integers [G, R, K] that stand for a weight in given scales, each column making up for those rounded before.

    Args:
        weight: float64 [G, R, K].
        metric: float64 [G, K, K], positive definite; see `input_metric`.
        scales: float64 [G, R], > 0, or [G, R, K] where they differ by input.
        limits: smallest and largest integer, float64 of either shape each.

    Returns:
        float64 of integral values within the limits.

    Example:
        Two inputs that are nearly the same share what one weight alone cannot say.

        >>> metric = np.array([[[1.0, 0.9], [0.9, 1.0]]])
        >>> one = np.ones((1, 1))
        >>> round_with_feedback(np.array([[[0.4, 0.4]]]), metric, one, (-7 * one, 7 * one)).tolist()
        [[[1.0, 0.0]]]
    """
    order = np.argsort(np.diagonal(metric, axis1=1, axis2=2), axis=1, kind="stable")
    ordered = np.take_along_axis(weight, order[:, None, :], axis=2)
    permuted = np.take_along_axis(np.take_along_axis(metric, order[:, :, None], axis=1), order[:, None, :], axis=2)
    factor = _factor(permuted)
    relative = factor / np.diagonal(factor, axis1=1, axis2=2)[:, :, None]
    steps, low, high = (_ordered(one, order, weight.shape) for one in (scales, *limits))
    columns = weight.shape[-1]
    left, rounded = np.zeros_like(ordered), np.zeros_like(ordered)
    for end in range(columns, 0, -_BLOCK):
        begin = max(end - _BLOCK, 0)
        wanted = ordered[:, :, begin:end] + left[:, :, end:] @ relative[:, begin:end, end:].swapaxes(1, 2)
        for column in range(end - 1, begin - 1, -1):
            behind = left[:, :, column + 1 : end] @ relative[:, column, column + 1 : end, None]
            here = wanted[:, :, column - begin] + behind[:, :, 0]
            step = steps[:, :, column]
            integers = np.clip(np.rint(here / step), low[:, :, column], high[:, :, column])
            rounded[:, :, column] = integers
            left[:, :, column] = ordered[:, :, column] - step * integers
    result = np.empty_like(rounded)
    np.put_along_axis(result, order[:, None, :], rounded, axis=2)
    return result


def round_nearest(weight: np.ndarray, scales: np.ndarray, limits: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The integers nearest to a weight [G, R, K] in scales [G, R] and limits as in `round_with_feedback`."""
    low, high = limits
    return np.clip(np.rint(weight / scales[:, :, None]), low[:, :, None], high[:, :, None])


def best_rounding(
    weight: np.ndarray,
    metric: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray],
    *,
    smallest: np.ndarray | float = 0.0,
    shared: bool = False,
) -> Rounded:
    """Integers and scales with the smallest error found: never a larger one than rounding to the nearest leaves.

    Scales from the one with which nothing saturates down to 0.6 of it are tried; those that do best to the nearest
    are rounded with feedback. At last, with the integers as they are, the scale has a closed form.

    Args:
        weight: float64 [G, M / G, K].
        metric: float64 [G, K, K], positive definite.
        limits: smallest and largest integer, float64 [M] each; the smallest <= 0 <= the largest.
        smallest: scales [M], or one, below which none may be.
        shared: one scale for all channels.
    """
    groups, rows, _ = weight.shape
    bounds = (limits[0].reshape(groups, rows), limits[1].reshape(groups, rows))
    floor = np.broadcast_to(np.asarray(smallest, np.float64), (groups * rows,)).reshape(groups, rows)
    widest = _largest_scales(weight, bounds)
    if shared:
        widest, floor = np.full_like(widest, widest.max()), np.full_like(floor, floor.max())

    def worth(candidate: Rounded) -> np.ndarray:
        """The error by channel, or that of all of them where they share a scale."""
        error = candidate.error(weight, metric)
        return np.full_like(error, error.sum()) if shared else error

    def nearest(scales: np.ndarray) -> Rounded:
        return Rounded(round_nearest(weight, scales, bounds), scales.reshape(-1))

    plain = [nearest(np.maximum(shrink * widest, floor)) for shrink in _SHRINKS]
    errors = np.stack([worth(candidate) for candidate in plain])
    ranks = np.argsort(errors, axis=0, kind="stable")
    found, least = _pick(plain, ranks[0]), errors.min(axis=0)
    for rank in range(_TRIED):
        scales = _pick(plain, ranks[rank]).scales.reshape(groups, rows)
        candidate = Rounded(round_with_feedback(weight, metric, scales, bounds), scales.reshape(-1))
        for better in (candidate, _rescaled(candidate, weight, metric, floor, shared=shared)):
            error = worth(better)
            found, least = _pick([found, better], (error < least).astype(int)), np.minimum(least, error)
    return found


def prior_weight(linear: QuantizedLinear, origin: Origin, name: str) -> np.ndarray:
    """The float weight that the operator's integers were rounded from, where the origin has it; else what they say.

    Whether they were is seen from the numbers: each lies within half a step of what is left of the origin's weight.

    Args:
        linear: the operator.
        origin: the graph before.
        name: of the value in the origin that the operator makes.

    Returns:
        float64 [M, C / groups, *kernel].
    """
    now = linear.weight()
    value = next((v for node in origin.model.graph for v in node.outputs if v.name == name), None)
    try:
        before = None if value is None else linear_producing(value)
    except DeclinedError:
        before = None
    if before is None:
        return now
    operand = before.node.inputs[before.weight_index]
    stored = constant_float64(operand)
    if operand is None or stored is None or before.node.op_type != linear.node.op_type:
        return now
    weight = linear.arranged(origin.cut(operand.name or "", stored))
    if weight.shape != now.shape:
        return now
    step = linear.scales.reshape(-1, *(1,) * (now.ndim - 1))
    low, high = (limit.reshape(step.shape) for limit in linear.limits())
    held = np.clip(weight, (low - 0.5) * step, (high + 0.5) * step)
    return weight if (np.abs(held - now) <= _HALF_STEP * step).all() else now


def round_solution(
    linear: QuantizedLinear, weight: np.ndarray, bias: np.ndarray, moments: SecondMoments, ridge: float
) -> Rounded:
    """The integers of a solved weight [G, M / G, K] with bias [M], in the limits in use and the types as stored."""
    rounded = best_rounding(
        weight,
        input_metric(moments, ridge),
        linear.limits(),
        smallest=linear.smallest_scales(bias),
        shared=linear.weights.scale.size == 1,
    )
    if linear.weights.scale.size == 1:
        return rounded
    silent = ~rounded.integers.reshape(len(rounded.scales), -1).any(axis=1)
    unit = linear.smallest_scales(bias) * _SILENT_STEPS  # a channel of zeros needs a scale for its bias alone
    scales = np.where(silent, np.where(unit > 0, unit, linear.scales), rounded.scales)
    return Rounded(rounded.integers, scales)


def beyond_clamp(start: ir.Value, end: ir.Value, known: Mapping[str | None, ir.Value]) -> bool:
    """Whether a quantizer on the way from `start` to `end` does the work of a Relu or Clip: the way is not linear.

    Args:
        start, end: values of a quantized graph, `end` reached through the only readers of the values between.
        known: the values of the graph before, by name. A value that has no namesake counts as clamped where its
            integers begin at 0, as those behind a Relu do.
    """
    value = start
    while value is not end:
        node = sole_consumer(value)
        if node is None:
            return False
        if is_op(node, "QuantizeLinear"):
            namesake = known.get(value.name)
            zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            if namesake is None and (zero is None or not zero.any()):
                return True
            if namesake is not None and is_op(sole_consumer(namesake), "Relu", "Clip"):
                return True
        value = node.outputs[0]
    return False


def _ordered(parameter: np.ndarray, order: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter [G, R] or [G, R, K] as [G, R, K] with its columns in this order [G, K]."""
    if parameter.ndim < len(shape):
        return np.broadcast_to(parameter[:, :, None], shape)
    return np.take_along_axis(parameter, order[:, None, :], axis=2)


def _largest_scales(weight: np.ndarray, limits: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The smallest scales [G, R] with which nothing saturates; 1 for channels of zeros."""
    low, high = limits
    if not weight.shape[-1]:
        return np.ones(low.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.where(high > 0, weight.max(axis=2) / high, 0.0)
        below = np.where(low < 0, weight.min(axis=2) / low, 0.0)
    scales = np.maximum(above, below)
    return np.where(scales > np.finfo(np.float32).tiny, scales, 1.0)


def _rescaled(rounded: Rounded, weight: np.ndarray, metric: np.ndarray, floor: np.ndarray, *, shared: bool) -> Rounded:
    """The same integers with the scale s = (w C q) / (q C q), which leaves the smallest error."""
    image = rounded.integers @ metric
    above, below = (image * weight).sum(axis=2), (image * rounded.integers).sum(axis=2)
    if shared:
        above, below = np.full_like(above, above.sum()), np.full_like(below, below.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where((below > 0) & (above > 0), above / below, rounded.scales.reshape(above.shape))
    return Rounded(rounded.integers, np.maximum(scales, floor).reshape(-1))


def _pick(candidates: list[Rounded], which: np.ndarray) -> Rounded:
    """For each channel the candidate `which` [M] names."""
    groups, rows, columns = candidates[0].integers.shape
    integers = np.stack([candidate.integers.reshape(groups * rows, columns) for candidate in candidates])
    scales = np.stack([candidate.scales for candidate in candidates])
    channels = np.arange(groups * rows)
    return Rounded(integers[which, channels].reshape(groups, rows, columns), scales[which, channels])


def _factor(metric: np.ndarray) -> np.ndarray:
    """R, upper triangular, with R^T R = C; the diagonal is raised as far as rounding errors in C make it necessary."""
    level = np.trace(metric, axis1=1, axis2=2)[:, None, None] / max(metric.shape[-1], 1) * np.eye(metric.shape[-1])
    for damping in (0.0, 1e-6, 1e-4, 1e-2):
        try:
            return np.linalg.cholesky(metric + damping * level).swapaxes(1, 2)
        except np.linalg.LinAlgError:
            continue
    raise DeclinedError("the second moments of its inputs are not finite")


def _quadratic(change: np.ndarray, metric: np.ndarray) -> np.ndarray:
    return ((change @ metric) * change).sum(axis=2).reshape(-1)


def _by_group(vector: np.ndarray, like: np.ndarray) -> np.ndarray:
    return vector.reshape(*like.shape[:2], 1)
