"""What quantization does to single values and single operators, measured on the float graph as it runs.

The float graph runs once, piece by piece (`graphopt.ir.pieces`). Where an operator is reached, what lies before it is
known, so only what lies behind is run again with this operator quantized, on the kernels that it will have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphopt.ir.compare import compare_runs
from graphopt.ir.pieces import Pieces, open_piece
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.rewrite import is_op, rank
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.quantize_apply import apply_plan
from graphopt.passes.quantize_placement import data_inputs, node_name, scaling_factor
from graphopt.passes.quantize_plan import OperatorPlan, QuantizePlan
from graphopt.passes.quantize_weights_apply import apply_weights

Batches = Sequence[Mapping[str, np.ndarray]]
Outputs = Sequence[np.ndarray]
Measure = Callable[[Outputs, Outputs], float]
"""How far the outputs of one run, the second argument, are from those of the float graph; 0 where they are equal."""
MEASURES = ("rms", "kl")
"""Measures by name, see `measure_named`."""


def measure_named(name: str) -> Measure:
    """A measure of the house.

    "rms" is the largest root-mean-square error of an output, relative to its own root mean square, as
    `graphopt.ir.compare` has it. "kl" takes the outputs for class logits: the mean Kullback-Leibler divergence of
    softmax over axis 1, in nats, the largest of any output that has such an axis.

    Example:
        >>> measure_named("rms")([np.array([3.0, 4.0])], [np.array([3.0, 3.5])])
        0.1
        >>> measure_named("kl")([np.array([[0.0, 1.0]])], [np.array([[0.0, 1.0]])])
        0.0
    """
    return {"rms": _rms, "kl": _divergence}[name]


def _rms(reference: Outputs, found: Outputs) -> float:
    return compare_runs([str(index) for index in range(len(reference))], [reference], [found]).rms_error


def _divergence(reference: Outputs, found: Outputs) -> float:
    worst = 0.0
    for expected, given in zip(reference, found, strict=True):
        if expected.dtype.kind == "f" and expected.ndim >= 2:
            if not np.isfinite(given).all():
                return math.inf
            logits, others = (_log_softmax(array.astype(np.float64)) for array in (expected, given))
            worst = max(worst, float((np.exp(logits) * (logits - others)).sum(axis=1).mean()))
    return worst


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@dataclass
class Agreement:
    """How well arrays agree with others that stand for them, over all pairs that were added; finite values only.

    Example:
        >>> agreement = Agreement()
        >>> agreement.add(np.array([1.0, -1.0]), np.array([1.1, -0.9]))
        >>> round(agreement.sqnr, 2)
        20.0
    """

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0

    def add(self, reference: np.ndarray, found: np.ndarray) -> None:
        """Take in one pair of the same shape."""
        a, b = (np.asarray(array, np.float64).ravel() for array in (reference, found))
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            a, b = a[finite], b[finite]
        difference = a - b
        self.signal += float(a @ a)
        self.noise += float(difference @ difference)
        self.other += float(b @ b)
        self.product += float(a @ b)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB, infinite where there is no noise, minus infinite without a signal."""
        if self.noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self.signal / self.noise) if self.signal > 0.0 else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, 1 where both are zero."""
        size = math.sqrt(self.signal * self.other)
        return self.product / size if size > 0.0 else float(self.noise == 0.0)

    @property
    def relative(self) -> float:
        """Root mean square of the difference over that of the reference."""
        return math.sqrt(self.noise / self.signal) if self.signal > 0.0 else (math.inf if self.noise else 0.0)


@dataclass
class Rounding:
    """What one quantizer does to the values that it is given, and how they come out of the quantized net.

    Attributes:
        planned: the quantizer.
        own: the float values against themselves, quantized.
        accumulated: the float values against those of the quantized net; empty for weights.
        clipped: number of values outside of the range.
        codes: how often each integer occurs, from the smallest.
        channel_axis: where the channels are, None where they are not told apart.
    """

    planned: TensorPlan
    channel_axis: int | None = None
    own: Agreement = field(default_factory=Agreement)
    accumulated: Agreement = field(default_factory=Agreement)
    clipped: int = 0
    codes: np.ndarray = field(init=False)
    _channels: np.ndarray | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        low, high = self.planned.limits
        self.codes = np.zeros(high - low + 1, np.int64)

    def add(self, array: np.ndarray) -> None:
        """Take in float values; what is not finite counts as 0."""
        low, _ = self.planned.limits
        finite = np.isfinite(array)
        array = np.where(finite, array, np.zeros_like(array)) if not finite.all() else array
        integers = self.planned.quantize(array)
        found = real_numbers(self.planned, integers)
        self.own.add(array, found)
        if self.channel_axis is not None and array.ndim > 1:
            others = tuple(axis for axis in range(array.ndim) if axis != self.channel_axis % array.ndim)
            pair = [np.square(one, dtype=np.float64).sum(axis=others) for one in (array, array - found)]
            self._channels = np.stack(pair) if self._channels is None else self._channels + np.stack(pair)
        self.codes += np.bincount(integers.ravel().astype(np.int64) - low, minlength=self.codes.size)
        scale, zero = self.planned.expanded(array.shape)
        unbounded = np.rint(array / scale) + zero
        self.clipped += int(((unbounded < low) | (unbounded > low + self.codes.size - 1)).sum())

    @property
    def channel_sqnr(self) -> float | None:
        """The ratio of `own` in dB that a quarter of the channels stay below; None where it was not measured."""
        if self._channels is None:
            return None
        signal, noise = self._channels[:, self._channels[0] > 0.0]
        if not signal.size:
            return None
        with np.errstate(divide="ignore"):
            return float(np.quantile(10.0 * np.log10(signal / noise), 0.25, method="lower"))

    @property
    def share_clipped(self) -> float:
        """Share of the values that the range leaves out."""
        total = int(self.codes.sum())
        return self.clipped / total if total else 0.0

    @property
    def bits_used(self) -> float:
        """Entropy of the integers in bits: how much of the width carries information."""
        total = int(self.codes.sum())
        share = self.codes[self.codes > 0] / max(total, 1)
        return float(-(share * np.log2(share)).sum()) + 0.0


def real_numbers(planned: TensorPlan, integers: np.ndarray) -> np.ndarray:
    """What integers stand for, float32, of the same shape."""
    scale, zero = planned.expanded(integers.shape)
    return (integers.astype(np.float32) - zero) * scale


def write_plan(model: ir.Model, plan: QuantizePlan) -> None:
    """Rewrite a model, legalized unless the plan is of weights alone, as the plan says, with standard operators."""
    if plan.weights_alone:
        apply_weights(model, plan, Context())
    else:
        apply_plan(model, plan)


def units(plan: QuantizePlan) -> list[OperatorPlan]:
    """The operators of a plan that round something: not those that move integers, nor those that stay float."""
    return [operator for operator in plan.operators if operator.form not in ("integer", "folded", "float")]


def only(model: ir.Model, plan: QuantizePlan, name: str) -> QuantizePlan:
    """The plan with one operator quantized and everything else in float. `model` is legalized."""
    node = next(node for node in model.graph if node_name(node) == name)
    clamp = _folded_clamp(node, plan)
    kept = {name, *([] if clamp is None else [node_name(clamp)])}
    known = _quantizers(model, plan)
    forms = {operator.node: operator.form for operator in plan.operators}
    results = [_result(node, clamp)] if forms[name] == "static" else []  # the others write floats
    wanted = {value.name for value in (*node.inputs, *results) if value is not None}
    tensors = {tensor.name: tensor for value, tensor in known.items() if value.name in wanted}
    others = tuple(tensor for tensor in plan.tensors if tensor.name in wanted and tensor.name not in tensors)
    operators = tuple(operator for operator in plan.operators if operator.node in kept)
    return QuantizePlan(tuple(map(_unsigned, (*tensors.values(), *others))), operators)


def without(model: ir.Model, plan: QuantizePlan, names: Collection[str]) -> QuantizePlan:
    """The plan with these operators in float and everything around them as it was. `model` is legalized."""
    clamps = [_folded_clamp(node, plan) for node in model.graph if node_name(node) in names]
    left = {*names, *(node_name(clamp) for clamp in clamps if clamp is not None)}
    operators = tuple(operator for operator in plan.operators if operator.node not in left)
    return replace(plan, operators=operators, tensors=tuple(map(_unsigned, plan.tensors)))


def _unsigned(tensor: TensorPlan) -> TensorPlan:
    """The same real numbers from unsigned integers, where `tensor` is an activation: see `may_be_signed`."""
    if tensor.role != "activation" or not tensor.signed:
        return tensor
    zero_point = tuple(zero + 2 ** (tensor.bits - 1) for zero in tensor.zero_point)
    return replace(tensor, signed=False, zero_point=zero_point)


def _folded_clamp(node: ir.Node, plan: QuantizePlan) -> ir.Node | None:
    folded = {operator.node for operator in plan.operators if operator.form == "folded"}
    readers = node.outputs[0].consumers()
    return readers[0] if len(readers) == 1 and node_name(readers[0]) in folded else None


def _result(node: ir.Node, clamp: ir.Node | None) -> ir.Value:
    return node.outputs[0] if clamp is None else clamp.outputs[0]


def _quantizers(model: ir.Model, plan: QuantizePlan) -> dict[ir.Value, TensorPlan]:
    """The quantizer that each value arrives in: its own, or the one that it was moved with."""
    named = {tensor.name: tensor for tensor in plan.tensors if tensor.role != "weight"}
    forms = {operator.node: operator.form for operator in plan.operators}
    known = {value: named[value.name] for value in model.graph.inputs if value.name in named}
    for node in model.graph:
        source = data_inputs(node)[0] if forms.get(node_name(node)) == "integer" else None
        for value in node.outputs:
            planned = named.get(value.name or "")
            if planned is None and source in known:
                moved = known[source]
                factor = scaling_factor(node) or 1.0
                scale = tuple(one * factor for one in moved.scale)
                planned = replace(moved, name=value.name or "", scale=scale)
            if planned is not None:
                known[value] = planned
    return known


def roundings(model: ir.Model, plan: QuantizePlan, batches: Batches, *, threads: int = 0) -> list[Rounding]:
    """What each quantizer of a plan does, in the order of the plan.

    Both nets run beside each other, each node once a batch, and of each only the values that are compared are kept.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    values.update({value.name: value for value in model.graph.inputs})
    found = [Rounding(planned, _channel_axis(values.get(planned.name))) for planned in plan.tensors]
    for rounding in found:
        value = model.graph.initializers.get(rounding.planned.name)
        if value is not None and value.const_value is not None and rounding.planned.scale:
            rounding.add(value.const_value.numpy())
    inside = [rounding for rounding in found if rounding.planned.role == "activation"]
    if not inside:
        return found
    copy = model.clone()
    write_plan(copy, plan)
    integers = _integers(copy)
    exact, rounded = (Pieces(one, batches, threads=threads) for one in (model, copy))
    for rounding in inside:
        value, stored = values.get(rounding.planned.name), integers.get(f"{rounding.planned.name}.scale")
        if value is None:
            continue
        exact.compute([value])
        if stored is not None:
            rounded.compute([stored])
        for batch in range(exact.batches):
            array = exact.array(value, batch)
            rounding.add(array)
            if stored is not None:
                rounding.accumulated.add(array, _read(rounding.planned, rounded.array(stored, batch)))
        exact.release([value])
        if stored is not None:
            rounded.release([stored])
    return found


