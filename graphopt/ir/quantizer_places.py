"""Where the quantizers of a plan stand in the float graph: data that the pass hands to training (ADR 0011)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from graphopt.ir.quantizer import TensorPlan


@dataclass(frozen=True)
class QuantizerPlace:
    """One quantizer.

    Attributes:
        tensor: how the tensor becomes integers; its name is that of the value or initializer where it stands.
        consumers: names of the nodes that read the quantized tensor; None for all of them, graph outputs included.
        bounds: the interval of the Relu or Clip whose work the saturation of this quantizer does, None where there is
            none. Its zero point stays, and its range must not grow beyond the interval.
        rule: where the writer makes the scales of a weight from the weight itself: what a weight becomes by that, as
            floats of the same shape. None where the scales are those of `tensor`.
    """

    tensor: TensorPlan
    consumers: tuple[str, ...] | None = None
    bounds: tuple[float, float] | None = None
    rule: Callable[[np.ndarray], np.ndarray] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class LayerPlace:
    """A linear operator whose data and weight are both quantized, so that its bias is stored in units of their scales.

    Attributes:
        node: name of the operator.
        data: index of its data's quantizer in `QuantizerPlaces.quantizers`.
        weight: index of its weight's.
        factor: what the scale of the data was multiplied with on its way from the quantizer (Mul by a scalar).
        bias: name of the initializer that is its bias, None where it has none.
    """

    node: str
    data: int
    weight: int
    factor: float = 1.0
    bias: str | None = None


@dataclass(frozen=True)
class DynamicPlace:
    """A value whose range is taken at run time, in 8 bits (DynamicQuantizeLinear).

    Attributes:
        value: its name.
        consumers: names of the nodes that read it quantized.
    """

    value: str
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class QuantizerPlaces:
    """All quantizers of a plan, by the names of the float graph.

    Attributes:
        quantizers: in the order of the plan; a weight with two plans (along two axes) is there twice.
        layers: linear operators on static integers.
        dynamic: values that are quantized at run time.

    Example:
        >>> plan = TensorPlan("x", "activation", 8, False, None, (0.1,), (0,), "calibration")
        >>> QuantizerPlaces((QuantizerPlace(plan, ("conv",)),)).quantizers[0].consumers
        ('conv',)
    """

    quantizers: tuple[QuantizerPlace, ...] = ()
    layers: tuple[LayerPlace, ...] = ()
    dynamic: tuple[DynamicPlace, ...] = ()

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """The plan of each quantizer."""
        return tuple(place.tensor for place in self.quantizers)
