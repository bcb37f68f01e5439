"""Channels through the normalisations.

One that takes its statistics channel by channel (BatchNormalization, InstanceNormalization) is exact. One that takes
them over channels sees fewer numbers once some are gone, so that those channels are marked inexact.
"""

from __future__ import annotations

from graphopt.ir.ops.axes import Axis
from graphopt.ir.ops.channels.elementwise import meet
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, RepairSite, Track

_STATISTICS = "its statistics are taken over this axis"


def per_channel(site: ChannelSite, parameters: int) -> Axis:
    """Axis 1 of the data meets `parameters` vectors (scale, bias, mean, variance); all other axes pass."""
    tracks = site.take_all(0)
    vectors = [site.take(index, 0) for index in range(1, 1 + parameters)]
    axis = site.unify(tracks[1], *vectors)
    zero = all(vector.zero for vector in vectors[:2])
    batch, _, *rest = tracks
    site.emit(0, [batch.nonzero(), Track(axis, zero), *(track.nonzero() for track in rest)])
    for index in range(1, len(site.node.outputs)):
        site.emit(index, [Track(axis)])
    return axis


def _spatial_statistics(site: ChannelSite) -> None:
    for axis in range(2, site.rank(0)):
        site.inexact(site.take(0, axis), _STATISTICS)


def batch_normalization(site: ChannelSite) -> None:
    """Scale, bias, mean and variance a channel."""
    axis = per_channel(site, 4)
    if not site.attribute("epsilon", 1e-5):
        site.divides_by(4, Track(axis, site.take(4, 0).zero))


def instance_normalization(site: ChannelSite) -> None:
    """Scale and bias a channel; statistics over the spatial axes."""
    per_channel(site, 2)
    _spatial_statistics(site)


def layer_normalization(site: ChannelSite) -> None:
    """Statistics over the axes from `axis` on (LayerNormalization 17, RMSNormalization 23)."""
    tracks = site.take_all(0)
    first = int(site.attribute("axis", -1)) % len(tracks)
    normalized = [Track(track.axis, True) for track in tracks[first:]]
    for track in normalized:
        site.inexact(track, _STATISTICS)
    operands = [normalized, *(site.take_all(index) for index in (1, 2) if site.given(index))]
    if any(len(operand) > len(normalized) for operand in operands):
        raise OpaqueError("its scale has more axes than it normalises")
    has_bias = len(operands) > 2
    scaled: list[Track] = []
    for meeting in meet(site, operands):
        zero = meeting.zero_of.get(1, False) and (not has_bias or meeting.zero_of.get(2, False))
        scaled.append(Track(meeting.axis, zero))
    leading = [track.nonzero() for track in tracks[:first]]
    site.emit(0, [*leading, *scaled])
    for index in range(1, len(site.node.outputs)):
        ones = [Track(site.store.open(1)) for _ in tracks[first:]]
        site.emit(index, [*leading, *ones])


def skip_layer_normalization(site: ChannelSite, bias: int) -> None:
    """com.microsoft: normalises the sum of inputs 0, 1 and `bias` over the last axis, scaled by inputs 2 (and 3)."""
    summed = [site.take_all(0), site.take_all(1)]
    if site.given(bias):
        summed.append(site.take_all(bias))
    data = [meeting.combined("all") for meeting in meet(site, summed)]
    site.inexact(data[-1], _STATISTICS)
    vectors = [site.take(index, 0) for index in range(2, bias) if site.given(index)]
    axis = site.unify(data[-1], *vectors)
    leading = [track.nonzero() for track in data[:-1]]
    one = Track(site.store.open(1))
    site.emit(0, [*leading, Track(axis, all(vector.zero for vector in vectors))])
    site.emit(1, [*leading, one])
    site.emit(2, [*leading, one])
    site.emit(3, data)


def group_normalization(site: ChannelSite) -> None:
    """GroupNormalization 21: whole groups go exactly, channels within all groups change their statistics."""
    tracks = site.take_all(0)
    groups = int(site.attribute("num_groups"))
    if tracks[1].axis.size % groups:
        raise OpaqueError(f"{groups} groups do not divide its channels")
    outer, inner = site.split(tracks[1], (groups, -1))
    site.inexact(inner, _STATISTICS)
    _spatial_statistics(site)
    site.behind("num_groups", outer)
    site.role(outer, "groups")
    vectors = [site.take(index, 0) for index in (1, 2)]
    axis = site.unify(tracks[1], *vectors)
    batch, _, *rest = tracks
    zero = all(vector.zero for vector in vectors)
    site.emit(0, [batch.nonzero(), Track(axis, zero), *(track.nonzero() for track in rest)])


def repair_group_normalization(site: RepairSite) -> None:
    """As many groups as stay."""
    groups = site.counted("num_groups")
    if groups is not None:
        site.set_attribute("num_groups", groups)


def mean_variance_normalization(site: ChannelSite) -> None:
    """Statistics over `axes` (0, 2, 3 by default)."""
    tracks = site.take_all(0)
    axes = {axis % len(tracks) for axis in site.attribute("axes", (0, 2, 3))}
    for axis, track in enumerate(tracks):
        if axis in axes:
            site.inexact(track, _STATISTICS)
        elif track.zero:
            site.divides_by(0, track)  # by a deviation of 0; onnxruntime adds no epsilon
    site.emit(0, (track.nonzero() for track in tracks))


def local_response_normalization(site: ChannelSite) -> None:
    """LRN: each channel is divided by a norm of its neighbours, which are others once channels are gone."""
    site.inexact(site.take(0, 1), "each channel is divided by a norm of its neighbours")
    site.pass_on()


def norm_division(site: ChannelSite) -> None:
    """LpNormalization: zeros do not count in the norm over `axis`, so that removing them is exact."""
    tracks = site.take_all(0)
    axis = int(site.attribute("axis", -1)) % len(tracks)
    if not tracks[axis].zero:
        site.inexact(tracks[axis], "it is divided by its norm and not 0 where masked")
    site.emit(0, (track if index == axis else track.nonzero() for index, track in enumerate(tracks)))


def softmax(site: ChannelSite) -> None:
    """Softmax, LogSoftmax, Hardmax (13): the axis that is normalised must stay, all others pass."""
    tracks = site.take_all(0)
    axis = int(site.attribute("axis", -1)) % len(tracks)
    _stay(site, tracks[axis].axis)
    site.emit(0, (track.nonzero() for track in tracks))


def _stay(site: ChannelSite, axis: Axis) -> None:
    site.freeze(axis, "it normalises over this axis, and masked entries count")
