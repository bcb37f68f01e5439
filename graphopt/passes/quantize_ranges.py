"""From observed values to scales and zero points: min-max, percentile, entropy, MSE; per tensor and per channel."""

from __future__ import annotations

import numpy as np

from graphopt.inputs.observe import Histogram, Statistics

RANGES = ("minmax", "percentile", "entropy", "mse")
"""How the range of an activation is chosen from what was observed."""
WEIGHT_SCALES = ("max", "mse")
"""How the scale of each channel of a weight is chosen: from its largest magnitude, or for the least squared error."""

_ENTROPY_STEPS = 96
"""Positions of each end tried by the entropy search, evenly spaced between 0 and the observed extreme."""
_MSE_ROUNDS, _MSE_HALVINGS = 8, 40
"""How often both ends are searched by turns, and the steps of a bisection."""
_MSE_COARSE, _MSE_FINE, _MSE_LEAST = 12, 6, 0.3
"""Scales tried for a weight, in parts of the largest that are evenly spaced from the least part, and again around the
best of them."""
_BIAS_HEADROOM = 2.0**30
"""Largest magnitude of a bias in units of the accumulator: half of int32, the products need the rest."""
_SILENT_CHANNEL_BITS = 2.0**24
"""Resolution of the bias of a channel whose weights are all zero."""
_SMALLEST_SCALE = 1e-30
"""Below this a product of two scales would no longer be a normal float32."""


def activation_range(statistics: Statistics, method: str, percentile: float, bits: int) -> tuple[float, float]:
    """The interval that a quantizer is to cover; always holds 0.

    Args:
        statistics: what was observed; the histogram is needed for all methods but "minmax".
        method: one of `RANGES`.
        percentile: how many percent of the values "percentile" keeps inside.
        bits: width of the integers, for "entropy" and "mse".
    """
    if statistics.count == 0:
        return 0.0, 0.0
    low, high = statistics.minimum, statistics.maximum
    if method != "minmax" and statistics.histogram is not None:
        if method == "percentile":
            inner_low, inner_high = statistics.histogram.percentile(percentile)
        elif method == "mse":
            inner_low, inner_high = mse_range(statistics.histogram, low, high, bits)
        else:
            inner_low, inner_high = entropy_range(statistics.histogram, min(low, 0.0), max(high, 0.0), bits)
        low, high = max(low, inner_low), min(high, inner_high)
    return min(low, 0.0), max(high, 0.0)


