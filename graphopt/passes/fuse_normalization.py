"""Pass fuse-normalization: LayerNorm and RMSNorm spelled out in primitives become one operator."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.match import (
    Monomial,
    axes_of,
    discard,
    expand,
    monomial,
    possible_atoms,
    possible_results,
    require_closed,
    scalar,
)
from graphopt.ir.rewrite import DeclinedError, Rewriter, constant, is_op, rank, sole_consumer, to_tensor
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.normalize_groups import spread_group_normalization

_RMS_NORM_OPSET = 23
_RMS_NORM_SPELLING = ("Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul")
"""The one spelling of RMSNorm that onnxruntime fuses at load; the last node only where there is a scale."""


@dataclass(frozen=True)
class FuseNormalization(Pass):
    """Write LayerNorm and RMSNorm in the form that onnxruntime runs as one kernel, GroupNorm in the fastest.

    With m the mean over the last axes, w and b weights of the shape of those axes::

        LayerNorm   w (x - m(x)) / sqrt(m((x - m(x))^2) + epsilon) + b      -> LayerNormalization
        RMSNorm     w x / sqrt(m(x^2) + epsilon)                            -> RMSNormalization, or Sqrt and Div

    (Ba et al. 2016; Zhang and Sennrich 2019; operators LayerNormalization-17, RMSNormalization-23.) The anchor is
    the inverse root: Sqrt below a Div or a Reciprocal, or Pow to -0.5. Around it everything is compared as a
    polynomial in x, m(x), the root and the weights, so that the keras form `x g + (b - m g)` with `g = w / root`,
    squares by Pow or Mul, and every operand order are one case. Weights with leading axes of one, and broadcast
    ones, are reshaped. Where a half-precision x is cast up for the statistics and down before the weight, both
    casts go: the operators keep the statistics in float32 themselves. Statistics formed in half precision become
    more exact.

    Speed over the first form; 2026-11-22, onnxruntime 1.31.1, CPU, one thread, [1, 197, 384], command
    `python -m benchmarks.forms layer rms group`::

        LayerNorm   Pow Sqrt Div 1.00   keras two-term 0.45   LayerNormalization 1.00
        RMSNorm     Pow Sqrt Reciprocal Mul 1.00   Mul Pow(-0.5) 1.31   Pow Sqrt Div 2.59   RMSNormalization 2.63
        GroupNorm   InstanceNormalization 1.00   LayerNormalization over groups 0.74   GroupNormalization 0.45

    So below opset 23 RMSNorm is written with Pow, Sqrt and Div, which onnxruntime fuses by itself, and no other
    spelling does; and the operator GroupNormalization, for which onnxruntime has no kernel and OpenVINO's provider no
    use, becomes Reshape, InstanceNormalization, Reshape, Mul, Add, as exporters wrote it before opset 21.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[4] w_scale, float[4] w_bias) => (float[N,4] y)
        <int64[1] axes = {-1}, float two = {2}, float epsilon = {1e-5}> {
          mean = ReduceMean (x, axes)
          centered = Sub (x, mean)
          square = Pow (centered, two)
          variance = ReduceMean (square, axes)
          shifted = Add (variance, epsilon)
          root = Sqrt (shifted)
          normalized = Div (centered, root)
          scaled = Mul (normalized, w_scale)
          y = Add (scaled, w_bias)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[4] w_scale, float[4] w_bias) => (float[N,4] y) {
          y = LayerNormalization <axis = -1, epsilon = 1e-05, stash_type = 1> (x, w_scale, w_bias)
        }
    """

    name: ClassVar[str] = "fuse-normalization"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("eliminate-identity", "fuse-attention")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Fuse every normalization that is recognized; a remark for each that cannot be consumed whole."""
        opset = model.opset_imports.get("", 0)

        def fuse(rewriter: Rewriter, node: ir.Node) -> bool:
            return _fuse(rewriter, node, opset)

        rewriter = Rewriter(model)
        rewriter.until_stable(fuse, "fuse normalization", context.missed)
        rewriter.until_stable(spread_group_normalization, "spread GroupNormalization", context.missed)


