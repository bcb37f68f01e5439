"""Channels through the ops that select, join, pad or scatter elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.ir.ops.axes import Axis
from graphopt.ir.ops.channels.elementwise import CODES
from graphopt.ir.ops.channels.layout import known_sizes
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, RepairSite, Track

_BY_DATA = "its entries are looked up by data"
_TO_THE_END = np.iinfo(np.int64).max


def concatenation(site: ChannelSite) -> None:
    """Channels of one operand behind those of the other; all other axes meet."""
    operands = [site.take_all(index) for index in range(len(site.node.inputs))]
    axis = int(site.attribute("axis", 0)) % len(operands[0])
    result: list[Track] = []
    for position, tracks in enumerate(zip(*operands, strict=True)):
        zero = all(track.zero for track in tracks)
        axes = [track.axis for track in tracks]
        if position != axis:
            result.append(Track(site.unify(*axes), zero))
        elif all(each.static for each in axes):
            result.append(Track(site.store.concat(axes), zero))
        else:
            for each in axes:
                site.freeze(each, "it is joined with a part whose length is decided at run time")
            result.append(site.fixed(known_sizes(site)[axis], "its length is decided at run time"))
    site.emit(0, result)


def _split_sizes(site: ChannelSite, axis: int) -> list[int] | None:
    if site.given(1):
        return site.integers(1)
    sizes = [known_sizes(site, index)[axis] for index in range(len(site.node.outputs))]
    return [size[0] for size in sizes] if all(len(set(size)) == 1 for size in sizes) else None


def splitting(site: ChannelSite) -> None:
    """Split: runs of channels; all other axes pass."""
    tracks = site.take_all(0)
    axis = int(site.attribute("axis", 0)) % len(tracks)
    sizes = _split_sizes(site, axis) if tracks[axis].axis.static else None
    if sizes is None:
        site.freeze(tracks[axis], "it is cut at positions that are decided at run time")
    ends = np.cumsum(sizes or [])
    for index in range(len(site.node.outputs)):
        if sizes is None:
            part = site.fixed(known_sizes(site, index)[axis], "its length is decided at run time")
        else:
            indices = np.arange(ends[index] - sizes[index], ends[index])
            part = Track(site.store.select(tracks[axis].axis, indices), tracks[axis].zero)
        site.emit(index, [*tracks[:axis], part, *tracks[axis + 1 :]])


def repair_split(site: RepairSite) -> None:
    """The lengths of what stays."""
    axis = int(site.attribute("axis", 0)) % site.input_rank(0)
    if site.kept_input(0, axis) is None:
        return
    sizes = site.constant(1)
    kept = [site.kept_output(index, axis) for index in range(len(site.node.outputs))]
    lengths = [
        int(mask.sum()) if mask is not None else int(np.reshape(sizes, -1)[index]) if sizes is not None else 0
        for index, mask in enumerate(kept)
    ]
    site.node.attributes.pop("num_outputs", None)
    site.set_operand(1, np.array(lengths, np.int64))


def _slices(site: ChannelSite | RepairSite, rank: int) -> dict[int, slice | None] | None:
    """Axis to what is taken, None where that is decided at run time; None as a whole where the axes are."""
    starts, ends, axes, steps = (site.constant(index) for index in range(1, 5))
    known = axes is not None or len(site.node.inputs) <= 3 or site.node.inputs[3] is None
    if not known:
        return None
    if axes is None:
        length = site.operand_length(1)
        axes = np.arange(length if length is not None else 0)
    found: dict[int, slice | None] = {}
    stepped = len(site.node.inputs) > 4 and site.node.inputs[4] is not None
    for position, axis in enumerate(np.reshape(axes, -1).tolist()):
        if starts is None or ends is None or (stepped and steps is None):
            found[axis % rank] = None
            continue
        step = 1 if steps is None else int(np.reshape(steps, -1)[position])
        start, end = int(np.reshape(starts, -1)[position]), int(np.reshape(ends, -1)[position])
        found[axis % rank] = slice(start, end, step)
    return found


def _indices(taken: slice, size: int) -> np.ndarray:
    """The positions that an ONNX slice takes: as in Python, but that an end below -size stands for before the first."""
    end: int | None = taken.stop
    if taken.step < 0 and taken.stop < -size:
        end = None
    return np.arange(size)[taken.start : end : taken.step]


def slicing(site: ChannelSite) -> None:
    """Slice: the channels taken, in their order; all other axes pass."""
    tracks = site.take_all(0)
    slices = _slices(site, len(tracks))
    if slices is None:
        raise OpaqueError("its axes are decided at run time")
    sizes = known_sizes(site)
    result = list(tracks)
    for axis, taken in slices.items():
        track = tracks[axis]
        if taken is None or not track.axis.static:
            site.freeze(track, "it is cut at positions that are decided at run time")
            result[axis] = site.fixed(sizes[axis], "its length is decided at run time")
            continue
        indices = _indices(taken, track.axis.size)
        if not np.array_equal(indices, np.arange(track.axis.size)):
            result[axis] = Track(site.store.select(track.axis, indices), track.zero)
    site.emit(0, result)


def repair_slice(site: RepairSite) -> None:
    """Bounds count the channels that stay; what is no even run any more is gathered first."""
    slices = _slices(site, site.input_rank(0)) or {}
    starts, ends = (site.constant(index) for index in (1, 2))
    if starts is None or ends is None:
        return
    bounds = np.stack([np.reshape(starts, -1), np.reshape(ends, -1), np.ones(np.size(starts), np.int64)])
    bounds[2] = [1 if taken is None else taken.step for taken in slices.values()]
    changed = strided = False
    for position, (axis, taken) in enumerate(slices.items()):
        mask = site.kept_input(0, axis)
        if mask is None or taken is None:
            continue
        indices = _indices(taken, len(mask))
        ranks = (np.cumsum(mask) - 1)[indices[mask[indices]]]
        even = _bounds(ranks, taken.step)
        if even is None:
            site.gather_first(axis, ranks)
            bounds[:, position] = 0, _TO_THE_END, 1
            strided = True
        else:
            bounds[:2, position] = even
        changed = True
    for index in range(3 if strided else 2):
        if changed:
            limits = np.iinfo(starts.dtype)
            site.set_operand((1, 2, 4)[index], bounds[index].clip(limits.min, limits.max).astype(starts.dtype))


def _bounds(ranks: np.ndarray, step: int) -> tuple[int, int] | None:
    """Start and end of the slice with `step` that takes exactly these positions; None where there is none."""
    if not len(ranks):
        return 0, 0
    if len(ranks) > 1 and not (np.diff(ranks) == step).all():
        return None
    end = int(ranks[-1]) + (1 if step > 0 else -1)
    return int(ranks[0]), end if end >= 0 else -_TO_THE_END


def gathering(site: ChannelSite) -> None:
    """Gather: channels picked by constant indices follow them; a table read by data keeps its rows."""
    tracks = site.take_all(0)
    axis = int(site.attribute("axis", 0)) % len(tracks)
    indices = site.constant(1)
    picked = tracks[axis]
    if site.store.is_fixed(picked.axis) or indices is None or not picked.axis.static:
        site.freeze(picked, _BY_DATA)
        site.role(picked, "rows")
        new = [track.nonzero() for track in site.take_all(1)]
    else:
        new = _picked(site, picked, indices)
    site.emit(0, [*tracks[:axis], *new, *tracks[axis + 1 :]])
    if site.is_weight(0):
        for track in tracks[axis + 1 :]:
            site.role(track, "outputs")


def _picked(site: ChannelSite, track: Track, indices: np.ndarray) -> list[Track]:
    flat = np.where(indices < 0, indices + track.axis.size, indices).reshape(-1)
    if not len(flat):
        raise OpaqueError("it takes nothing")
    selected = site.store.select(track.axis, flat)
    if indices.ndim == 0:
        return []
    axes = [selected] if indices.ndim == 1 else site.split(selected, indices.shape)
    return [Track(axis, track.zero) for axis in axes]


def repair_gather(site: RepairSite) -> None:
    """Indices count the channels that stay; those of channels that went go."""
    indices = site.constant(1)
    axis = int(site.attribute("axis", 0)) % site.input_rank(0)
    mask = site.kept_input(0, axis)
    if indices is None:
        return
    kept = [site.kept_output(0, axis + position) for position in range(indices.ndim)]
    if mask is None and all(each is None for each in kept):
        return
    for position, each in enumerate(kept):
        if each is not None:
            indices = np.compress(each, indices, axis=position)
    if mask is not None:
        ranks = np.cumsum(mask) - 1
        indices = ranks[indices].astype(indices.dtype)  # negative indices count from the end of `ranks` alike
    site.set_operand(1, indices)


def _same_or_frozen(site: ChannelSite, tracks: Sequence[Track]) -> Axis:
    """Axes that meet whole are the same channels; where one is shorter, positions are not told apart."""
    if len({track.axis.sizes for track in tracks}) == 1:
        return site.unify(*tracks)
    for track in tracks:
        site.freeze(track, _BY_DATA)
    return tracks[0].axis


def gathering_elements(site: ChannelSite) -> None:
    """GatherElements: positions along `axis` come from data, all other axes of data and indices meet."""
    data, indices = site.take_all(0), site.take_all(1)
    axis = int(site.attribute("axis", 0)) % len(data)
    sizes = known_sizes(site)
    result: list[Track] = []
    for position, (track, index) in enumerate(zip(data, indices, strict=True)):
        if position == axis:
            site.freeze(track, _BY_DATA)
            result.append(index.nonzero())
        elif track.axis.sizes == index.axis.sizes:
            result.append(Track(site.unify(track, index), track.zero))
        else:
            _same_or_frozen(site, (track, index))
            result.append(site.fixed(sizes[position], _BY_DATA))
    site.emit(0, result)


def gathering_tuples(site: ChannelSite) -> None:
    """GatherND: leading axes of the data are addressed by index tuples, the rest of its axes pass."""
    data, indices = site.take_all(0), site.take_all(1)
    batch = int(site.attribute("batch_dims", 0))
    addressed = indices[-1].axis.size
    site.freeze(indices[-1], "its entries form one index", channel=False)
    for track in data[batch : batch + addressed]:
        site.freeze(track, _BY_DATA)
    shared = [Track(site.unify(a, b), a.zero) for a, b in zip(data[:batch], indices[:batch], strict=True)]
    picked = [track.nonzero() for track in indices[batch:-1]]
    site.emit(0, [*shared, *picked, *data[batch + addressed :]])


def scattering_elements(site: ChannelSite) -> None:
    """ScatterElements: positions along `axis` come from data, all other axes of data, indices and updates meet."""
    data, indices, updates = (site.take_all(index) for index in range(3))
    axis = int(site.attribute("axis", 0)) % len(data)
    result = list(data)
    for position, tracks in enumerate(zip(data, indices, updates, strict=True)):
        if position == axis:
            for track in tracks:
                site.freeze(track, "its entries are written by data")
        else:
            _same_or_frozen(site, tracks)
            result[position] = Track(tracks[0].axis, tracks[0].zero and tracks[2].zero)
    site.emit(0, result)


def scattering_tuples(site: ChannelSite) -> None:
    """ScatterND: leading axes of the data are addressed by index tuples, the rest meets the updates."""
    data, indices, updates = (site.take_all(index) for index in range(3))
    addressed = indices[-1].axis.size
    site.freeze(indices[-1], "its entries form one index", channel=False)
    for track in data[:addressed]:
        site.freeze(track, "its entries are written by data")
    leading = len(indices) - 1
    for track in (*indices[:-1], *updates[:leading]):
        site.freeze(track, "its entries say where to write")
    passed = [
        Track(_same_or_frozen(site, (a, b)), a.zero and b.zero)
        for a, b in zip(data[addressed:], updates[leading:], strict=True)
    ]
    site.emit(0, [*data[:addressed], *passed])


def cache_update(site: ChannelSite) -> None:
    """TensorScatter: positions along `axis` come from data, all other axes of cache and update meet."""
    cache, update = site.take_all(0), site.take_all(1)
    axis = int(site.attribute("axis", -2)) % len(cache)
    if site.given(2):
        site.unify(site.take(2, 0), cache[0])
    result = list(cache)
    for position, (track, other) in enumerate(zip(cache, update, strict=True)):
        if position == axis:
            site.freeze(track, "its entries are written by data")
            site.freeze(other, "its entries are written by data")
        else:
            result[position] = Track(site.unify(track, other), track.zero and other.zero)
    site.emit(0, result)


def one_hot(site: ChannelSite) -> None:
    """OneHot: axes of the indices pass, the new one has an entry a class."""
    tracks = [track.nonzero() for track in site.take_all(0)]
    axis = int(site.attribute("axis", -1)) % (len(tracks) + 1)
    classes = site.fixed(known_sizes(site)[axis], "its positions are classes", channel=True)
    site.emit(0, [*tracks[:axis], classes, *tracks[axis:]])


def _pads(site: ChannelSite | RepairSite, rank: int) -> dict[int, tuple[int, int]] | None:
    """Axis to elements added before and after, None where that is decided at run time."""
    pads = site.constant(1)
    axes = site.constant(3)
    listed = len(site.node.inputs) > 3 and site.node.inputs[3] is not None
    if pads is None or (listed and axes is None):
        return None
    names = [int(axis) % rank for axis in (np.reshape(axes, -1) if axes is not None else range(rank))]
    before, after = np.reshape(pads, (2, -1))
    return {axis: (int(before[index]), int(after[index])) for index, axis in enumerate(names)}


def padding(site: ChannelSite) -> None:
    """Pad: a channel axis that is padded with a constant gets new channels (the shortcut of a CIFAR ResNet)."""
    tracks = site.take_all(0)
    pads = _pads(site, len(tracks))
    sizes = known_sizes(site)
    value = site.constant(2)
    codes = site.dtype(0) in CODES  # their 0 is a zero point, which is not known here
    fills_zero = not codes and (not site.given(2) or (value is not None and not np.any(value)))
    result: list[Track] = []
    for axis, track in enumerate(tracks):
        before, after = (None, None) if pads is None else pads.get(axis, (0, 0))
        if before == 0 and after == 0:
            result.append(track if fills_zero or not _grows(pads) else track.nonzero())
        elif before is None or after is None or min(before, after) < 0 or not track.axis.static:
            site.freeze(track, "it is padded or cropped")
            result.append(site.fixed(sizes[axis], "it is padded or cropped"))
        elif site.attribute("mode", "constant") != "constant":
            site.freeze(track, "its border repeats its own entries", channel=False)
            result.append(site.fixed(sizes[axis], "its border repeats its own entries"))
        else:
            result.append(Track(_padded(site, track.axis, before, after), track.zero and fills_zero))
    site.emit(0, result)


def _grows(pads: dict[int, tuple[int, int]] | None) -> bool:
    return pads is None or any(size for pair in pads.values() for size in pair)


def _padded(site: ChannelSite, axis: Axis, before: int, after: int) -> Axis:
    if site.store.is_fixed(axis):
        return site.fixed(axis.size + before + after, "its border is padded").axis
    fresh = site.store.labels.fresh
    pieces = [site.store.labelled(fresh(before)), axis, site.store.labelled(fresh(after))]
    return site.store.concat([piece for piece in pieces if piece.size])


def repair_pad(site: RepairSite) -> None:
    """As many padded channels as stay on each side."""
    rank = site.input_rank(0)
    pads = site.constant(1)
    found = _pads(site, rank)
    if pads is None or found is None:
        return
    wanted = np.array(pads, np.int64).reshape(2, -1)
    changed = False
    for position, (axis, (before, after)) in enumerate(found.items()):
        mask = site.kept_output(0, axis)
        if mask is None or (before == 0 and after == 0):
            continue
        wanted[0, position] = mask[:before].sum()
        wanted[1, position] = mask[len(mask) - after :].sum()
        changed = True
    if changed:
        site.set_operand(1, wanted.reshape(-1))


def embedding_bag(site: ChannelSite) -> None:
    """com.microsoft TorchEmbedding: rows of the table are read by data, its width passes."""
    rows, width = site.take_all(0)
    site.freeze(rows, _BY_DATA)
    site.emit(0, [*(track.nonzero() for track in site.take_all(1)), width])
