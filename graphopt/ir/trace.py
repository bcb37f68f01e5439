"""From a torch module or program to a verified `onnx_ir.Model` in canonical form.

Exporters are not to be trusted: they drop inputs, fix sizes that were asked to be dynamic, and now and then
compute something else. So the export is run beside the module, on the example inputs and on a second size of
the dynamic axes, and where the two disagree the other exporter has its turn.

torch is imported inside the functions: the ONNX path must not load it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError, TraceError
from graphopt.ir.canonical import NOTES, canonicalize
from graphopt.ir.trace_blame import is_data_dependent, reason, user_code
from graphopt.ir.trace_export import EXPORTERS, Chatter, ExportMismatchError, quiet
from graphopt.ir.trace_shapes import open_sizes, without_ones
from graphopt.ir.trace_subject import Subject, inference_state, make_subject, output_names
from graphopt.ir.trace_verify import Evidence, correct_output_shapes, disagreement, gather_evidence, is_random

if TYPE_CHECKING:
    import torch


@dataclass
class _Attempts:
    """What went wrong with the exporters tried so far."""

    failures: dict[str, str] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)
    where: str | None = None
    data_dependent: bool = False
    disagreed: bool = False

    def failed(self, exporter: str, why: str, chatter: Chatter) -> None:
        self.failures[exporter] = why
        self.said[exporter] = chatter.lines()


def trace(
    module_or_program: torch.nn.Module | torch.export.ExportedProgram,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ir.Model:
    """Turn a torch module into an ONNX graph in canonical form, verified against the module.

    Inputs are named like the parameters of `forward` and the keys below them (`past.0.key`), outputs by the
    keys of what it returns (`logits`; `output_0` in a tuple; a lone tensor is `output`), weights like the
    module's parameters. Arguments and outputs that are no tensors are fixed and left out. The module is
    traced as in inference, and is left exactly as it was. What the user should know is in
    `model.meta["graphopt.notes"]`, a list of sentences.

    Args:
        module_or_program: a module of any floating-point dtype on any device, or an exported program.
        args: example inputs: a tensor, or a tuple or list of positional arguments; numpy arrays serve as
            tensors. A program brings its own.
        kwargs: example keyword arguments.
        dynamic_shapes: which axes stay open, as `torch.export.export` takes it; names of dimensions become
            the symbols of the ONNX interface.

    Raises:
        DataError: `module_or_program` is neither, the module itself fails on the example inputs, or
            `dynamic_shapes` does not fit them.
        TraceError: torch cannot export it, or what it exports computes something else.

    Example:
        >>> import torch
        >>> batch = torch.export.Dim("batch")
        >>> model = trace(torch.nn.Linear(3, 2), torch.ones(4, 3), dynamic_shapes=({0: batch},))
        >>> str(model.graph.inputs[0].shape), list(model.graph.initializers)
        ('[batch,3]', ['weight', 'bias'])
    """
    return trace_with_feeds(module_or_program, args, kwargs, dynamic_shapes=dynamic_shapes).model


@dataclass(frozen=True)
class Traced:
    """A verified graph and the inputs on which it was verified.

    Attributes:
        model: the graph in canonical form.
        feeds: arrays by input name: the example inputs first, then a second size of the dynamic axes, if any.
    """

    model: ir.Model
    feeds: tuple[dict[str, np.ndarray], ...]


def trace_with_feeds(
    module_or_program: torch.nn.Module | torch.export.ExportedProgram,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Traced:
    """As `trace`, with the inputs that the export was verified on."""
    subject = make_subject(module_or_program, args, kwargs, dynamic_shapes)
    with inference_state(subject):
        outputs = output_names(subject)
        tensors = _export_inputs(subject)
        attempts = _Attempts()
        for exporter in EXPORTERS:
            traced = _attempt(exporter, subject, tensors, outputs, attempts)
            if traced is not None:
                return traced
    raise _failure(subject, attempts)


def _export_inputs(subject: Subject) -> Sequence[torch.Tensor]:
    """The example inputs; where a dynamic axis has size 1 there, twice as large, if the module takes that."""
    larger = without_ones(subject.tensors, subject.axes)
    if larger is None:
        return subject.tensors
    try:
        subject.run(larger)
    except Exception:  # whatever the user's code raises: the example inputs are the only ones we know
        return subject.tensors
    return larger


def _attempt(
    exporter: str,
    subject: Subject,
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[str],
    attempts: _Attempts,
) -> Traced | None:
    """Export with one exporter and verify. None, and the failure recorded, where that does not work out."""
    import torch

    with quiet() as chatter, torch.no_grad():
        try:
            model = EXPORTERS[exporter](subject, tensors, outputs)
        except ExportMismatchError as error:
            attempts.failed(exporter, str(error), chatter)
            return None
        except Exception as error:  # exporters raise anything
            attempts.failed(exporter, reason(error), chatter)
            attempts.where = attempts.where or user_code(error)
            attempts.data_dependent = attempts.data_dependent or is_data_dependent(error)
            return None
    if attempts.data_dependent and chatter.bakes_values:
        attempts.failed(exporter, "it followed the branch that the example inputs take, and only that", chatter)
        return None
    evidence = gather_evidence(subject, model)
    wrong = disagreement(model, evidence)
    if wrong is not None:
        attempts.disagreed = True
        if is_random(subject, evidence):
            raise _random(subject)
        attempts.failed(exporter, wrong, chatter)
        return None
    if attempts.failures and evidence.sizes[0] and len(evidence.inputs) == 1:
        # torch.export refused, and no second size confirms what another exporter claims about the dynamic axes
        attempts.failed(exporter, "; ".join(evidence.notes) or "its dynamic axes cannot be verified", chatter)
        return None
    fallen_back = [f"exported with {exporter}; {other} failed: {why}" for other, why in attempts.failures.items()]
    correct_output_shapes(model, evidence)
    return _canonical(model, subject, evidence, [*subject.notes, *fallen_back])


def _canonical(model: ir.Model, subject: Subject, evidence: Evidence, notes: Sequence[str]) -> Traced:
    """The canonical form of a verified model, verified once more: this time a difference would be ours."""
    interface = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    model = canonicalize(model, sizes=open_sizes(model, subject.tensors))
    found = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    wrong = disagreement(model, Evidence(evidence.inputs, evidence.outputs))
    if wrong is None and found != interface:
        wrong = f"its inputs and outputs are {found}, expected {interface}"
    if wrong is not None:
        raise TraceError(
            f"the export is right, but its canonical form is not: {wrong}",
            where=model.graph.name,
            help="this is a defect of graphopt; please report it with the module",
        )
    known = model.meta.get(NOTES, [])
    model.meta[NOTES] = list(dict.fromkeys([*known, *notes, *evidence.notes]))
    names = [str(value.name) for value in model.graph.inputs]
    return Traced(model, tuple(dict(zip(names, run, strict=True)) for run in evidence.inputs))


def _random(subject: Subject) -> GraphoptError:
    return TraceError(
        "the module gives different outputs for the same inputs, so an export of it cannot be verified",
        where=type(subject.module).__name__,
        help="make it deterministic in eval mode: F.dropout(x, training=self.training), no torch.rand",
    )


def _failure(subject: Subject, attempts: _Attempts) -> TraceError:
    """The error to raise when no exporter gave a model that computes what the module computes."""
    name = type(subject.module).__name__
    if attempts.data_dependent:
        what = f"{name} cannot be exported: its control flow depends on the values in a tensor"
        way_out = (
            "replace the Python condition or loop by tensor operations (torch.where), or by torch.cond or "
            "torch.while_loop; a size that depends on data needs torch._check"
        )
    elif attempts.disagreed:
        what = f"no exporter of torch gives a model that computes what {name} computes"
        way_out = "report it to torch.onnx; replacing the operations behind that output often helps"
    else:
        what = f"torch cannot export {name} to ONNX"
        way_out = "rewrite it with operations that ONNX has, or export the model yourself and use graphopt.load"
    lines = [what]
    for exporter, why in attempts.failures.items():
        lines.append(f"  {exporter}: {why}")
        if not attempts.data_dependent:  # then the line says it all
            lines += [f"    | {line}" for line in attempts.said[exporter]]
    return TraceError("\n".join(lines), where=attempts.where, help=way_out)