def _channel_axis(value: ir.Value | None) -> int | None:
    """Where the channels of an activation are: axis 1 beside a Conv, else the last."""
    if value is None:
        return None
    beside = [value.producer(), *value.consumers()]
    return 1 if any(is_op(node, "Conv") for node in beside if node is not None) or (rank(value) or 0) > 3 else -1


def _integers(model: ir.Model) -> dict[str | None, ir.Value]:
    """The integers of a quantized graph by the name of their scale."""
    found: dict[str | None, ir.Value] = {}
    for node in model.graph:
        if is_op(node, "QuantizeLinear") and node.inputs[1] is not None:
            found.setdefault(node.inputs[1].name, node.outputs[0])
    return found


def _read(planned: TensorPlan, integers: np.ndarray) -> np.ndarray:
    return real_numbers(planned, np.clip(integers, *planned.limits))


@dataclass(frozen=True)
class Effect:
    """What quantizing one operator alone does.

    Attributes:
        local: the operator's result against that of the float graph, its inputs being exact.
        alone: how far the outputs of the model move, None where that was not measured.
    """

    local: Agreement
    alone: float | None


def single_effects(
    model: ir.Model,
    plan: QuantizePlan,
    batches: Batches,
    *,
    names: Sequence[str],
    measure: Measure,
    outputs: bool,
    threads: int = 0,
) -> Iterator[tuple[str, Effect]]:
    """Quantize operators one at a time, in graph order.

    Args:
        model: the float model, legalized as the plan was made.
        plan: has the operators in it.
        batches: inputs.
        names: nodes of `units(plan)`.
        measure: how outputs are compared.
        outputs: whether the outputs of the model are computed; else only the operator itself is run.
        threads: of onnxruntime.
    """
    session = open_session(model, threads=threads)
    reference = [session.run_feeds(feeds) for feeds in batches] if outputs else []
    del session
    pieces, wanted = Pieces(model, batches, threads=threads), set(names)
    for node in list(model.graph):
        if node_name(node) not in wanted:
            continue
        read = [value for value in node.inputs if value is not None and not value.is_initializer()]
        pieces.compute(read)
        result = _result(node, _folded_clamp(node, plan))
        tail = _Tail(model, only(model, plan, node_name(node)), pieces, result, outputs=outputs, threads=threads)
        runs = [tail.run(pieces, batch) for batch in range(pieces.batches)]
        moved = [measure(whole, tail.outputs_of(run, whole)) for whole, run in zip(reference, runs, strict=False)]
        pieces.compute([result])
        local = Agreement()
        for batch, run in enumerate(runs):
            local.add(pieces.array(result, batch), tail.result_of(run))
        pieces.release([*read, result])
        yield node_name(node), Effect(local, max(moved) if moved else None)


