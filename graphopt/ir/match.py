"""Recognizing a computation whatever way an exporter wrote it: normal forms instead of lists of patterns.

`expand` reads elementwise arithmetic as a polynomial over chosen values, so that `0.5 * x * (1 + e)`,
`x * (e + 1) / 2` and `0.5 * x + x * e * 0.5` are one and the same thing; operand order, association and
division by constants are handled here and nowhere else. `require_closed` is the other half of every match: what a
rewrite consumes must be invisible from outside, so that `discard` may remove it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.rewrite import (
    FLOATING,
    DeclinedError,
    constant,
    constant_tensor,
    discard_if_dead,
    is_op,
    rank,
)

Monomial = frozenset[tuple[ir.Value, int]]
"""A product of powers, negative ones included: pairs of value and exponent. The empty one is the constant term."""

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Reciprocal", "Neg", "Pow")
"""The elementwise operators that `expand` sees through."""

_HIGHEST_DEGREE = 4
_RELATIVE_ACCURACY = {ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 1e-2}
"""How near a constant must be to the number it stands for; exporters round it once to the element type."""


@dataclass(frozen=True)
class Expansion:
    """A value as a polynomial over other values.

    Attributes:
        terms: coefficient of each monomial; no coefficient is zero.
        nodes: the nodes that compute the value from the atoms.
        constant_rank: highest rank of the scalar constants read; a constant of shape [1, 1] gives its rank to
            the result, so a match must see that it is no higher than the rank of the atoms.
    """

    terms: Mapping[Monomial, float]
    nodes: frozenset[ir.Node] = frozenset()
    constant_rank: int = 0

    def matches(self, expected: Mapping[Monomial, float], element_type: ir.DataType | None) -> bool:
        """Whether both have the same monomials with the same coefficients, up to rounding to the element type."""
        accuracy = _RELATIVE_ACCURACY.get(element_type or ir.DataType.FLOAT, 1e-5)
        return self.terms.keys() == expected.keys() and all(
            abs(self.terms[monomial] - coefficient) <= accuracy * abs(coefficient)
            for monomial, coefficient in expected.items()
        )

    def linear_in(self, value: ir.Value) -> tuple[float, float] | None:
        """`(a, b)` where the polynomial is a * value + b with a not zero, else None."""
        power = monomial((value, 1))
        if power not in self.terms or not self.terms.keys() <= {power, monomial()}:
            return None
        return self.terms[power], self.terms.get(monomial(), 0.0)

    @property
    def degree(self) -> int:
        """Highest total degree of a monomial, negative exponents counted as positive ones."""
        return max((sum(abs(exponent) for _, exponent in term) for term in self.terms), default=0)


def monomial(*powers: tuple[ir.Value, int]) -> Monomial:
    """The product of these powers; exponent 0 is left out."""
    return frozenset((value, exponent) for value, exponent in powers if exponent)


def scalar(value: ir.Value | None) -> float | None:
    """The number that a one-element numeric constant holds, else None. Exponents may be integers."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype not in FLOATING | {ir.DataType.INT32, ir.DataType.INT64}:
        return None
    return float(np.asarray(tensor.numpy(), dtype=np.float64).reshape(()))


def expand(value: ir.Value, atoms: Collection[ir.Value], *, weights: bool = False) -> Expansion | None:
    """`value` as a polynomial over `atoms`, or None where it is none (of low degree, over these alone).

    Args:
        value: the result to read.
        atoms: the values that are not looked into.
        weights: whether constants of more than one element are atoms, too.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[3] x) => (float[3] y) <float two = {2}> { a = Mul(x, two) y = Sub(a, x) }''')
        >>> x, y = model.graph.inputs[0], model.graph.outputs[0]
        >>> expand(y, {x}).terms == {monomial((x, 1)): 1.0}
        True
    """
    if value in atoms:
        return Expansion({monomial((value, 1)): 1.0})
    number = scalar(value)
    if number is not None:
        return Expansion({monomial(): number} if number else {}, constant_rank=rank(value) or 0)
    if weights and constant_tensor(value) is not None:
        return Expansion({monomial((value, 1)): 1.0})
    node = value.producer()
    if node is None or not is_op(node, *ARITHMETIC):
        return None
    operands: list[Expansion] = []
    for operand in node.inputs:
        expansion = None if operand is None else expand(operand, atoms, weights=weights)
        if expansion is None:
            return None
        operands.append(expansion)
    terms = _combine(node.op_type, [operand.terms for operand in operands])
    if terms is None:
        return None
    expansion = Expansion(
        terms,
        frozenset({node}).union(*(operand.nodes for operand in operands)),
        max(operand.constant_rank for operand in operands),
    )
    return expansion if expansion.degree <= _HIGHEST_DEGREE else None


def possible_atoms(value: ir.Value, depth: int = 6) -> Iterator[ir.Value]:
    """`value` and the run-time values that it is computed from by arithmetic alone, nearest first."""
    seen: set[ir.Value] = set()
    level = [value]
    for _ in range(depth + 1):
        following: list[ir.Value] = []
        for candidate in level:
            if candidate in seen or constant_tensor(candidate) is not None:
                continue
            seen.add(candidate)
            yield candidate
            producer = candidate.producer()
            if producer is not None and is_op(producer, *ARITHMETIC):
                following.extend(operand for operand in producer.inputs if operand is not None)
        level = following


