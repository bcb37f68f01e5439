"""FakeQuant: train a network while it computes with the integers that it will be deployed with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
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
from graphopt.train.fold_quantizers import fold_activation, fold_bias, fold_weight
from graphopt.train.places import LinearLayer, linear_layers

_CANDIDATES = 100
"""Clipping points that are tried for the range with the least mean squared error."""
_SAMPLED = 2**18
"""Elements of a tensor that its range is found on."""
_SMALLEST_SCALE = 1e-8
_FEWEST_BITS, _MOST_BITS = 2, 8
_INT32 = 2.0**31 - 128
"""The largest float32 that fits into int32."""
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

    Args:
        plan: one `TensorPlan` a tensor, or the JSON of a plan (a list of them, or `QuantizePlan.to_json()`).
            Plans without a scale get theirs from the weight, or from `prepare` for activations.
        learn: whether scales and zero points are trained.

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

    def __init__(self, plan: Iterable[Any] | Mapping[str, Any], *, learn: bool = True) -> None:
        super().__init__()
        entries: Any = plan.get("tensors", ()) if isinstance(plan, Mapping) else plan
        plans = [entry if isinstance(entry, TensorPlan) else TensorPlan.from_json(entry) for entry in entries]
        self.names: dict[str, str] = {}
        self.quantizers = nn.ModuleDict()
        self.bias_names: dict[str, str] = {}
        self.biases = nn.ModuleDict()
        for number, entry in enumerate(plans):
            if entry.bits not in range(_FEWEST_BITS, _MOST_BITS + 1):
                raise LiftError(
                    f"a quantizer of {entry.bits} bits",
                    where=entry.name,
                    help=f"{_FEWEST_BITS} to {_MOST_BITS} are there",
                )
            if entry.name in self.names.values():
                raise LiftError("two quantizers for one tensor", where=entry.name, help="give each tensor one plan")
            key = f"q{number}"
            self.names[key] = entry.name
            self.quantizers[key] = Quantizer(entry, learn=learn)

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
        edges = {layer.node for layer in layers if _is_edge(layer, layers)}
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
        for key, quantizer in self._quantizers().items():
            name = self.names[key]
            others = [each for each in lifted.insertions.children() if isinstance(each, FakeQuant) and each is not self]
            if any(name in each.names.values() for each in others):
                raise LiftError("two quantizers for one tensor", where=name, help="give each tensor one plan")
            lifted.place(name, f"{path}.quantizers.{key}")
            if name in initializers and not quantizer.fitted:
                quantizer.fit(attribute(lifted, initializers[name]).detach())
        self._insert_biases(lifted, path)

    def prepare(self, lifted: LiftedModule, batches: Sequence[Sequence[torch.Tensor]]) -> None:
        """Find the ranges of activations that have none, by least squared error, on float activations."""
        waiting = {key: quantizer for key, quantizer in self._quantizers().items() if not quantizer.fitted}
        seen: dict[str, list[torch.Tensor]] = {key: [] for key in waiting}

        def watch(key: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                rows = _rows(inputs[0].detach(), waiting[key].planned.axis)
                seen[key].append(_sample(rows, _SAMPLED // max(len(batches), 1)))

            return hook

        handles = [quantizer.register_forward_pre_hook(watch(key)) for key, quantizer in waiting.items()]
        active = [module for module in lifted.modules() if isinstance(module, Quantizer) and module.active]
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
            name, learned = self.names[key], quantizer.learned()
            if not quantizer.fitted:
                raise _without_range(name)
            if folding.is_constant(name):
                fold_weight(folding, name, learned)
            else:
                fold_activation(folding, name, learned)
        for key, name in self.bias_names.items():
            bias = self.biases.get_submodule(key)
            assert isinstance(bias, BiasQuantizer)
            fold_bias(folding, name, bias.scale.detach().cpu().numpy())

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


class Quantizer(nn.Module):
    """One place. `base`, `log_ratio` and `zero_point` are [1] or, along `plan.axis`, [channels]."""

    base: torch.Tensor

    def __init__(self, plan: TensorPlan, *, learn: bool) -> None:
        super().__init__()
        self.planned, self.active, self.learn = plan, True, learn
        self.fitted = bool(plan.scale)
        scale = torch.tensor(plan.scale or [1.0], dtype=torch.float32)
        self._set(scale, torch.tensor(plan.zero_point or [0] * scale.numel(), dtype=torch.float32))

    def _set(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        self.register_buffer("base", scale)
        self.log_ratio = nn.Parameter(torch.zeros_like(scale), requires_grad=self.learn)
        self.zero_point = nn.Parameter(zero_point, requires_grad=self.learn and not self.planned.signed)

    @property
    def scale(self) -> torch.Tensor:
        """The scale as it is now."""
        return self.base * self.log_ratio.exp()

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the grid of its integers; unchanged while ranges are being found."""
        if not self.active:
            return tensor
        if not self.fitted:
            raise _without_range(self.planned.name)
        low, high = self.planned.limits
        per_scale = tensor.numel() // self.base.numel()
        samples = tensor.shape[0] if self.planned.role == "activation" and tensor.dim() > 0 else 1
        damping = 1.0 / math.sqrt(max(per_scale // max(samples, 1), 1) * high)
        return _Learned.apply(tensor, self.scale, self.zero_point, low, high, damping, self.planned.axis)  # pyright: ignore[reportReturnType]

    def fit(self, tensor: torch.Tensor) -> None:
        """Take the range with the least mean squared error on a weight."""
        rows = _rows(tensor, self.planned.axis)
        self.fit_rows(_sample(rows, _SAMPLED) if self.planned.axis is None else rows)

    def fit_rows(self, rows: torch.Tensor) -> None:
        """Take the ranges with the least mean squared error on samples [scales, n]."""
        low, high = self.planned.limits
        scale, zero = _least_squares_range(rows.float(), low, high, symmetric=self.planned.signed)
        self._set(scale.to(self.base.device), zero.to(self.base.device))
        self.fitted = True

    def learned(self) -> TensorPlan:
        """The plan with the scales and zero points of now."""
        scale = self.scale.detach().float().cpu().tolist()
        zero = self.zero_point.detach().float().round().clamp(*_zero_limits(self.planned)).int().cpu().tolist()
        return replace(self.planned, scale=tuple(scale), zero_point=tuple(zero), source="training")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Ranges come in the size that they were saved in, and count as found."""
        saved = state_dict.get(f"{prefix}base")
        if saved is not None:
            if saved.shape != self.base.shape:
                self._set(*(torch.ones_like(saved, device=self.base.device) for _ in range(2)))
            self.fitted = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportArgumentType]


class BiasQuantizer(nn.Module):
    """A bias in the integers of the sum that it starts, b = round(b / (s_x s_w)) s_x s_w, gradient straight through."""

    def __init__(self, data: Quantizer, weight: Quantizer) -> None:
        super().__init__()
        self._factors = (data, weight)  # in a tuple, so that they are not children a second time

    @property
    def scale(self) -> torch.Tensor:
        """[1], or one for each output channel."""
        data, weight = self._factors
        return data.scale * weight.scale

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        """The bias as the integer kernel adds it; unchanged while ranges are being found."""
        if not all(each.active and each.fitted for each in self._factors):
            return bias
        with torch.no_grad():
            scale = self.scale.to(bias.device)
            rounded = (bias.to(scale.dtype) / scale).round().clamp(-_INT32, _INT32).mul_(scale).to(bias.dtype)
        return bias + (rounded - bias).detach()


class _Learned(torch.autograd.Function):
    """The quantizer and its straight-through gradient, see `FakeQuant`."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        low: int,
        high: int,
        damping: float,
        axis: int | None,
    ) -> torch.Tensor:
        step, zero = _shaped(scale, zero_point, low, high, tensor, axis)
        integers = torch.div(tensor.to(step.dtype), step).round_().add_(zero).clamp_(low, high)
        result = integers.sub_(zero).mul_(step).to(tensor.dtype)
        ctx.save_for_backward(tensor, result, scale, zero_point)
        ctx.settings = low, high, damping, axis
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        tensor, result, scale, zero_point = ctx.saved_tensors
        low, high, damping, axis = ctx.settings
        step, zero = _shaped(scale, zero_point, low, high, tensor, axis)
        inside = (tensor >= (low - 0.5 - zero) * step) & (tensor <= (high + 0.5 - zero) * step)
        to_tensor = torch.where(inside, gradient, 0.0)
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            # dy/ds = (y - x) / s where nothing is clamped, y / s where it is
            moved = torch.where(inside, tensor, 0.0).neg_().add_(result).mul_(gradient)
            to_scale = _summed(moved, scale, axis) / scale * damping
        if ctx.needs_input_grad[2]:
            clamped = _summed(gradient, scale, axis) - _summed(to_tensor, scale, axis)
            to_zero = -clamped * scale * damping
        return to_tensor, to_scale, to_zero, None, None, None, None


def _without_range(name: str) -> LiftError:
    return LiftError("a quantizer has no range yet", where=name, help="call FakeQuant.prepare with some inputs")


def _shaped(
    scale: torch.Tensor, zero_point: torch.Tensor, low: int, high: int, tensor: torch.Tensor, axis: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and whole zero point, shaped to broadcast with the tensor."""
    shape = [1] * tensor.dim()
    if axis is not None:
        shape[axis] = -1
    zero = zero_point.round().clamp(min(low, 0), high)
    return scale.reshape(shape), zero.reshape(shape)


def _summed(tensor: torch.Tensor, like: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The sum over all axes but that of the scales, in the shape of the scales."""
    axes = [other for other in range(tensor.dim()) if axis is None or other != axis % tensor.dim()]
    return tensor.sum(axes, dtype=like.dtype).reshape(like.shape)


def _zero_limits(plan: TensorPlan) -> tuple[int, int]:
    low, high = plan.limits
    return min(low, 0), high


def _least_squares_range(
    rows: torch.Tensor, low: int, high: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row [channels, n] with the least squared error, over clipped ranges."""
    smallest, largest = rows.amin(1).clamp_max(0.0), rows.amax(1).clamp_min(0.0)
    if symmetric:
        largest = torch.maximum(-smallest, largest)
        smallest = -largest
    best = torch.full_like(largest, torch.inf)
    best_scale, best_zero = torch.ones_like(largest), torch.zeros_like(largest)
    for candidate in range(_CANDIDATES, _CANDIDATES // 10, -1):
        share = candidate / _CANDIDATES
        scale = ((largest - smallest) * share / (high - low)).clamp_min(_SMALLEST_SCALE)
        zero = torch.zeros_like(scale) if symmetric else (low - smallest * share / scale).round().clamp(low, high)
        integers = ((rows / scale[:, None]).round_() + zero[:, None]).clamp_(low, high)
        error = ((integers - zero[:, None]) * scale[:, None] - rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _rows(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The elements that share a scale as rows, [scales, n]."""
    return tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def _sample(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most about `count` elements, evenly taken from all rows."""
    return rows[:, :: max(rows.numel() // max(count, 1), 1)]


def _merge(plans: dict[str, TensorPlan], plan: TensorPlan) -> None:
    """Where layers share a tensor, the one that needs more bits decides."""
    known = plans.get(plan.name)
    if known is None or plan.bits > known.bits:
        plans[plan.name] = plan


def _is_edge(layer: LinearLayer, layers: Sequence[LinearLayer]) -> bool:
    """Whether no linear layer is before, or none behind."""
    others = {other.node for other in layers}
    return not _reaches(layer.data, others, forward=False) or not _reaches(layer.result, others, forward=True)


def _reaches(value: ir.Value, nodes: set[ir.Node], *, forward: bool) -> bool:
    """Whether the producers (or the consumers) of a value lead to one of the nodes."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        producer = current.producer()
        found = list(current.consumers()) if forward else ([] if producer is None else [producer])
        for node in found:
            if node in nodes:
                return True
            further = node.outputs if forward else node.inputs
            fresh = [other for other in further if other is not None and other not in seen]
            seen.update(fresh)
            waiting += fresh
    return False
