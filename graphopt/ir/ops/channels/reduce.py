"""Channels through the ops that reduce, scan or rank along axes."""

from __future__ import annotations

from graphopt.ir.ops.channels.layout import known_sizes
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, Track


def _reduced_axes(site: ChannelSite, rank: int) -> set[int]:
    found = site.integers(1) if site.given(1) else site.attribute("axes") or ()
    if found is None:
        raise OpaqueError("its axes are decided at run time")
    axes = list(found)
    if not axes:
        return set() if site.attribute("noop_with_empty_axes", 0) else set(range(rank))
    return {axis % rank for axis in axes}


def reduction(site: ChannelSite, *, skips_zero: bool, keeps_zero: bool = True, takes_logarithm: bool = False) -> None:
    """Axes that are reduced end here, the others pass.

    Args:
        site: the node.
        skips_zero: zeros do not count (sums and norms), so that removing masked channels is exact.
        keeps_zero: a reduction of zeros is 0.
        takes_logarithm: a reduction of zeros is the logarithm of 0.
    """
    tracks = site.take_all(0)
    axes = _reduced_axes(site, len(tracks))
    result: list[Track] = []
    for axis, track in enumerate(tracks):
        if axis not in axes:
            if takes_logarithm:
                site.divides_by(0, track)
            result.append(track if keeps_zero else track.nonzero())
            continue
        if not skips_zero:
            site.inexact(track, "it reduces over this axis, and masked entries count")
        elif not track.zero:
            site.inexact(track, "it sums over this axis, which is not 0 where masked")
        if site.attribute("keepdims", 1):
            result.append(Track(site.store.open(1)))
    site.emit(0, result)


def ranking(site: ChannelSite, *, axis: int | None = None, outputs: int = 1) -> None:
    """One axis must stay (ArgMax, TopK, CumSum): its positions are what counts; all others pass."""
    tracks = site.take_all(0)
    position = int(site.attribute("axis", axis if axis is not None else 0)) % len(tracks)
    _along(site, tracks, position, outputs)


def cumulative(site: ChannelSite) -> None:
    """CumSum, CumProd: the axis is input 1."""
    axis = site.integers(1)
    if axis is None:
        raise OpaqueError("its axis is decided at run time")
    tracks = site.take_all(0)
    _along(site, tracks, axis[0] % len(tracks), 1)


def _along(site: ChannelSite, tracks: list[Track], axis: int, outputs: int) -> None:
    site.freeze(tracks[axis], "the positions along this axis count")
    for index in range(min(outputs, len(site.node.outputs))):
        sizes = known_sizes(site, index)
        result = [track.nonzero() for track in tracks]
        if len(sizes) < len(tracks):
            del result[axis]
        else:
            result[axis] = site.fixed(sizes[axis], "the positions along this axis count")
        site.emit(index, result)
