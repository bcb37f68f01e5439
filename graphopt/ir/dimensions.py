"""Sizes of axes, static or symbolic: reading them off a value, multiplying and dividing them.

A symbolic size is text, as in ONNX's `dim_param`: the name of an input dimension or a polynomial in such names
(`batch*sequence`, `past + sequence`). Parsing and algebra are onnx_ir's (`SymbolicDim`, on sympy); text that is no
expression is a symbol like any other, equal to itself alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache, reduce

import onnx_ir as ir

from graphopt.ir.ops.row import Shape

DEFAULT_SIZE = 2
"""Elements of a symbolic dimension that nobody gave a size. Never 1: broadcasting would be ambiguous."""
Dimension = int | str
"""Number of elements, or the symbol or expression that stands for it."""


def dimensions(value: ir.Value | None) -> tuple[Dimension, ...] | None:
    """Shape with text for symbolic dimensions; None where the rank or a dimension is unknown."""
    if value is None or value.shape is None:
        return None
    found: list[Dimension] = []
    for dim in value.shape:
        size = dim if isinstance(dim, int) else dim.value
        if size is None:
            return None
        found.append(size)
    return tuple(found)


def product(factors: Iterable[Dimension]) -> Dimension | None:
    """The product of sizes; None where a symbol is no expression and has another factor beside it.

    Example:
        >>> product([2, "batch", 3]), product(["batch", "sequence"]), product([])
        ('6*batch', 'batch*sequence', 1)
    """
    sizes = [size for size in factors if size != 1]
    if all(isinstance(size, int) for size in sizes):
        return math.prod(size for size in sizes if isinstance(size, int))
    return sizes[0] if len(sizes) == 1 else _multiplied(tuple(sizes))


@lru_cache(maxsize=4096)
def quotient(size: Dimension, divisor: Dimension) -> Dimension | None:
    """`size / divisor` where it is whole for every choice of the symbols, else None. Nothing divides zero.

    Example:
        >>> quotient("4*batch*sequence", "batch"), quotient("batch", "batch"), quotient("batch", 2)
        ('4*sequence', 1, None)
    """
    if size == divisor:
        return None if size == 0 else 1
    if divisor == 1:
        return size
    if isinstance(size, int):
        return size // divisor if isinstance(divisor, int) and size and divisor and size % divisor == 0 else None
    if divisor == 0:
        return None
    try:
        ratio = ir.SymbolicDim(size) / (divisor if isinstance(divisor, int) else ir.SymbolicDim(divisor))
        text = ratio.simplify().value
    except (ValueError, ArithmeticError):  # not an expression: a symbol without algebra
        return None
    return None if text is None or "/" in text else _read(text)


def evaluate(size: str, sizes: Mapping[str, int]) -> int | None:
    """The number that a symbolic size is at these sizes of the symbols, None where a symbol has none."""
    if size in sizes:
        return sizes[size]
    try:
        found = ir.SymbolicDim(size).evaluate(sizes)
    except (ValueError, ArithmeticError):
        return None
    return found if isinstance(found, int) else None


@lru_cache(maxsize=4096)
def polynomial(terms: tuple[tuple[tuple[str, ...], int], ...]) -> Dimension:
    """The size with these integer coefficients of products of symbols; equal polynomials give equal text.

    Example:
        >>> polynomial(((("batch", "sequence"), 1), (("batch",), 2))), polynomial((((), 7),))
        ('batch*sequence + 2*batch', 7)
    """
    constant = sum(coefficient for names, coefficient in terms if not names)
    symbolic = [
        reduce(lambda left, name: left * ir.SymbolicDim(name), names[1:], ir.SymbolicDim(names[0])) * coefficient
        for names, coefficient in terms
        if names and coefficient
    ]
    if not symbolic:
        return constant
    text = (reduce(lambda left, right: left + right, symbolic) + constant).value
    assert text is not None
    return text


@lru_cache(maxsize=4096)
def _multiplied(sizes: tuple[Dimension, ...]) -> Dimension | None:
    try:
        number = math.prod(size for size in sizes if isinstance(size, int))
        symbols = [ir.SymbolicDim(size) for size in sizes if isinstance(size, str)]
        text = (reduce(lambda left, right: left * right, symbols) * number).value
    except ValueError:
        return None
    return None if text is None else _read(text)


def _read(text: str) -> Dimension:
    return int(text) if text.lstrip("-").isdigit() else text


def dimension_name(value: ir.Value, axis: int) -> str | None:
    """Name of a symbolic dimension: its own, or `value[axis]` where the model left it anonymous; None if static."""
    assert value.shape is not None
    dimension = value.shape[axis]
    if isinstance(dimension, int):
        return None
    return dimension.value or f"{value.name}[{axis}]"


def symbolic_dimensions(model: ir.Model) -> list[str]:
    """Names of the symbolic dimensions of the model's inputs, each once, in order of appearance."""
    names: dict[str, None] = {}
    for value in model.graph.inputs:
        for axis in range(len(value.shape) if value.shape is not None else 0):
            name = dimension_name(value, axis)
            if name is not None:
                names[name] = None
    return list(names)


def concrete_shape(value: ir.Value, sizes: Mapping[str, int]) -> Shape | None:
    """Declared shape with numbers for symbols; None where the rank is unknown or a symbol is an unbound expression."""
    if value.shape is None:
        return None
    shape: list[int] = []
    for axis, dimension in enumerate(value.shape):
        name = dimension_name(value, axis)
        shape.append(int(dimension) if name is None else sizes.get(name, DEFAULT_SIZE))  # type: ignore[arg-type]
    return tuple(shape)


def known_sizes(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, int] | None:
    """Those of `sizes` that are dimensions of the model, by name; None where none is."""
    names = symbolic_dimensions(model)
    return {name: size for name, size in sizes.items() if name in names} or None
