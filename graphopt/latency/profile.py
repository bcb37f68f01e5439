"""Where the time of a model goes: by kernel, node, operator and block, as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from graphopt.errors import GraphoptError
from graphopt.ir.figures import drawing
from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.timing import Latency
from graphopt.latency.kernels import Kernel, KernelProfile

VIEWS = ("block", "node", "op")
"""What the time may be shown by."""
_MOST_BLOCKS = 32
"""Blocks are cut as deep in the names as leaves no more than this many."""
_SHOWN, _DRAWN = 20, 40
_WIDTH = 120
_NAMES = 40
"""Letters of a name that are kept in one line before figures or operators give way."""
_BYTES = {
    **dict.fromkeys(("double", "int64", "uint64"), 8),
    **dict.fromkeys(("float", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
}
"""Bytes of an element by onnxruntime's name of its type; other types are few and small."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules around a node."""


@dataclass(frozen=True)
class Part:
    """The time of a node, an operator, a block or a region.

    Attributes:
        name: of the node, operator or block.
        kernels: how many kernels.
        microseconds: in one run of the model.
        layout: of these, in changes of layout.
        share: of the time of all kernels, 0 to 1.
        macs: multiply-accumulates of its nodes.
        bytes: what its kernels read and write, weights included.
        operators: what onnxruntime runs it as, the dearest first.
    """

    name: str
    kernels: int
    microseconds: float
    layout: float
    share: float
    macs: int
    bytes: int
    operators: tuple[str, ...]

    @property
    def gflops(self) -> float:
        """Billions of operations a second, two for each multiply-accumulate; 0 where there are none."""
        return 2e-3 * self.macs / self.microseconds if self.microseconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "operators": list(self.operators), "gflops": self.gflops}


