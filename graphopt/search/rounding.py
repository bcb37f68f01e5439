"""Which widths are fast: counts of channels that fill the blocks of the target's kernels."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.ir.channels import ChannelGroup

BLOCK = 16
"""Channels that a kernel of onnxruntime computes at once; the cost is flat inside a block (measured, see `step_of`)."""
_SMALLEST_STEP = 4
"""A count that is no multiple of this leaves the fast path."""


def step_of(width: int) -> int:
    """The number of channels that a group of this width is rounded to a multiple of.

    Measured on onnxruntime's CPU kernels (AVX-512): the cost of a convolution or product is flat
    inside a block of 16 channels and then steps (52 = 56 = 60 = 64, 20 = 24 = 28 = 32); counts that are no multiple of
    4 leave the fast path altogether. So groups go in steps of 16, and those narrower than 32, which would then lose all
    or nothing, in steps of half their width, rounded down to a power of two, of 4 at least. Fewer than 4 channels are
    in no block; they go one by one.

    Example:
        >>> [step_of(width) for width in (3, 8, 16, 20, 32, 48, 64, 2048)]
        [1, 4, 8, 8, 16, 16, 16, 16]
    """
    if width < _SMALLEST_STEP:
        return 1
    half = max(width // 2, _SMALLEST_STEP)
    return min(BLOCK, 1 << (half.bit_length() - 1))


def unit_step(group: ChannelGroup, round_to: int | None = None) -> int:
    """The number of units that what is kept of a group should be a multiple of.

    A unit that owns several coordinates of an axis (a head, a channel of each convolution group) counts as many
    channels: the step is the smallest with which the coordinates come out as multiples of `step_of` their number, but
    never more than `step_of` the units: three gates of 32 hidden units are 96 coordinates and go by 8 units, not 16.

    Args:
        group: any group with units.
        round_to: multiples of coordinates that the user wants, 1 for none; None derives them from the width.

    Raises:
        GraphoptError: `round_to` is no whole number of at least 1.
    """
    check_round_to(round_to)
    each = coordinates_per_unit(group)
    if round_to is None:
        step = step_of(group.units * each)
        return min(step // math.gcd(step, each), step_of(group.units))
    return round_to // math.gcd(round_to, each)


def check_round_to(round_to: int | None) -> None:
    """Raise `GraphoptError` where `round_to` is neither None nor a whole number of at least 1."""
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GraphoptError(
            f"round_to is {round_to!r}", help="give a whole number, 1 for any width, or None for the target's own"
        )


def coordinates_per_unit(group: ChannelGroup) -> int:
    """How many coordinates a unit owns on an axis of a weight; where axes differ, as on most of them.

    Example:
        A head of width 64 owns 64 coordinates of the query projection, a channel of a convolution owns one, though it
        owns 49 of the product behind a Flatten of 7 x 7 pixels.
    """
    ranks = {value.name: len(value.shape or ()) for value, _ in group.origin.members}
    owned = group.slices(0)
    counts = [len(indices) for name, axes in owned.items() if ranks.get(name, 0) > 1 for _, indices in axes]
    counts = counts or [len(indices) for axes in owned.values() for _, indices in axes]
    if not counts:
        return 1
    number = Counter(counts)
    return max(1, min(number, key=lambda count: (-number[count], count)))


def kept_choices(units: int, step: int, least: int) -> np.ndarray:
    """The numbers of units that may be kept, ascending: all of them, and the multiples of `step` from `least` on.

    Args:
        units: how many there are.
        step: see `unit_step`.
        least: how many must stay, 1 at least.

    Example:
        >>> kept_choices(20, 8, 1).tolist(), kept_choices(3, 4, 1).tolist()
        ([8, 16, 20], [3])
    """
    first = math.ceil(max(least, 1) / step) * step
    return np.unique([*range(first, units + 1, step), units]).astype(np.int64)


def nearest(choices: np.ndarray, kept: float) -> int:
    """Index of the choice nearest to `kept`; the wider one of two.

    Example:
        >>> choices = kept_choices(64, 16, 1)
        >>> int(choices[nearest(choices, 44.8)]), int(choices[nearest(choices, 40)]), int(choices[nearest(choices, 0)])
        (48, 48, 16)
    """
    distance = np.abs(choices - kept)
    return int(np.flatnonzero(distance <= distance.min() + 1e-9)[-1])