@dataclass(frozen=True)
class _Statistics:
    """What the inverse root says: x, its mean (None for RMSNorm), and the nodes up to the root.

    Attributes:
        x: the value that is normalized.
        mean: the value m(x), None where nothing is subtracted.
        axes_count: number of trailing axes that are averaged over.
        epsilon: added to the mean square.
        root: Sqrt(...) or Pow(..., -0.5).
        exponent: power of `root` in the normalized value: -1 for Sqrt, 1 for Pow(..., -0.5).
        nodes: all that computes `root` from x.
    """

    x: ir.Value
    mean: ir.Value | None
    axes_count: int
    epsilon: float
    root: ir.Value
    exponent: int
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class _Normalization:
    """A whole normalization: statistics, weights, the input to read and the value to replace."""

    statistics: _Statistics
    source: ir.Value
    scale: ir.Value | None
    bias: ir.Value | None
    result: ir.Value
    nodes: frozenset[ir.Node]


def _fuse(rewriter: Rewriter, node: ir.Node, opset: int) -> bool:
    statistics = _statistics(node)
    if statistics is None:
        return False
    found = list(_normalizations(statistics))
    if statistics.mean is None and opset < _RMS_NORM_OPSET:
        found = [candidate for candidate in found if candidate.source is statistics.x]
    if not found:
        raise DeclinedError("the root of the mean square does not divide the value that was squared")
    refusal: DeclinedError | None = None
    for candidate in sorted(found, key=lambda candidate: -len(candidate.nodes)):
        try:
            require_closed(candidate.nodes, candidate.result)
            return _emit(rewriter, candidate, opset)
        except DeclinedError as declined:
            refusal = refusal or declined
    assert refusal is not None
    raise refusal


def _statistics(node: ir.Node) -> _Statistics | None:
    """Read backwards from Sqrt(m + epsilon) or Pow(m + epsilon, -0.5), m a mean of squares over trailing axes."""
    if is_op(node, "Sqrt"):
        exponent = -1
    elif is_op(node, "Pow") and abs(scalar(node.inputs[1]) or 0.0) == 0.5:
        exponent = -1 if (scalar(node.inputs[1]) or 0.0) > 0 else 1
    else:
        return None
    shifted = node.inputs[0]
    if shifted is None or shifted.dtype is None:
        return None
    for mean_square in possible_atoms(shifted, depth=1):
        reduction = mean_square.producer()
        square = None if reduction is None else reduction.inputs[0]
        inner = expand(shifted, (mean_square,))
        linear = None if inner is None else inner.linear_in(mean_square)
        if inner is None or linear is None or linear[0] != 1.0 or linear[1] < 0.0 or square is None:
            continue
        count = _trailing_axes(reduction)
        if reduction is None or count is None or inner.constant_rank > (rank(square) or 0):
            continue
        for x, mean, nodes in _squared(square, count):
            consumed = nodes | inner.nodes | {node, reduction}
            return _Statistics(x, mean, count, linear[1], node.outputs[0], exponent, consumed)
    return None


def _squared(square: ir.Value, count: int) -> Iterator[tuple[ir.Value, ir.Value | None, frozenset[ir.Node]]]:
    """x, m(x) and the nodes between where `square` is (x - m(x))^2; then x, None where it is x^2."""
    atoms = list(possible_atoms(square))
    for mean in atoms:
        reduction = mean.producer()
        x = reduction.inputs[0] if reduction is not None and _trailing_axes(reduction) == count else None
        if x is None or reduction is None:
            continue
        found = expand(square, (x, mean))
        expected = {monomial((x, 2)): 1.0, monomial((x, 1), (mean, 1)): -2.0, monomial((mean, 2)): 1.0}
        if found is not None and found.matches(expected, x.dtype):
            yield x, mean, found.nodes | {reduction}
    for x in atoms:
        found = expand(square, (x,))
        if found is not None and found.matches({monomial((x, 2)): 1.0}, x.dtype):
            yield x, None, found.nodes


