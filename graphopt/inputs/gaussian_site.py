"""One node and what is known before it: what the rules of Gaussian moments read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.inputs.gaussian_moments import Moments, independent
from graphopt.ir.ops.row import Shape
from graphopt.ir.propagate import Facts
from graphopt.ir.rewrite import constant_float64


@dataclass
class Site:
    """One node, and what is known before it.

    Attributes:
        model: the model.
        node: the node.
        facts: shapes of all values.
        known: moments of the values before.
    """

    model: ir.Model
    node: ir.Node
    facts: Facts
    known: Mapping[ir.Value, Moments]

    def moments(self, index: int = 0) -> Moments | None:
        """Moments of an input; None where they are unknown, or the input is a constant or missing."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None else self.known.get(value)

    def shape(self, index: int = 0) -> Shape | None:
        """Shape of an input."""
        return self.facts.shape(self.node.inputs[index] if index < len(self.node.inputs) else None)

    @property
    def result_shape(self) -> Shape | None:
        """Shape of the first result."""
        return self.facts.shape(self.node.outputs[0])

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """A constant as float64, floats and sizes alike."""
        found = constant_float64(value)
        if found is None and value is not None and not value.is_graph_input():
            array = self.facts.constant(value)
            found = None if array is None or array.dtype.kind not in "fiu" else array.astype(np.float64)
        return found

    def integers(self, index: int) -> list[int] | None:
        """A constant operand of whole numbers."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        array = None if value is None else self.facts.constant(value)
        return None if array is None else [int(number) for number in array.reshape(-1)]

    def attribute(self, name: str, default: int) -> int:
        """An INT attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()


Rule = Callable[[Site], "Moments | Sequence[Moments | None] | None"]


def restated(axis: int, data: Moments | None, mean: np.ndarray, deviation: np.ndarray) -> Moments:
    """Mean and standard deviation as recorded; correlations as computed, none where nothing was known.

    A negative deviation turns the sign of a channel.
    """
    if data is None or data.channels != len(mean):
        return Moments(axis, mean, lambda: independent(deviation**2), (), deviation**2)
    return Moments(axis, mean, lambda: data.second.rescaled(deviation), [data], deviation**2)
