"""Symbolic sizes: the algebra agrees with the numbers that the symbols stand for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.dimensions import Dimension, evaluate, polynomial, product, quotient

SIZES = {"batch": 3, "past": 5, "sequence": 7}
_FACTORS = st.lists(st.sampled_from([2, 3, 4, "batch", "sequence", "past + sequence"]), min_size=1, max_size=4)


def number(size: Dimension | None) -> int | None:
    return evaluate(size, SIZES) if isinstance(size, str) else size


@settings(max_examples=60, deadline=None)
@given(_FACTORS, _FACTORS)
def test_a_product_divided_by_a_factor_is_the_other(first: list[Dimension], second: list[Dimension]) -> None:
    whole, part = product([*first, *second]), product(first)
    assert whole is not None
    assert part is not None
    assert number(whole) == math.prod(number(size) or 0 for size in [*first, *second])
    left = quotient(whole, part)
    assert left is not None
    assert number(left) == math.prod(number(size) or 0 for size in second)


@pytest.mark.parametrize(
    ("size", "divisor"), [("batch", 2), ("batch", "sequence"), ("batch + 1", "batch"), (6, 4), (0, 0), (5, 0), (0, 5)]
)
def test_what_does_not_come_out_whole_is_none(size: Dimension, divisor: Dimension) -> None:
    assert quotient(size, divisor) is None


@pytest.mark.parametrize("name", ["?", "N,C", "a b", "x[1]"])
def test_names_that_are_no_expressions_are_symbols_without_algebra(name: str) -> None:
    assert quotient(name, name) == 1
    assert quotient(name, 2) is None
    assert product([name]) == name
    assert product([name, 2]) is None
    assert evaluate(name, SIZES) is None


def test_equal_polynomials_have_equal_text() -> None:
    one = polynomial(((("batch", "sequence"), 2), (("batch",), 1), ((), 0)))
    other = polynomial(((("batch",), 1), (("sequence", "batch"), 2)))
    assert one == other == "2*batch*sequence + batch"
