"""The two exporters of torch behind one contract, and what both leave to be put right.

An exporter takes a `Subject` and gives an `ir.Model` whose inputs and outputs are those of the subject, in
order and named alike, whose weights are called like the module's parameters, and which owns its weights.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.ir.propagate import BUFFER
from graphopt.ir.trace_shapes import name_symbols
from graphopt.ir.trace_subject import Subject, unique_names

if TYPE_CHECKING:
    import torch

_OPSET_OF_DYNAMO = 21
_OPSET_OF_TORCHSCRIPT = 20
"""The highest that the TorchScript exporter writes; the canonical form lifts it."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CHILD = "module."
"""Where the user's module hangs in `Subject.flat`, and so the prefix of every parameter name."""


class ExportMismatchError(Exception):
    """An export that went through, but whose interface is not the subject's."""


@dataclass
class Chatter:
    """What the exporters printed, logged and warned of."""

    stream: io.StringIO = field(default_factory=io.StringIO)
    warnings: list[warnings.WarningMessage] = field(default_factory=list)

    def lines(self, limit: int = 6) -> list[str]:
        """The last lines, for an error message: without deprecations, which only torch's own developers can mend."""
        said = [line.rstrip() for line in self.stream.getvalue().splitlines()]
        said += [
            f"{w.category.__name__}: {str(w.message).strip().partition(chr(10))[0]}"
            for w in self.warnings
            if not issubclass(w.category, (DeprecationWarning, FutureWarning))
        ]
        telling = [
            _ANSI.sub("", line)[:200] for line in said if line.strip() and "torchvision is not installed" not in line
        ]
        return telling[-limit:]

    @property
    def bakes_values(self) -> bool:
        """Whether the TorchScript tracer said that it followed the values of the example inputs."""
        return any(w.category.__name__ == "TracerWarning" for w in self.warnings)