def _trailing_axes(node: ir.Node | None) -> int | None:
    """How many axes a ReduceMean averages over, where they are the last ones and stay as axes of one."""
    if node is None or not is_op(node, "ReduceMean") or node.inputs[0] is None:
        return None
    keeps = node.attributes.get("keepdims")
    axes, dimensions = axes_of(node), rank(node.inputs[0])
    if (keeps is not None and not keeps.as_int()) or not axes or dimensions is None:
        return None
    positions = sorted(axis % dimensions for axis in axes)
    return len(positions) if positions == list(range(dimensions - len(positions), dimensions)) else None


def _normalizations(statistics: _Statistics) -> Iterator[_Normalization]:
    """Every result that is the normalized x, with or without weights."""
    x, mean, inverse = statistics.x, statistics.mean, (statistics.root, statistics.exponent)
    unit = {monomial((x, 1), inverse): 1.0}
    if mean is not None:
        unit[monomial((mean, 1), inverse)] = -1.0
    atoms = tuple(value for value in (x, mean, statistics.root) if value is not None)
    for result, scale, bias, nodes in _affine(statistics.root, unit, atoms):
        if bias is not None and mean is None:
            continue
        consumed = statistics.nodes | nodes
        yield _Normalization(statistics, x, scale, bias, result, consumed)
        if scale is None and bias is None:
            yield from _between_casts(statistics, result, consumed)


def _between_casts(
    statistics: _Statistics, normalized: ir.Value, nodes: frozenset[ir.Node]
) -> Iterator[_Normalization]:
    """The normalization of a half-precision value: Cast up, normalize, Cast down, times w, plus b."""
    up, down = statistics.x.producer(), sole_consumer(normalized)
    if up is None or down is None or not is_op(up, "Cast") or not is_op(down, "Cast"):
        return
    source, cast = up.inputs[0], down.outputs[0]
    if source is None or source.dtype is None or source.dtype != cast.dtype:
        return
    for result, scale, bias, affine in _affine(cast, {monomial((cast, 1)): 1.0}, (cast,)):
        if bias is None or statistics.mean is not None:
            yield _Normalization(statistics, source, scale, bias, result, nodes | affine | {down})


def _affine(
    start: ir.Value, unit: Mapping[Monomial, float], atoms: tuple[ir.Value, ...]
) -> Iterator[tuple[ir.Value, ir.Value | None, ir.Value | None, frozenset[ir.Node]]]:
    """Result, scale, bias and nodes of every value computed from `start` that is unit * scale + bias."""
    for result in possible_results(start, depth=6):
        found = expand(result, atoms, weights=True)
        if found is None or found.constant_rank > (rank(atoms[0]) or 0):
            continue
        weights = {value for term in found.terms for value, _ in term}.difference(atoms)
        for scale in (None, *weights):
            for bias in (None, *weights - {scale}):
                factor = () if scale is None else ((scale, 1),)
                expected = {monomial(*term, *factor): number for term, number in unit.items()}
                if bias is not None:
                    expected[monomial((bias, 1))] = 1.0
                if found.terms == expected:
                    yield result, scale, bias, found.nodes


# Emission ---------------------------------------------------------------------------------------------------------


