"""Channels through the ops that work position by position.

`zero` is the one thing in which they differ: whether the result is 0 at a channel whose weights are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.axes import Axis
from graphopt.ir.ops.flow import ChannelSite, Track

CODES = {int(dtype) for dtype in ir.DataType if dtype.is_integer() and dtype.bitwidth <= 8}
"""Element types of quantized values."""
Combination = Literal["all", "any", "first", "none"]
"""Which operands must be 0 for the result to be: all of a sum, any of a product, the base of a power."""


def keeps_zero(site: ChannelSite) -> None:
    """All axes pass; 0 stays 0."""
    site.pass_on()


def moves_zero(site: ChannelSite) -> None:
    """All axes pass; 0 becomes something else (Sigmoid, Exp, Cos)."""
    site.pass_on(zero=False)


def activation(site: ChannelSite, *, zero: bool = True) -> None:
    """All axes pass; what the channels are good for passes a nonlinearity."""
    for track in site.take_all(0):
        site.role(track, "activated")
    site.pass_on(zero=zero)


def singular(site: ChannelSite) -> None:
    """All axes pass; 0 becomes infinity or NaN (Reciprocal, Log)."""
    for track in site.take_all(0):
        if track.zero:
            site.divides_by(0, track)
    site.pass_on(zero=False)


def clip(site: ChannelSite) -> None:
    """All axes pass; 0 stays 0 where it lies within the bounds."""
    low, high = site.constant(1), site.constant(2)
    inside = (low is not None or not site.given(1)) and (high is not None or not site.given(2))
    inside = inside and (low is None or bool(low.max() <= 0)) and (high is None or bool(high.min() >= 0))
    site.pass_on(zero=inside)


def cast(site: ChannelSite) -> None:
    """All axes pass. In 8 bits, 0 is written as a zero point, which is another number once cast to or from it."""
    target = int(site.attribute("to"))
    site.pass_on(zero=target not in CODES and site.dtype(0) not in CODES)


def shrink(site: ChannelSite) -> None:
    """All axes pass; 0 lies within the threshold unless that is negative."""
    site.role(site.peek(0, -1), "activated")
    site.pass_on(zero=site.attribute("lambd", 0.5) >= 0 or not site.attribute("bias", 0.0))


def cast_like(site: ChannelSite) -> None:
    """All axes of the data pass; the other operand gives its type only, and may lose channels of its own."""
    site.take_all(1)
    site.pass_on(zero=site.dtype(0) not in CODES and site.dtype(1) not in CODES)


def dropout(site: ChannelSite) -> None:
    """All axes pass, to the mask as well."""
    site.pass_on()
    site.pass_on(zero=False, output=1)


@dataclass(frozen=True)
class Meeting:
    """One axis of a broadcast.

    Attributes:
        axis: the channels of the result.
        zeros: of each operand that has the whole axis, whether it is 0 where masked.
        short: whether some operand has one element there, which every channel sees.
        zero_of: operand index to the same flag, operands with one element left out.
    """

    axis: Axis
    zeros: tuple[bool, ...]
    short: bool
    zero_of: dict[int, bool]

    def combined(self, how: Combination) -> Track:
        """The axis of the result of an op for which `how` operands must be 0."""
        if how == "all":
            zero = all(self.zeros) and not self.short
        elif how == "any":
            zero = any(self.zeros)
        else:
            zero = how == "first" and self.zero_of.get(0, False)
        return Track(self.axis, zero and bool(self.zeros))


def meet(site: ChannelSite, operands: Sequence[list[Track]]) -> list[Meeting]:
    """Align operands at the right, as ONNX broadcasting does, and unify the axes that meet."""
    rank = max(map(len, operands))
    found: list[Meeting] = []
    for position in range(rank):
        there = {
            index: tracks[position - rank + len(tracks)]
            for index, tracks in enumerate(operands)
            if position - rank + len(tracks) >= 0
        }
        whole = {index: track for index, track in there.items() if not _is_one(track)}
        axis = site.unify(*(whole or there).values())
        zeros = tuple(track.zero for track in whole.values())
        found.append(
            Meeting(axis, zeros, len(whole) < len(operands), {index: track.zero for index, track in whole.items()})
        )
    return found


def _is_one(track: Track) -> bool:
    return track.axis.static and track.axis.size == 1


def broadcast(site: ChannelSite, how: Combination = "all", operands: Sequence[int] | None = None) -> None:
    """Operands meet under broadcasting; `how` many of them must be 0 for the result to be."""
    indices = list(range(len(site.node.inputs))) if operands is None else operands
    tracks = [site.take_all(index) for index in indices]
    added = how == "all" and len(indices) == 2 and not any(map(site.is_weight, indices))
    met = [_differ(site, *pair) for pair in zip(*(entry[::-1] for entry in tracks), strict=False)] if added else []
    meetings = meet(site, tracks)
    site.emit(0, (meeting.combined(how) for meeting in meetings))
    for meeting, different in zip(meetings[::-1], met, strict=False):
        if different and not meeting.short:
            site.role(meeting.axis, "residual")


def _differ(site: ChannelSite, a: Track, b: Track) -> bool:
    """Whether two axes have not been known to be the same so far: a shortcut meets a branch."""
    return site.store.root(a.axis) is not site.store.root(b.axis)


def divide(site: ChannelSite) -> None:
    """The dividend must be 0; a divisor that may be 0 once masked must not be masked."""
    meetings = meet(site, [site.take_all(0), site.take_all(1)])
    for meeting in meetings:
        if meeting.zero_of.get(1):
            site.divides_by(1, Track(meeting.axis, True))
    site.emit(0, (meeting.combined("first") for meeting in meetings))


def power(site: ChannelSite) -> None:
    """0 to a positive power is 0; to a negative one it is infinity."""
    exponent = site.constant(1)
    meetings = meet(site, [site.take_all(0), site.take_all(1)])
    if exponent is not None and exponent.size and bool((exponent > 0).all()):
        masked = any(meeting.zero_of.get(1) for meeting in meetings)  # then it is 0, and 0 to the 0 is 1
        site.emit(0, (meeting.combined("none" if masked else "first") for meeting in meetings))
        return
    for meeting in meetings:
        if meeting.zero_of.get(0):
            site.divides_by(0, Track(meeting.axis, True))
    site.emit(0, (meeting.combined("none") for meeting in meetings))


def where(site: ChannelSite) -> None:
    """Both alternatives must be 0, each on the whole axis or as a scalar 0."""
    operands = [site.take_all(index) for index in range(3)]
    scalars = {index: _is_scalar_zero(site, index) for index in (1, 2)}
    tracks: list[Track] = []
    for meeting in meet(site, operands):
        zero = all(meeting.zero_of.get(index, scalars[index]) for index in (1, 2))
        tracks.append(Track(meeting.axis, zero))
    site.emit(0, tracks)


def _is_scalar_zero(site: ChannelSite, index: int) -> bool:
    found = site.constant(index)
    return found is not None and not np.any(found)