@contextlib.contextmanager
def quiet() -> Generator[Chatter]:
    """Collect what is printed, logged by torch and onnx, and warned of, instead of showing it."""
    chatter = Chatter()
    collector = logging.StreamHandler(chatter.stream)
    tops = ("torch", "onnx", "onnxscript", "onnx_ir", "transformers")
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in tops]
    loggers = [logging.getLogger(name) for name in {*names, *tops}]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            top = logger.name in tops
            logger.handlers, logger.propagate = ([collector] if top else []), not top
        with (
            contextlib.redirect_stdout(chatter.stream),
            contextlib.redirect_stderr(chatter.stream),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            chatter.warnings = caught
            yield chatter
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


def export_dynamo(subject: Subject, tensors: Sequence[torch.Tensor], outputs: Sequence[str]) -> ir.Model:
    """Export with torch.export (`dynamo=True`). No optimisation: it would fold BatchNormalization away."""
    import torch

    shapes = tuple({axis: wish.spec for axis, wish in asked.items()} or None for asked in subject.axes)
    program = torch.onnx.export(
        subject.flat,
        tuple(tensors),
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=_OPSET_OF_DYNAMO,
        dynamic_shapes=(shapes,) if any(shapes) else None,
    )
    if program is None or program.exported_program is None:
        raise ExportMismatchError("torch returned no model")
    model = program.model
    if len(model.graph.inputs) != len(tensors):
        raise ExportMismatchError(f"the model has {len(model.graph.inputs)} inputs, expected {len(tensors)}")
    mutated = sorted(program.exported_program.graph_signature.buffers_to_mutate.values())
    mutated = [name.removeprefix(_CHILD) for name in mutated if not name.endswith("num_batches_tracked")]
    if mutated:
        subject.notes.append(f"forward() writes to buffers, which the model does not: {', '.join(mutated)}")
    _finish(model, subject, outputs)
    return model


def export_torchscript(subject: Subject, tensors: Sequence[torch.Tensor], outputs: Sequence[str]) -> ir.Model:
    """Export by TorchScript tracing (`dynamo=False`); the weights are attached from the module."""
    places = [f"graphopt_input_{index}" for index in range(len(tensors))]
    model = ir.from_proto(onnx.load_from_string(_torchscript_file(subject, tensors, places, len(outputs))))
    state = subject.state()
    inputs = {value.name: value for value in model.graph.inputs}
    model.graph.inputs.clear()
    for place, tensor in zip(places, tensors, strict=True):
        # The tracer drops inputs that nothing reads; the interface keeps them.
        value = inputs.pop(place, None) or ir.Value(name=place)
        value.type = value.type or ir.TensorType(_adapter(tensor).dtype)
        value.shape = value.shape or ir.Shape(list(tensor.shape))
        model.graph.inputs.append(value)
    for name, value in inputs.items():
        weight = state.get(str(name).removeprefix(_CHILD))
        if weight is None:
            raise ExportMismatchError(f"the model has an input {name} that is neither an argument nor a parameter")
        value.const_value = _adapter(weight.detach())
        model.graph.register_initializer(value)
    _finish(model, subject, outputs)
    return model


def _torchscript_file(subject: Subject, tensors: Sequence[torch.Tensor], places: Sequence[str], outputs: int) -> bytes:
    """The ONNX file that the TorchScript exporter writes, without weights: they are inputs named like parameters.

    Training mode is "preserve" and constant folding off: otherwise the exporter folds BatchNormalization and the
    transposes of weights, and parameters lose their names. Without weights there is no second copy of them and no
    2 GiB limit.
    """
    import torch

    file = io.BytesIO()
    with _descriptor_diverted():
        torch.onnx.export(
            subject.flat,
            tuple(tensors),
            file,  # pyright: ignore[reportArgumentType]  (TorchScript takes a buffer)
            dynamo=False,
            opset_version=_OPSET_OF_TORCHSCRIPT,
            input_names=places,
            output_names=[f"graphopt_output_{index}" for index in range(outputs)],
            dynamic_axes={
                place: {axis: wish.name or f"{place}_dim_{axis}" for axis, wish in asked.items()}
                for place, asked in zip(places, subject.axes, strict=True)
                if asked
            },
            do_constant_folding=False,
            export_params=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    return file.getvalue()


@contextlib.contextmanager
def _descriptor_diverted() -> Generator[None]:
    """Throw away what is written to the process's standard output, by whatever thread.

    The TorchScript exporter prints the whole graph from C++ when it fails (torch 2.13 switches that log on, whatever
    its setting), where `redirect_stdout` does not reach.
    """
    try:
        saved = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


Exporter = Callable[[Subject, "Sequence[torch.Tensor]", "Sequence[str]"], ir.Model]

EXPORTERS: dict[str, Exporter] = {"torch.export": export_dynamo, "TorchScript": export_torchscript}
"""Exporters by name, in the order in which they are tried."""


def arrays(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The tensors as arrays on the CPU; bfloat16 and float8 in their ml_dtypes form."""
    return [_adapter(tensor.detach()).numpy() for tensor in tensors]


def _adapter(tensor: torch.Tensor) -> ir.TensorProtocol:
    from onnx_ir.tensor_adapters import TorchTensor

    return TorchTensor(tensor.cpu().contiguous())


def _finish(model: ir.Model, subject: Subject, outputs: Sequence[str]) -> None:
    """Own the weights, and give weights, inputs, outputs and sizes their names, in place."""
    graph = model.graph
    if len(graph.outputs) != len(outputs):
        raise ExportMismatchError(f"the model has {len(graph.outputs)} outputs, expected {len(outputs)}")
    _name_weights(graph, subject)
    _separate_outputs(graph)
    weights = {name for name in graph.initializers if name in subject.state()}
    inputs = unique_names(subject.input_names, weights, "input")
    results = unique_names(outputs, weights | set(inputs), "output")
    interface = [*graph.inputs, *graph.outputs]
    _make_way(graph, {*inputs, *results}, keep={id(value) for value in interface})
    for number, value in enumerate(interface):  # so that no name is taken by another one in between
        value.name = f"graphopt_interface_{number}"
    for value, name in zip(interface, [*inputs, *results], strict=True):
        value.name = name
    graph.name = type(subject.module).__name__
    broken = name_symbols(model, subject.axes, subject.tensors)
    if broken:
        raise ExportMismatchError("; ".join(broken))


def _name_weights(graph: ir.Graph, subject: Subject) -> None:
    """Call each weight like the module does, under the first name of tied ones, and copy its values."""
    state = subject.state()
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    for value in list(graph.initializers.values()):
        name = str(value.name).removeprefix(_CHILD)
        if name in state:
            name = first[id(state[name])]
        known = graph.initializers.get(name)
        if known is not None and known is not value:
            value.replace_all_uses_with(known, replace_graph_outputs=True)
            del graph.initializers[str(value.name)]
            continue
        value.name = name
        if name in state and not state[name].requires_grad:
            value.meta[BUFFER] = True
        tensor = value.const_value
        if tensor is not None:
            value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)


def _separate_outputs(graph: ir.Graph) -> None:
    """Put an Identity before outputs that are an input, a weight or another output, so that each has its
    name."""
    seen: set[int] = set()
    for place, value in enumerate(graph.outputs):
        if value.producer() is None or id(value) in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[place] = node.outputs[0]
        seen.add(id(graph.outputs[place]))


def _make_way(graph: ir.Graph, names: set[str], keep: set[int]) -> None:
    """Rename inner values and weights that no module owns whose name the interface needs."""
    taken = {value.name for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers) | names
    inner = [value for node in graph.all_nodes() for value in node.outputs]
    for value in [*inner, *graph.initializers.values()]:
        if value.name in names and id(value) not in keep:
            (value.name,) = unique_names([f"{value.name}_inner"], {str(name) for name in taken})
            taken.add(value.name)
