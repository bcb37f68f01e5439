"""Channels through pooling, interpolation and sampling: images are resampled channel by channel."""

from __future__ import annotations

from graphopt.ir.ops.channels.layout import known_sizes
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, RepairSite, Track

_SPATIAL = "a window slides over it"


def pooling(site: ChannelSite) -> None:
    """Batch and channels pass, spatial axes stay (AveragePool, MaxPool, LpPool and their global forms)."""
    if len(site.node.outputs) > 1 and site.node.outputs[1].uses():
        raise OpaqueError("its indices count through all channels")
    batch, channels = site.take(0, 0), site.take(0, 1)
    site.freeze_rest(_SPATIAL)
    for index in range(len(site.node.outputs)):
        sizes = site.output_sizes(index)
        if sizes is not None:
            site.emit(index, [batch, channels, *(site.fixed(size, _SPATIAL) for size in sizes[2:])])


def resampling(site: ChannelSite) -> None:
    """Axes that keep their size pass, the others stay (Resize, Upsample, CenterCropPad)."""
    tracks = site.take_all(0)
    sizes = known_sizes(site)
    result = list(tracks)
    scales = _scales(site, len(tracks))
    for axis, (track, size) in enumerate(zip(tracks, sizes, strict=True)):
        if track.axis.sizes != size or not track.axis.static or scales.get(axis, 1.0) != 1.0:
            site.freeze(track, "it is resampled", channel=False)
            result[axis] = site.fixed(size, "it is resampled")
    site.emit(0, result)


def _scales(site: ChannelSite, rank: int) -> dict[int, float]:
    """Scale of each axis where there are scales: one that rounds to the same size still resamples."""
    index = {"Resize": 2, "Upsample": 1}.get(site.node.op_type)
    if index is None or not site.given(index) or site.operand_length(index) == 0:
        return {}
    scales = site.constant(index)
    axes = site.attribute("axes") or range(rank)
    found = [float("nan")] * rank if scales is None else [float(scale) for scale in scales.reshape(-1)]
    return {axis % rank: scale for axis, scale in zip(axes, found, strict=False)}


def repair_resize(site: RepairSite) -> None:
    """Entries of `sizes` follow the channels; `scales` are 1 there."""
    _resize(site, 3)


def repair_crop(site: RepairSite) -> None:
    """Entries of `shape` follow the channels."""
    _resize(site, 1)


def _resize(site: RepairSite, index: int) -> None:
    if index >= len(site.node.inputs) or site.node.inputs[index] is None:
        return
    rank = site.output_rank()
    axes = [axis % rank for axis in site.attribute("axes") or range(rank)]
    for element, axis in enumerate(axes):
        site.resize(index, element, axis)


def grid_sampling(site: ChannelSite) -> None:
    """GridSample: channels of the image pass; the grid's last axis holds coordinates."""
    batch = site.unify(site.take(0, 0), site.take(1, 0))
    channels = site.take(0, 1)
    site.freeze_rest("it is sampled at coordinates")
    sizes = known_sizes(site)
    spatial = [site.fixed(size, "it is sampled at coordinates") for size in sizes[2:]]
    site.emit(0, [Track(batch), channels, *spatial])


def region_pooling(site: ChannelSite) -> None:
    """RoiAlign, MaxRoiPool: [regions, C, height, width]."""
    channels = site.take(0, 1)
    site.freeze_rest("regions are cut out of it")
    sizes = known_sizes(site)
    regions, _, *spatial = (site.fixed(size, "regions are cut out of it") for size in sizes)
    site.emit(0, [regions, channels, *spatial])


def column_to_image(site: ChannelSite) -> None:
    """Col2Im: axis 1 is channels x positions of the block."""
    sizes = known_sizes(site)
    batch, columns = site.take(0, 0), site.take(0, 1)
    channels, block = site.split(columns, (sizes[1][0], -1))
    site.freeze(block, "its positions form a block of pixels", channel=False)
    site.freeze_rest("its positions are pixels")
    spatial = [site.fixed(size, "its positions are pixels") for size in sizes[2:]]
    site.emit(0, [batch, Track(channels, columns.zero), *spatial])
