"""Which parameters the loss cannot move, and the operators that stand in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphopt.ir.channel_analysis import nodes_below
from graphopt.ir.lifted import INSERTIONS, NODE, LiftedModule

_FLAT = {"Ceil", "Floor", "Round", "Sign"}
"""Operators whose derivative is 0 wherever it exists: torch returns a gradient, and it says nothing."""
_SHOWN = 4
"""Names that one sentence lists."""


@dataclass(frozen=True)
class Blocked:
    """Parameters that got no gradient.

    Attributes:
        parameters: ONNX names of the initializers.
        blockers: the operators in the way, as `Op 'node'`, in the order of the graph; empty where the parameters
            merely do not lead to anything in the loss.
    """

    parameters: tuple[str, ...]
    blockers: tuple[str, ...]

    def __str__(self) -> str:
        reason = f"blocked by {_listed(self.blockers)}" if self.blockers else "nothing in the loss depends on them"
        return f"no gradient for {_listed(self.parameters)}: {reason}"


def blocked_parameters(
    module: LiftedModule, model: ir.Model, inputs: Sequence[torch.Tensor], trained: Mapping[str, torch.Tensor]
) -> Blocked | None:
    """The parameters without a gradient after the first backward pass, and why.

    Args:
        module: lifted, perhaps with insertions; gradients are those of the first step.
        model: the graph that was lifted, for the names of operators.
        inputs: what the module was called with; it is run once more, in evaluation mode, only where one is blocked.
        trained: parameters that are to be trained, by ONNX name.

    Returns:
        None where every one got a gradient.
    """
    silent = {name for name, parameter in trained.items() if parameter.grad is None}
    zero = {name for name, parameter in trained.items() if parameter.grad is not None and not parameter.grad.any()}
    flat = any(node.op_type in _FLAT for node in nodes_below(model.graph))
    if not silent and not (zero and flat):
        return None
    operators = {node.name or "": node.op_type for node in nodes_below(model.graph)}
    carrying = _carrying(module, inputs)
    paths = {path: name for name, path in module.interface.initializers.items()}
    names: list[str] = []
    blockers: dict[str, None] = {}
    for node in module.graph.nodes:
        name = paths.get(str(node.target)) if node.op == "get_attr" else None
        if name not in silent | zero:
            continue
        found, reaches = _walk(node, carrying, operators)
        if name in silent or not reaches:
            names.append(name or "")
            blockers.update(dict.fromkeys(found))
    return Blocked(tuple(names), tuple(blockers)) if names else None


def _carrying(module: LiftedModule, inputs: Sequence[torch.Tensor]) -> set[fx.Node]:
    """The nodes whose result carries a gradient."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    recorder = _Recorder(module)
    try:
        with torch.enable_grad():
            recorder.run(*inputs)
    finally:
        for part in training:
            part.training = True
    return recorder.carrying


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps which nodes carry a gradient."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.carrying: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter does it."""
        result = super().run_node(n)
        if n.op == "call_function" and getattr(n.target, "__name__", "") == "partial":
            self.carrying.add(n)  # a subgraph with what it captures: judged by what it returns
        if any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in _flat(result)):
            self.carrying.add(n)
        return result


def _flat(result: Any) -> list[Any]:
    return [part for entry in result for part in _flat(entry)] if isinstance(result, (tuple, list)) else [result]


def _walk(start: fx.Node, carrying: set[fx.Node], operators: Mapping[str, str]) -> tuple[list[str], bool]:
    """The operators at which the gradient ends on the way from a parameter, and whether some way reaches the end."""
    blockers: list[str] = []
    reaches, seen, queue = False, {start}, [start]
    while queue:
        for user in queue.pop(0).users:
            if user in seen:
                continue
            seen.add(user)
            if user.op == "output":
                reaches = True
                continue
            node = str(user.meta.get(NODE, ""))
            operator = operators.get(node, "insertion" if str(user.target).startswith(INSERTIONS) else str(user.target))
            if user not in carrying or operator in _FLAT:
                if not _asks_for_a_size(operator):
                    blockers.append(f"{operator} {node or user.name!r}" if not node else f"{operator} {node!r}")
                continue
            queue.append(user)
    return blockers, reaches


def _asks_for_a_size(operator: str) -> bool:
    """Whether a use is no computation: the shape of a value is not the value."""
    return operator in ("Shape", "Size")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
