"""FakeQuant: train a network while it computes with the integers that it will be deployed with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from graphopt.errors import GraphoptError, LiftError
from graphopt.ir.lifted import VALUE, Insertion, LiftedModule
from graphopt.ir.lower import Folding, attribute
from graphopt.ir.ops.torch.conv import conv
from graphopt.ir.ops.torch.linear import gemm
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.quantizer_places import QuantizerPlace, QuantizerPlaces
from graphopt.train.fold_quantizers import fold_activation, fold_bias, fold_weight
from graphopt.train.places import is_edge, linear_layers
from graphopt.train.quantizers import (
    SAMPLED,
    BiasQuantizer,
    DynamicQuantizer,
    Quantizer,
    RuledQuantizer,
    rows_of,
    sample,
    without_range,
)

WriteGraph = Callable[[ir.Model, tuple[TensorPlan, ...]], ir.Model]
"""Writes the quantized graph of a float one, which may be changed, by the plans of its tensors."""
_FEWEST_BITS, _MOST_BITS = 2, 8
_SAFE_BITS = 7
"""Bits of weights that no kernel saturates with."""


class FakeQuant(Insertion):
    """Quantizers with learned scales and zero points at weights and activations, 2 to 8 bits (LSQ).

    Forward, the arithmetic of ONNX QuantizeLinear and DequantizeLinear, so that what is trained is what runs:

        q = clamp(round(x / s) + z, low, high)        y = (q - z) s

    with rounding half to even and, for learned asymmetric ranges, z rounded. Backward, the gradient goes straight
    through the rounding where nothing is clamped, and to the scale as in Esser et al. 2020, "Learned Step Size
    Quantization", damped by 1 / sqrt(n high); to the zero point as in Bhalgat et al. 2020, "LSQ+". What is trained is
    the logarithm of the scale over its first value (as in Jain et al. 2019, "Trained Quantization Thresholds"), so that
    one learning rate serves scales of any size.

    Weights fold to integers and a DequantizeLinear, activations to QuantizeLinear and DequantizeLinear, behind a Clip
    where the range is narrower than that of the stored type (4 bits in int8). The bias of a Conv or Gemm whose data and
    weight are quantized is rounded to int32 in units of s_x s_w and folds so: onnxruntime does that to float biases,
    and at 4 bits the units are coarse.

    That is the form of quantizers that stand anywhere. Those of the pass `quantize` stand where its plan has them
    (`places`), and fold to the graph that the pass itself writes (`write`); `graphopt.fake_quantize` makes them.

    Args:
        plan: one `TensorPlan` a tensor, or the JSON of a plan (a list of them, or `QuantizePlan.to_json()`), for
            quantizers that all consumers read; or `QuantizerPlaces`, which say who reads them.
            Plans without a scale get theirs from the weight, or from `prepare` for activations.
        learn: whether scales and zero points are trained.
        write: makes the quantized graph of the trained float graph and `plan()`, when the module is lowered; None
            folds every quantizer where it stands.

    Raises:
        LiftError: a width that is not from 2 to 8, two plans for one tensor; on insertion, a tensor that the graph does
            not have, or that has a quantizer already.

    Example:
        >>> import graphopt
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {1, 0.3, 0, -1}> { y = MatMul(x, w) }'''))
        >>> lifted = graphopt.lift(model)
        >>> lifted.attach("quantizers", FakeQuant([TensorPlan("w", "weight", 2, True, None, (1.0,), (0,), "weights")]))
        >>> lifted(torch.ones(1, 2)).tolist()
        [[1.0, -1.0]]
        >>> [node.op_type for node in graphopt.lower(lifted, model).graph]
        ['DequantizeLinear', 'MatMul']
    """

    def __init__(
        self,
        plan: Iterable[Any] | Mapping[str, Any] | QuantizerPlaces,
        *,
        learn: bool = True,
        write: WriteGraph | None = None,
    ) -> None:
        super().__init__()
        self.places = plan if isinstance(plan, QuantizerPlaces) else None
        self.write = write
        plans = plan.tensors if isinstance(plan, QuantizerPlaces) else _plans(plan)
        self.names: dict[str, str] = {}
        self.quantizers = nn.ModuleDict()
        self.bias_names: dict[str, str] = {}
        self.biases = nn.ModuleDict()
        self.dynamic = nn.ModuleDict()
        for number, entry in enumerate(plans):
            if entry.bits not in range(_FEWEST_BITS, _MOST_BITS + 1):
                raise LiftError(
                    f"a quantizer of {entry.bits} bits",
                    where=entry.name,
                    help=f"{_FEWEST_BITS} to {_MOST_BITS} are there",
                )
            place = QuantizerPlace(entry) if self.places is None else self.places.quantizers[number]
            if entry.block_size and place.rule is None:
                raise LiftError(
                    f"a quantizer with scales in blocks of {entry.block_size}",
                    where=entry.name,
                    help="use graphopt.fake_quantize, or plan with block_size=0: training learns one scale an output",
                )
            if self.places is None and entry.name in self.names.values():
                raise LiftError("two quantizers for one tensor", where=entry.name, help="give each tensor one plan")
            key = f"q{number}"
            self.names[key] = entry.name
            self.quantizers[key] = (
                Quantizer(entry, learn=learn, bounds=place.bounds)
                if place.rule is None
                else RuledQuantizer(entry, place.rule)
            )

    @classmethod
    def for_linear(
        cls, model: ir.Model, *, weight_bits: int = 7, activation_bits: int = 8, edge_bits: int = 8, learn: bool = True
    ) -> FakeQuant:
        """Quantizers at the weights and data inputs of every Conv, ConvTranspose, Gemm and MatMul with a weight.

        Weights have one symmetric scale an output channel, activations one scale and a zero point.

        Args:
            model: the canonical graph that is lifted.
            weight_bits: 2 to 8. Weights have 7 by default, with which no sum of two products saturates in 16 bits:
                onnxruntime's int8 kernels for x86 without VNNI add so. 8 is right where the target has VNNI, or is ARM.
            activation_bits: 2 to 8.
            edge_bits: bits of the inputs of the first and the last linear layers (those that read a graph input, and
                those whose result no other linear layer depends on), as is usual below 8 bits; their weights have
                7 of them.
            learn: see `FakeQuant`.

        Raises:
            GraphoptError: the model has no linear layer with a stored float weight.
        """
        layers = linear_layers(model)
        if not layers:
            raise GraphoptError(
                "no linear layer has a stored float weight",
                where=model.graph.name,
                help="weights must be initializers, directly or behind a Transpose or Cast; or pass a plan of your own",
            )
        edges = {layer.node for layer in layers if is_edge(layer, layers)}
        plans: dict[str, TensorPlan] = {}
        for layer in layers:
            edge = layer.node in edges
            name, axis = layer.weight.name or "", layer.output_axis
            bits = max(min(edge_bits, _SAFE_BITS), weight_bits) if edge else weight_bits
            _merge(plans, TensorPlan(name, "weight", bits, True, axis, (), (), "weights"))
            bits = max(edge_bits, activation_bits) if edge else activation_bits
            _merge(plans, TensorPlan(layer.data.name or "", "activation", bits, False, None, (), (), "calibration"))
        return cls(plans.values(), learn=learn)

    def plan(self) -> tuple[TensorPlan, ...]:
        """The quantizers as they are now: learned scales and zero points, in the form that the quantize pass has."""
        return tuple(quantizer.learned() for quantizer in self._quantizers().values())

    def to_json(self) -> list[dict[str, Any]]:
        """`plan()` as plain data, which the constructor takes."""
        return [asdict(entry) for entry in self.plan()]

    def insert(self, lifted: LiftedModule, path: str) -> None:
        """See `Insertion`. Ranges of weights that have none are found here, by least squared error."""
        if lifted.reference_dtype == torch.float64:
            raise LiftError("ONNX has no quantizers for float64", help="quantize the model in float32")
        initializers = lifted.interface.initializers
        for number, (key, quantizer) in enumerate(self._quantizers().items()):
            name = self.names[key]
            others = [each for each in lifted.insertions.children() if isinstance(each, FakeQuant) and each is not self]
            if any(name in each.names.values() for each in others):
                raise LiftError("two quantizers for one tensor", where=name, help="give each tensor one plan")
            consumers = None if self.places is None else self.places.quantizers[number].consumers
            lifted.place(name, f"{path}.quantizers.{key}", consumers)
            if name in initializers and not quantizer.fitted:
                quantizer.fit(attribute(lifted, initializers[name]).detach())
        if self.places is None:
            self._insert_biases(lifted, path)
        else:
            self._insert_planned(lifted, path, self.places)

    def prepare(self, lifted: LiftedModule, batches: Sequence[Sequence[torch.Tensor]]) -> None:
        """Find the ranges of activations that have none, by least squared error, on float activations."""
        waiting = {key: quantizer for key, quantizer in self._quantizers().items() if not quantizer.fitted}
        seen: dict[str, list[torch.Tensor]] = {key: [] for key in waiting}

        def watch(key: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                rows = rows_of(inputs[0].detach(), waiting[key].planned.axis)
                seen[key].append(sample(rows, SAMPLED // max(len(batches), 1)))

            return hook

        handles = [quantizer.register_forward_pre_hook(watch(key)) for key, quantizer in waiting.items()]
        kinds = (Quantizer, DynamicQuantizer)
        active = [module for module in lifted.modules() if isinstance(module, kinds) and module.active]
        training = lifted.training
        try:
            for quantizer in active:
                quantizer.active = False
            lifted.eval()
            with torch.no_grad():
                for batch in batches:
                    lifted(*batch)
        finally:
            lifted.train(training)
            for quantizer in active:
                quantizer.active = True
            for handle in handles:
                handle.remove()
        for key, quantizer in waiting.items():
            if seen[key]:
                quantizer.fit_rows(torch.cat(seen[key], 1))

    def fold(self, folding: Folding) -> None:
        """See `Insertion`."""
        for key, quantizer in self._quantizers().items():
            if not quantizer.fitted:
                raise without_range(self.names[key])
        if self.write is not None:
            folding.at_end(functools.partial(_written, write=self.write, plan=self.plan()))
            return
        if self.places is not None:
            raise LiftError(
                "quantizers of QuantizerPlaces do not fold without `write`",
                help="make them with graphopt.fake_quantize, or pass the plans of the tensors alone",
            )
        for key, quantizer in self._quantizers().items():
            name, learned = self.names[key], quantizer.learned()
            if folding.is_constant(name):
                fold_weight(folding, name, learned)
            else:
                fold_activation(folding, name, learned)
        for key, name in self.bias_names.items():
            bias = self.biases.get_submodule(key)
            assert isinstance(bias, BiasQuantizer)
            fold_bias(folding, name, bias.scale.detach().cpu().numpy())

    def _insert_planned(self, lifted: LiftedModule, path: str, places: QuantizerPlaces) -> None:
        """Biases of the layers that the places name, and quantizers whose range is taken at run time."""
        quantizers = list(self._quantizers().values())
        for number, layer in enumerate(places.layers):
            if layer.bias is None:
                continue
            key = f"b{number}"
            self.bias_names[key] = layer.bias
            self.biases[key] = BiasQuantizer(quantizers[layer.data], quantizers[layer.weight], layer.factor)
            lifted.place(layer.bias, f"{path}.biases.{key}", [layer.node])
        for number, place in enumerate(places.dynamic):
            self.dynamic[f"d{number}"] = DynamicQuantizer()
            lifted.place(place.value, f"{path}.dynamic.d{number}", place.consumers)

    def _insert_biases(self, lifted: LiftedModule, path: str) -> None:
        """Biases of layers whose data and weight are quantized get int32, in the units of the sum that they start."""
        at = {f"{path}.quantizers.{key}": quantizer for key, quantizer in self._quantizers().items()}
        for node in list(lifted.graph.nodes):
            if node.target not in (conv, gemm) or len(node.args) < 3 or node.kwargs.keys() & {"alpha", "beta"}:
                continue
            data, weight = (at.get(str(getattr(operand, "target", ""))) for operand in node.args[:2])
            bias = node.args[2]
            name = str(bias.meta.get(VALUE)) if isinstance(bias, fx.Node) else ""
            if data is None or weight is None or name not in lifted.interface.initializers or len(bias.users) > 1:
                continue
            if name in self.names.values() or attribute(lifted, lifted.interface.initializers[name]).dim() != 1:
                continue
            key = f"b{len(self.bias_names)}"
            self.bias_names[key] = name
            self.biases[key] = BiasQuantizer(data, weight)
            lifted.place(name, f"{path}.biases.{key}")

    def _quantizers(self) -> dict[str, Quantizer]:
        return dict(self.quantizers.items())  # pyright: ignore[reportReturnType]


def _plans(given: Any) -> list[TensorPlan]:
    entries = given.get("tensors", ()) if isinstance(given, Mapping) else given  # pyright: ignore[reportUnknownVariableType]
    return [entry if isinstance(entry, TensorPlan) else TensorPlan.from_json(entry) for entry in entries]  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]


def _written(model: ir.Model, write: WriteGraph, plan: tuple[TensorPlan, ...]) -> ir.Model:
    return write(model, plan)


def _merge(plans: dict[str, TensorPlan], plan: TensorPlan) -> None:
    """Where layers share a tensor, the one that needs more bits decides."""
    known = plans.get(plan.name)
    if known is None or plan.bits > known.bits:
        plans[plan.name] = plan
