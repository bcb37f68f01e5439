"""Groups of coupled channels: which channels are the same, which can be removed, and why the others cannot.

The public face of the dependency analysis (`graphopt.ir.channel_analysis` applies the rules,
`graphopt.ir.channel_units` makes units of labels, `graphopt.ir.channel_names` names them).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import SelectionError
from graphopt.ir.channel_analysis import ChannelAnalysis, analyse
from graphopt.ir.channel_names import Namer
from graphopt.ir.channel_units import UnitGroup, Units
from graphopt.ir.ops.row import OpTable

Selection = Mapping["str | ChannelGroup", Sequence[int]]
"""Name of a group, or the group, to the indices of the units that go."""
_MOST_NAMES = 5


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Interchangeable units: each is a set of coordinates of initializers that can only go together.

    Attributes:
        name: what the channels are, unique in the model: "layer1.0.conv1", "heads of encoder.layer.3.attention".
        role: the kind of channels: "channels", "residual stream", "mlp hidden", "heads", "head width", ...
        units: how many can be removed independently of each other.
        prunable: whether any of them can be removed.
        reason: why not, naming the operator or the interface; None where they can.
        exact: whether removing equals masking. False where the channels pass a mean or a normalisation.
        inexact_reason: why not, None where it does.
        members: (name of the initializer, axis) of everything that the units own, in stable order.
        origin, analysed: the atoms and the analysis behind the group, for graphopt's own use.
    """

    name: str
    role: str
    units: int
    prunable: bool
    reason: str | None
    exact: bool
    inexact_reason: str | None
    members: tuple[tuple[str, int], ...]
    origin: UnitGroup
    analysed: Units

    def slices(self, unit: int) -> dict[str, list[tuple[int, np.ndarray]]]:
        """What one unit owns: name of an initializer to pairs (axis, int64 indices along it, ascending).

        Raises:
            SelectionError: there is no such unit.
        """
        (unit,) = _indices(self.name, [unit])
        if not 0 <= unit < self.units:
            raise SelectionError(
                f"there is no unit {unit}: the group has {self.units}",
                where=self.name,
                help=f"units count from 0 to {self.units - 1}",
            )
        atom = int(self.origin.atoms[unit])
        found: dict[str, list[tuple[int, np.ndarray]]] = {}
        for value, axis in self.origin.members:
            indices = self.analysed.owned((value, axis), atom)
            found.setdefault(value.name or "", []).append((axis, indices))
        return found

    @property
    def parameters(self) -> int:
        """Elements of initializers that one unit takes with it, on average, the other groups being whole."""
        return self.analysed.parameters(self.origin) // max(self.units, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "role": self.role,
            "units": self.units,
            "prunable": self.prunable,
            "reason": self.reason,
            "exact": self.exact,
            "inexact_reason": self.inexact_reason,
            "parameters_per_unit": self.parameters,
            "members": [{"tensor": name, "axis": axis} for name, axis in self.members],
        }

    def __repr__(self) -> str:
        state = ("exact" if self.exact else "inexact") if self.prunable else f"frozen: {self.reason}"
        return f"ChannelGroup({self.name!r}, {self.units} units, {state})"


