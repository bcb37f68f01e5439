"""The time of a kernel between widths that were measured: flat inside of blocks of channels, bilinear in the blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

_FAST_STEP = 4
"""A count of channels that is no multiple of this leaves the fast path of onnxruntime's kernels."""
_TERMS = 4


@dataclass(frozen=True)
class Point:
    """One kernel that was measured: channels that come in and go out, and microseconds."""

    into: int
    out: int
    microseconds: float


@dataclass(frozen=True)
class Estimate:
    """Microseconds of a kernel, and where they come from.

    Attributes:
        microseconds: the time; NaN where nothing is known.
        how: "measured", "interpolated" between widths that were measured, "outside" of them, or "unknown".
        points: how many measurements it rests on.
    """

    microseconds: float
    how: str
    points: int

    @property
    def is_known(self) -> bool:
        """Whether it was measured or lies between what was."""
        return self.how in ("measured", "interpolated")


def interpolate(points: Sequence[Point], into: int, out: int, *, block: int, is_channelwise: bool = False) -> Estimate:
    """The time at widths that were not measured, from those that were.

    A kernel computes `block` channels at once, so its time is that of the next whole block: 52 = 56 = 60 = 64. In
    blocks i of inputs and o of outputs it is a + b i + c o + d i o, fitted to all points; what they are off
    by is spread over their surroundings, so that measured blocks come out as measured. Outside of the blocks measured,
    or where the count of inputs is no multiple of 4 and leaves the fast path, the answer is "outside": the fit is all
    there is.

    Args:
        points: of the same operator, attributes and sizes.
        into: channels that come in.
        out: channels that go out.
        block: channels that are computed at once.
        is_channelwise: each channel is computed from its own, as in a depthwise convolution: the time is a + b o.

    Example:
        >>> points = [Point(i, o, 5 + i * o / 64) for i in (16, 64) for o in (16, 64)]
        >>> found = interpolate(points, 32, 60, block=16)
        >>> round(found.microseconds, 6), found.how
        (37.0, 'interpolated')
    """
    fast = [point for point in points if not _is_slow(point.into)]
    known = [point for point in points if (point.into, point.out) == (into, out)]
    if known:
        return Estimate(float(np.mean([point.microseconds for point in known])), "measured", len(known))
    if not fast:
        return Estimate(math.nan, "unknown", 0)
    blocks = _blocks([(point.into, point.out) for point in fast], block)
    wanted = _blocks([(into, out)], block)
    times = np.array([point.microseconds for point in fast])
    here = (blocks == wanted).all(axis=1)
    inside = bool((blocks.min(axis=0) <= wanted[0]).all() and (wanted[0] <= blocks.max(axis=0)).all())
    how = "interpolated" if inside and not _is_slow(into) else "outside"
    if here.any():
        return Estimate(float(times[here].mean()), how, int(here.sum()))
    terms = 2 if is_channelwise else _TERMS
    coefficients = _fit(_terms(blocks, terms), times)
    off = times - _terms(blocks, terms) @ coefficients
    nearness = 1 / ((np.log2(blocks) - np.log2(wanted)) ** 2).sum(axis=1)
    found = float(_terms(wanted, terms)[0] @ coefficients + (nearness * off).sum() / nearness.sum())
    return Estimate(max(found, 0.0), how, len(fast))


def _is_slow(into: int) -> bool:
    return into % _FAST_STEP != 0 and into > _FAST_STEP


def _blocks(widths: Sequence[tuple[int, int]], block: int) -> np.ndarray:
    return np.ceil(np.maximum(np.array(widths, dtype=np.float64), 1) / block)


def _terms(blocks: np.ndarray, count: int) -> np.ndarray:
    into, out = blocks[:, 0], blocks[:, 1]
    return np.stack([np.ones(len(blocks)), out, into, into * out][:count], axis=1)


def _fit(terms: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Least squares where the points determine every term; else with coefficients of at least 0, as more costs more."""
    scale = np.maximum(np.abs(terms).max(axis=0), 1e-12)
    if np.linalg.matrix_rank(terms / scale) == terms.shape[1]:
        return np.linalg.lstsq(terms / scale, times, rcond=None)[0] / scale
    return nnls(terms / scale, times)[0] / scale
