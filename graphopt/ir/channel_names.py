"""Names of channel groups that a reader of the model understands: module paths, and what the channels serve as.

The rules note what an axis serves as where they see it ("heads", "groups", the outputs of a weight, the sum of two
activations); a name is made of that and of the modules that own the weights. Names do not depend on the order of
nodes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from graphopt.ir.channel_analysis import weight_sources
from graphopt.ir.channel_units import UnitGroup, Units

_ANONYMOUS = re.compile(r"(onnx::\w+|val_\d+|[A-Za-z]+_\d+|_*\d+)$")
"""Names that exporters make up for weights; the node that reads the weight says more."""
_LINEAR = {"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"}
_WORDS = {
    "hidden units": "hidden units",
    "repeats": "query heads per key head",
    "head width": "head width",
    "value width": "value width",
    "heads": "heads",
    "groups": "groups",
}
"""Role to how it is spoken of, the role that names a group with several of them first."""


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
        seen: Counter[str] = Counter()
        unique: list[tuple[str, str]] = []
        for name, role in found:
            seen[name] += 1
            unique.append((name if seen[name] == 1 else f"{name} #{seen[name]}", role))
        return unique

    def _name(self, group: UnitGroup) -> tuple[str, str]:
        roles = [entry for leaf in group.leaves for entry in self._roles.get(id(leaf.axis), ())]
        kinds = {role for role, _ in roles}
        values = list(dict.fromkeys(value for value, _ in group.members))
        role = next((role for role in _WORDS if role in kinds), None)
        producers, nodes = self._producers(group, roles)
        if role == "repeats" and "heads" not in kinds:
            role = None
        if role is None or (role in ("head width", "value width") and len(producers) > 2 and "residual" in kinds):
            return self._by_weights(values, producers, nodes, "residual" in kinds)
        return f"{_WORDS[role]} of {_common(values)}", _WORDS[role]

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
        self, values: Sequence[ir.Value], producers: Sequence[ir.Value], nodes: Sequence[ir.Node], residual: bool
    ) -> tuple[str, str]:
        consumers = [value for value in values if value not in producers and len(value.shape or ()) > 1]
        if not producers:
            if len(values) == 1 and any(use.node.op_type == "Gather" for use in values[0].uses()):
                return f"rows of {_module(values[0])}", "rows"
            return f"inputs of {_common(values)}", "inputs"
        if residual and len(producers) > 1:
            count = len(values)
            prefix = _prefix(values)
            of = f" of {prefix}" if prefix else ""
            return f"residual stream{of} ({count} tensors)", "residual stream"
        readers = [use.node for value in consumers for use in value.uses()]
        if consumers and all(node.op_type in _LINEAR for node in nodes) and _all_linear(readers):
            return f"mlp hidden of {_common([*producers, *consumers])}", "mlp hidden"
        if len(producers) == 1:
            return _module(producers[0]), "channels"
        return f"channels of {_common(producers)} ({len(values)} tensors)", "channels"


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
    if _ANONYMOUS.fullmatch(name):
        nodes = sorted(use.node.name or "" for use in value.uses())
        scope = (nodes[0] if nodes else name).strip("/").split("/")
        return scope[:-1] if len(scope) > 1 else scope
    parts = name.split(".")
    return parts[:-1] if len(parts) > 1 else parts


def _module(value: ir.Value) -> str:
    return ".".join(_path(value))


def _prefix(values: Sequence[ir.Value]) -> str:
    """The longest module path that all weights share; made-up names do not count where others have one."""
    named = [value for value in values if not _ANONYMOUS.fullmatch(value.name or "")] or list(values)
    paths = [_path(value) for value in named]
    common = paths[0]
    for path in paths[1:]:
        length = next(
            (i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), min(len(common), len(path))
        )
        common = common[:length]
    return ".".join(common)


def _common(values: Sequence[ir.Value]) -> str:
    return _prefix(values) or _module(values[0])
