"""Pass fuse-activations: activations spelled out in arithmetic become the operator that onnxruntime runs fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.match import (
    Expansion,
    clip_bounds,
    discard,
    expand,
    monomial,
    possible_atoms,
    possible_results,
    require_closed,
    scalar,
)
from graphopt.ir.rewrite import DeclinedError, Rewriter, is_op, rank
from graphopt.passes.contract import Context, Pass, Semantics

_TANH_SLOPE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715
_TANH_SATURATES = 10.0
"""From here on tanh is 1 in float32, so that it does not matter how softplus goes on."""
_HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Attributes = dict[str, "int | float | str | Sequence[int]"]
Emit = Callable[[Rewriter, ir.Node, ir.Value], ir.Value]
"""Builds the replacement behind a node, from x; returns its result."""


@dataclass(frozen=True)
class FuseActivations(Pass):
    """Write Gelu, HardSigmoid, HardSwish, Mish, Swish, clipping and Relu in their fastest form.

    Each activation is recognized as a polynomial in its input x and one anchor a (`graphopt.ir.match.expand`),
    so every operand order, association and way to divide by a constant is the same to it::

        Gelu          x/2 + x a/2      a = Erf(x / sqrt 2)
        Gelu, tanh    x/2 + x a/2      a = Tanh(sqrt(2/pi) (x + 0.044715 x^3))
                      x a              a = Sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
        HardSigmoid   c a              a = Clip(p x + q, 0, 1/c)            -> HardSigmoid(alpha = c p, beta = c q)
        HardSwish     c x a            same a                               -> x * HardSigmoid(x)
        Mish          x a              a = Tanh(Softplus(x)), or op Mish    -> x (1 - s^2) / (1 + s^2), s = Sigmoid(-x)
        Swish         op Swish(x)                                           -> x * Sigmoid(alpha x)
        clipping      Min, Max, Relu and Clip with constant bounds in a row -> one Clip, or Relu

    (Hendrycks and Gimpel 2016; Howard et al. 2019; Misra 2019. tanh(log(1 + e^x)) = (1 - s^2) / (1 + s^2).)

    What is emitted is what onnxruntime's CPU kernels run fastest. Speed over the form in parentheses, alone on
    [1, 197, 1536] / after MatMul + Add / after Conv; 2026-11-22, onnxruntime 1.31.1, one thread, command
    `python -m benchmarks.forms gelu hardswish hardsigmoid silu mish relu`::

        Gelu            (x * (1 + erf(x / c)) * 0.5)   0.99 / 0.98 / 1.00   onnxruntime fuses this one order itself
        Gelu            (0.5 x * (1 + erf(x * c)))     2.68 / 1.16 / 1.34   and no other
        Gelu tanh       (tanh, Pow)                    4.08 / 1.37 / 1.81
        x * HardSigmoid (Add Clip Mul Div)             1.54 / 1.08 / 1.36   HardSwish is the same: it is expanded to it
        HardSigmoid     (Add Clip Div)                 2.59 / 1.09 / 1.46
        Mish, sigmoid   (Softplus Tanh Mul, or Mish)   4.89 /  -   / 5.43
        Swish           (x * Sigmoid(x))               0.33 / 0.88 / 0.75   declined, and undone where it stands
        Clip            (Relu Min)                     2.11 / 1.00 / 1.07
        Relu            (Clip from 0)                  1.01 / 1.00 / 1.20

    Declined: Gelu on float16 and bfloat16 for CPU (0.94: no kernel, expanded between casts), Mish there (the
    sigmoid form cancels in half precision), and everything whose inner values something else reads.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,8] x) => (float[N,8] y) <float root = {1.4142135}, float one = {1}, float half = {0.5}> {
          a = Div (x, root)
          b = Erf (a)
          c = Add (b, one)
          d = Mul (x, c)
          y = Mul (d, half)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,8] x) => (float[N,8] y) {
          y = Gelu (x)
        }
    """

    name: ClassVar[str] = "fuse-activations"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("eliminate-identity",)

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Rewrite every activation that is recognized; clipping first, since HardSigmoid is built on it."""
        rewriter = Rewriter(model)
        opset = model.opset_imports.get("", 0)
        rewriter.until_stable(_clip, "fuse clipping", context.missed)
        for idiom in _IDIOMS:
            rewriter.until_stable(_rule_of(idiom, opset, context.target), f"fuse {idiom.what}", context.missed)
        rewriter.until_stable(_hard_sigmoid, "fuse HardSigmoid", context.missed)
        if context.target == "cpu":
            rewriter.until_stable(_mish, "write Mish by Sigmoid", context.missed)
            rewriter.until_stable(_swish, "write Swish by Sigmoid", context.missed)