def entropy_range(histogram: Histogram, low: float, high: float, bits: int) -> tuple[float, float]:
    """The part of [low, high] around 0 whose quantization loses the least information.

    For each candidate the distribution clipped to it, P (what lies outside counted in the last bins), is compared
    with the same distribution spread over 2^bits levels, Q, by the Kullback-Leibler divergence of Q from P
    (Migacz, "8-bit inference with TensorRT", GTC 2017; there for |x|, here the upper end first, then the lower).
    Zeros, of which a Relu makes many, are exact in every range and would drown the rest: their bin counts like
    its neighbour.
    """
    counts = histogram.counts.astype(np.float64)
    centres = histogram.edges[:-1] + histogram.width / 2
    zero = int(np.clip(-histogram.low // histogram.width, 0, counts.size - 1)) if histogram.width else 0
    counts[zero] = max(counts[zero - 1] if zero else 0.0, counts[min(zero + 1, counts.size - 1)])
    parts = np.arange(1, _ENTROPY_STEPS + 1) / _ENTROPY_STEPS

    def best(ranges: list[tuple[float, float]]) -> tuple[float, float]:
        """The range that loses least; the widest of equals, and of ranges too narrow to judge."""
        losses = [_divergence(counts, centres, *one, 2**bits) for one in ranges]
        return ranges[len(losses) - 1 - int(np.argmin(losses[::-1]))]

    if high > 0.0:
        _, high = best([(low, float(high * part)) for part in parts])
    if low < 0.0:
        low, _ = best([(float(low * part), high) for part in parts])
    return low, high


def mse_range(histogram: Histogram, low: float, high: float, bits: int) -> tuple[float, float]:
    """The part of [low, high] around 0 that loses the least squared error in all: by rounding inside, clipping outside.

    With s = (high - low) / (2^bits - 1) and n values inside, the error of a range is

        E = n s^2 / 12  +  sum over x > high of (x - high)^2  +  sum over x < low of (low - x)^2

    (Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment"; Sakr et
    al. 2022, "Optimal clipping and magnitude-aware differentiation for improved quantization-aware training", search
    the zero of the derivative for |x|; here each end by bisection on the histogram, by turns). Zeros, of which a Relu
    makes many, are exact in every range and do not count. Where the search gains nothing the range stays whole.

    Args:
        histogram: the distribution.
        low: smallest value.
        high: largest value.
        bits: width of the integers.

    Example:
        >>> values = np.append(np.random.default_rng(0).normal(size=100_000), 50.0)
        >>> histogram = Histogram()
        >>> histogram.add(values)
        >>> [round(end) for end in mse_range(histogram, float(values.min()), 50.0, 4)]
        [-3, 3]
    """
    low, high = min(low, 0.0), max(high, 0.0)
    values = np.clip(histogram.edges[:-1] + histogram.width / 2, low, high)
    counts = histogram.counts.astype(np.float64)
    zero = np.abs(values) <= histogram.width / 2
    if int(np.count_nonzero(counts[~zero])) < 2:
        return low, high
    counts[zero] = 0.0
    values, counts = values[counts > 0], counts[counts > 0]
    ends = (low, high)
    for _ in range(_MSE_ROUNDS):
        before = ends
        # the lower end is the upper one of the mirrored distribution
        ends = ends[0], _upper_end(values, counts, ends[0], high, bits)
        ends = -_upper_end(-values[::-1], counts[::-1], -ends[1], -low, bits), ends[1]
        if np.allclose(before, ends, rtol=1e-3, atol=0.0):
            break
    whole, found = (_squared_error(values, counts, *one, bits) for one in ((low, high), ends))
    return ends if found < whole else (low, high)


def _upper_end(values: np.ndarray, counts: np.ndarray, low: float, most: float, bits: int) -> float:
    """The end in [0, most] at which the error of rounding grows as fast as that of clipping falls."""
    if most <= 0.0:
        return 0.0
    # sums over everything from a value on, so that each step of the bisection is one look-up
    beyond = np.append(np.cumsum(counts[::-1])[::-1], 0.0)
    beyond_total = np.append(np.cumsum((counts * values)[::-1])[::-1], 0.0)
    inside = counts[values >= low].sum()
    least, largest = 0.0, most
    for _ in range(_MSE_HALVINGS):
        high = (least + largest) / 2
        first = int(np.searchsorted(values, high, side="right"))
        rounding = (inside - beyond[first]) * (high - low) / (12 * (2**bits - 1) ** 2)
        if rounding < beyond_total[first] - beyond[first] * high:
            least = high
        else:
            largest = high
    return (least + largest) / 2


def _squared_error(values: np.ndarray, counts: np.ndarray, low: float, high: float, bits: int) -> float:
    """Sum over a distribution of the squared error of the quantizer that covers [low, high]."""
    scale, zero = asymmetric_quantizer(low, high, bits)
    integers = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1)
    return float(np.sum(counts * np.square((integers - zero) * scale - values)))


def _divergence(counts: np.ndarray, centres: np.ndarray, low: float, high: float, levels: int) -> float:
    """KL(P || Q) for one range, infinite where the range has fewer bins than levels."""
    inside = np.flatnonzero((centres >= low) & (centres <= high))
    if inside.size < levels:
        return np.inf
    first, last = inside[0], inside[-1] + 1
    clipped = counts[first:last].copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    # Spread what each level holds evenly over those of its bins that hold anything at all.
    raw = counts[first:last]
    level = np.minimum(np.arange(raw.size) * levels // raw.size, levels - 1)
    filled = raw > 0
    held = np.bincount(level, weights=raw, minlength=levels)
    bins = np.bincount(level, weights=filled, minlength=levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(filled, (held / bins)[level], 0.0)
    total, spread_total = clipped.sum(), spread.sum()
    if total == 0 or spread_total == 0:
        return np.inf
    p, q = clipped / total, spread / spread_total
    here = p > 0
    q = np.maximum(q, 1e-12)
    return float(np.sum(p[here] * np.log(p[here] / q[here])))


def asymmetric_quantizer(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of unsigned integers that cover [low, high], 0 represented exactly.

    Example:
        >>> asymmetric_quantizer(-1.0, 1.55, 8)
        (0.01, 100)
        >>> asymmetric_quantizer(0.0, 0.0, 8)
        (1.0, 0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    scale = (high - low) / levels
    if not np.isfinite(scale) or scale <= 0.0:
        return 1.0, 0
    scale = float(max(np.float32(scale), np.float32(_SMALLEST_SCALE)))
    return _shortest(scale), int(np.clip(np.rint(-low / scale), 0, levels))


def symmetric_scales(
    weight: np.ndarray,
    axis: int,
    bits: int,
    bias: np.ndarray | None = None,
    input_scale: float = 1.0,
    method: str = "max",
) -> np.ndarray:
    """One float32 scale a channel for signed integers with zero point 0.

    Args:
        weight: any shape, finite.
        axis: the axis that counts channels.
        bits: width of the integers.
        bias: one number a channel that will be stored as int32 in units of `input_scale * scale`; scales are kept
            large enough for it to fit.
        input_scale: scale of the data operand.
        method: one of `WEIGHT_SCALES`: "max" covers the largest magnitude, "mse" has the least squared error.

    Returns:
        float32 [weight.shape[axis]], all > 0.

    Example:
        >>> symmetric_scales(np.array([[0.7, -0.1], [0.0, 0.0]]), 0, 4).round(3).tolist()
        [0.10000000149011612, 1.0]
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight.astype(np.float64)).max(axis=others)
    scales = largest / (2 ** (bits - 1) - 1)
    if method == "mse":
        scales = scales * _best_parts(weight, axis, scales, bits)
    magnitude = np.zeros_like(scales) if bias is None or bias.size == 0 else np.abs(bias)
    silent = magnitude / (input_scale * _SILENT_CHANNEL_BITS)
    silent[magnitude == 0] = 1.0
    scales = np.where(largest == 0, silent, scales)
    return (
        np.maximum.reduce([scales, magnitude / (input_scale * _BIAS_HEADROOM)]).clip(_SMALLEST_SCALE).astype(np.float32)
    )


def _best_parts(weight: np.ndarray, axis: int, scales: np.ndarray, bits: int) -> np.ndarray:
    """For each channel the part of its scale with which rounding and clipping lose the least squared error."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float32)
    most = 2 ** (bits - 1) - 1
    whole = np.where(scales > 0, scales, 1.0)[:, None].astype(np.float32)
    best, least = np.ones(len(rows)), np.full(len(rows), np.inf)

    def attempt(parts: np.ndarray) -> None:
        nonlocal best, least
        step = whole * parts[:, None].astype(np.float32)
        integers = np.clip(np.rint(rows / step), -most, most)
        errors = np.square(integers * step - rows).sum(axis=1, dtype=np.float64)
        better = errors < least
        best, least = np.where(better, parts, best), np.where(better, errors, least)

    coarse = np.linspace(1.0, _MSE_LEAST, _MSE_COARSE)
    for part in coarse:
        attempt(np.full(len(rows), part))
    around, width = best.copy(), coarse[0] - coarse[1]
    for offset in np.linspace(-width, width, _MSE_FINE + 2)[1:-1]:
        attempt(np.minimum(around + offset, 1.0))
    return best


def _shortest(scale: float) -> float:
    """The shortest decimal that is the same float32, so that plans print and store well."""
    return float(str(np.float32(scale)))