def _emit(rewriter: Rewriter, found: _Normalization, opset: int) -> bool:
    """Put the operator, or the spelling that onnxruntime fuses, in the place of the result."""
    statistics, source = found.statistics, found.source
    after = found.result.producer()
    assert after is not None
    assert isinstance(after.graph, ir.Graph)
    if statistics.mean is None and opset < _RMS_NORM_OPSET:
        spelling = _RMS_NORM_SPELLING[: 5 if found.scale is None else 6]
        if collections.Counter(node.op_type for node in found.nodes) == collections.Counter(spelling):
            return False
        last = _root_and_division(rewriter, after, found)
    else:
        if opset < 17:
            raise DeclinedError(f"LayerNormalization needs opset 17, the model has {opset}")
        inputs: list[ir.Value | None] = [source, _weight(rewriter, after.graph, found, found.scale, "scale")]
        if found.bias is not None:
            inputs.append(_weight(rewriter, after.graph, found, found.bias, "bias"))
        op_type = "RMSNormalization" if statistics.mean is None else "LayerNormalization"
        attributes: dict[str, int | float | str | Sequence[int]] = {
            "axis": -statistics.axes_count,
            "epsilon": statistics.epsilon,
            "stash_type": 1,
        }
        last = rewriter.insert(after, op_type, inputs, attributes=attributes, like=found.result, suffix=op_type.lower())
    rewriter.supersede(found.result, last.outputs[0])
    discard(found.nodes)
    up = statistics.x.producer()
    if source is not statistics.x and up is not None:
        discard([up])
    return True


def _root_and_division(rewriter: Rewriter, after: ir.Node, found: _Normalization) -> ir.Node:
    """x / Sqrt(ReduceMean(Pow(x, 2)) + epsilon) * scale, in the spelling that onnxruntime fuses."""
    x = found.source
    assert isinstance(after.graph, ir.Graph)
    assert x.dtype is not None
    name, graph, count = found.result.name, after.graph, found.statistics.axes_count
    two = rewriter.initializer(graph, f"{name}_two", to_tensor(np.asarray(2.0), x.dtype))
    epsilon = rewriter.initializer(graph, f"{name}_epsilon", to_tensor(np.asarray(found.statistics.epsilon), x.dtype))
    axes = rewriter.initializer(graph, f"{name}_axes", ir.Tensor(np.arange(-count, 0, dtype=np.int64)))
    square = rewriter.insert(after, "Pow", [x, two], like=x, suffix="pow")
    mean = rewriter.insert(square, "ReduceMean", [square.outputs[0], axes], like=x, suffix="reducemean")
    shifted = rewriter.insert(mean, "Add", [mean.outputs[0], epsilon], like=x, suffix="add")
    root = rewriter.insert(shifted, "Sqrt", shifted.outputs, like=x, suffix="sqrt")
    last = rewriter.insert(root, "Div", [x, root.outputs[0]], like=x, suffix="div")
    return (
        last
        if found.scale is None
        else rewriter.insert(last, "Mul", [last.outputs[0], found.scale], like=x, suffix="mul")
    )


def _weight(rewriter: Rewriter, graph: ir.Graph, found: _Normalization, weight: ir.Value | None, role: str) -> ir.Value:
    """A weight in the shape of the normalized axes: the constant itself, a reshaped copy, or ones."""
    count, x = found.statistics.axes_count, found.source
    shape = () if x.shape is None else tuple(x.shape)[-count:]
    if len(shape) != count or not all(isinstance(size, int) for size in shape) or x.dtype is None:
        raise DeclinedError("the size of the normalized axes is not known")
    sizes = tuple(int(size) for size in shape if isinstance(size, int))
    if weight is None:
        ones = np.ones(sizes, dtype=np.float64)
        return rewriter.initializer(graph, f"{found.result.name}_{role}", to_tensor(ones, x.dtype))
    array = constant(weight)
    assert array is not None
    if array.shape == sizes and weight.dtype == x.dtype:
        return weight
    leading = array.shape[: max(array.ndim - count, 0)]
    if any(size != 1 for size in leading):
        raise DeclinedError(f"the weight {weight.name} of shape {list(array.shape)} also varies before the axes")
    try:
        reshaped = np.broadcast_to(array.reshape(array.shape[len(leading) :]), sizes)
    except ValueError:
        raise DeclinedError(f"the weight {weight.name} of shape {list(array.shape)} does not fit the axes") from None
    return rewriter.initializer(graph, f"{weight.name}_{role}", to_tensor(reshaped, x.dtype))