# Activations that are polynomials in x and an anchor -----------------------------------------------------------


@dataclass(frozen=True)
class _Idiom:
    """An activation: anchor a = op(argument), result. Polynomials map (power of x, power of a) to a coefficient."""

    what: str
    anchor: str
    argument: Mapping[tuple[int, int], float]
    result: Mapping[tuple[int, int], float]
    attributes: Attributes
    op_type: str = "Gelu"
    since: int = 20


_HALF_X_TIMES_ONE_PLUS_A = {(1, 0): 0.5, (1, 1): 0.5}
_IDIOMS = (
    _Idiom("Gelu", "Erf", {(1, 0): math.sqrt(0.5)}, _HALF_X_TIMES_ONE_PLUS_A, {}),
    _Idiom(
        "Gelu (tanh form)",
        "Tanh",
        {(1, 0): _TANH_SLOPE, (3, 0): _TANH_SLOPE * _TANH_CUBIC},
        _HALF_X_TIMES_ONE_PLUS_A,
        {"approximate": "tanh"},
    ),
    _Idiom(
        "Gelu (tanh form by Sigmoid)",
        "Sigmoid",
        {(1, 0): 2 * _TANH_SLOPE, (3, 0): 2 * _TANH_SLOPE * _TANH_CUBIC},
        {(1, 1): 1.0},
        {"approximate": "tanh"},
    ),
)


def _rule_of(idiom: _Idiom, opset: int, target: str) -> Callable[[Rewriter, ir.Node], bool]:
    def rule(rewriter: Rewriter, node: ir.Node) -> bool:
        if not is_op(node, idiom.anchor):
            return False
        found = _find_idiom(idiom, node)
        if found is None:
            return False
        x, result, nodes = found
        if opset < idiom.since:
            raise DeclinedError(f"{idiom.op_type} needs opset {idiom.since}, the model has {opset}")
        if target == "cpu" and x.dtype in _HALF_TYPES:
            raise DeclinedError("onnxruntime has no half-precision kernel and its expansion is slower (x0.94)")

        def emit(rewriter: Rewriter, after: ir.Node, x: ir.Value) -> ir.Value:
            return rewriter.insert(
                after, idiom.op_type, [x], attributes=dict(idiom.attributes), like=x, suffix=idiom.op_type.lower()
            ).outputs[0]

        return _replace(rewriter, result, nodes, x, emit)

    return rule


def _find_idiom(idiom: _Idiom, node: ir.Node) -> tuple[ir.Value, ir.Value, set[ir.Node]] | None:
    """x, the result and the consumed nodes where `node` is the anchor of the idiom."""
    anchor, argument = node.outputs[0], node.inputs[0]
    if argument is None:
        return None
    for x in possible_atoms(argument):
        inner = _expand_to(argument, (x,), _polynomial(idiom.argument, x, anchor))
        if inner is None:
            continue
        for result in possible_results(anchor):
            outer = _expand_to(result, (x, anchor), _polynomial(idiom.result, x, anchor))
            if outer is not None:
                return x, result, {node, *inner.nodes, *outer.nodes}
    return None


def _polynomial(terms: Mapping[tuple[int, int], float], x: ir.Value, anchor: ir.Value) -> dict[frozenset, float]:
    return {monomial((x, of_x), (anchor, of_anchor)): number for (of_x, of_anchor), number in terms.items()}


def _expand_to(value: ir.Value, atoms: tuple[ir.Value, ...], expected: Mapping[frozenset, float]) -> Expansion | None:
    """The expansion of `value`, where it is the expected polynomial and constants leave the rank as it is."""
    found = expand(value, atoms)
    if found is None or not found.matches(expected, atoms[0].dtype):
        return None
    return found if found.constant_rank <= (rank(atoms[0]) or 0) else None


# HardSigmoid and clipping -----------------------------------------------------------------------------------------


def _hard_sigmoid(rewriter: Rewriter, node: ir.Node) -> bool:
    """c * Clip(p x + q, 0, 1 / c), times x or not, where that saves a node."""
    bounds = clip_bounds(node)
    if bounds is None or bounds[0] != 0.0 or bounds[1] is None or bounds[1] <= 0.0:
        return False
    candidates = sorted(_hard_sigmoids(node, bounds[1]), key=lambda found: -len(found[2]))
    refusal: DeclinedError | None = None
    for x, result, nodes, emit in candidates:  # the largest first; a smaller one where others read its inside
        try:
            return _replace(rewriter, result, nodes, x, emit)
        except DeclinedError as declined:
            refusal = refusal or declined
    if refusal is not None:
        raise refusal
    return False


