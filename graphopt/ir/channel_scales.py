"""Which channels of a graph may be scaled without changing what it computes, and how that is written into weights.

Where everything between the operators that make a channel and those that read it is positively homogeneous,
f(s x) = s f(x) for s > 0, its producers may be multiplied and its consumers divided by any s. `channel_scales` finds
all these degrees of freedom of a graph at once: one *variable* for each set of channels that must share a factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.linear import Linear
from graphopt.ir.rewrite import Rewriter, constant_float64, constant_tensor, to_tensor
from graphopt.ir.scale_flow import ScaledConstant, ScaleFlow
from graphopt.ir.scale_rules import RULES
from graphopt.ir.statistics import BATCHNORM_STATISTICS

FIXED = -1
"""Stands for the variable of a channel whose factor is 1."""


@dataclass(frozen=True, eq=False)
class LinearScales:
    """A linear operator with the variables of its channels.

    Attributes:
        linear: the operator.
        ins: int64 [in channels], variables of what it reads, `FIXED` where there is none.
        outs: int64 [out channels], of what it makes.
        why_ins: why some of `ins` are fixed, and the node or value to blame; None where none is.
        why_outs: the same of `outs`.
    """

    linear: Linear
    ins: np.ndarray
    outs: np.ndarray
    why_ins: tuple[str, str] | None = None
    why_outs: tuple[str, str] | None = None

    def magnitudes(self) -> np.ndarray:
        """Largest |w| over the kernel: float64 [out channels, in channels / groups]."""
        weight = np.abs(self.linear.weight())
        return weight.reshape(*weight.shape[:2], -1).max(axis=2, initial=0.0)

    def ins_by_row(self) -> np.ndarray:
        """The variables that each row of the weight reads: [out channels, in channels / groups]."""
        groups = self.linear.groups
        return np.repeat(self.ins.reshape(groups, -1), self.linear.out_channels // groups, axis=0)


class ChannelScales:
    """All factors that may be moved between the weights of one model.

    Attributes:
        model: the model; only `apply` changes it.
        count: number of variables.
        linears: the operators whose weights take factors up, in graph order.
        refused: the linear operators whose weights do not, each with the reason.
        values: computed values of the main graph to the variables of their elements: int64 arrays that broadcast
            against them, `FIXED` where the factor is 1.
    """

    def __init__(self, model: ir.Model) -> None:
        """Analyse the main graph of a canonical model with shapes."""
        self.model = model
        flow = ScaleFlow(RULES)
        flow.run(model.graph)
        labels = flow.labels
        found = [one.outs for one in flow.linears] + [one.ins for one in flow.linears]
        found += [one.outs.reshape(-1) for one in flow.constants]
        roots = np.unique(labels.find(np.concatenate([np.zeros(0, np.int64), *found])))
        free = roots[~labels.is_fixed(roots)]
        self.count = len(free)

        def variables(of: np.ndarray) -> np.ndarray:
            class_of = labels.find(of)
            place = np.searchsorted(free, class_of)
            known = (place < len(free)) & (free[np.minimum(place, len(free) - 1)] == class_of) if len(free) else False
            return np.where(known, place, FIXED)

        self.refused = flow.refused
        self.linears: list[LinearScales] = []
        for one in flow.linears:
            ins, outs = variables(one.ins), variables(one.outs)
            why = [
                labels.reason(side) if (found == FIXED).any() else None
                for side, found in ((one.ins, ins), (one.outs, outs))
            ]
            self.linears.append(LinearScales(one.linear, ins, outs, *why))
        self.values = {value: variables(of) for value, of in labels.items()}
        self._constants = [
            (one, variables(one.outs), None if one.ins is None else variables(one.ins)) for one in flow.constants
        ]

    def factors_of(self, variables: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """The factor of each element, 1 where it is fixed."""
        return np.append(factors, 1.0)[variables]

    def scaled(self, one: LinearScales, factors: np.ndarray) -> np.ndarray:
        """What the weight of an operator is multiplied with: float64 [out channels, in channels / groups]."""
        return self.factors_of(one.outs, factors)[:, None] / self.factors_of(one.ins_by_row(), factors)

    def apply(self, factors: np.ndarray) -> None:
        """Multiply the channels of each variable by its factor, and divide what reads them: in place.

        What was known of values from BatchNormalization is scaled with them.

        Args:
            factors: float64 [count], all positive and finite.

        Raises:
            DeclinedError: a scaled weight is not finite in its element type. Nothing has changed then.
        """
        weights: dict[ir.Value, tuple[LinearScales, ir.Tensor]] = {}
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for one in self.linears:
                by = self.scaled(one, factors)
                value = one.linear.node.inputs[one.linear.weight_index]
                assert value is not None
                if (by != 1.0).any() and value not in weights:
                    weights[value] = one, self._scaled_weight(one.linear, by)
            constants = [(one, self._scaled_constant(one, outs, ins, factors)) for one, outs, ins in self._constants]
        rewriter = Rewriter(self.model)
        for value, (one, tensor) in weights.items():
            if value.is_initializer():
                value.const_value = tensor  # every reader reads it in the same way
            else:
                rewriter.replace_constant(one.linear.node, one.linear.weight_index, tensor)
        for one, tensor in constants:
            if tensor is not None:
                rewriter.replace_constant(one.node, one.index, tensor)
        for value, variables in self.values.items():
            self._scale_statistics(value, self.factors_of(variables, factors))

    @staticmethod
    def _scaled_weight(linear: Linear, by: np.ndarray) -> ir.Tensor:
        stored = constant_float64(linear.node.inputs[linear.weight_index])
        assert stored is not None
        full = np.broadcast_to(by.reshape(by.shape + (1,) * len(linear.kernel)), by.shape + linear.kernel)
        return to_tensor(stored * linear.as_read(full), linear.dtype)

    def _scaled_constant(
        self, one: ScaledConstant, outs: np.ndarray, ins: np.ndarray | None, factors: np.ndarray
    ) -> ir.Tensor | None:
        """The constant with its factors, None where it stays as it is."""
        by = self.factors_of(outs, factors)
        if ins is not None:
            by = by / self.factors_of(ins, factors)
        value = one.node.inputs[one.index]
        array, tensor = constant_float64(value), constant_tensor(value)
        if array is None or tensor is None or (by == 1.0).all() or not array.any():
            return None
        scaled = array * by
        while scaled.ndim > array.ndim and scaled.shape[0] == 1:
            scaled = scaled[0]
        return to_tensor(scaled, tensor.dtype)

    @staticmethod
    def _scale_statistics(value: ir.Value, by: np.ndarray) -> None:
        statistics = value.meta.get(BATCHNORM_STATISTICS)
        if statistics is None or (by == 1.0).all():
            return
        mean, std = statistics
        if by.ndim < 2 or by.size != by.shape[1]:
            del value.meta[BATCHNORM_STATISTICS]  # it is no longer one number a channel
            return
        value.meta[BATCHNORM_STATISTICS] = (mean * by.reshape(-1), std * by.reshape(-1))


def channel_scales(model: ir.Model) -> ChannelScales:
    """Find the channels of a model that may be scaled, and what has to be scaled with them.

    Source: positive homogeneity as in Nagel et al. 2019 ("Data-Free Quantization Through Weight Equalization and Bias
    Correction"), there for pairs of layers; here for whatever a graph couples.

    Args:
        model: canonical, with inferred shapes; it is not changed.

    Returns:
        The variables; none where nothing can be scaled.

    Example:
        >>> from graphopt.ir.load import load
        >>> model = load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) =>
        ...     (float[n,2] y) <float[2,3] a = {1,2,3,4,5,6}, float[3,2] b = {1,1,1,1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> scales = channel_scales(model)
        >>> scales.count, [(one.ins.tolist(), one.outs.tolist()) for one in scales.linears]
        (3, [([-1, -1], [0, 1, 2]), ([0, 1, 2], [-1, -1])])
        >>> scales.apply(np.array([1.0, 2.0, 4.0]))
        >>> model.graph.initializers["a"].const_value.numpy().tolist()
        [[1.0, 4.0, 12.0], [4.0, 10.0, 24.0]]
        >>> model.graph.initializers["b"].const_value.numpy().tolist()
        [[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]]
    """
    return ChannelScales(model)
