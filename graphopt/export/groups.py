"""What can be pruned in a model, in groups of coupled channels, and what keeps the rest."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from graphopt.export.group_coverage import Counts, Coverage
from graphopt.export.inspect import bound_sizes
from graphopt.ir.channels import ChannelGroup, ChannelGroups, channel_groups
from graphopt.ir.cost import operator_name
from graphopt.ir.load import Source, load
from graphopt.ir.ops.axes import Reason
from graphopt.ir.ops.row import OpTable

_WIDTH = 160
"""Columns of the report as text."""
_FEW, _FEW_TENSORS = 3, 2
"""Names that a line of text shows, of nodes and of tensors, whose names are long; JSON has all of them."""


@dataclass(frozen=True)
class Obstacle:
    """One reason why channels must stay, over all nodes that give it.

    Attributes:
        operator: the operator to blame, None for the interface of the model.
        reason: why.
        nodes: names of the nodes.
        channels: channels that cannot be removed for it.
        parameters: weights that lie on such channels and on no channel that can be removed. What an operator keeps
            is not counted again for the inputs and outputs of the model.
        alone: those of them that no other operator keeps.
        tensors: the initializers that hold them; where there are none, those that hold the channels.
    """

    operator: str | None
    reason: str
    nodes: tuple[str, ...]
    channels: int
    parameters: int
    alone: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        if self.operator is None:
            return self.reason
        return f"{self.operator}: {self.reason} ({_few(self.nodes)})"


@dataclass(frozen=True)
class GroupsReport:
    """The groups of a model, how much of it they cover, and what keeps the rest.

    Attributes:
        groups: all groups, those that cannot be pruned included.
        parameters: weights that lie on a channel that can be removed.
        macs: multiply-accumulates that do.
        obstacles: what keeps channels, the most parameters first.
        kept_macs: node and multiply-accumulates that lie on no channel that can be removed, the most first.
        opaque: operator, node and reason of every node that no rule accounts for.
        unknown: operators whose multiply-accumulates are not known and not counted.
        dynamic: symbolic dimensions and the sizes that multiply-accumulates are counted with.
    """

    groups: tuple[ChannelGroup, ...]
    parameters: Coverage
    macs: Coverage
    obstacles: tuple[Obstacle, ...]
    kept_macs: tuple[tuple[str, int], ...]
    opaque: tuple[tuple[str, str, str], ...]
    unknown: tuple[str, ...]
    dynamic: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "parameters": vars(self.parameters) | {"share": self.parameters.share},
            "macs": vars(self.macs) | {"share": self.macs.share},
            "dynamic": self.dynamic,
            "groups": [group.to_json() for group in self.groups],
            "obstacles": [vars(obstacle) for obstacle in self.obstacles],
            "kept_macs": [{"node": node, "macs": macs} for node, macs in self.kept_macs],
            "opaque": [{"operator": kind, "node": node, "reason": reason} for kind, node, reason in self.opaque],
            "unknown": list(self.unknown),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(self._lines()))
        if self.obstacles:
            yield Text()
            yield self._obstacle_table()
        prunable = [group for group in self.groups if group.prunable]
        if prunable:
            yield Text()
            table = _table("prunable group", "role", "#units", "#parameters/unit", "#tensors", "removal")
            for group in prunable:
                removal = "exact" if group.exact else f"inexact: {group.inexact_reason}"
                table.add_row(*_cells(group), Text(removal))
            yield table
        frozen = len(self.groups) - len(prunable)
        if frozen:
            yield Text(f"\n{_count(frozen, 'group')} cannot be pruned; --frozen lists them")

    def frozen(self) -> Group:
        """What cannot be pruned, to print: the groups and the nodes that no rule accounts for, with the reasons."""
        table = _table("group that stays", "role", "#units", "#parameters/unit", "#tensors", "because")
        for group in self.groups:
            if not group.prunable:
                table.add_row(*_cells(group), Text(group.reason or ""))
        nodes = _table("node without a rule", "operator", "because")
        for kind, node, reason in self.opaque:
            nodes.add_row(Text(node), Text(kind), Text(reason))
        shown = [table] if table.row_count else [Text("every group can be pruned")]
        return Group(*shown, *([Text(), nodes] if self.opaque else []))

    def _lines(self) -> list[str]:
        prunable = [group for group in self.groups if group.prunable]
        units = sum(group.units for group in prunable)
        inexact = sum(not group.exact for group in prunable)
        lines = [
            f"{_count(len(self.groups), 'group')} of channels, {len(prunable)} prunable ({_count(units, 'unit')}"
            + (f"; {_count(inexact, 'group')} inexact)" if inexact else ")"),
            f"parameters {_covered(self.parameters)}",
            f"MACs       {_covered(self.macs)}",
        ]
        if self.dynamic:
            lines[-1] += f", counted at {', '.join(f'{name} = {size}' for name, size in self.dynamic.items())}"
        if self.kept_macs:
            lines.append(f"           the others: {_few([f'{node} {macs:,}' for node, macs in self.kept_macs])}")
        if self.unknown:
            lines.append(f"           those of some nodes are not known and not counted: {_few(self.unknown)}")
        if self.opaque:
            lines.append(f"not passed {_few([f'{kind} {node}' for kind, node, _ in self.opaque])}")
        return lines

    def __str__(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=_WIDTH, color_system=None, force_terminal=False).print(self)
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def _obstacle_table(self) -> Table:
        table = _table("what keeps channels", "#channels", "#parameters", "#kept by it alone", "tensors")
        for obstacle in self.obstacles:
            if not obstacle.channels and obstacle.operator is None:
                continue  # single numbers, which have no channels to keep
            figures = (f"{number:,}" for number in (obstacle.channels, obstacle.parameters, obstacle.alone))
            table.add_row(Text(str(obstacle)), *figures, Text(_few(obstacle.tensors, _FEW_TENSORS)))
        return table


def describe_groups(
    source: Source | ChannelGroups,
    inputs: Mapping[str, np.ndarray] | np.ndarray | None = None,
    *,
    table: OpTable | None = None,
) -> GroupsReport:
    """Find the channel groups of a model and say how much of it can be pruned, and what keeps the rest.

    Args:
        source: as for `graphopt.load`, or groups that `channel_groups` has found.
        inputs: example inputs that bind the dynamic dimensions; not with groups, which have been found at sizes.
        table: op rows, `default_table().with_rows([...])` for operators of your own; not with groups either.

    Raises:
        LoadError, InvalidGraphError: the model cannot be read or contradicts itself.
        DataError: the inputs do not fit the model.

    Example:
        >>> import graphopt
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,1] y) <float[2,3] a = {1,2,3,4,5,6}, float[3,1] b = {1,1,1}>
        ...     { h = MatMul(x, a) y = MatMul(h, b) }''')
        >>> found = graphopt.describe_groups(model)
        >>> found.parameters.share, found.macs.share, [str(obstacle) for obstacle in found.obstacles]
        (1.0, 1.0, ["graph input 'x'"])
    """
    groups = source if isinstance(source, ChannelGroups) else find_groups(source, inputs, table=table)
    counts, analysis = Counts(groups), groups.analysis
    kept = [(node, work.total - work.prunable) for node, work in counts.macs.items() if work.prunable < work.total]
    return GroupsReport(
        groups=tuple(groups),
        parameters=Coverage(sum(counts.parameters.values()), sum(counts.prunable.values())),
        macs=Coverage(*(sum(getattr(work, name) for work in counts.macs.values()) for name in ("total", "prunable"))),
        obstacles=_obstacles(groups, counts),
        kept_macs=tuple((f"{operator_name(node)} {node.name}", macs) for node, macs in sorted(kept, key=_most)),
        opaque=tuple((operator_name(node), node.name or "", reason) for node, reason in analysis.opaque),
        unknown=tuple(sorted({operator_name(node) for node in counts.unknown})),
        dynamic=dict(analysis.sizes[0]),
    )


def find_groups(
    source: Source,
    inputs: Mapping[str, np.ndarray] | np.ndarray | None = None,
    *,
    table: OpTable | None = None,
) -> ChannelGroups:
    """Groups of whatever can be loaded, its dynamic dimensions bound by example inputs."""
    model = load(source)
    return channel_groups(model, sizes=bound_sizes(model, inputs), table=table)


def _obstacles(groups: ChannelGroups, counts: Counts) -> tuple[Obstacle, ...]:
    """Reasons of the same text and operator are one obstacle."""
    merged: dict[tuple[str | None, str], list[Reason]] = {}
    frozen = [group for group in groups.units.groups if group.frozen is not None]
    known = [group.frozen for group in frozen if group.frozen is not None]
    for reason in dict.fromkeys([*known, *(one for kept in counts.kept.values() for key in kept for one in key)]):
        operator = None if reason.node is None else operator_name(reason.node)
        merged.setdefault((operator, reason.text), []).append(reason)
    found: list[Obstacle] = []
    for (operator, text), reasons in merged.items():
        chosen = set(reasons)
        held = {value: kept for value, kept in counts.kept.items() if any(chosen & key for key in kept)}
        members = {value: None for group in frozen if group.frozen in chosen for value, _ in group.members}
        found.append(
            Obstacle(
                operator=operator,
                reason=text,
                nodes=tuple(reason.node.name or "" for reason in reasons if reason.node is not None),
                channels=sum(len(group.atoms) for group in frozen if group.frozen in chosen),
                parameters=sum(size for kept in held.values() for key, size in kept.items() if chosen & key),
                alone=sum(size for kept in held.values() for key, size in kept.items() if key <= chosen),
                tensors=_names(held or members),
            )
        )
    return tuple(sorted(found, key=lambda one: (-one.parameters, -one.channels, str(one))))


def _most(entry: tuple[ir.Node, int]) -> int:
    return -entry[1]


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(value.name or "" for value in values)


def _few(names: Sequence[str], shown: int = _FEW) -> str:
    """The first few, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f", +{more}" if more > 0 else "")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _covered(covered: Coverage) -> str:
    """The share is rounded down, so that 100 % is all."""
    share = math.floor(covered.share * 1000) / 10
    return f"{covered.prunable:,} of {covered.total:,} prunable ({share:g} %)"


def _table(*columns: str) -> Table:
    """A table without lines; columns that begin with # are of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix("#"), justify="right" if column.startswith("#") else "left")
    return table


def _cells(group: ChannelGroup) -> tuple[Text, Text, str, str, str]:
    tensors = len({name for name, _ in group.members})
    return Text(group.name), Text(group.role), f"{group.units:,}", f"{group.parameters:,}", str(tensors)
