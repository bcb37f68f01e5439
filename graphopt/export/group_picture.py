"""A graph of channel groups as one SVG file, without Graphviz.

Layers by longest path, from the groups that the inputs reach first; weights that lead back (to a residual stream, say)
do not count for that. A long edge is laid through an empty place in each layer that it crosses, and places are ordered
by the mean position of their neighbours (Sugiyama, Tagawa and Toda 1981).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

import networkx

from graphopt.export.group_graph import COLOURS

_HEIGHT, _NARROWEST, _CHARACTER = 42, 196, 7
"""Of a box, and how wide a character of its name may be."""
_LONGEST_NAME = 42
_MOST_IN_COLUMN, _MOST_IN_ROW = 24, 6
"""Boxes of a layer, as far as those that nothing follows can be put into a later one."""
_BESIDE, _BETWEEN_COLUMNS, _BETWEEN_ROWS = 14, 84, 46
"""Room between boxes of a layer, and between layers that lie beside and below one another."""
_THREAD = 6
"""Room of an edge that crosses a layer."""
_PORT, _WIDEST_PORT = 11, 24
"""Room between the ends of edges at one side of a box, at least and at most."""
_MARGIN, _LEGEND, _LEGEND_STEP = 20, 34, 90
_SWEEPS = 12
_LINE, _NAME, _FIGURES = "#7b8794", "#1c2128", "#57606a"
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold."""


@dataclass(eq=False)
class _Place:
    """A box, or where a long edge crosses a layer.

    Attributes:
        name: of the group, None for an edge.
        before: places in the layer before that an edge comes from.
        after: places in the layer behind that an edge leads to.
        extent: room along the layer.
        along: centre in the direction of the layer.
        level: centre in the other direction.
    """

    name: str | None
    before: list[_Place] = field(default_factory=list["_Place"])
    after: list[_Place] = field(default_factory=list["_Place"])
    extent: float = _THREAD
    along: float = 0
    level: float = 0


@dataclass(frozen=True)
class _Line:
    """What is drawn between two groups: an edge, or one in each direction.

    Attributes:
        places: the boxes at both ends and the places between them.
        first: the group in the earlier layer.
        last: the group in the later layer.
    """

    places: list[_Place]
    first: str
    last: str


def picture(graph: networkx.DiGraph[str]) -> str:
    """A self-contained SVG of what `group_graph` returns: boxes by state, arrows for weights, titles on hovering.

    Layers stand beside one another or below one another, whichever makes the smaller picture.

    Example:
        >>> import networkx
        >>> graph = networkx.DiGraph()
        >>> graph.add_node("a < b", role="channels", units=3, parameters=5, state="exact")
        >>> "a &lt; b" in picture(graph)
        True
    """
    forward = _without_ways_back(graph)
    longest = max((len(_shortened(name)) for name in graph), default=0)
    width = max(_NARROWEST, _CHARACTER * longest + 20)
    columns, rows = _levels(forward, _MOST_IN_COLUMN), _levels(forward, _MOST_IN_ROW)
    beside = _largest_side(columns, width + _BETWEEN_COLUMNS, _HEIGHT + _BESIDE)
    below = _largest_side(rows, _HEIGHT + _BETWEEN_ROWS, width + _BESIDE)
    layers, lines = _layers(graph, rows if below < beside else columns)
    return _Drawing(graph, layers, lines, width, below < beside).text()


# Where things stand ---------------------------------------------------------------------------------------------


def _levels(forward: networkx.DiGraph[str], most: int) -> dict[str, int]:
    """The layer of each group: one more than the longest path to it; of too many, groups at an end come later."""
    order = {name: position for position, name in enumerate(forward)}
    waiting: list[str] = []
    found: dict[str, int] = {}
    layers = [list(names) for names in networkx.topological_generations(forward)]
    level = 0
    while level < len(layers) or waiting:
        names = [*waiting, *(layers[level] if level < len(layers) else [])]
        ends = sorted((name for name in names if not forward.adj[name]), key=order.__getitem__)
        stay = max(most - (len(names) - len(ends)), 1)
        waiting = ends[stay:]
        found.update((name, level) for name in names if name not in waiting)
        level += 1
    return found


def _largest_side(levels: Mapping[str, int], step: float, extent: float) -> float:
    """Width or height of a picture, whichever is larger."""
    counts = Counter(levels.values())
    return max(len(counts) * step, max(counts.values(), default=0) * extent)


