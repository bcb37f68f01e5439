"""What a pruning decided, as data: printable, JSON both ways, replayable on the same model (design.md D5)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.store import model_digest
from graphopt.ir.channels import ChannelGroups, Selection
from graphopt.ir.removal import mask_channels, remove_channels
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from graphopt.search import Costs

_MOST_SKIPPED = 8
"""Reasons for skipping that are printed, the most frequent first."""


@dataclass(frozen=True)
class GroupPlan:
    """What happens to the units of one group.

    Attributes:
        name: name of the group.
        role: what its channels are.
        units: how many there are.
        removed: indices of those that go, ascending.
        boundary: score of the best unit that goes and of the worst that stays; None where either is missing.

    Raises:
        GraphoptError: the indices are not ascending, or not those of units, or nothing would be left.
    """

    name: str
    role: str
    units: int
    removed: tuple[int, ...] = ()
    boundary: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        whole = all(type(unit) is int for unit in (self.units, *self.removed))
        if not whole or list(self.removed) != sorted({unit for unit in self.removed if 0 <= unit < self.units}):
            raise GraphoptError(
                f"{_first_wrong(self.removed, self.units)}: these are not ascending indices of {self.units!r} units",
                where=self.name,
                help="removed units are whole numbers from 0 to one below the number of units, each once",
            )
        if self.removed and len(self.removed) >= self.units:
            raise GraphoptError(
                f"nothing would be left: all {self.units} units go", where=self.name, help="leave at least one unit"
            )
        if self.boundary is not None and len(self.boundary) != 2:
            raise GraphoptError(
                f"a boundary is two scores, not {len(self.boundary)}",
                where=self.name,
                help="give the score of the best unit that goes and of the worst that stays, or null",
            )

    @property
    def kept(self) -> int:
        """How many units stay."""
        return self.units - len(self.removed)


@dataclass(frozen=True)
class SkippedGroup:
    """A group that was not to be pruned.

    Attributes:
        name: name of the group.
        role: what its channels are.
        units: how many there are.
        reason: why, one clause.
    """

    name: str
    role: str
    units: int
    reason: str


@dataclass(frozen=True)
class PrunePlan:
    """Every decision of one `PruneChannels.plan`: apply it with `PruneChannels.apply`, store it with `to_json`.

    Attributes:
        model: digest of the model that the plan is for; see `digest_of`.
        groups: the groups that could be pruned, those that lose nothing included.
        skipped: the groups that could not, or were not to be.
        criterion: what ranked the units.
        allocation: what decided how many go where.
        target: what was asked for.
        share: what is left of what the target counts.
        compensation: how the consumers take up what is gone; "none" where they do not.
        source: where inputs came from, where any were needed, and why; empty otherwise.
        before: costs of the model for one sample, at the other sizes that the plan was made for.
        after: costs of the pruned model, counted on the pruned graph.
        notes: where less or more goes than was asked for, and why; sentences.

    Example:
        >>> plan = PrunePlan("", (GroupPlan("conv1", "channels", 4, (1, 2), (0.5, 0.7)),))
        >>> plan.selection, PrunePlan.from_json(plan.to_json()) == plan
        ({'conv1': (1, 2)}, True)
    """

    model: str
    groups: tuple[GroupPlan, ...] = ()
    skipped: tuple[SkippedGroup, ...] = ()
    criterion: str = ""
    allocation: str = ""
    target: str = ""
    share: float = 1.0
    compensation: str = "none"
    source: str = ""
    before: Costs = field(default_factory=Costs)
    after: Costs = field(default_factory=Costs)
    notes: tuple[str, ...] = ()

    @property
    def selection(self) -> dict[str, tuple[int, ...]]:
        """Name of each group that loses units to the units that go: what `remove_channels` takes."""
        return {group.name: group.removed for group in self.groups if group.removed}

    def check(self, model: ir.Model) -> None:
        """Raise `GraphoptError` unless this is the model that the plan was made for."""
        check_digest(self.model, model)

    def masked(self, model: ir.Model, groups: ChannelGroups | None = None) -> ir.Model:
        """The masked reference: a new model of full size in which all that the removed units own is 0.

        Args:
            model: the model of the plan; it is not changed.
            groups: `channel_groups(model)`, where the caller has it.

        Raises:
            GraphoptError: it is another model.
        """
        self.check(model)
        return mask_channels(model, self._selected(), groups=groups)

    def pruned(self, model: ir.Model, groups: ChannelGroups | None = None) -> ir.Model:
        """A new model without the removed units, nothing compensated. Arguments and errors: as `masked`."""
        self.check(model)
        return remove_channels(model, self._selected(), groups=groups)

    def _selected(self) -> Selection:
        return {name: units for name, units in self.selection.items()}  # noqa: C416

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` turns back into an equal plan."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrunePlan:
        """The plan that `to_json` wrote, also after a round trip through text.

        Raises:
            GraphoptError: the data is no such plan.
        """
        try:
            unknown = set(data) - {entry.name for entry in fields(cls)}
            if unknown:
                raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
            values = {**data}
            values["groups"] = tuple(_group(one) for one in data["groups"])
            values["skipped"] = tuple(SkippedGroup(**one) for one in data["skipped"])
            values["before"], values["after"] = Costs(**data["before"]), Costs(**data["after"])
            values["notes"] = tuple(data.get("notes", ()))
            plan = cls(**values)
            texts = (
                plan.model,
                plan.criterion,
                plan.allocation,
                plan.target,
                plan.compensation,
                plan.source,
                *plan.notes,
            )
            if not all(isinstance(text, str) for text in texts):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError("a text is something else")
            if len({group.name for group in plan.groups}) < len(plan.groups):
                raise ValueError("a group occurs twice")
            if not math.isfinite(plan.share):
                raise ValueError(f"share is {plan.share}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise GraphoptError(f"not a pruning plan: {error}", help="pass what PrunePlan.to_json wrote") from error
        return plan

    def __str__(self) -> str:
        lines = [f"prune {self.target} · criterion {self.criterion} · allocation {self.allocation}"]
        lines[0] += f" · compensation {self.compensation}" if self.compensation != "none" else ""
        lines += [f"inputs: {self.source}"] if self.source else []
        lines += [_cost_line(name, self.before, self.after) for name in ("macs", "params", "bytes")]
        rows = [("group", "role", "units", "kept", "goes up to", "stays from")]
        rows += [_group_row(group) for group in self.groups]
        lines += ["", *_table(rows)]
        lines += [f"note: {note}" for note in self.notes]
        reasons = Counter(group.reason for group in self.skipped).most_common()
        first = {group.reason: group.name for group in reversed(self.skipped)}
        for reason, count in reasons[:_MOST_SKIPPED]:
            lines.append(f"kept whole: {first[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}")
        more = sum(count for _, count in reasons[_MOST_SKIPPED:])
        lines += [f"kept whole: {more} more, for other reasons"] if more else []
        return "\n".join(lines)


def check_digest(digest: str, model: ir.Model) -> None:
    """Raise `GraphoptError` unless a model has this digest."""
    if digest_of(model) != digest:
        raise GraphoptError(
            "the plan was made for another model",
            where=model.graph.name,
            help="apply it to the very graph that was planned, or plan anew",
        )


def digest_of(model: ir.Model) -> str:
    """SHA-256 of nodes, weights and interface, the same in another process and after saving and loading.

    What training has left about activations (`BATCHNORM_STATISTICS`) lives in memory only and does not count.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
        >>> digest_of(ir.from_onnx_text(text)) == digest_of(ir.from_onnx_text(text))
        True
    """
    shell = model.clone()
    for graph in shell.graphs():
        for node in graph:
            for value in node.outputs:
                value.meta.pop(BATCHNORM_STATISTICS, None)
    return model_digest(shell)


def _first_wrong(removed: Sequence[int], units: int) -> str:
    """Which entry of a list that may be long is the first that is no index, or no larger than the one before."""
    last = -1
    for place, unit in enumerate(removed):
        if type(unit) is not int or type(units) is not int or not last < unit < units:
            return f"entry {place} of `removed` is {unit!r}"
        last = unit
    return f"`units` is {units!r}"


def _group(data: Mapping[str, Any]) -> GroupPlan:
    values: dict[str, Any] = {**data, "removed": tuple(data["removed"])}
    if data["boundary"] is not None:
        values["boundary"] = tuple(map(float, data["boundary"]))
    return GroupPlan(**values)


def _cost_line(name: str, before: Costs, after: Costs) -> str:
    first, then = before.get(name), after.get(name)
    share = f"{then / first:.1%}" if first else "-"
    return f"{name:<7}{first:>16,} -> {then:>16,}  {share}"


def _group_row(group: GroupPlan) -> tuple[str, ...]:
    scores = ("-", "-") if group.boundary is None else tuple(f"{score:.4g}" for score in group.boundary)
    return group.name, group.role, str(group.units), str(group.kept), *scores


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
