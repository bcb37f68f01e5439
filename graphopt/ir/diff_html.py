"""The page that `GraphDiff.to_html` writes: both graphs side by side, edges drawn as lanes, changes marked.

Rows are in one topological order of both graphs together, so that corresponding nodes stand next to each other.
Everything that comes out of a model goes through `html.escape`; the script reads no data but what stands in the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import TYPE_CHECKING

import networkx
import onnx_ir as ir

from graphopt.ir.correspondence import Correspondence, Side, paired_by_name
from graphopt.ir.diff_html_assets import SCRIPT, STYLE
from graphopt.ir.text import attribute_text, node_text, op_text, type_text, value_text
from graphopt.ir.weight_pairs import weight_change, weight_type

if TYPE_CHECKING:
    from graphopt.ir.diff import GraphDiff

_CONTEXT = 3
"""Unchanged rows left open on each side of a change; longer runs fold in between."""
_LANE, _ROW, _LANES = 12, 30, 6
"""Pixels from lane to lane, pixels a row, and the number of lanes drawn apart; further ones share the last."""
_NAME = 30
"""Characters of a name that a row shows, its end; the line at the foot of the page shows all of it."""
_FAMILIES = (
    ("quant", ("Quantize", "Integer")),  # before linear: QuantizeLinear is none
    ("linear", ("Conv", "Gemm", "MatMul", "Linear", "Attention", "LSTM", "GRU", "Einsum")),
    ("norm", ("Norm",)),
    ("shape", ("Shape", "shape", "Transpose", "Concat", "Split", "Slice", "queeze", "Flatten", "Gather", "Expand")),
    ("pool", ("Pool", "Reduce")),
    ("control", ("If", "Loop", "Scan")),
)  # fmt: skip
"""Colour of an op's badge by a part of its name; the others are plain."""


@dataclass(frozen=True)
class _Cell:
    """One graph's half of a row: a node, or an input or output of the model."""

    kind: str
    reads: tuple[ir.Value, ...]
    writes: tuple[ir.Value, ...]
    markup: str
    plain: str
    depth: int = 0


@dataclass(frozen=True)
class _Row:
    left: _Cell | None
    right: _Cell | None
    hunk: int | None = None
    first: bool = False


def render(difference: GraphDiff, title: str) -> str:
    """The page as one string of HTML.

    Args:
        difference: what `graphopt.ir.diff.diff` returned.
        title: heading and title of the page.
    """
    page = _Page(difference)
    return "\n".join(
        (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/>',
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            _header(difference, title),
            f'<div id="body"><nav id="side">{_sidebar(difference)}</nav>',
            f'<main id="graphs"><div class="heads"><b>before</b><b>after</b></div>{page.rows()}</main></div>',
            '<footer id="line">Click a row to see its whole line, a value to see where it is made and read.</footer>',
            f"<script>{SCRIPT}</script></body></html>",
        )
    )


# --- head and side ---


def _header(difference: GraphDiff, title: str) -> str:
    a, b = difference.before, difference.after
    cards = [
        _card("nodes", a.nodes, b.nodes),
        _card("parameters", a.parameters, b.parameters),
        _card("weight bytes", a.weight_bytes, b.weight_bytes),
    ]
    ops = sorted({op for op in (*a.ops, *b.ops) if a.ops[op] != b.ops[op]}, key=lambda op: (b.ops[op] - a.ops[op], op))
    chips = "".join(
        f'<span class="chip {"less" if b.ops[op] < a.ops[op] else "more"}">{escape(op)} '
        f"{a.ops[op]} → {b.ops[op]} <i>{b.ops[op] - a.ops[op]:+d}</i></span>"
        for op in ops
    )
    verdict = "" if difference else '<span class="chip same">no difference</span>'
    return (
        f'<header><h1>{escape(title)}</h1><div class="cards">{"".join(cards)}</div>'
        f'<div class="chips">{verdict}{chips}</div>'
        '<div class="tools"><input id="find" type="search" placeholder="find op or name  ( / )" '
        'aria-label="find op or name"/><output id="hits"></output>'
        '<button id="previous" title="previous change (p)">↑</button>'
        '<button id="next" title="next change (n)">↓</button>'
        '<button id="fold" title="open or close the unchanged runs (f)">unfold all</button></div></header>'
    )


