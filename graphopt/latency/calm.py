"""What to believe of timings on a machine that others use too."""

from __future__ import annotations

import numpy as np

UNDISTURBED = 0.97
"""A run counts as undisturbed where the thread had the core for this share of the time."""
EXCESS = 1.02
"""How much more than the whole the kernels may take together before slow calls are put down to other processes."""
LONG = 1000.0
"""Microseconds; the fastest of many calls of a kernel below that was hardly interrupted, whatever else runs."""
_LEVELS = tuple(round(0.5 - 0.025 * step, 3) for step in range(21))


def undisturbed(shares: np.ndarray) -> np.ndarray:
    """Which runs to count, by the share of the time that the thread had the core: [runs] of bool.

    All that had it throughout, and at least the better half of all: a rule that no noise can leave without runs.

    Example:
        >>> undisturbed(np.array([1.0, 0.6, 0.99, 0.98])).tolist(), undisturbed(np.array([0.5, 0.6, 0.2, 0.3])).tolist()
        ([True, False, True, True], [True, True, False, False])
    """
    return shares >= min(UNDISTURBED, float(np.median(shares)))


def inner_mean(values: np.ndarray, level: float = 0.5) -> float:
    """Mean of the inner half: what a median would be if the clock did not count in whole microseconds.

    Args:
        values: [runs].
        level: about which quantile to take, up to 0.5: the mean of what lies between half of it and half of it more.

    Example:
        >>> inner_mean(np.array([5.0, 3.0, 4.0, 900.0])), inner_mean(np.array([5.0, 3.0, 4.0, 900.0]), 0.1)
        (4.5, 3.0)
    """
    ordered, count = np.sort(values), len(values)
    first = min(int(count * level / 2), count - 1)
    return float(ordered[first : max(count - int(count * (1 - level * 1.5)), first + 1)].mean())


def believed_level(times: np.ndarray, whole: float) -> float:
    """The highest level of `inner_mean`, up to 0.5, at which the kernels together take no longer than the whole.

    Args:
        times: microseconds [runs, kernels].
        whole: microseconds of a run of the model by a clock that other processes do not disturb.

    Returns:
        The level; 0, which is the fastest call of each, where they take longer at every level.

    Example:
        >>> calls = np.array([[10.0], [10.0], [10.0], [30.0], [50.0], [70.0], [90.0], [90.0]])
        >>> believed_level(calls, 60.0), believed_level(calls, 10.0)
        (0.5, 0.25)
    """
    for level in _LEVELS:
        if kernels_together(times, level) <= EXCESS * whole:
            return level
    return 0.0


def kernels_together(times: np.ndarray, level: float) -> float:
    """The sum over the kernels at a level of `inner_mean`, microseconds; `times` is [runs, kernels]."""
    return sum(inner_mean(column, level) for column in times.T)


def scaled_to(times: np.ndarray, level: float, whole: float) -> np.ndarray:
    """Times whose sum at a level is that of the whole: calls that were long enough to be interrupted are made shorter.

    Args:
        times: microseconds [runs, kernels].
        level: of `inner_mean`.
        whole: microseconds.

    Example:
        >>> scaled_to(np.array([[10.0, 3000.0, 6000.0]]), 0.0, 6010.0).tolist()
        [[10.0, 2000.0, 4000.0]]
    """
    each = np.array([inner_mean(column, level) for column in times.T])
    is_long = each > LONG
    left = whole - each[~is_long].sum()
    if left <= 0 or not is_long.any():
        return times * (whole / max(each.sum(), 1e-9))
    return times * np.where(is_long, left / max(each[is_long].sum(), 1e-9), 1.0)
