"""From observed values to scales and zero points: min-max, percentile, entropy; per tensor and per channel."""

from __future__ import annotations

import numpy as np

from graphopt.inputs.observe import Histogram, Statistics

RANGES = ("minmax", "percentile", "entropy")
"""How the range of an activation is chosen from what was observed."""

_ENTROPY_STEPS = 96
"""Positions of each end tried by the entropy search, evenly spaced between 0 and the observed extreme."""
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
        bits: width of the integers, for "entropy".
    """
    if statistics.count == 0:
        return 0.0, 0.0
    low, high = statistics.minimum, statistics.maximum
    if method != "minmax" and statistics.histogram is not None:
        if method == "percentile":
            inner_low, inner_high = statistics.histogram.percentile(percentile)
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
    weight: np.ndarray, axis: int, bits: int, bias: np.ndarray | None = None, input_scale: float = 1.0
) -> np.ndarray:
    """One float32 scale a channel for signed integers with zero point 0.

    Args:
        weight: any shape, finite.
        axis: the axis that counts channels.
        bits: width of the integers.
        bias: one number a channel that will be stored as int32 in units of `input_scale * scale`; scales are kept
            large enough for it to fit.
        input_scale: scale of the data operand.

    Returns:
        float32 [weight.shape[axis]], all > 0.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight.astype(np.float64)).max(axis=others)
    scales = largest / (2 ** (bits - 1) - 1)
    magnitude = np.zeros_like(scales) if bias is None or bias.size == 0 else np.abs(bias)
    silent = magnitude / (input_scale * _SILENT_CHANNEL_BITS)
    silent[magnitude == 0] = 1.0
    scales = np.where(largest == 0, silent, scales)
    return (
        np.maximum.reduce([scales, magnitude / (input_scale * _BIAS_HEADROOM)]).clip(_SMALLEST_SCALE).astype(np.float32)
    )


def _shortest(scale: float) -> float:
    """The shortest decimal that is the same float32, so that plans print and store well."""
    return float(str(np.float32(scale)))