def _card(name: str, before: int, after: int) -> str:
    change = ""
    if before != after:
        percent = f"{100 * (after - before) / before:+.1f} %" if before else "new"
        change = f'<i class="{"less" if after < before else "more"}">{percent}</i>'
    figures = f"{before:,}" if before == after else f"{before:,} → {after:,}"
    return f'<div class="card"><small>{name}</small><b>{figures}</b>{change}</div>'


def _sidebar(difference: GraphDiff) -> str:
    parts = [f"<h2>changes <small>{len(difference.hunks)}</small></h2>"]
    number = 0
    for group in difference.groups:
        first, count = number, len(group)
        number += count
        head = group[0]
        ops = " ".join(
            f'<span class="{css}">{escape(_counted(map(op_text, nodes)))}</span>'
            for css, nodes in (("out", head.removed), ("in", head.added))
            if nodes
        )
        times = f"<em>×{count}</em>" if count > 1 else ""
        scope = f"<small>in {escape(head.scope)}</small>" if head.scope else ""
        links = "".join(f'<a href="#h{first + index}">{escape(hunk.anchor)}</a>' for index, hunk in enumerate(group))
        parts.append(
            f'<details class="group"><summary data-hunk="{first}">{ops} {times}{scope}</summary>{links}</details>'
        )
    if not difference.groups:
        parts.append("<p>none in the nodes</p>")
    parts += _listed("interface", [escape(line) for line in difference.interface], opened=True)
    weights = [
        f'<span class="both">%{escape(p.name)}</span> {escape(weight_change(p))}' for p in difference.weights_changed
    ]
    parts += _listed("weights changed", weights)
    for word, css, listed in (
        ("removed", "out", difference.weights_removed),
        ("added", "in", difference.weights_added),
    ):
        lines = [f'<span class="{css}">%{escape(name)}</span> {escape(weight_type(value))}' for name, value in listed]
        parts += _listed(f"weights {word}", lines)
    return "".join(parts)


def _listed(name: str, lines: Sequence[str], *, opened: bool = False) -> Iterator[str]:
    if lines:
        items = "".join(f"<li>{line}</li>" for line in lines)
        state = ' open="open"' if opened else ""
        head = f"<summary><h2>{name} <small>{len(lines)}</small></h2></summary>"
        yield f'<details class="list"{state}>{head}<ul>{items}</ul></details>'


def _counted(names: Iterable[str]) -> str:
    return ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in Counter(names).items())


# --- the rows ---


