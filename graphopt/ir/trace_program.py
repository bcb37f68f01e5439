"""An exported program as a module: its inputs, its dynamic axes, its operators in their inference form."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from graphopt.errors import DataError, TraceError
from graphopt.ir.trace_shapes import DynamicAxis, bound

if TYPE_CHECKING:
    import torch

_TRAINING_ARGUMENT = {
    "aten::dropout": "train",
    "aten::dropout_": "train",
    "aten::alpha_dropout": "train",
    "aten::feature_dropout": "train",
    "aten::feature_alpha_dropout": "train",
    "aten::native_dropout": "train",
    "aten::rrelu": "training",
    "aten::batch_norm": "training",
}
"""Operators of an exported program that behave differently in training, and the argument that says so."""


def program_inputs(program: torch.export.ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example arguments that a program carries. Raises `DataError` where it carries none."""
    if program.example_inputs is None:
        raise DataError(
            "the exported program carries no example inputs",
            help="pass args=(...): tensors of the shapes and dtypes that it was exported with",
        )
    return program.example_inputs


def program_module(program: torch.export.ExportedProgram, notes: list[str]) -> torch.nn.Module:
    """A module that runs the program, its training-only operators in their inference form.

    It has a graph of its own, and shares the parameters with the program, which stays as it is.
    """
    import torch

    try:
        module = program.module(check_guards=False)
    except Exception as error:  # torch raises anything when a program's names clash with its own
        raise TraceError(
            f"torch cannot turn the program back into a module: {error}",
            where=type(program).__name__,
            help="pass the module itself, or rename the submodule that the message names",
        ) from error
    switched: Counter[str] = Counter()
    for graph_module in [part for part in module.modules() if isinstance(part, torch.fx.GraphModule)]:
        for node in graph_module.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is None or node.op != "call_function":
                continue
            if schema.name == "aten::_native_batch_norm_legit_functional" and node.args[5] is True:
                raise TraceError(
                    "the exported program normalises with the statistics of the batch (training)",
                    where=(node.stack_trace or str(node)).strip().splitlines()[-1].strip(),
                    help="call module.eval() before torch.export.export",
                )
            if _switch_to_inference(node, schema):
                switched[schema.name.removeprefix("aten::")] += 1
        graph_module.recompile()
    if switched:
        which = ", ".join(f"{count} {name}" for name, count in sorted(switched.items()))
        notes.append(f"the exported program contains training code; it was traced in its inference form ({which})")
    return module


def _switch_to_inference(node: torch.fx.Node, schema: Any) -> bool:
    """Set the training argument of a node to False. Whether it was True."""
    argument = _TRAINING_ARGUMENT.get(schema.name)
    names = [parameter.name for parameter in schema.arguments]
    if argument is None or argument not in names:
        return False
    # Without running statistics the batch's own are the definition of the op, in inference too.
    if schema.name == "aten::batch_norm" and node.args[names.index("running_mean")] is None:
        return False
    place = names.index(argument)
    if place < len(node.args) and node.args[place] is True:
        node.update_arg(place, False)
        return True
    if node.kwargs.get(argument) is True:
        node.update_kwarg(argument, False)
        return True
    return False


def program_axes(program: torch.export.ExportedProgram) -> list[dict[int, DynamicAxis]]:
    """The axes that an exported program leaves open, for each of its tensor inputs in order."""
    import torch

    users = set(program.graph_signature.user_inputs)
    axes: list[dict[int, DynamicAxis]] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in users or not isinstance(value, torch.Tensor):
            continue
        axes.append({})
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                bounds = program.range_constraints.get(size.node.expr)
                low, high = (0, None) if bounds is None else (bound(bounds.lower) or 0, bound(bounds.upper))
                hint = torch.export.Dim.DYNAMIC(min=low or None, max=high)
                axes[-1][axis] = DynamicAxis(None, hint, low, high, required=True)
    return axes
