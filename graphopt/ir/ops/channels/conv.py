"""Channels through the convolutions: input channels meet the filters', filters make the output channels.

With groups both axes are cut in groups x channels of a group: whole groups can go, or the same channels of all.
"""

from __future__ import annotations

from graphopt.ir.ops.axes import Axis
from graphopt.ir.ops.channels.elementwise import CODES
from graphopt.ir.ops.channels.layout import known_sizes
from graphopt.ir.ops.channels.linear import along, contract
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, RepairSite, Track

_SPATIAL = "a kernel slides over it"


def _grouped(site: ChannelSite, data: Track, filters: Track, groups: int) -> tuple[Axis, Axis, Axis]:
    """Groups, channels of a group on the data side, channels of a group on the side of the filters."""
    if data.axis.size % groups or filters.axis.size % groups:
        raise OpaqueError(f"{groups} groups do not divide its channels")
    outer, inner = site.split(data, (groups, -1))
    other, channels = site.split(filters, (groups, -1))
    site.unify(outer, other)
    if groups > 1:
        site.behind("group", outer)
        if inner.size > 1 or channels.size > 1:
            site.role(outer, "groups")
        for part in (inner, channels):
            site.role(part, "group width")
    return outer, inner, channels


def convolution(site: ChannelSite, data: int = 0, weight: int = 1, bias: int = 2) -> None:
    """Conv 1 to 3-D: W is [M, C / group, k...] (ONNX Conv 1, 11, 22)."""
    batch, channels = site.take(data, 0), site.take(data, 1)
    filters, inner = site.take(weight, 0), site.take(weight, 1)
    groups = int(site.attribute("group", 1))
    if site.dtype(data) in CODES:  # whether their 0 is the zero point of this operator is not known
        batch, channels = batch.nonzero(), channels.nonzero()
        inner, filters = (inner, filters) if site.is_weight(weight) else (inner.nonzero(), filters.nonzero())
    if groups == 1:
        contract(site, channels, inner)
    else:
        _, within, _ = _grouped(site, channels, filters, groups)
        contract(site, Track(within, channels.zero), inner)
    site.role(filters, "outputs")
    _emit(site, batch, _with_bias(site, filters, bias), biased=site.given(bias))


def transposed_convolution(site: ChannelSite) -> None:
    """ConvTranspose: W is [C, M / group, k...] (ONNX ConvTranspose 1, 11, 22)."""
    batch, channels = site.take(0, 0), site.take(0, 1)
    inner, filters = site.take(1, 0), site.take(1, 1)
    groups = int(site.attribute("group", 1))
    if groups == 1:
        contract(site, channels, inner)
    else:
        outer, within, other = _grouped(site, channels, inner, groups)
        contract(site, Track(within, channels.zero), Track(other, inner.zero))
        filters = Track(site.product(outer, filters), filters.zero and inner.zero)
    site.role(filters, "outputs")
    _emit(site, batch, _with_bias(site, filters, 2), biased=site.given(2))


def deformable_convolution(site: ChannelSite) -> None:
    """DeformConv: offsets and mask belong to offset groups, whose number stays (ONNX DeformConv 19, 22)."""
    offset_groups = int(site.attribute("offset_group", 1))
    if offset_groups > 1:
        site.freeze(site.split(site.take(0, 1), (offset_groups, -1))[0], "each offset group has its own offsets")
    for index in (2, 4):
        if site.given(index):
            site.unify(site.take(index, 0), site.take(0, 0))
            site.freeze(site.take(index, 1), "its positions are offsets of the kernel", channel=False)
    convolution(site, bias=3)


def causal_convolution(site: ChannelSite) -> None:
    """CausalConvWithState: depthwise, with a bias and a state of the last positions (ONNX 27)."""
    channels = site.take(0, 1)
    filters = site.take(1, 0)
    axis = site.unify(channels, filters)
    bias = site.take(2, 0) if site.given(2) else None
    state = site.take(3, 1) if site.given(3) else None
    for track in (bias, state):
        if track is not None:
            site.unify(axis, track)
    zero = filters.zero and (bias is None or bias.zero)
    batch = site.take(0, 0)
    if site.given(3):
        site.unify(batch, site.take(3, 0))
    site.freeze_rest(_SPATIAL)
    _emit(site, batch, Track(axis, zero), biased=bias is not None)
    sizes = site.output_sizes(1) if len(site.node.outputs) > 1 else None
    if sizes is not None:
        past = channels.zero and (state is None or state.zero)
        site.emit(1, [batch, Track(axis, past), site.fixed(sizes[2], _SPATIAL)])


def quantized_convolution(site: ChannelSite) -> None:
    """QLinearConv: x and W at inputs 0 and 3, each followed by scale and zero point; bias at 8."""
    for index in (4, 5):
        along(site, index, site.take(3, 0))
    convolution(site, 0, 3, 8)


def integer_convolution(site: ChannelSite) -> None:
    """ConvInteger: zero points at inputs 2 and 3."""
    along(site, 3, site.take(1, 0))
    convolution(site, 0, 1, len(site.node.inputs))


def _with_bias(site: ChannelSite, filters: Track, bias: int) -> Track:
    if not site.given(bias):
        return filters
    track = site.take(bias, 0)
    return Track(site.unify(filters, track), filters.zero and track.zero)


def _emit(site: ChannelSite, batch: Track, channels: Track, *, biased: bool) -> None:
    site.freeze_rest(_SPATIAL)
    batch = batch.nonzero() if biased else batch
    site.emit(0, [batch, channels, *(site.fixed(size, _SPATIAL) for size in known_sizes(site)[2:])])


def repair_groups(site: RepairSite) -> None:
    """As many groups as stay."""
    groups = site.counted("group")
    if groups is not None:
        site.set_attribute("group", groups)