class _Page:
    """The rows of both graphs in one order, and their markup."""

    def __init__(self, difference: GraphDiff) -> None:
        self.correspondence: Correspondence = difference.correspondence
        self.hunks = difference.hunks
        self.numbers: dict[ir.Value, int] = {}

    def rows(self) -> str:
        rows = list(self._ordered())
        lanes = [_Lanes([row.left for row in rows]), _Lanes([row.right for row in rows])]
        markup = [self._row(row, [lane.svg(index) for lane in lanes]) for index, row in enumerate(rows)]
        kept = [False] * len(rows)
        for index, row in enumerate(rows):
            if row.hunk is not None or any(cell and cell.kind == "io" for cell in (row.left, row.right)):
                for near in range(max(0, index - _CONTEXT), min(len(rows), index + _CONTEXT + 1)):
                    kept[near] = True
        return "".join(self._folded(rows, markup, kept))

    def _folded(self, rows: list[_Row], markup: list[str], kept: list[bool]) -> Iterator[str]:
        start = 0
        while start < len(rows):
            end = start
            while end < len(rows) and kept[end] == kept[start]:
                end += 1
            block = "".join(markup[start:end])
            if kept[start] or end - start < 4:
                yield block
            else:
                ops = Counter(cell.plain for row in rows[start:end] if (cell := row.left) and cell.kind == "node")
                heads = Counter(_op_of(text) for text in ops.elements())
                words = ", ".join(f"{op} ×{count}" for op, count in heads.most_common(6))
                state = "" if self.hunks else ' open="open"'
                yield (
                    f'<details class="run"{state}><summary>{end - start} unchanged'
                    f"<small>{escape(words)}</small></summary>{block}</details>"
                )
            start = end

    def _ordered(self) -> Iterator[_Row]:
        found = self.correspondence
        for a, b in _interface(list(found.a.model.graph.inputs), list(found.b.model.graph.inputs)):
            yield _Row(self._port("input", a), self._port("input", b))
        hunk_of = {node: index for index, hunk in enumerate(self.hunks) for node in (*hunk.removed, *hunk.added)}
        blocks: list[list[_Row]] = []
        block_of: dict[ir.Node, int] = {}
        for node in found.a.position:
            if node in found.nodes:
                other = found.nodes[node]
                block_of[node] = block_of[other] = len(blocks)
                blocks.append([_Row(self._node(node, found.a), self._node(other, found.b))])
            elif node not in block_of:
                self._add_hunk(hunk_of[node], blocks, block_of)
        for node in found.b.position:
            if node not in block_of:
                self._add_hunk(hunk_of[node], blocks, block_of)
        for index in self._block_order(block_of, len(blocks)):
            yield from blocks[index]
        for a, b in _interface(list(found.a.model.graph.outputs), list(found.b.model.graph.outputs)):
            yield _Row(self._port("output", a), self._port("output", b))

    def _add_hunk(self, index: int, blocks: list[list[_Row]], block_of: dict[ir.Node, int]) -> None:
        hunk = self.hunks[index]
        for node in (*hunk.removed, *hunk.added):
            block_of[node] = len(blocks)
        left = [self._node(node, self.correspondence.a) for node in hunk.removed]
        right = [self._node(node, self.correspondence.b) for node in hunk.added]
        blocks.append([_Row(a, b, index, place == 0) for place, (a, b) in enumerate(zip_longest(left, right))])

    def _block_order(self, block_of: Mapping[ir.Node, int], count: int) -> list[int]:
        """Blocks so that in both graphs producers come first; where changes make that impossible, as in the first."""
        order: networkx.DiGraph[int] = networkx.DiGraph()
        order.add_nodes_from(range(count))
        for side in (self.correspondence.a, self.correspondence.b):
            for node in side.position:
                producers = [value.producer() for value in node.inputs if value is not None]
                found = (block_of.get(source, -1) for source in (*producers, side.owner[node]) if source is not None)
                sources = {block for block in found if block >= 0}
                order.add_edges_from((source, block_of[node]) for source in sources - {block_of[node]})
        places = self.correspondence.places()
        rank: dict[int, float] = {}
        for node, block in block_of.items():
            rank[block] = min(rank.get(block, float("inf")), places[node])
        if networkx.is_directed_acyclic_graph(order):
            return list(networkx.lexicographical_topological_sort(order, key=lambda block: (rank[block], block)))
        return sorted(range(count), key=lambda block: (rank[block], block))

    # --- cells ---

    def _port(self, word: str, value: ir.Value | None) -> _Cell | None:
        if value is None:
            return None
        markup = f'<b class="op io">{word}</b>{self._value(value)} <s>{escape(type_text(value))}</s>'
        reads, writes = ((), (value,)) if word == "input" else ((value,), ())
        return _Cell("io", reads, writes, markup, f"{word} {value_text(value)}: {type_text(value)}")

    def _node(self, node: ir.Node, side: Side) -> _Cell:
        op = op_text(node)
        family = next((name for name, parts in _FAMILIES if any(part in op for part in parts)), "plain")
        outputs = ", ".join(self._value(value) for value in node.outputs if value.name)
        inputs = ", ".join(self._value(value) for value in node.inputs)
        attributes = ", ".join(f"{name}={attribute_text(value)}" for name, value in sorted(node.attributes.items()))
        kind = type_text(node.outputs[0]) if node.outputs else ""
        markup = (
            f'<b class="op {family}">{escape(op)}</b><s>{escape(kind)}</s> {outputs} '
            f"<u>←</u> {inputs}{f' <s>{{{escape(attributes)}}}</s>' if attributes else ''}"
        )
        reads = tuple(v for v in node.inputs if v is not None and v not in self.correspondence.weights.key)
        depth = side.scope[node].count(".") if side.owner[node] is not None else 0
        plain = node_text(node) + (f"    in {side.scope[node]}" if side.scope[node] else "")
        plain += f"    node {node.name}" if node.name else ""
        return _Cell("node", reads, tuple(node.outputs), markup, plain, min(depth, 1))

    def _value(self, value: ir.Value | None) -> str:
        if value is None:
            return "_"
        shared = self.correspondence.origin.get(value, value)
        number = self.numbers.setdefault(shared, len(self.numbers))
        weight = ' class="w"' if value in self.correspondence.weights.key else ""
        name = value_text(value)
        shown = name if len(name) <= _NAME else f"%…{name[2 - _NAME :]}"
        return f'<a data-v="{number}"{weight}>{escape(shown)}</a>'

    def _row(self, row: _Row, lanes: Sequence[str]) -> str:
        changed = row.hunk is not None
        cells: list[str] = []
        for cell, lane, css in ((row.left, lanes[0], "out"), (row.right, lanes[1], "in")):
            kind = f"cell {css}" if changed and cell else "cell gap" if cell is None else "cell"
            text = f'<span class="t d{cell.depth}">{cell.markup}</span>' if cell else ""
            title = f' data-line="{escape(cell.plain)}"' if cell else ""
            cells.append(f'<div class="{kind}"{title}>{lane}{text}</div>')
        mark = f' id="h{row.hunk}"' if row.first else ""
        group = f' data-h="{row.hunk}"' if changed else ""
        return f'<div class="row{" changed" if changed else ""}"{mark}{group}>{"".join(cells)}</div>'