def _layers(graph: networkx.DiGraph[str], levels: Mapping[str, int]) -> tuple[list[list[_Place]], list[_Line]]:
    """Boxes in layers, with places for the edges that cross a layer, and the lines to draw."""
    boxes = {name: _Place(name) for name in graph}
    layers: list[list[_Place]] = [[] for _ in range(1 + max(levels.values(), default=-1))]
    for name, box in boxes.items():
        layers[levels[name]].append(box)
    lines: list[_Line] = []
    for first, last in dict.fromkeys((a, b) if levels[a] < levels[b] else (b, a) for a, b in _by_weights(graph)):
        threads = [_Place(None) for _ in range(levels[first] + 1, levels[last])]
        for level, thread in enumerate(threads, start=levels[first] + 1):
            layers[level].append(thread)
        places = [boxes[first], *threads, boxes[last]]
        for a, b in pairwise(places):
            a.after.append(b)
            b.before.append(a)
        lines.append(_Line(places, first, last))
    return layers, lines


def _by_weights(graph: networkx.DiGraph[str]) -> list[tuple[str, str]]:
    return [(a, b) for a, b, relation in graph.edges(data="relation") if a != b and relation == "weights"]


def _without_ways_back(graph: networkx.DiGraph[str]) -> networkx.DiGraph[str]:
    """The weights that lead on: a depth-first walk, from groups that no weight leads to, drops what closes a cycle."""
    edges = _by_weights(graph)
    reached, leading = {b for _, b in edges}, Counter(a for a, _ in edges)
    starts: list[str] = sorted(graph, key=lambda name: (name in reached, -leading[name]))
    walked: networkx.DiGraph[str] = networkx.DiGraph()
    walked.add_nodes_from(starts)
    walked.add_edges_from(edges)
    path: set[str] = set()
    back: set[tuple[str, str]] = set()
    for a, b, kind in networkx.dfs_labeled_edges(walked):
        if kind == "forward":
            path.add(b)
        elif kind == "reverse":
            path.discard(b)
        elif b in path:
            back.add((a, b))
    forward: networkx.DiGraph[str] = networkx.DiGraph()
    forward.add_nodes_from(graph)
    forward.add_edges_from(edge for edge in edges if edge not in back)
    return forward


def _order(layers: list[list[_Place]]) -> None:
    """Order each layer so that few edges cross: alternately by the neighbours before and behind."""
    for layer in layers:
        _spread(layer)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else layers[::-1]:
            wanted = {place: _mean(place, place.before if down else place.after) for place in layer}
            layer.sort(key=wanted.__getitem__)
            _spread(layer)


def _mean(place: _Place, neighbours: Iterable[_Place]) -> float:
    positions = [neighbour.along for neighbour in neighbours]
    return sum(positions) / len(positions) if positions else place.along


def _spread(layer: Sequence[_Place]) -> None:
    """Places one behind the other, the middle of the layer at 0."""
    position = -(sum(place.extent for place in layer) + _BESIDE * (len(layer) - 1)) / 2
    for place in layer:
        place.along = position + place.extent / 2
        position += place.extent + _BESIDE


# What they look like --------------------------------------------------------------------------------------------


