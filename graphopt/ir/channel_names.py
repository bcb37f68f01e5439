"""Names of channel groups that a reader of the model understands: module paths, and what the channels serve as.

The rules note what an axis serves as where they see it ("heads", "groups", the outputs of a weight, the sum of two
activations); a name is made of that and of the modules that own the weights. Names do not depend on the order of
nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from graphopt.ir.channel_analysis import weight_sources
from graphopt.ir.channel_units import UnitGroup, Units
from graphopt.ir.ops.axes import ONE_OF_A_PACK

ANONYMOUS = re.compile(r"(onnx::\w+|val_\d+|[A-Za-z]+_\d+|_*\d+)$")
"""Names that exporters make up for weights; the node that reads the weight says more."""
_LINEAR = {"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"}
_SERVES = ("repeats", "heads", "residual", "head width", "value width", "groups", "group width", "rows")
"""What an axis may serve as, in the order in which a group with several of these is named."""


class Namer:
    """Names the groups of one model."""

    def __init__(self, units: Units) -> None:
        self._units = units
        self._roles: dict[int, list[tuple[str, ir.Node]]] = {}
        for axis, role, node in units.analysis.state.roles:
            for part in units.analysis.store.leaves(axis):
                self._roles.setdefault(id(part), []).append((role, node))

    def names(self) -> list[tuple[str, str]]:
        """Name and role of each group; names are unique."""
        found = [self._name(group) for group in self._units.groups]
        alike: dict[str, list[int]] = {}
        for index, (name, _) in enumerate(found):
            alike.setdefault(name, []).append(index)
        for name, indices in alike.items():
            if len(indices) > 1:
                axes = [self._units.groups[index].members[0][1] for index in indices]
                parts = [self._range(self._units.groups[index]) for index in indices]
                if len(set(axes)) == len(axes):
                    parts = [f"axis {axis}" for axis in axes]
                told_apart = None not in parts and len(set(parts)) == len(parts)
                for number, (index, part) in enumerate(zip(indices, parts, strict=True), start=1):
                    suffix = f"[{part}]" if told_apart else f" #{number}" if number > 1 else ""
                    found[index] = name + suffix, found[index][1]
        return found

    def _range(self, group: UnitGroup) -> str | None:
        """The run of coordinates that the units own on their first tensor, None where it is no run."""
        indices = self._units.coordinates(group.members[0], self._units.chosen(group.atoms))
        if len(indices) == 0 or int(indices[-1]) - int(indices[0]) + 1 != len(indices):
            return None
        return f"{int(indices[0])}:{int(indices[-1]) + 1}"

    def _name(self, group: UnitGroup) -> tuple[str, str]:
        roles = [entry for leaf in group.leaves for entry in self._roles.get(id(leaf.axis), ())]
        kinds = {role for role, _ in roles}
        values = list(dict.fromkeys(value for value, _ in group.members))
        producers, nodes = self._producers(group, roles)
        consumers = [value for value in values if value not in producers and len(value.shape or ()) > 1]
        if group.frozen is not None and group.frozen.text == ONE_OF_A_PACK:
            return f"parts of {_common(values)}", "parts"
        if "hidden units" in kinds:
            recurrences = [node.inputs[2] for role, node in roles if role == "hidden units"]
            weights = {source for value in recurrences if value is not None for source in weight_sources(value)}
            return (
                f"hidden units of {_common([value for value in values if value in weights] or values)}",
                "hidden units",
            )
        for role in _SERVES:
            if role not in kinds or (role == "repeats" and ("heads" not in kinds or len(producers) > 1)):
                continue
            if role == "residual":
                if len(producers) > 1 and consumers:
                    prefix = common_module(values)
                    of = f" of {prefix}" if prefix else ""
                    return f"residual stream{of} ({len(values)} tensors)", "residual stream"
            elif role != "group width" or len(producers) == 1:
                words = "query heads per key head" if role == "repeats" else role
                return f"{words} of {_common(producers if role == 'group width' else values)}", words
        return self._by_weights(values, producers, consumers, nodes, "activated" in kinds)

    def _producers(
        self, group: UnitGroup, roles: Iterable[tuple[str, ir.Node]]
    ) -> tuple[list[ir.Value], list[ir.Node]]:
        """The weights whose outputs these channels are, and the nodes that apply them."""
        members = dict(group.members)
        nodes = list(dict.fromkeys(node for role, node in roles if role == "outputs"))
        found: dict[ir.Value, ir.Node] = {}
        for node in nodes:
            for operand in node.inputs:
                if operand is None or operand not in self._units.analysis.state.weights:
                    continue
                for source in weight_sources(operand):
                    if source in members and len(source.shape or ()) > 1:
                        found.setdefault(source, node)
        ordered = [value for value in members if value in found]
        return ordered, [found[value] for value in ordered]

    def _by_weights(
        self,
        values: Sequence[ir.Value],
        producers: Sequence[ir.Value],
        consumers: Sequence[ir.Value],
        nodes: Sequence[ir.Node],
        activated: bool,
    ) -> tuple[str, str]:
        if not producers:
            return f"inputs of {_common(values)}", "inputs"
        readers = [use.node for value in consumers for use in value.uses()]
        if consumers and all(node.op_type in _LINEAR for node in nodes) and _all_linear(readers):
            role = "mlp hidden" if activated else "inner width"
            return f"{role} of {_common([*producers, *consumers])}", role
        if len(producers) > 1:
            return f"channels of {_common(producers)} ({len(values)} tensors)", "channels"
        module = _module(producers[0])
        return (f"{nodes[0].op_type} {module}" if module.replace(".", "").isdigit() else module), "channels"


def _all_linear(nodes: Iterable[ir.Node]) -> bool:
    """Whether weights are read by products only, maybe transposed before."""
    for node in nodes:
        found = [use.node for use in node.outputs[0].uses()] if node.op_type == "Transpose" else [node]
        if not all(reader.op_type in _LINEAR for reader in found):
            return False
    return True


def _path(value: ir.Value) -> list[str]:
    """The module that owns a weight, as a path."""
    name = value.name or ""
    if ANONYMOUS.fullmatch(name):
        nodes = sorted(use.node.name or "" for use in value.uses())
        scope = (nodes[0] if nodes else name).strip("/").split("/")
        return scope[:-1] if len(scope) > 1 else scope
    parts = name.split(".")
    return parts[:-1] if len(parts) > 1 else parts


def _module(value: ir.Value) -> str:
    return ".".join(_path(value))


def common_module(values: Sequence[ir.Value]) -> str:
    """The longest module path that all weights share; made-up names do not count where others have one."""
    named = [value for value in values if not ANONYMOUS.fullmatch(value.name or "")] or list(values)
    paths = [_path(value) for value in named]
    common = paths[0]
    for path in paths[1:]:
        length = next(
            (i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), min(len(common), len(path))
        )
        common = common[:length]
    return ".".join(common)


def _common(values: Sequence[ir.Value]) -> str:
    return common_module(values) or _module(values[0])