def _op_of(line: str) -> str:
    return line.split(" = ", 1)[-1].split("(", 1)[0]


def _interface(a: list[ir.Value], b: list[ir.Value]) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    pairs = dict(paired_by_name(a, b))
    taken = set(pairs.values())
    yield from ((value, pairs.get(value)) for value in a)
    yield from ((None, value) for value in b if value not in taken)


class _Lanes:
    """The edges of one graph as parallel lanes down the rows, like the history graph of a version control system."""

    def __init__(self, cells: Sequence[_Cell | None]) -> None:
        self.last = {value: index for index, cell in enumerate(cells) if cell for value in cell.reads}
        self.width = 1
        active: dict[ir.Value, int] = {}
        self.drawings: list[str] = []
        for index, cell in enumerate(cells):
            before = dict(active)
            sources = dict.fromkeys(value for value in cell.reads if value in active) if cell else {}
            for value in sources:
                if self.last[value] == index:
                    del active[value]
            targets: dict[ir.Value, int] = {}
            for value in cell.writes if cell else ():
                if value in self.last:
                    lane = next(lane for lane in range(len(active) + 1) if lane not in active.values())
                    active[value] = targets[value] = lane
            at = next(iter(targets.values()), next((before[value] for value in sources), 0)) if cell else None
            self.drawings.append(self._draw(before, active, sources, targets, at))
            self.width = max([self.width, *(lane + 1 for lane in active.values())])

    def _draw(
        self,
        before: Mapping[ir.Value, int],
        after: Mapping[ir.Value, int],
        sources: Iterable[ir.Value],
        targets: Mapping[ir.Value, int],
        at: int | None,
    ) -> str:
        middle = _ROW // 2
        paths = [f"M{_x(lane)} 0V{_ROW}" for value, lane in before.items() if value in after and value not in targets]
        if at is not None:
            for value in sources:
                start, end = _x(before[value]), _x(at)
                paths.append(
                    f"M{start} 0" + (f"V{middle}" if start == end else f"C{start} {middle} {end} 2 {end} {middle}")
                )
            for lane in targets.values():
                start, end = _x(at), _x(lane)
                paths.append(
                    f"M{start} {middle}"
                    + (f"V{_ROW}" if start == end else f"C{start} {_ROW} {end} {middle} {end} {_ROW}")
                )
        dot = f'<circle cx="{_x(at)}" cy="{middle}" r="4"/>' if at is not None else ""
        return f'<path d="{"".join(dict.fromkeys(paths))}"/>{dot}'

    def svg(self, index: int) -> str:
        """The piece of the drawing that stands in one row."""
        width = _x(min(self.width, _LANES)) + 2
        return f'<svg width="{width}" height="{_ROW}">{self.drawings[index]}</svg>'


def _x(lane: int) -> int:
    return 9 + min(lane, _LANES - 1) * _LANE
