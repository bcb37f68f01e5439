"""What was taken where so that a budget is met, as data: printable, JSON both ways, replayable on the same model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.figures import drawing
from graphopt.passes.prune_plan import GroupPlan, SkippedGroup, check_digest

_MOST_NAMED = 8
"""Changes that a report names."""
_MOST_SKIPPED = 6
"""Reasons that are printed, the most frequent first."""


@dataclass(frozen=True)
class RankPlan:
    """A layer that is taken apart.

    Attributes:
        node: name of the operator.
        form: name in `graphopt.factorizations.FORMS`.
        rank: of the chain.
        full: the rank at which nothing would be lost.
    """

    node: str
    form: str
    rank: int
    full: int


@dataclass(frozen=True)
class BlockPlan:
    """A block that could go as a whole.

    Attributes:
        name: of the region.
        loss: what would be lost with it.
        dropped: whether it goes.
    """

    name: str
    loss: float
    dropped: bool


@dataclass(frozen=True)
class IntegerPlan:
    """An operator that could compute on integers of 8 bits.

    Attributes:
        node: name of the operator.
        loss: what the outputs lose when it alone does.
        taken: whether it does.
    """

    node: str
    loss: float
    taken: bool


@dataclass(frozen=True)
class Try:
    """One solution that was built and looked at.

    Attributes:
        predicted: share of the cost that was expected to be left.
        measured: share that was left.
        loss: sum of what is lost, as predicted.
        gap: how far the loss may be from the best one, relative.
        seconds: that solving took.
        note: of the solver.
    """

    predicted: float
    measured: float
    loss: float
    gap: float = 0.0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class BudgetPlan:
    """Every decision of one `MeetBudget.plan`: apply it with `MeetBudget.apply`, store it with `to_json`.

    Attributes:
        model: digest of the model that the plan is for; see `graphopt.passes.prune_plan.digest_of`.
        kind: "latency", "macs", "params" or "bytes".
        asked: share of it that was to be left.
        whole: of the model as it is: microseconds, or a count.
        groups: the groups that could lose units, those that lose none included.
        ranks: the layers that are taken apart.
        blocks: the blocks that could go, those that stay included.
        skipped: the groups that stay whole, and why.
        solver: what decided.
        tries: what was built and looked at, the last one is the plan.
        source: where inputs came from and why; empty where none were used.
        integers: the operators that could compute on integers, those that stay on floats included.
        integer_form: how, see `graphopt.passes.quantize.Quantize.form`.
        compensation: the form of `fold-reconstruction` that follows, "none" for none.
        notes: what the user should know; sentences.

    Example:
        >>> plan = BudgetPlan("", "macs", 0.5, 1e6, groups=(GroupPlan("conv1", "channels", 4, (1, 2)),))
        >>> plan.selection, BudgetPlan.from_json(plan.to_json()) == plan
        ({'conv1': (1, 2)}, True)
    """

    model: str
    kind: str
    asked: float
    whole: float
    groups: tuple[GroupPlan, ...] = ()
    ranks: tuple[RankPlan, ...] = ()
    blocks: tuple[BlockPlan, ...] = ()
    skipped: tuple[SkippedGroup, ...] = ()
    solver: str = ""
    tries: tuple[Try, ...] = ()
    source: str = ""
    integers: tuple[IntegerPlan, ...] = ()
    integer_form: str = "auto"
    compensation: str = "none"
    notes: tuple[str, ...] = ()

    @property
    def selection(self) -> dict[str, tuple[int, ...]]:
        """Name of each group that loses units to the units that go: what `remove_channels` takes."""
        return {group.name: group.removed for group in self.groups if group.removed}

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the blocks that go."""
        return tuple(block.name for block in self.blocks if block.dropped)

    @property
    def on_integers(self) -> tuple[str, ...]:
        """Names of the operators that compute on integers, in the order of the graph."""
        return tuple(one.node for one in self.integers if one.taken)

    @property
    def is_empty(self) -> bool:
        """Whether the model stays as it is."""
        return not (self.selection or self.ranks or self.dropped or self.on_integers)

    def check(self, model: ir.Model) -> None:
        """Raise `GraphoptError` unless this is the model that the plan was made for."""
        check_digest(self.model, model)

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` turns back into an equal plan."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BudgetPlan:
        """The plan that `to_json` wrote, also after a round trip through text.

        Raises:
            GraphoptError: a field is missing, unknown or not what it should be.
        """
        unknown = sorted(set(data) - {one.name for one in fields(cls)})
        if unknown:
            raise GraphoptError(f"a plan has no field {unknown[0]!r}", help="pass what `BudgetPlan.to_json` returned")
        values = dict(data)
        parts: dict[str, Callable[..., Any]] = {
            "groups": _group,
            "ranks": RankPlan,
            "blocks": BlockPlan,
            "skipped": SkippedGroup,
            "tries": Try,
            "integers": IntegerPlan,
        }
        try:
            for name, kind in parts.items():
                values[name] = tuple(kind(**one) for one in values.get(name, ()))
            values["notes"] = tuple(values.get("notes", ()))
            return cls(**values)
        except (TypeError, ValueError, AttributeError) as error:
            raise GraphoptError(f"this is no plan: {error}", help="pass what `BudgetPlan.to_json` returned") from error

    def summary(self) -> list[str]:
        """The budget, what was predicted and measured, and how much of what went."""
        units = sum(len(group.removed) for group in self.groups)
        all_units = sum(group.units for group in self.groups)
        went = [f"{units} of {all_units} units in {len(self.selection)} groups"] if self.selection else []
        went += [f"{len(self.ranks)} layers taken apart"] if self.ranks else []
        went += [f"{len(self.dropped)} of {len(self.blocks)} blocks dropped"] if self.dropped else []
        head = f"{self.kind} to {self.asked:.3g}"
        went += [f"{len(self.on_integers)} of {len(self.integers)} operators on integers"] if self.on_integers else []
        if not self.tries:
            return [f"{head}: nothing goes"]
        last = self.tries[-1]
        found = f"predicted {last.predicted:.3f}, measured {last.measured:.3f}"
        gap = f", gap {last.gap:.1%}" if last.gap > 1e-4 else ""
        told = f"{head}: {found} ({self.solver}{gap}, {len(self.tries)} built); {', '.join(went) or 'nothing goes'}"
        return [told, *self._named()]

    def _named(self) -> list[str]:
        """One line that names what goes, the first of it."""
        parts = [f"{one.name} {one.units} -> {one.kept}" for one in self.groups if one.removed]
        parts += [f"{one.node} {one.form} {one.rank} of {one.full}" for one in self.ranks]
        parts += [f"int8 {name}" for name in self.on_integers]
        parts = [*(f"block {name}" for name in self.dropped), *parts]
        more = [f"and {len(parts) - _MOST_NAMED} more (`graphopt plan`, --json)"] if len(parts) > _MOST_NAMED else []
        return [f"  what goes: {'; '.join([*parts[:_MOST_NAMED], *more])}"] if parts else []

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw what is left of each group, layer and block, and what computes on integers, in the order of the graph.

        Args:
            path: ends in .svg, .png or .pdf.

        Raises:
            GraphoptError: matplotlib is not installed, or the format is unknown.
            WriteError: the file cannot be written.
        """
        bars = [(group.name, group.kept / group.units, f"{group.kept} of {group.units}") for group in self.groups]
        bars += [(one.node, one.rank / one.full, f"rank {one.rank} of {one.full}") for one in self.ranks]
        bars += [
            (f"block {one.name}", 0.0 if one.dropped else 1.0, "dropped" if one.dropped else "kept")
            for one in self.blocks
        ]
        bars += [(one.node, 1.0, "int8" if one.taken else "float") for one in self.integers]
        with drawing(Path(path), width=7.0, height=1.0 + 0.18 * max(len(bars), 1)) as figure:
            axes = figure.subplots()
            colours = [_colour(share, text) for _, share, text in bars]
            axes.barh(range(len(bars)), [share for _, share, _ in bars], color=colours)
            for place, (_, share, text) in enumerate(bars):
                axes.text(min(share, 0.98) + 0.01, place, text, va="center", fontsize=6)
            axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=6)
            axes.set_xlim(0, 1.2)
            axes.invert_yaxis()
            axes.set_xlabel("share that is left")
            axes.set_title(self.summary()[0], fontsize=8)

    def __str__(self) -> str:
        unit = f"{self.whole / 1e3:.2f} ms" if self.kind == "latency" else f"{self.whole:,.0f} {self.kind}"
        lines = [self.summary()[0], f"of {unit}; inputs: {self.source or 'none'}; then {self.compensation}"]
        width = max((len(group.name) for group in self.groups), default=0)
        lines += [
            f"  {group.name:{width}}  {group.role}  {group.units} -> {group.kept}"
            for group in self.groups
            if group.removed
        ]
        lines += [f"  {one.node}: {one.form}, rank {one.rank} of {one.full}" for one in self.ranks]
        lines += [
            f"  block {one.name} {'dropped' if one.dropped else 'stays'} (loss {one.loss:.3g})" for one in self.blocks
        ]
        if self.integers:
            lines.append(f"  on integers ({self.integer_form}): {', '.join(self.on_integers) or 'nothing'}")
            lines.append(f"  on floats: {', '.join(one.node for one in self.integers if not one.taken) or 'nothing'}")
        reasons = Counter(group.reason for group in self.skipped)
        lines += [f"  {count} groups stay: {reason}" for reason, count in reasons.most_common(_MOST_SKIPPED)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _colour(share: float, text: str) -> str:
    if text == "int8":
        return "tab:blue"
    return "tab:green" if share == 1 else "tab:orange" if share else "tab:red"


def _group(**data: Any) -> GroupPlan:
    boundary = data.get("boundary")
    return GroupPlan(
        data["name"],
        data["role"],
        data["units"],
        tuple(data.get("removed", ())),
        None if boundary is None else (boundary[0], boundary[1]),
    )