def possible_results(value: ir.Value, depth: int = 5) -> Iterator[ir.Value]:
    """The values computed from `value` by arithmetic, in the same graph, nearest first; `value` is the first."""
    producer = value.producer()
    seen = {value}
    level = [value]
    for _ in range(depth + 1):
        following: list[ir.Value] = []
        for candidate in level:
            yield candidate
            for use in candidate.uses():
                result = use.node.outputs[0]
                if is_op(use.node, *ARITHMETIC) and result not in seen and use.node.graph is _graph(producer):
                    seen.add(result)
                    following.append(result)
        level = following


def clip_bounds(node: ir.Node) -> tuple[float | None, float | None] | None:
    """Lower and upper bound of a Clip with constant bounds (None where it has none); None for any other node."""
    if not is_op(node, "Clip"):
        return None
    bounds: list[float | None] = []
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        number = scalar(value)
        if value is not None and number is None:
            return None
        bounds.append(None if number is None or np.isinf(number) else number)
    return bounds[0], bounds[1]


def axes_of(node: ir.Node) -> tuple[int, ...] | None:
    """Axes of a reduction, from its input (opset 18) or its attribute; None where they are not known."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant(node.inputs[1])
        return None if array is None else tuple(int(axis) for axis in array.reshape(-1))
    attribute = node.attributes.get("axes")
    return None if attribute is None else tuple(attribute.as_ints())


def require_closed(nodes: Collection[ir.Node], result: ir.Value) -> None:
    """Raise `DeclinedError` unless `result` is the only value of `nodes` that anything else can see."""
    home = _graph(result.producer())
    for node in nodes:
        if node.graph is not home:
            raise DeclinedError(f"{node.op_type} {node.name} is computed outside the subgraph that reads it", node)
        for output in node.outputs:
            if output is result:
                continue
            if output.is_graph_output():
                raise DeclinedError(f"the result {output.name} of {node.op_type} is also a graph output", node)
            outsiders = [use.node for use in output.uses() if use.node not in nodes]
            if outsiders:
                reader = f"{outsiders[0].op_type} {outsiders[0].name or ''}".rstrip()
                raise DeclinedError(f"the result {output.name} of {node.op_type} is also read by {reader}", node)


def discard(nodes: Collection[ir.Node]) -> None:
    """Remove those of `nodes` that nothing reads any more, and the constants that only they read."""
    remaining = [node for node in nodes if node.graph is not None]
    while remaining:
        left = [node for node in remaining if not discard_if_dead(node)]
        if len(left) == len(remaining):
            return
        remaining = left


def _graph(node: ir.Node | None) -> object:
    return None if node is None else node.graph


def _combine(op_type: str, operands: list[Mapping[Monomial, float]]) -> Mapping[Monomial, float] | None:
    """The polynomial that an arithmetic operator makes of its operands, None where it makes none."""
    first = operands[0]
    if op_type == "Neg":
        return _scaled(first, -1.0)
    if op_type == "Reciprocal":
        return _inverse(first)
    second = operands[1]
    if op_type == "Add":
        return _sum(first, second)
    if op_type == "Sub":
        return _sum(first, _scaled(second, -1.0))
    if op_type == "Mul":
        return _product(first, second)
    if op_type == "Div":
        inverse = _inverse(second)
        return None if inverse is None else _product(first, inverse)
    exponent = second.get(monomial()) if second.keys() <= {monomial()} else None  # Pow
    if exponent is None or exponent not in range(1, _HIGHEST_DEGREE + 1):
        return None
    power = first
    for _ in range(int(exponent) - 1):
        power = _product(power, first)
    return power


def _inverse(terms: Mapping[Monomial, float]) -> Mapping[Monomial, float] | None:
    """One over a single monomial; a sum has no inverse here."""
    if len(terms) != 1:
        return None
    ((term, coefficient),) = terms.items()
    return {frozenset((value, -exponent) for value, exponent in term): 1.0 / coefficient}


def _scaled(terms: Mapping[Monomial, float], factor: float) -> Mapping[Monomial, float]:
    return {term: coefficient * factor for term, coefficient in terms.items()}


def _sum(first: Mapping[Monomial, float], second: Mapping[Monomial, float]) -> Mapping[Monomial, float]:
    total = {term: first.get(term, 0.0) + second.get(term, 0.0) for term in first.keys() | second.keys()}
    return {term: coefficient for term, coefficient in total.items() if coefficient}


def _product(first: Mapping[Monomial, float], second: Mapping[Monomial, float]) -> Mapping[Monomial, float]:
    total: dict[Monomial, float] = {}
    for left, left_coefficient in first.items():
        for right, right_coefficient in second.items():
            exponents = dict(left)
            for value, exponent in right:
                exponents[value] = exponents.get(value, 0) + exponent
            term = monomial(*exponents.items())
            total[term] = total.get(term, 0.0) + left_coefficient * right_coefficient
    return {term: coefficient for term, coefficient in total.items() if coefficient}
