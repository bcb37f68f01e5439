"""Scale: trainable gates on channels, pushed towards zero by an L1 penalty."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from graphopt.errors import GraphoptError, LiftError
from graphopt.ir.channels import channel_groups
from graphopt.ir.lifted import Insertion, LiftedModule
from graphopt.ir.lower import Folding, Link
from graphopt.ir.rewrite import constant, is_op, sole_consumer
from graphopt.train.places import LinearLayer, linear_layers, stored_shape


class Scale(Insertion):
    """One gate a channel, y_c = g_c x_c, with the penalty `l1` * sum |g|: channels that are not needed go to zero.

    The form of Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", with gates of
    their own in place of the scales of BatchNormalization. Gates fold into the layer that produces the value (weights
    and bias of a linear layer, scale and shift of BatchNormalization), else to one Mul.

    Args:
        axes: name of each gated value of the main graph to its channel axis.
        channels: number of channels of each.
        l1: weight of the penalty.

    Example:
        >>> import graphopt
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[1,2] x) => (float[1,1] y) <float[2,2] w = {1, 0, 0, 1}, float[2,1] v = {1, 1}>
        ...     { h = MatMul(x, w) a = Relu(h) y = MatMul(a, v) }'''))
        >>> lifted = graphopt.lift(model)
        >>> lifted.attach("gates", Scale.for_channels(model, l1=0.1))
        >>> round(float(lifted.insertions["gates"].penalty().detach()), 6)
        0.2
    """

    def __init__(self, axes: Mapping[str, int], channels: Mapping[str, int], *, l1: float = 1e-4) -> None:
        super().__init__()
        if l1 < 0:
            raise GraphoptError(f"l1 is {l1}", help="give a weight of at least 0")
        self.l1 = l1
        self.axes = dict(axes)
        self.names: dict[str, str] = {f"g{number}": name for number, name in enumerate(axes)}
        self.gates = nn.ModuleDict({key: _Gate(channels[name], axes[name]) for key, name in self.names.items()})

    @classmethod
    def for_channels(cls, model: ir.Model, *, l1: float = 1e-4) -> Scale:
        """Gates behind every linear layer (behind its BatchNormalization where it has one) whose channels can go.

        Raises:
            GraphoptError: the model has no such layer.
        """
        removable = _removable_outputs(model)
        axes: dict[str, int] = {}
        channels: dict[str, int] = {}
        for layer in linear_layers(model):
            if (layer.weight.name or "") in removable:
                name = _gated(layer).name or ""
                axes[name], channels[name] = layer.channel_axis, layer.channels
        if not axes:
            raise GraphoptError("no linear layer has channels that could be removed", where=model.graph.name)
        return cls(axes, channels, l1=l1)

    def values(self) -> dict[str, np.ndarray]:
        """The gates [channels] by value name."""
        sites = self._sites()
        return {name: sites[key].gate.detach().float().cpu().numpy() for key, name in self.names.items()}

    def scores(self, model: ir.Model) -> dict[str, np.ndarray]:
        """How much each unit of each channel group passes: the sum of its |gates|, by group name.

        Args:
            model: the graph that was lifted. Groups without a gated layer are left out.
        """
        values = self.values()
        gates = {
            layer.weight.name or "": (np.abs(values[name]), layer.output_axis)
            for layer in linear_layers(model)
            if (name := _gated(layer).name or "") in values
        }
        scores: dict[str, np.ndarray] = {}
        for group in channel_groups(model):
            found = [_passed(group.slices(unit), gates) for unit in range(group.units)]
            if group.prunable and all(score is not None for score in found):
                scores[group.name] = np.array(found)
        return scores

    def insert(self, lifted: LiftedModule, path: str) -> None:
        """See `Insertion`."""
        for key, name in self.names.items():
            lifted.place(name, f"{path}.gates.{key}")

    def penalty(self) -> torch.Tensor:
        """`l1` times the sum of all |gates|."""
        return self.l1 * sum((site.gate.abs().sum() for site in self._sites().values()), torch.zeros(()))

    def fold(self, folding: Folding) -> None:
        """See `Insertion`."""
        values = self.values()
        for name, axis in self.axes.items():
            if not _fold_into_producer(folding, name, values[name]):
                known = folding.value(name).shape
                if known is None and axis >= 0:
                    raise LiftError("the rank of a gated value is unknown", where=name, help="count axes from the end")
                behind = -axis - 1 if axis < 0 or known is None else len(known) - axis - 1
                dtype = folding.element_type(name).numpy()
                gate = folding.add_constant(f"{name}_gate", values[name].astype(dtype).reshape(-1, *[1] * behind))
                folding.insert_after(name, [Link("Mul", [gate])])

    def _sites(self) -> dict[str, _Gate]:
        return dict(self.gates.items())  # pyright: ignore[reportReturnType]


class _Gate(nn.Module):
    """The gates of one value."""

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.gate = nn.Parameter(torch.ones(channels))

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = [1] * tensor.dim()
        shape[self.axis] = -1
        return tensor * self.gate.to(tensor.dtype).reshape(shape)


def _removable_outputs(model: ir.Model) -> set[str]:
    """Weights of linear layers whose output channels belong to a prunable group."""
    axes = {layer.weight.name: layer.output_axis for layer in linear_layers(model)}
    return {
        name
        for group in channel_groups(model)
        if group.prunable
        for name, slices in group.slices(0).items()
        if name in axes and any(axis == axes[name] for axis, _ in slices)
    }


def _passed(
    slices: Mapping[str, list[tuple[int, np.ndarray]]], gates: Mapping[str, tuple[np.ndarray, int | None]]
) -> float | None:
    """Sum of the gates of one unit, None where none of its layers is gated."""
    found = [
        gates[name][0][indices].sum()
        for name, places in slices.items()
        if name in gates
        for axis, indices in places
        if axis == gates[name][1]
    ]
    return float(np.sum(found)) if found else None


def _fold_into_producer(folding: Folding, name: str, gate: np.ndarray) -> bool:
    """Multiply the weights that produce the value; False where there are none, or something else reads them."""
    value = folding.value(name)
    node = value.producer()
    if node is not None and is_op(node, "BatchNormalization"):
        return _fold_into_normalization(folding, node, gate)
    layer = next((layer for layer in linear_layers(folding.model) if layer.result is value), None)
    if layer is None or layer.output_axis is None or not _owned(layer):
        return False
    around = (*layer.node.inputs, layer.weight, layer.bias, layer.node.outputs[0])
    if any(part.name in folding.later for part in around if part not in (None, layer.data, layer.result)):
        return False  # an insertion that is folded later is to see the weights without the gate
    shape = [1] * len(layer.weight_shape)
    shape[layer.output_axis] = -1
    for stored, factor in ((layer.weight, gate.reshape(shape)), (layer.bias, gate)):
        if stored is not None:
            folding.set_constant(stored.name or "", folding.constant(stored.name or "") * factor)
    return True


def _gated(layer: LinearLayer) -> ir.Value:
    """The value that is gated: behind the layer, or behind its BatchNormalization."""
    following = sole_consumer(layer.result)
    if following is not None and is_op(following, "BatchNormalization"):
        return following.outputs[0]
    return layer.result


def _owned(layer: LinearLayer) -> bool:
    """Whether nothing else reads the weight and the bias, and every bias that there is counts as one."""
    has_bias = len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None
    if has_bias and (layer.bias is None or stored_shape(layer.bias) != (layer.channels,)):
        return False
    operand = next(value for value in layer.node.inputs if value is not None and value is not layer.data)
    return all(_read_once(value) for value in (layer.weight, operand, layer.bias) if value is not None)


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _fold_into_normalization(folding: Folding, node: ir.Node, gate: np.ndarray) -> bool:
    scale, shift = node.inputs[1:3]
    assert scale is not None
    assert shift is not None
    if any(constant(value) is None or not _read_once(value) for value in (scale, shift)):
        return False
    if scale.name in folding.later or shift.name in folding.later:
        return False  # as in `_fold_into_producer`
    for value in (scale, shift):
        folding.set_constant(value.name or "", folding.constant(value.name or "") * gate)
    return True
