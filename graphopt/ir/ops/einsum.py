"""The arithmetic of Einsum: the extent of each index, and the multiplications that an equation costs.

Source: ONNX Einsum 12 (numpy's `einsum`, with "..." for broadcast axes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphopt.ir.ops.row import Shape, Site

Indices = tuple[str, ...]
"""Index names of an operand's axes: letters, and "...k" for the k-th broadcast axis from the right."""


def einsum_macs(site: Site) -> int:
    """Product of all index extents (2 operands); more operands: summed over pairs, left to right.

    One operand is a permutation, diagonal or sum: 0. With three or more, operands are contracted two at a
    time from the left, and every index that neither a later operand nor the output needs is summed at once.

    Example:
        "bqd,bkd->bqk" on [2, 3, 5] and [2, 4, 5] costs 2 * 3 * 4 * 5 = 120.
    """
    shapes = [site.input_shape(index) for index in range(len(site.inputs))]
    operands, output = parse_equation(str(site.attribute("equation")), shapes)
    extents = index_extents(operands, shapes)
    total = 0
    left = operands[0]
    for position, right in enumerate(operands[1:], start=1):
        touched = set(left) | set(right)
        total += math.prod(extents[index] for index in touched)
        needed = set(output).union(*operands[position + 1 :])
        left = tuple(touched & needed)
    return total


def parse_equation(equation: str, shapes: Sequence[Shape]) -> tuple[list[Indices], Indices]:
    """The index names of each operand and of the output; the implicit output is in alphabetical order.

    Args:
        equation: for instance "...ij,jk->...ik".
        shapes: concrete shape of each operand; only the ranks are read, to see how many axes "..." stands
        for.
    """
    inputs, arrow, explicit = equation.replace(" ", "").partition("->")
    operands = [
        _expand_ellipsis(term, len(shape) - len(term.replace("...", "")))
        for term, shape in zip(inputs.split(","), shapes, strict=True)
    ]
    broadcast_axes = max((sum(name.startswith(".") for name in names) for names in operands), default=0)
    if arrow:
        return operands, _expand_ellipsis(explicit, broadcast_axes)
    letters = [name for names in operands for name in names if not name.startswith(".")]
    once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    return operands, (*_expand_ellipsis("...", broadcast_axes), *once)


def index_extents(operands: Sequence[Indices], shapes: Sequence[Shape]) -> dict[str, int]:
    """Extent of each index: the largest over its axes, because axes of size 1 broadcast."""
    extents: dict[str, int] = {}
    for names, shape in zip(operands, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            extents[name] = size if extents.get(name, 1) == 1 else extents[name]
    return extents


def _expand_ellipsis(term: str, axes: int) -> Indices:
    before, ellipsis, after = term.partition("...")
    middle = [f"...{axes - position - 1}" for position in range(axes)] if ellipsis else []
    return (*before, *middle, *after)