class _Tail:
    """What is left to run of the float graph once one operator in it is quantized."""

    def __init__(
        self, model: ir.Model, plan: QuantizePlan, pieces: Pieces, result: ir.Value, *, outputs: bool, threads: int
    ) -> None:
        copy = model.clone()
        write_plan(copy, plan)
        done = {node_name(node) for node in pieces.done}
        nodes = [node for node in copy.graph if node_name(node) not in done]
        made = {value: node for node in nodes for value in node.outputs}
        by_name = {value.name: value for value in (*copy.graph.inputs, *made)}
        by_name.update({value.name: value for node in copy.graph for value in node.outputs if value not in made})
        self._frontier = pieces.frontier()
        self._planned = next((one for one in plan.tensors if one.name == result.name), None)
        found = _integers(copy).get(f"{result.name}.scale") if self._planned is not None else by_name.get(result.name)
        assert found is not None
        self._result = found
        self._changed = [(index, value) for index, value in enumerate(copy.graph.outputs) if outputs and value in made]
        wanted = list(dict.fromkeys([found, *(value for _, value in self._changed)]))
        if not outputs:
            nodes = _ancestors(nodes, found)
        sources = [by_name[value.name] for value in self._frontier]
        types = {own: pieces.array(value, 0).dtype for own, value in zip(sources, self._frontier, strict=True)}
        self._places = {value: index for index, value in enumerate(wanted)}
        self._session = open_piece(copy, nodes, sources, wanted, types=types, threads=threads)

    def run(self, pieces: Pieces, batch: int) -> list[np.ndarray]:
        return self._session.run_feeds({value.name or "": pieces.array(value, batch) for value in self._frontier})

    def outputs_of(self, run: Outputs, whole: Outputs) -> list[np.ndarray]:
        """All outputs of the model: those of the float graph where the operator does not reach them."""
        changed = {index: run[self._places[value]] for index, value in self._changed}
        return [changed.get(index, array) for index, array in enumerate(whole)]

    def result_of(self, run: Outputs) -> np.ndarray:
        array = run[self._places[self._result]]
        return array if self._planned is None else _read(self._planned, array)


def _ancestors(nodes: Sequence[ir.Node], value: ir.Value) -> list[ir.Node]:
    """Those of the nodes that `value` needs, in their order."""
    inside, found, waiting = set(nodes), set[ir.Node](), [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node in inside and node not in found:
            found.add(node)
            waiting += [read for read in node.inputs if read is not None]
    return [node for node in nodes if node in found]