@dataclass(frozen=True)
class Profile:
    """Where the time of one model goes.

    Attributes:
        model: its name.
        measured: every kernel; see `graphopt.latency.kernels.profile_kernels`.
        paths: module path of each node, as far as the names tell; see `block_paths`.
    """

    model: str
    measured: KernelProfile
    paths: Mapping[str, tuple[str, ...]] = field(repr=False)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel, in the order in which they run."""
        return self.measured.kernels

    @property
    def microseconds(self) -> float:
        """Of all kernels together."""
        return self.measured.microseconds

    @property
    def latency(self) -> Latency:
        """Of a run of the whole model without the profiler, milliseconds."""
        return self.measured.latency

    @cached_property
    def depth(self) -> int:
        """How many parts of a module path make a block, where the caller does not say: the most that leave few."""
        deepest = max((len(path) for path in self.paths.values()), default=0)
        counts = {depth: len({path[:depth] for path in self.paths.values()}) for depth in range(1, deepest + 1)}
        return max((depth for depth, count in counts.items() if count <= _MOST_BLOCKS), default=1)

    def by_node(self) -> tuple[Part, ...]:
        """Each node that time is put down to, in graph order; the others were fused into one of them."""
        order = {name: place for place, name in enumerate(self.measured.names)}
        parts = self._parts(lambda kernel: kernel.node or "")
        return tuple(sorted(parts, key=lambda part: order.get(part.name, len(order))))

    def by_operator(self) -> tuple[Part, ...]:
        """Each operator as onnxruntime runs it ("QLinearConv", "ReorderOutput"), the dearest first."""
        return self._dearest(lambda kernel: kernel.operator)

    def by_block(self, depth: int | None = None) -> tuple[Part, ...]:
        """Each block, in the order in which they run: nodes whose module paths begin with the same parts.

        Args:
            depth: how many parts, at least 1; `depth` of this profile where None.

        Raises:
            GraphoptError: the depth is not positive.
        """
        if depth is not None and depth < 1:
            raise GraphoptError(f"blocks of depth {depth}", help="give at least 1: the outermost modules")
        wanted = depth or self.depth
        return self._parts(lambda kernel: ".".join(self.paths.get(kernel.node or "", ())[:wanted]) or "(no module)")

    def by_region(self, regions: Mapping[str, Sequence[str]]) -> tuple[Part, ...]:
        """Each region that the caller names, by the names of its nodes, in the order in which they run.

        Args:
            regions: names of the nodes of each region; where regions share a node, the first has it. Nodes in none are
                under "(elsewhere)".
        """
        owner = {node: name for name, nodes in reversed(list(regions.items())) for node in nodes}
        return self._parts(lambda kernel: owner.get(kernel.node or "", "(elsewhere)"))

    def by(self, view: str, depth: int | None = None) -> tuple[Part, ...]:
        """By one of `VIEWS`. Raises `GraphoptError` where it is something else."""
        if view == "block":
            return self.by_block(depth)
        if view == "node":
            return self.by_node()
        if view == "op":
            return self.by_operator()
        raise GraphoptError(f"nothing to show by {view!r}", help=f"show it by {', '.join(VIEWS)}")

    def table(self, by: str = "block", *, top: int | None = None, depth: int | None = None) -> ProfileTable:
        """The profile to be printed.

        Args:
            by: one of `VIEWS`.
            top: show no more than the dearest so many; 20 where None.
            depth: of blocks.

        Raises:
            GraphoptError: `by` is not one of `VIEWS`, or a number is not positive.
        """
        if top is not None and top < 1:
            raise GraphoptError(f"the dearest {top} are to be shown", help="give at least 1")
        return ProfileTable(self, by, self.by(by, depth), top or _SHOWN)

    def plot(
        self, path: str | os.PathLike[str], by: str = "block", *, top: int | None = None, depth: int | None = None
    ) -> Path:
        """Draw a bar for each part.

        Args:
            path: ends in .svg, .png or .pdf.
            by: one of `VIEWS`.
            top: no more than the dearest so many; 40 where None.
            depth: of blocks.

        Raises:
            GraphoptError: matplotlib is not installed, it knows no such format, or `by` is not one of `VIEWS`.
            WriteError: the path cannot be written.
        """
        parts = _dearest(self.by(by, depth), top or _DRAWN)[::-1]
        places = range(len(parts))
        with drawing(Path(path), width=10, height=1.2 + 0.22 * max(len(parts), 4)) as figure:
            axes = figure.subplots()
            axes.barh(places, [part.microseconds - part.layout for part in parts], label="kernels")
            if any(part.layout for part in parts):
                own = [part.microseconds - part.layout for part in parts]
                axes.barh(places, [part.layout for part in parts], left=own, label="changes of layout")
                axes.legend(loc="lower right")
            for place, part in zip(places, parts, strict=True):
                axes.annotate(f" {part.share:.1%}", (part.microseconds, place), va="center")
            axes.set_yticks(places, [_short(part.name, 60) for part in parts])
            axes.margins(x=0.1)
            axes.set_xlabel(f"microseconds in one run of {self.model} ({self.latency.median:.3g} ms)")
        return Path(path)

    def to_json(self) -> dict[str, Any]:
        """Plain data: kernels, and the time by node, operator and block."""
        measured = self.measured
        return {
            "model": self.model,
            "target": measured.target,
            "threads": measured.threads,
            "rounds": measured.rounds,
            "latency_ms": vars(measured.latency),
            "kernels_us": measured.microseconds,
            "layout_us": measured.layout_microseconds,
            "notes": list(measured.notes),
            "without_kernel": list(measured.without_kernel),
            "kernels": [{**vars(kernel), "node": kernel.node} for kernel in measured.kernels],
            "nodes": [part.to_json() for part in self.by_node()],
            "operators": [part.to_json() for part in self.by_operator()],
            "blocks": [part.to_json() for part in self.by_block()],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        return str(self.table())

    def _parts(self, key: Callable[[Kernel], str]) -> tuple[Part, ...]:
        """Sums over the kernels with the same key, in the order in which they run."""
        groups: dict[str, list[Kernel]] = {}
        for kernel in self.kernels:
            groups.setdefault(key(kernel), []).append(kernel)
        counted: set[str] = set()
        found = {name: self._part(name, kernels, counted) for name, kernels in groups.items()}
        return tuple(part for part in found.values() if part.microseconds or part.macs)

    def _dearest(self, key: Callable[[Kernel], str]) -> tuple[Part, ...]:
        return tuple(sorted(self._parts(key), key=lambda part: -part.microseconds))

    def _part(self, name: str, kernels: Sequence[Kernel], counted: set[str]) -> Part:
        macs = 0
        for kernel in kernels:
            for node in kernel.nodes:
                macs += self._macs[node] if node not in counted else 0
                counted.add(node)
        microseconds = sum(kernel.microseconds for kernel in kernels)
        operators: dict[str, float] = {}
        for kernel in kernels:
            operators[kernel.operator] = operators.get(kernel.operator, 0.0) + kernel.microseconds
        return Part(
            name,
            len(kernels),
            microseconds,
            sum(kernel.microseconds for kernel in kernels if not kernel.nodes),
            microseconds / self.microseconds if self.microseconds else 0.0,
            macs,
            sum(moved_bytes(kernel) for kernel in kernels),
            tuple(sorted(operators, key=lambda operator: -operators[operator])),
        )

    @cached_property
    def _macs(self) -> dict[str, int]:
        return dict(zip(self.measured.names, self.measured.macs, strict=True))


@dataclass(frozen=True)
class ProfileTable:
    """What is printed of a profile: one view, the dearest parts of it.

    Attributes:
        profile: what is shown.
        by: one of `VIEWS`.
        parts: all parts of the view.
        top: how many are shown.
    """

    profile: Profile
    by: str
    parts: tuple[Part, ...]
    top: int

    def to_json(self) -> dict[str, Any]:
        """As `Profile.to_json`: everything."""
        return self.profile.to_json()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        measured, latency = self.profile.measured, self.profile.latency
        threads = f"{measured.threads or 'default'} thread{'' if measured.threads == 1 else 's'}"
        yield Text(
            f"{self.profile.model} · {measured.target} ({threads}) · {latency.median:.3f} ms "
            f"({latency.low:.3f} to {latency.high:.3f}, {measured.rounds} runs), "
            f"{measured.microseconds / 1e3:.3f} ms in {len(measured.kernels)} kernels, "
            f"{measured.layout_microseconds / 1e3:.3f} ms of that in changes of layout"
        )
        table = Table(box=None, pad_edge=False, header_style="bold")
        shown = _dearest(self.parts, self.top)
        rows = [self._row(part) for part in shown]
        longest = max((len(row[0]) for row in rows), default=0)
        table.add_column({"op": "operator"}.get(self.by, self.by), overflow="fold", min_width=min(longest, _NAMES))
        for place, column in enumerate(("kernels", "us", "share", "MACs", "moved", "GFLOP/s"), start=1):
            width = max(len(column), *(len(row[place]) for row in rows)) if rows else len(column)
            table.add_column(column, justify="right", no_wrap=True, min_width=width)
        if self.by != "op":
            table.add_column("runs as", overflow="ellipsis", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        rest = len(self.parts) - len(shown)
        if rest:
            left = sum(part.microseconds for part in self.parts) - sum(part.microseconds for part in shown)
            table.add_row(f"({rest} more)", "", f"{left:.0f}", f"{left / (self.profile.microseconds or 1.0):.1%}")
        yield table
        for note in measured.notes:
            yield Text(f"note: {note}", "yellow")

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, highlight=False)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _row(self, part: Part) -> list[Text]:
        cells = [
            part.name,
            str(part.kernels),
            f"{part.microseconds:.0f}" if part.microseconds >= 100 else f"{part.microseconds:.1f}",
            f"{part.share:.1%}",
            _scaled(part.macs),
            f"{_scaled(part.bytes)}B",
            f"{part.gflops:.1f}" if part.macs else "-",
        ]
        return [Text(cell) for cell in (*cells, *((", ".join(part.operators),) if self.by != "op" else ()))]


def moved_bytes(kernel: Kernel) -> int:
    """Bytes of the tensors that a kernel reads and writes, as onnxruntime reports their shapes."""
    pairs = (
        *zip(kernel.dtypes, kernel.input_shapes, strict=True),
        *zip(kernel.output_dtypes, kernel.output_shapes, strict=True),
    )
    total = 0
    for dtype, shape in pairs:
        size = _BYTES.get(dtype, 0)
        for length in shape:
            size *= length
        total += size
    return round(total * kernel.calls)


def block_paths(names: Sequence[str], nodes: Sequence[ir.Node]) -> dict[str, tuple[str, ...]]:
    """The module path of each node, outermost first, as far as names tell.

    In order: the modules that torch's exporter noted; the parts of a node's name between slashes, as older exporters
    write it; the name of the largest weight, without its last part. A node without any has the path of the node that
    makes its first input. What all paths have in common is left out.

    Args:
        names: of the nodes.
        nodes: all nodes, in graph order.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[1,2] x) => (float[1,2] z) '
        ...     '<float[2,2] "block.first.weight" = {1,2,3,4}, float[2,2] "block.second.weight" = {1,2,3,4}> { '
        ...     '[a] y = MatMul (x, "block.first.weight") [b] h = Relu (y) [c] z = MatMul (h, "block.second.weight") }')
        >>> block_paths("abc", list(model.graph))
        {'a': ('first',), 'b': ('first',), 'c': ('second',)}
    """
    found: dict[ir.Node, tuple[str, ...]] = {}
    for node in nodes:
        path = _stated_path(node)
        if not path:
            before = (value.producer() for value in node.inputs if value is not None)
            path = next((found[one] for one in before if one is not None and found.get(one)), ())
        found[node] = path
    known = [path for path in found.values() if path]
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*known, strict=False))
    common = min(sum(1 for _ in alike), min((len(path) for path in known), default=1) - 1)
    return {name: found[node][common:] for name, node in zip(names, nodes, strict=True)}


def _stated_path(node: ir.Node) -> tuple[str, ...]:
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
    if len(scopes) > 1 and scopes[-2]:
        return tuple(scopes[-2].split("."))
    parts = tuple(part for part in (node.name or "").split("/") if part)[:-1]
    if parts:
        return parts
    weights = [value for value in node.inputs if value is not None and value.name and value.const_value is not None]
    weights.sort(key=lambda value: -_elements(value))
    return tuple((weights[0].name or "").split(".")[:-1]) if weights else ()


def _elements(value: ir.Value) -> int:
    count = 1
    for length in tensor_shape(value.const_value) if value.const_value is not None else ():
        count *= length
    return count


def _dearest(parts: Sequence[Part], top: int) -> tuple[Part, ...]:
    """The dearest `top` of them, in their own order."""
    kept = {part.name for part in sorted(parts, key=lambda part: -part.microseconds)[:top]}
    return tuple(part for part in parts if part.name in kept)


def _scaled(number: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number} " if number else "0 "


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"
