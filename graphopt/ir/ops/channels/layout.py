"""Channels through the ops that regroup, permute, insert or repeat axes without selecting elements."""

from __future__ import annotations

import numpy as np

from graphopt.ir.ops.axes import Sizes
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, RepairSite, Track


def known_sizes(site: ChannelSite, index: int = 0) -> tuple[Sizes, ...]:
    """Sizes of output `index`; raises where its shape is unknown."""
    sizes = site.output_sizes(index)
    if sizes is None:
        raise OpaqueError("the shape of its result is unknown")
    return sizes


def regrouping(site: ChannelSite) -> None:
    """Reshape and Flatten: axes are merged and cut where the sizes of both sides agree at every run-time size.

    Each block of axes between two common boundaries is regrouped by itself, so that one block that cannot be
    followed does not freeze the others.
    """
    tracks = site.take_all(0)
    wanted = known_sizes(site)
    reason = site.reason("it regroups axes differently at another run-time size")
    result: list[Track] = []
    for sources, targets in _blocks([track.axis.sizes for track in tracks], list(wanted)):
        block = [tracks[axis] for axis in sources]
        zero = all(track.zero for track in block if not site.store.is_fixed(track.axis))
        axes = site.store.regroup([track.axis for track in block], [wanted[axis] for axis in targets], reason)
        result.extend(Track(axis, zero) for axis in axes)
    site.emit(0, result)


