"""The parameters and buffers of a lifted graph."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import torch
from torch import nn

from graphopt.errors import LiftError
from graphopt.ir.lift_graph import GraphPlan, float_type, plan_graph
from graphopt.ir.lifted import ANCHOR, INSERTIONS, Interface, LiftedModule, as_tensor
from graphopt.ir.ops.row import OpTable
from graphopt.ir.ops.torch.dtypes import torch_dtype
from graphopt.ir.propagate import BUFFER, LITERAL

_EXPONENT_OF = "Pow"
_ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "Sum", "Where", "Clip", "Mod"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Ceil", "Floor", "Round", "Sign"),
}
"""Operators whose operands are numbers in the code, not parameters, where they have one element or are literals."""


def build_module(model: ir.Model, table: OpTable, wanted: frozenset[str]) -> LiftedModule:
    """The plan of `plan_graph` with weights, in evaluation mode."""
    plan = plan_graph(model, table)
    reference = torch_dtype(float_type(model))
    root = _bodies(plan, reference)
    trainable: set[str] = set()
    for name in sorted(wanted - plan.initializers.keys()):
        raise LiftError(f"{name!r} is read as numbers, not as a tensor", help="`trainable` names what is computed with")
    for name, path in plan.initializers.items():
        value = model.graph.initializers[name]
        if value.const_value is None:
            raise LiftError("an initializer has no value", where=name, help="load the model with its external data")
        tensor = _tensor(value)
        if _is_parameter(value, tensor, model, table) or name in wanted:
            if not tensor.is_floating_point():
                raise LiftError(f"{name!r} holds {tensor.dtype}, which no gradient can move", where=name)
            trainable.add(name)
        _register(root, path, tensor, parameter=name in trainable)
    inputs = model.graph.inputs
    interface = Interface(
        inputs=tuple(value.name or "" for value in inputs),
        outputs=tuple(value.name or "" for value in model.graph.outputs),
        element_types=tuple(None if value.dtype is None else int(value.dtype) for value in inputs),
        initializers=dict(plan.initializers),
        trainable=frozenset(trainable),
    )
    root.__dict__["interface"] = interface
    root.add_module(INSERTIONS, nn.ModuleDict())
    lifted = LiftedModule(root, plan.graph)
    lifted.meta["reference_dtype"] = reference
    return lifted.eval()


def _bodies(plan: GraphPlan, reference: torch.dtype) -> nn.Module:
    """A root module with an anchor, and the subgraphs as children."""
    root = nn.Module()
    root.register_buffer(ANCHOR, torch.empty(0, dtype=reference), persistent=False)
    for path, body in plan.bodies.items():
        root.add_module(path, torch.fx.GraphModule(_bodies(body, reference), body.graph, class_name="Body"))
    return root


def _register(root: nn.Module, path: str, tensor: torch.Tensor, *, parameter: bool) -> None:
    *parents, leaf = path.split(".")
    module = root
    for part in parents:
        if part not in module._modules:  # pyright: ignore[reportPrivateUsage]
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if parameter:
        module.register_parameter(leaf, nn.Parameter(tensor))
    else:
        module.register_buffer(leaf, tensor)


def _tensor(value: ir.Value) -> torch.Tensor:
    assert value.const_value is not None
    if value.const_value.dtype == ir.DataType.STRING:
        raise LiftError("strings have no torch counterpart", where=value.name)
    try:
        return as_tensor(value.const_value.numpy())
    except TypeError as error:
        raise LiftError(f"torch has no {value.const_value.dtype.name}", where=value.name) from error


def _is_parameter(value: ir.Value, tensor: torch.Tensor, model: ir.Model, table: OpTable) -> bool:
    """Whether training may move an initializer; see `graphopt.lift`."""
    if not tensor.is_floating_point() or tensor.element_size() < 2 or tensor.numel() == 0 or value.meta.get(BUFFER):
        return False
    if any(_is_read_as_numbers(use.node, use.idx, model, table) for use in value.uses()):
        return False
    in_code = tensor.numel() == 1 or value.meta.get(LITERAL)
    if all(
        _is_setting(use.node, use.idx, model, table)
        or (in_code and use.node.domain == "" and use.node.op_type in _ARITHMETIC)
        for use in value.uses()
    ):
        return False
    return bool(torch.isfinite(tensor).all())


def _is_read_as_numbers(node: ir.Node, index: int, model: ir.Model, table: OpTable) -> bool:
    """Whether the generated code, or BatchNormalization's own update, holds the value: no gradient step may move it."""
    row = table.row(node.domain, node.op_type, model.opset_imports.get(node.domain, 1))
    return row is not None and index in (*row.structural, *row.statistics)


def _is_setting(node: ir.Node, index: int, model: ir.Model, table: OpTable) -> bool:
    row = table.row(node.domain, node.op_type, model.opset_imports.get(node.domain, 1))
    settings: Iterable[int] = () if row is None else (*row.structural, *row.quantization, *row.statistics)
    return index in settings or (node.op_type == _EXPONENT_OF and index == 1)