class ChannelGroups(list[ChannelGroup]):
    """All groups of a model, in an order that does not depend on the order of its nodes.

    Attributes:
        analysis: what the rules found out.
        units: the units behind the groups.
    """

    def __init__(self, analysis: ChannelAnalysis, units: Units, groups: Iterable[ChannelGroup]) -> None:
        super().__init__(groups)
        self.analysis, self.units = analysis, units
        self._by_name = {group.name: group for group in self}

    def named(self, name: str) -> ChannelGroup:
        """The group of that name. Raises `SelectionError` where there is none."""
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SelectionError(f"a group is given by its name, not by {name!r}")
        if name not in self._by_name:
            close = [known for known in self._by_name if name in known or known in name][:_MOST_NAMES]
            known = ", ".join(map(repr, close or list(self._by_name)[:_MOST_NAMES])) or "none"
            raise SelectionError(
                f"the model has no channel group {name!r}",
                help=f"names come from channel_groups of this very model, for instance {known}",
            )
        return self._by_name[name]

    def atoms(self, selection: Selection) -> np.ndarray:
        """A selection as one boolean a label, checked.

        Raises:
            SelectionError: an unknown group or unit, a group that cannot be pruned, or nothing left on an axis.
        """
        if not isinstance(selection, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SelectionError("a selection maps names of groups to indices of units")
        chosen: list[int] = []
        for key, units in selection.items():
            group = self.named(key.name if isinstance(key, ChannelGroup) else key)
            name = group.name
            indices = _indices(name, units)
            if indices and not group.prunable:
                raise SelectionError(f"the group cannot be pruned: {group.reason}", where=name)
            for unit in indices:
                if not 0 <= unit < group.units:
                    group.slices(unit)
            if len(set(indices)) >= group.units:
                raise SelectionError(
                    f"nothing would be left: all {group.units} units are selected", where=name, help="keep at least one"
                )
            chosen.extend(int(group.origin.atoms[unit]) for unit in indices)
        removed = self.units.chosen(chosen)
        emptied = self.units.emptied(removed)
        if emptied is not None:
            (value, axis), names = emptied, [str(name) for name, units in selection.items() if len(list(units))]
            raise SelectionError(
                f"nothing would be left on axis {axis} of {value.name!r}, which several groups share",
                where=", ".join(map(repr, names[:_MOST_NAMES])),
                help="keep a unit of one of them",
            )
        return removed


def _indices(name: str, units: Sequence[int]) -> list[int]:
    """The units of a selection as integers; masks and fractions are no indices."""
    try:
        given = list(units)
        indices = [operator.index(unit) for unit in given]
    except TypeError:
        given, indices = [True], []
    if any(isinstance(unit, (bool, np.bool_)) for unit in given):
        raise SelectionError(
            f"a selection lists indices of units, not {units!r}",
            where=name,
            help="for a mask, pass numpy.flatnonzero(mask)",
        )
    return indices


def channel_groups(
    model: ir.Model, *, sizes: Mapping[str, int] | None = None, table: OpTable | None = None
) -> ChannelGroups:
    """Find the coupled channels of a model: what can be removed, in which units, and why the rest cannot.

    Labels are unified along the graph by the `channels` rules of the op table; no weight is read. Source: the
    dependency graph of DepGraph (Fang et al. 2023), stated once an operator instead of once a pair of layers.

    Args:
        model: a model in canonical form (what `graphopt.load` and `graphopt.trace` return); it is not changed.
        sizes: elements of the symbolic input dimensions that the model is known to accept, by name; 8 by default.
        table: op rows, `default_table().with_rows([...])` for operators of your own.

    Returns:
        A list of groups in stable order, the ones that cannot be pruned included.

    Raises:
        InvalidGraphError: the model is not in canonical form, or its shapes contradict each other.

    Example:
        >>> import graphopt, onnx.parser
        >>> model = graphopt.load(onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,2] y) <float[2,3] a = {1,2,3,4,5,6}, float[3,2] b = {1,1,1,1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> for group in graphopt.channel_groups(model):
        ...     print(group.name, group.units, group.reason)
        inputs of a 2 graph input 'x'
        mlp hidden of a 3 None
        b 2 graph output 'y'
    """
    analysis = analyse(model, sizes=sizes, table=table)
    units = Units(analysis)
    namer = Namer(units)
    names = namer.names()
    return ChannelGroups(
        analysis,
        units,
        (
            ChannelGroup(
                name=name,
                role=role,
                units=len(group.atoms),
                prunable=group.frozen is None,
                reason=None if group.frozen is None else str(group.frozen),
                exact=group.inexact is None,
                inexact_reason=None if group.inexact is None else str(group.inexact),
                members=tuple((value.name or "", axis) for value, axis in group.members),
                origin=group,
                analysed=units,
            )
            for (name, role), group in zip(names, units.groups, strict=True)
        ),
    )