def _blocks(before: list[Sizes], after: list[Sizes]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes with the same number of elements on both sides, in every probe."""
    blocks: list[tuple[list[int], list[int]]] = []
    left, right = 0, 0
    while left < len(before) or right < len(after):
        first, second = left, right
        a = np.ones(len((before or after)[0]), np.int64)
        b = a.copy()
        while True:
            if (left > first or right > second) and np.array_equal(a, b):
                break
            if left < len(before) and (right >= len(after) or (a <= b).all()):
                a = a * np.array(before[left])
                left += 1
            elif right < len(after):
                b = b * np.array(after[right])
                right += 1
            else:
                break
        blocks.append((list(range(first, left)), list(range(second, right))))
    return blocks


def repair_reshape(site: RepairSite) -> None:
    """Entries of the target shape follow their axes; -1 stays, and so does 0 where it copies the axis that it means."""
    for axis in range(site.output_rank()):
        if site.first_element(1, axis) == 0 and not site.attribute("allowzero", 0):
            site.copies(1, axis, axis)
        else:
            site.resize(1, axis, axis)


def transposition(site: ChannelSite) -> None:
    """Axes in the order of `perm`, reversed by default."""
    tracks = site.take_all(0)
    permutation = site.attribute("perm") or range(len(tracks))[::-1]
    site.emit(0, (tracks[axis] for axis in permutation))


def _listed_axes(site: ChannelSite, rank: int) -> set[int]:
    axes = site.integers(1) if site.given(1) else site.attribute("axes")
    if axes is None:
        raise OpaqueError("its axes are not written out")
    return {int(axis) % rank for axis in axes}


def squeezing(site: ChannelSite) -> None:
    """Axes of one element go, the others pass."""
    tracks = site.take_all(0)
    gone = _listed_axes(site, len(tracks))
    site.emit(0, (track for axis, track in enumerate(tracks) if axis not in gone))


def unsqueezing(site: ChannelSite) -> None:
    """Axes of one element come, the others pass."""
    tracks = site.take_all(0)
    rank = len(known_sizes(site))
    new, rest = _listed_axes(site, rank), iter(tracks)
    site.emit(0, (Track(site.store.open(1)) if axis in new else next(rest) for axis in range(rank)))


def expansion(site: ChannelSite) -> None:
    """Axes pass; where one element is repeated a static number of times, each copy is a channel of its own.

    That makes the query heads of grouped-query attention units: the copies of a key head meet them.
    """
    tracks = site.take_all(0)
    sizes = known_sizes(site)
    padded = [None] * (len(sizes) - len(tracks)) + tracks
    site.emit(0, (_repeated(site, track, size) for track, size in zip(padded, sizes, strict=True)))


def _repeated(site: ChannelSite, track: Track | None, size: Sizes) -> Track:
    if track is not None and track.axis.sizes == size:
        return track
    if len(set(size)) != 1:
        return site.fixed(size, "its length is decided at run time")
    found = site.fresh(size[0])
    site.role(found, "repeats")
    return found


def repair_expand(site: RepairSite) -> None:
    """Entries of the target shape follow their axes, aligned at the right; 1 stays."""
    rank = site.output_rank()
    target = site.operand_length(1)
    for element in range(target or 0):
        site.resize(1, element, element + rank - (target or 0))


def tiling(site: ChannelSite) -> None:
    """Tile: copies of one element are channels; copies of a longer axis stay together."""
    tracks = site.take_all(0)
    repeats = site.integers(1)
    sizes = known_sizes(site)
    result: list[Track] = []
    for axis, track in enumerate(tracks):
        count = None if repeats is None else repeats[axis]
        if count == 1:
            result.append(track)
        elif track.axis.static and track.axis.size == 1:
            result.append(_repeated(site, None, sizes[axis]))
        elif count is None:
            site.freeze(track, "it is repeated a number of times that is decided at run time")
            result.append(site.fixed(sizes[axis], "its length is decided at run time"))
        else:
            copies = site.repeats(count, "copies of the same channels")
            result.append(Track(site.product(copies, track), track.zero))
    site.emit(0, result)


def repair_tile(site: RepairSite) -> None:
    """Counts of repeated single elements follow the copies that stay."""
    for axis in range(site.output_rank()):
        if site.kept_input(0, axis) is None:
            site.resize(1, axis, axis)


def filled(site: ChannelSite) -> None:
    """ConstantOfShape: static lengths are new channels, 0 where the filling is."""
    value = site.attribute("value")
    zero = value is None or not np.any(value.numpy())
    reason = "its length is decided at run time"
    site.emit(
        0,
        (
            Track(site.store.open(size[0]), zero) if len(set(size)) == 1 else site.fixed(size, reason)
            for size in known_sizes(site)
        ),
    )


def repair_filled(site: RepairSite) -> None:
    """Entries of the shape follow their axes."""
    for axis in range(site.output_rank()):
        site.resize(0, axis, axis)


def depth_to_space(site: ChannelSite) -> None:
    """Sub-pixels stay, channels pass: outermost are the sub-pixels in DCR mode, the channels in CRD mode."""
    batch, channels = site.take(0, 0), site.take(0, 1)
    block = int(site.attribute("blocksize")) ** 2
    if channels.axis.size % block:
        raise OpaqueError(f"{block} sub-pixels do not divide its channels")
    columns_first = site.attribute("mode", "DCR") == "CRD"
    pieces = site.split(channels, (-1, block) if columns_first else (block, -1))
    depth, pixels = pieces if columns_first else pieces[::-1]
    site.freeze(pixels, "its positions become pixels", channel=False)
    site.freeze_rest("its positions are pixels")
    spatial = [site.fixed(size, "its positions are pixels") for size in known_sizes(site)[2:]]
    site.emit(0, [batch, Track(depth, channels.zero), *spatial])


def space_to_depth(site: ChannelSite) -> None:
    """Channels come once for every sub-pixel, sub-pixels outermost."""
    batch, channels = site.take(0, 0), site.take(0, 1)
    pixels = site.repeats(int(site.attribute("blocksize")) ** 2, "copies of the same channels")
    site.freeze_rest("its positions are pixels")
    spatial = [site.fixed(size, "its positions are pixels") for size in known_sizes(site)[2:]]
    site.emit(0, [batch, Track(site.product(pixels, channels), channels.zero), *spatial])


def sizes_only(site: ChannelSite) -> None:
    """Shape and Size read no element: the data may lose channels, and the result is repaired where it is used."""
    for axis in range(site.rank(0)):
        site.take(0, axis)
    site.emit(0, (site.fixed(size, "its entries are sizes") for size in known_sizes(site)))


def diagonal(site: ChannelSite) -> None:
    """Trilu: positions of the last two axes count, leading axes pass."""
    tracks = site.take_all(0)
    for track in tracks[-2:]:
        site.freeze(track, "the positions along this axis count", channel=False)
    site.emit(0, tracks)


def reversal(site: ChannelSite) -> None:
    """ReverseSequence: batch and time stay, all other axes pass."""
    tracks = site.take_all(0)
    for axis in (site.attribute("batch_axis", 1), site.attribute("time_axis", 0)):
        site.freeze(tracks[axis], "sequences are reversed along it", channel=False)
    site.emit(0, tracks)


def positions(site: ChannelSite) -> None:
    """Range, EyeLike, random fillings: operands are sizes and bounds, and the result has no channels."""
    site.freeze_rest("it says how, not what")
    site.emit(0, (site.fixed(size, "its entries are positions") for size in known_sizes(site)))


def transform(site: ChannelSite) -> None:
    """DFT: the transformed axis and the pair of real and imaginary part stay, all other axes pass.

    The default axis is 1 in version 17 and -2 in version 20: without one, both stay.
    """
    tracks = site.take_all(0)
    axes = site.integers(2) if site.given(2) else [site.attribute("axis")] if site.attribute("axis") else [1, -2]
    if axes is None:
        raise OpaqueError("its axis is decided at run time")
    sizes = known_sizes(site)
    result = list(tracks)
    for axis in (*(axis % len(tracks) for axis in axes), len(tracks) - 1):
        site.freeze(tracks[axis], "its positions are frequencies", channel=False)
        result[axis] = site.fixed(sizes[axis], "its positions are frequencies")
    site.emit(0, result)
