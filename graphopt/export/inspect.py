"""What is in a model file: interface, operators, cost, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from graphopt.inputs.calibration import fit_feeds
from graphopt.inputs.probes import symbolic_sizes
from graphopt.ir.cost import OperatorCost, cost
from graphopt.ir.dimensions import dimension_name, symbolic_dimensions
from graphopt.ir.load import Source, load, read
from graphopt.ir.ops.row import tensor_bytes

_LARGEST = 10


@dataclass(frozen=True)
class Inspection:
    """What is in a model.

    Attributes:
        inputs: name to dtype and shape, for instance "FLOAT[batch,3,224,224]".
        outputs: the same.
        opsets: domain to version.
        operators: cost by operator, the most MACs first.
        largest_weights: name, dtype and shape, bytes.
        dynamic: symbolic dimensions and the sizes that MACs were counted with.
        nodes: number of nodes of the file.
        canonical_nodes: number of nodes in canonical form, which costs are counted on.
        parameters: elements of all weights.
        macs: multiply-accumulate operations of one run.
        weight_bytes: bytes of all weights.
        unknown: operators without a known cost.
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    opsets: dict[str, int]
    operators: tuple[OperatorCost, ...]
    largest_weights: tuple[tuple[str, str, int], ...]
    dynamic: dict[str, int]
    nodes: int
    canonical_nodes: int
    parameters: int
    macs: int
    weight_bytes: int
    unknown: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **vars(self),
            "operators": [vars(use) for use in self.operators],
            "largest_weights": [
                {"name": name, "type": kind, "bytes": size} for name, kind, size in self.largest_weights
            ],
            "unknown": list(self.unknown),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(self._lines()))
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("operator")
        for column in ("count", "MACs", "parameters"):
            table.add_column(column, justify="right")
        for use in self.operators:
            table.add_row(use.operator, str(use.nodes), f"{use.macs:,}", f"{use.parameters:,}")
        yield table
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("largest weights")
        table.add_column("type")
        table.add_column("bytes", justify="right")
        for name, kind, size in self.largest_weights:
            table.add_row(Text(name), Text(kind), f"{size:,}")
        yield table
        if self.unknown:
            yield Text(f"cost unknown: {', '.join(self.unknown)}")

    def _lines(self) -> list[str]:
        lines = [f"input   {name}: {kind}" for name, kind in self.inputs.items()]
        lines += [f"output  {name}: {kind}" for name, kind in self.outputs.items()]
        opsets = [f"{domain or 'ai.onnx'} {version}" for domain, version in self.opsets.items()]
        lines.append(f"opset   {', '.join(opsets)}")
        if self.dynamic:
            lines.append(f"dynamic {', '.join(f'{name} (counted as {size})' for name, size in self.dynamic.items())}")
        lines.append(
            f"{self.nodes} nodes ({self.canonical_nodes} in canonical form), {self.parameters:,} parameters, "
            f"{self.macs:,} MACs, {self.weight_bytes / 1e6:.2f} MB of weights"
        )
        return lines


def inspect(source: Source, inputs: Mapping[str, np.ndarray] | np.ndarray | None = None) -> Inspection:
    """Read a model and say what is in it; operators and costs are those of its canonical form.

    Args:
        source: as for `graphopt.load`.
        inputs: example inputs that bind the dynamic dimensions; usual sizes where not given.

    Raises:
        LoadError, InvalidGraphError: the model cannot be read.
        DataError: the inputs do not fit the model.
    """
    file = read(source)
    model = load(file)
    sizes = symbolic_sizes(model) | bound_sizes(model, inputs)
    total = cost(model, sizes)
    weights = sorted(
        (
            (name, _type(value), tensor_bytes(value.const_value))
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        ),
        key=lambda weight: -weight[2],
    )
    return Inspection(
        inputs={value.name or "": _type(value) for value in model.graph.inputs},
        outputs={value.name or "": _type(value) for value in model.graph.outputs},
        opsets=dict(file.opset_imports),
        operators=total.by_op(),
        largest_weights=tuple(weights[:_LARGEST]),
        dynamic={name: sizes[name] for name in symbolic_dimensions(model) if name in sizes},
        nodes=sum(1 for graph in file.graphs() for _ in graph),
        canonical_nodes=sum(1 for graph in model.graphs() for _ in graph),
        parameters=total.parameters,
        macs=total.macs,
        weight_bytes=total.weight_bytes,
        unknown=tuple(sorted({entry.operator for entry in total.unknown})),
    )


def bound_sizes(model: ir.Model, inputs: Mapping[str, np.ndarray] | np.ndarray | None) -> dict[str, int]:
    """Elements of the symbolic dimensions of a model that example inputs bind, by name; none without inputs.

    Raises:
        DataError: the inputs do not fit the model.
    """
    if inputs is None:
        return {}
    feeds = fit_feeds(model, inputs)
    return {
        name: int(feeds[value.name or ""].shape[axis])
        for value in model.graph.inputs
        for axis in range(len(value.shape or ()))
        if (name := dimension_name(value, axis)) is not None
    }


def _type(value: ir.Value) -> str:
    dimensions = "?" if value.shape is None else ",".join(str(size) for size in value.shape)
    return f"{value.dtype.name if value.dtype is not None else '?'}[{dimensions}]"
