"""Does an exported model compute what the module computes? Decided by running both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.compare import compare_runs, exact_tolerance
from graphopt.ir.session import open_session
from graphopt.ir.trace_blame import first_line
from graphopt.ir.trace_export import arrays
from graphopt.ir.trace_shapes import open_sizes, other_sizes, resized
from graphopt.ir.trace_subject import Subject

if TYPE_CHECKING:
    import torch


@dataclass
class Evidence:
    """Inputs and what the module itself makes of them: the example inputs, and other sizes of the dynamic
    axes."""

    inputs: list[list[np.ndarray]] = field(default_factory=list)
    outputs: list[list[np.ndarray]] = field(default_factory=list)
    sizes: list[Mapping[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, subject: Subject, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> None:
        """Run the module once more, at these sizes of the model's symbols, and keep what went in and came out."""
        self.outputs.append(arrays(subject.run(tensors)))
        self.inputs.append(arrays(tensors))
        self.sizes.append(sizes)


def gather_evidence(subject: Subject, model: ir.Model) -> Evidence:
    """Run the module on the example inputs, and on a second size of the sizes that `model` leaves open."""
    evidence = Evidence()
    sizes = open_sizes(model, subject.tensors)
    evidence.add(subject, subject.tensors, sizes)
    refused = ""
    for choice in other_sizes(model, subject.axes, sizes):
        try:
            evidence.add(subject, resized(model, subject.tensors, choice), choice)
        except Exception as error:  # whatever the user's code raises: this size is not for it
            refused = refused or f"{_sizes(choice)}: {first_line(error, 120)}"
        else:
            return evidence
    if sizes:
        why = f"the module itself refuses others ({refused})" if refused else "no other size is allowed"
        evidence.notes.append(f"dynamic axes were verified at one size only, {_sizes(sizes)}: {why}")
    return evidence


def disagreement(model: ir.Model, evidence: Evidence) -> str | None:
    """How the model differs from the module, or None where it agrees on all evidence.

    onnxruntime runs the model with its own optimisations disabled. A model that uses bfloat16 where
    onnxruntime has no kernel for the CPU cannot be judged; that goes to the notes of the evidence.
    """
    names = [str(value.name) for value in model.graph.outputs]
    inputs = [str(value.name) for value in model.graph.inputs]
    try:
        session = open_session(model, optimized=False)
        found = [session.run_feeds(dict(zip(inputs, run, strict=True))) for run in evidence.inputs]
    except GraphoptError as error:
        if _uses_bfloat16(model):
            evidence.notes.append(
                f"not verified: onnxruntime cannot run this bfloat16 model on the CPU ({first_line(error)})"
            )
            return None
        return first_line(error)
    comparison = compare_runs(names, evidence.outputs, found)
    allowed = {name: exact_tolerance(array) for name, array in zip(names, evidence.outputs[0], strict=True)}
    wrong = [
        f"output `{output.name}` "
        + (output.reason or f"differs by {output.error:.1e} of its scale (allowed: {allowed[output.name]:.0e})")
        for output in comparison.outputs
        if not output.error <= allowed.get(output.name, 0.0)
    ]
    return "; ".join(wrong) or None


def correct_output_shapes(model: ir.Model, evidence: Evidence) -> None:
    """Open the output sizes that the exporter declares as numbers and that the evidence refutes, in place.

    torch.export does so behind a recurrent layer over a dynamic axis. Where a declared size is wrong, the shapes
    that it comes from inside the graph are not to be trusted either, and are forgotten.
    """
    refuted = False
    for place, value in enumerate(model.graph.outputs):
        if value.shape is None:
            continue
        shape: list[int | str | None] = [size if isinstance(size, int) else size.value for size in value.shape]
        for axis, declared in enumerate(shape):
            found = [run[place].shape[axis] for run in evidence.outputs]
            if isinstance(declared, int) and any(size != declared for size in found):
                equal = [name for name in evidence.sizes[0] if [sizes[name] for sizes in evidence.sizes] == found]
                shape[axis] = equal[0] if len(equal) == 1 else f"{value.name}_dim_{axis}"
                refuted = True
        value.shape = ir.Shape(shape)
    if refuted:
        for node in model.graph.all_nodes():
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None


def is_random(subject: Subject, evidence: Evidence) -> bool:
    """Whether the module gives other outputs when it runs on the example inputs once more."""
    again = compare_runs(
        [str(index) for index in range(len(evidence.outputs[0]))],
        evidence.outputs[:1],
        [arrays(subject.run(subject.tensors))],
    )
    return again.error > min(exact_tolerance(array) for array in evidence.outputs[0])


def _uses_bfloat16(model: ir.Model) -> bool:
    values = [
        *model.graph.inputs,
        *model.graph.outputs,
        *model.graph.initializers.values(),
        *(value for node in model.graph.all_nodes() for value in node.outputs),
    ]
    return any(value.dtype == ir.DataType.BFLOAT16 for value in values)


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
