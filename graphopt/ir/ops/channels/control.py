"""Channels through subgraphs: their nodes are analysed like any other, and what enters and leaves them meets."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.ops.channels.layout import known_sizes
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, Track, Tracks

_TURNS = "its positions are turns of a loop"


def branching(site: ChannelSite) -> None:
    """If: results of both branches meet."""
    branches = [site.node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    for branch in branches:
        site.run(branch)
    site.freeze_rest("it decides at run time")
    for index in range(len(site.node.outputs)):
        results = [site.tracks_of(branch.outputs[index]) for branch in branches]
        first, second = results
        if first is None or second is None or len(first) != len(second):
            _give_up(site, results, index)
            continue
        site.emit(index, _joined(site, first, second))


def _joined(site: ChannelSite, first: Tracks, second: Tracks) -> list[Track]:
    joined: list[Track] = []
    for a, b in zip(first, second, strict=True):
        if a.axis.sizes == b.axis.sizes:
            joined.append(Track(site.unify(a, b), a.zero and b.zero))
        else:
            for track in (a, b):
                site.freeze(track, "branches give it different lengths")
            joined.append(Track(a.axis))
    return joined


def _give_up(site: ChannelSite, results: list[Tracks | None], index: int) -> None:
    """A result whose shape the branches do not agree on: everything that reaches it stays."""
    for tracks in results:
        for track in tracks or ():
            site.freeze(track, "branches give it different shapes")
    sizes = site.output_sizes(index)
    if sizes is not None:
        site.emit(index, (site.fixed(size, "branches give it different shapes", channel=True) for size in sizes))


def looping(site: ChannelSite) -> None:
    """Loop: carried values have the same channels in every turn, scanned results get an axis of turns."""
    body = site.node.attributes["body"].as_graph()
    count = len(site.node.inputs) - 2
    site.freeze_rest("it decides at run time", inputs=(0, 1))
    for value in body.inputs[:2]:
        site.bind(value, ())
    carried = [site.take_all(index + 2) for index in range(count)]
    _turn(site, body, body.inputs[2:], carried, body.outputs[1 : 1 + count])
    for index, value in enumerate(body.outputs[1 + count :], start=count):
        tracks = _result(site, value)
        site.emit(index, [site.fixed(known_sizes(site, index)[0], _TURNS), *tracks])


def scanning(site: ChannelSite) -> None:
    """Scan 9 on: states as in a loop, scanned operands lose and scanned results get an axis of turns."""
    body = site.node.attributes["body"].as_graph()
    scanned = int(site.attribute("num_scan_inputs"))
    states = len(site.node.inputs) - scanned
    axes = site.attribute("scan_input_axes") or [0] * scanned
    for index in range(scanned):
        tracks = site.take_all(states + index)
        axis = axes[index] % len(tracks)
        site.freeze(tracks[axis], _TURNS, channel=False)
        site.bind(body.inputs[states + index], [*tracks[:axis], *tracks[axis + 1 :]])
    carried = [site.take_all(index) for index in range(states)]
    _turn(site, body, body.inputs[:states], carried, body.outputs[:states])
    results = body.outputs[states:]
    axes = site.attribute("scan_output_axes") or [0] * len(results)
    for index, value in enumerate(results):
        tracks = list(_result(site, value))
        axis = axes[index] % (len(tracks) + 1)
        length = site.fixed(known_sizes(site, states + index)[axis], _TURNS)
        site.emit(states + index, [*tracks[:axis], length, *tracks[axis:]])


def _turn(
    site: ChannelSite,
    body: ir.Graph,
    inputs: Sequence[ir.Value],
    carried: list[list[Track]],
    outputs: Sequence[ir.Value],
) -> None:
    """Run the body once and let carried values meet what they were; a value may be 0 only before the first turn."""
    for value, tracks in zip(inputs, carried, strict=True):
        keeps = value not in site.state.carried
        site.bind(value, [Track(track.axis, track.zero and keeps) for track in tracks])
    site.run(body)
    for index, (value, tracks, result) in enumerate(zip(inputs, carried, outputs, strict=True)):
        after = _result(site, result)
        if len(after) != len(tracks):
            raise OpaqueError("a carried value changes its number of axes")
        merged: list[Track] = []
        for before, now in zip(tracks, after, strict=True):
            if before.axis.sizes != now.axis.sizes:
                raise OpaqueError("a carried value changes its shape")
            axis = site.unify(before, now)
            if before.zero and not now.zero and not site.store.is_fixed(axis):
                site.state.carried.add(value)
            merged.append(Track(axis, before.zero and now.zero))
        site.emit(index, merged)


def _result(site: ChannelSite, value: ir.Value) -> Tracks:
    tracks = site.tracks_of(value)
    if tracks is None:
        raise OpaqueError("the shape of a value in its body is unknown")
    return tracks