def _hard_sigmoids(node: ir.Node, high: float) -> Iterator[tuple[ir.Value, ir.Value, set[ir.Node], Emit]]:
    """x, result, nodes and replacement of every way to see the Clip `node` as the inside of a HardSigmoid."""
    argument, anchor = node.inputs[0], node.outputs[0]
    assert argument is not None
    for x in possible_atoms(argument):
        inner = expand(argument, (x,))
        linear = None if inner is None else inner.linear_in(x)
        if inner is None or linear is None or inner.constant_rank > (rank(x) or 0):
            continue
        for result in possible_results(anchor):
            for times_x in (0, 1):
                outer = _expand_to(result, (x, anchor), {monomial((x, times_x), (anchor, 1)): 1.0 / high})
                nodes = {node} if outer is None else {node, *inner.nodes, *outer.nodes}
                if outer is not None and len(nodes) >= 2 + times_x:
                    emit = _emit_hard_sigmoid(linear[0] / high, linear[1] / high, bool(times_x))
                    yield x, result, nodes, emit


def _emit_hard_sigmoid(alpha: float, beta: float, times_x: bool) -> Emit:
    def emit(rewriter: Rewriter, after: ir.Node, x: ir.Value) -> ir.Value:
        attributes: Attributes = {"alpha": float(np.float32(alpha)), "beta": float(np.float32(beta))}
        gate = rewriter.insert(after, "HardSigmoid", [x], attributes=attributes, like=x, suffix="hardsigmoid")
        return (
            rewriter.insert(gate, "Mul", [x, gate.outputs[0]], like=x, suffix="mul").outputs[0]
            if times_x
            else gate.outputs[0]
        )

    return emit


def _clip(rewriter: Rewriter, node: ir.Node) -> bool:
    """Min, Max, Relu and Clip in a row are one Clip; a Clip from zero without upper bound is a Relu."""
    outer = _bounds(node)
    if outer is None or node.outputs[0].dtype not in (ir.DataType.FLOAT, *_HALF_TYPES, ir.DataType.DOUBLE):
        return False
    data, low, high = outer
    nodes = {node}
    producer = data.producer()
    inner = None if producer is None else _bounds(producer)
    if inner is not None and producer is not None:
        inner_data, inner_low, inner_high = inner
        nodes.add(producer)
        # Outer(inner(x)): the inner bounds are clipped by the outer ones.
        data, low, high = inner_data, _clipped(inner_low, low, high, low), _clipped(inner_high, low, high, high)
    op_type = "Relu" if low == 0.0 and math.isinf(high) else "Clip"
    if (node.op_type == op_type and len(nodes) == 1) or (math.isinf(low) and math.isinf(high)):
        return False

    def emit(rewriter: Rewriter, after: ir.Node, x: ir.Value) -> ir.Value:
        bounds = [] if op_type == "Relu" else [_bound(rewriter, after, x, name, b) for name, b in _named(low, high)]
        return rewriter.insert(after, op_type, [x, *bounds], like=x, suffix=op_type.lower()).outputs[0]

    return _replace(rewriter, node.outputs[0], nodes, data, emit)


def _named(low: float, high: float) -> Iterator[tuple[str, float]]:
    yield "low", low
    if not math.isinf(high):
        yield "high", high


def _bound(rewriter: Rewriter, after: ir.Node, x: ir.Value, name: str, bound: float) -> ir.Value | None:
    if math.isinf(bound):
        return None
    assert isinstance(after.graph, ir.Graph)
    assert x.dtype is not None
    tensor = ir.Tensor(np.asarray(bound, dtype=x.dtype.numpy()), dtype=x.dtype)
    return rewriter.initializer(after.graph, f"{after.outputs[0].name}_{name}", tensor)