class _Drawing:
    """Layers as SVG, with boxes of one width; `downwards` says whether they stand below one another."""

    def __init__(
        self,
        graph: networkx.DiGraph[str],
        layers: list[list[_Place]],
        lines: list[_Line],
        width: float,
        downwards: bool,
    ) -> None:
        self._graph, self._lines, self._width, self._downwards = graph, lines, width, downwards
        self._boxes = [place for layer in layers for place in layer if place.name is not None]
        self._depth, between = (_HEIGHT, _BETWEEN_ROWS) if self._downwards else (self._width, _BETWEEN_COLUMNS)
        for box in self._boxes:
            ends = _PORT * (max(len(box.before), len(box.after)) + 1)
            box.extent = max(self._width if self._downwards else _HEIGHT, ends)
        _order(layers)
        places = [place for layer in layers for place in layer]
        first = min((place.along - place.extent / 2 for place in places), default=0)
        for level, layer in enumerate(layers):
            for place in layer:
                place.along -= first
                place.level = level * (self._depth + between) + self._depth / 2
        self._along = max((place.along + place.extent / 2 for place in places), default=0)
        self._levels = max((place.level for place in places), default=0) + self._depth / 2
        self._ports = {key: offset for box in self._boxes for key, offset in _ports(box)}

    def text(self) -> str:
        """The file."""
        size = (self._along, self._levels) if self._downwards else (self._levels, self._along)
        width = max(size[0], _LEGEND_STEP * (len(COLOURS) + 1)) + 2 * _MARGIN
        height = size[1] + 2 * _MARGIN + _LEGEND
        drawn = [*map(self._line, self._lines), *map(self._loop, self._boxes), *map(self._box, self._boxes)]
        body = "\n".join([*_legend(), *filter(None, drawn)])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0.8 L8 4 L0 7.2 Z" fill="{_LINE}"/></marker></defs>\n'
            f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
        )

    def _point(self, along: float, level: float) -> tuple[float, float]:
        x, y = (along, level) if self._downwards else (level, along)
        return x + _MARGIN, y + _MARGIN + _LEGEND

    def _box(self, box: _Place) -> str:
        name = box.name or ""
        about = self._graph.nodes[name]
        x, y = self._point(box.along, box.level)
        width, height = (box.extent, _HEIGHT) if self._downwards else (self._width, box.extent)
        fill, border = COLOURS[about["state"]]
        units = f"{about['units']:,} unit{'' if about['units'] == 1 else 's'}"
        figures = f"{units}, {about['parameters']:,} parameters each"
        title = _escaped(f"{name}: {about['role']}, {figures}, {about['state']}")
        text = f'<text x="{x:g}" text-anchor="middle"'
        return (
            f'<g><title>{title}</title><rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" '
            f'height="{height:g}" rx="5" fill="{fill}" stroke="{border}"/>'
            f'{text} y="{y - 4:g}" font-size="12" fill="{_NAME}">{_escaped(_shortened(name))}</text>'
            f'{text} y="{y + 12:g}" font-size="10.5" fill="{_FIGURES}">{figures}</text></g>'
        )

    def _line(self, line: _Line) -> str:
        """Smooth through all places of an edge, with arrows where the weights lead."""
        path: list[str] = []
        for a, b in pairwise(line.places):
            start, end = a.along + self._ports.get((a, b), 0), b.along + self._ports.get((b, a), 0)
            near, far = a.level + self._depth / 2, b.level - self._depth / 2
            middle = (near + far) / 2
            points = [self._point(*point) for point in ((start, near), (start, middle), (end, middle), (end, far))]
            stops = [f"{x:g} {y:g}" for x, y in points]
            path.append(f"{'L' if path else 'M'}{stops[0]} C{', '.join(stops[1:])}")
        ways = {"marker-end": (line.first, line.last), "marker-start": (line.last, line.first)}
        led = {marker: way for marker, way in ways.items() if self._graph.has_edge(*way)}
        arrows = "".join(f' {marker}="url(#arrow)"' for marker in led)
        title = "\n".join(self._title(*way) for way in led.values())
        return (
            f'<path d="{" ".join(path)}" fill="none" stroke="{_LINE}" stroke-width="1.2"{arrows}>'
            f"<title>{_escaped(title)}</title></path>"
        )

    def _loop(self, box: _Place) -> str:
        """A weight from a group to itself: a small bow at the upper right corner of its box."""
        name = box.name or ""
        if not self._graph.has_edge(name, name):
            return ""
        width, height = (box.extent, _HEIGHT) if self._downwards else (self._width, box.extent)
        x, y = self._point(box.along, box.level)
        return (
            f'<path d="M{x + width / 2 - 22:g} {y - height / 2:g} c-2 -13, 16 -13, 14 0" fill="none" '
            f'stroke="{_LINE}" stroke-width="1.2" marker-end="url(#arrow)">'
            f"<title>{_escaped(self._title(name, name))}</title></path>"
        )

    def _title(self, a: str, b: str) -> str:
        about = self._graph.edges[a, b]
        return f"{a} -> {b}: {', '.join(about['weights'])} ({about['parameters']:,} parameters)"


def _ports(box: _Place) -> Iterable[tuple[tuple[_Place, _Place], float]]:
    """Where on the sides of a box the edges end, in the order of the places that they come from, from its middle."""
    for side in (box.before, box.after):
        step = min(box.extent / (len(side) + 1), _WIDEST_PORT)
        for index, other in enumerate(sorted(side, key=lambda place: place.along)):
            yield (box, other), (index - (len(side) - 1) / 2) * step


def _legend() -> list[str]:
    drawn: list[str] = []
    for index, (state, (fill, border)) in enumerate(COLOURS.items()):
        x = _MARGIN + index * _LEGEND_STEP
        drawn.append(
            f'<rect x="{x}" y="{_MARGIN}" width="14" height="14" rx="3" fill="{fill}" stroke="{border}"/>'
            f'<text x="{x + 20}" y="{_MARGIN + 11}" font-size="11" fill="{_FIGURES}">{state}</text>'
        )
    x = _MARGIN + len(COLOURS) * _LEGEND_STEP
    drawn.append(
        f'<path d="M{x} {_MARGIN + 7} h24" stroke="{_LINE}" stroke-width="1.2" marker-end="url(#arrow)"/>'
        f'<text x="{x + 32}" y="{_MARGIN + 11}" font-size="11" fill="{_FIGURES}">weight</text>'
    )
    return drawn


def _shortened(name: str) -> str:
    """Of a long name what it is and the end of its path, where names differ."""
    over = len(name) - _LONGEST_NAME
    if over <= 0:
        return name
    what, of, path = name.partition(" of ")
    start, rest = (what + of, path) if of and len(what) < _LONGEST_NAME // 2 else ("", name)
    return f"{start}\u2026{rest[over + 1 :].lstrip('.')}"


def _escaped(text: str) -> str:
    return escape(_FORBIDDEN.sub("?", text))