def _bounds(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """Data, lower and upper bound of a node that clips by constants, infinities where it does not bound."""
    if is_op(node, "Relu") and node.inputs[0] is not None:
        return node.inputs[0], 0.0, math.inf
    bounds = clip_bounds(node)
    if bounds is not None and node.inputs[0] is not None:
        low = -math.inf if bounds[0] is None else bounds[0]
        high = math.inf if bounds[1] is None else bounds[1]
        return (node.inputs[0], low, high) if low <= high else None
    if not is_op(node, "Min", "Max") or len(node.inputs) != 2:
        return None
    for data, other in (node.inputs, reversed(node.inputs)):
        number = scalar(other)
        if number is None or data is None or other is None or (rank(other) or 0) > (rank(data) or 0):
            continue
        return (data, -math.inf, number) if node.op_type == "Min" else (data, number, math.inf)
    return None


def _clipped(inner: float, low: float, high: float, unbounded: float) -> float:
    return unbounded if math.isinf(inner) else min(max(inner, low), high)


# Mish and Swish ---------------------------------------------------------------------------------------------------


def _mish(rewriter: Rewriter, node: ir.Node) -> bool:
    x = node.inputs[0] if is_op(node, "Mish", "Softplus") else None
    if x is None:
        return False
    found = (node.outputs[0], {node}) if node.op_type == "Mish" else _spelled_mish(node, x)
    if found is None:
        return False
    if x.dtype != ir.DataType.FLOAT:
        raise DeclinedError("1 - s^2 cancels in half precision" if x.dtype in _HALF_TYPES else "it is not float32")

    def emit(rewriter: Rewriter, after: ir.Node, x: ir.Value) -> ir.Value:
        assert isinstance(after.graph, ir.Graph)
        one = rewriter.initializer(
            after.graph, f"{after.outputs[0].name}_one", ir.Tensor(np.ones((), dtype=np.float32))
        )
        negative = rewriter.insert(after, "Neg", [x], like=x, suffix="neg")
        sigmoid = rewriter.insert(negative, "Sigmoid", negative.outputs, like=x, suffix="sigmoid")
        square = rewriter.insert(sigmoid, "Mul", [sigmoid.outputs[0], sigmoid.outputs[0]], like=x, suffix="mul")
        below = rewriter.insert(square, "Sub", [one, square.outputs[0]], like=x, suffix="sub")
        above = rewriter.insert(below, "Add", [one, square.outputs[0]], like=x, suffix="add")
        gate = rewriter.insert(above, "Div", [below.outputs[0], above.outputs[0]], like=x, suffix="div")
        return rewriter.insert(gate, "Mul", [x, gate.outputs[0]], like=x, suffix="mul").outputs[0]

    return _replace(rewriter, found[0], found[1], x, emit)


def _spelled_mish(softplus: ir.Node, x: ir.Value) -> tuple[ir.Value, set[ir.Node]] | None:
    value, guard = _softplus(softplus, x)
    for use in value.uses():
        if not is_op(use.node, "Tanh"):
            continue
        anchor = use.node.outputs[0]
        for result in possible_results(anchor):
            outer = _expand_to(result, (x, anchor), {monomial((x, 1), (anchor, 1)): 1.0})
            if outer is not None:
                return result, {softplus, *guard, use.node, *outer.nodes}
    return None


def _softplus(softplus: ir.Node, x: ir.Value) -> tuple[ir.Value, set[ir.Node]]:
    """The softplus of x, through torch's Where(x > threshold, x, Softplus(x)) where tanh does not see that."""
    for use in softplus.outputs[0].uses():
        choice = use.node
        if not is_op(choice, "Where") or choice.inputs[1] is not x or choice.inputs[2] is not softplus.outputs[0]:
            continue
        large = None if choice.inputs[0] is None else choice.inputs[0].producer()
        threshold = scalar(large.inputs[1]) if large is not None and is_op(large, "Greater") else None
        if large is not None and large.inputs[0] is x and threshold is not None and threshold >= _TANH_SATURATES:
            return choice.outputs[0], {choice, large}
    return softplus.outputs[0], set()


def _swish(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "Swish") or node.inputs[0] is None:
        return False
    x = node.inputs[0]
    attribute = node.attributes.get("alpha")
    alpha = 1.0 if attribute is None else attribute.as_float()

    def emit(rewriter: Rewriter, after: ir.Node, x: ir.Value) -> ir.Value:
        assert isinstance(after.graph, ir.Graph)
        assert x.dtype is not None
        scaled, behind = x, after
        if alpha != 1.0:
            tensor = ir.Tensor(np.asarray(alpha, dtype=x.dtype.numpy()), dtype=x.dtype)
            factor = rewriter.initializer(after.graph, f"{after.outputs[0].name}_alpha", tensor)
            behind = rewriter.insert(after, "Mul", [x, factor], like=x, suffix="mul")
            scaled = behind.outputs[0]
        gate = rewriter.insert(behind, "Sigmoid", [scaled], like=x, suffix="sigmoid")
        return rewriter.insert(gate, "Mul", [x, gate.outputs[0]], like=x, suffix="mul").outputs[0]

    return _replace(rewriter, node.outputs[0], {node}, x, emit)


def _replace(rewriter: Rewriter, result: ir.Value, nodes: set[ir.Node], x: ir.Value, emit: Emit) -> bool:
    """Put what `emit` builds from x in the place of `result`; `nodes` computed it and must serve nothing else."""
    producer = result.producer()
    assert producer is not None
    require_closed(nodes, result)
    rewriter.supersede(result, emit(rewriter, producer, x))
    discard(nodes)
    return True
