"""Polynomial normal form of elementwise arithmetic, and closedness of what a match consumes."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.match import expand, monomial, possible_atoms, possible_results, require_closed
from graphopt.ir.rewrite import DeclinedError


def _model(body: str, outputs: str = "float[3] y") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[3] x, float[3] z) => ({outputs}) '
        f"<float two = {{2}}, float half = {{0.5}}, float[3] w = {{1, 2, 3}}> {{ {body} }}"
    )


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul(x, half) b = Add(z, two) y = Mul(a, b)",
        "b = Add(two, z) a = Mul(b, x) y = Div(a, two)",
        "a = Mul(x, z) b = Mul(half, a) y = Add(b, x)",
        "a = Neg(z) b = Sub(a, two) c = Mul(x, b) d = Mul(c, half) y = Neg(d)",
    ],
)
def test_spellings_of_one_polynomial_are_equal(body: str) -> None:
    model = _model(body)
    x, z = model.graph.inputs
    found = expand(model.graph.outputs[0], (x, z))
    assert found is not None
    assert found.terms == {monomial((x, 1), (z, 1)): 0.5, monomial((x, 1)): 1.0}
    assert found.nodes == set(model.graph)


def test_quotients_are_negative_powers() -> None:
    model = _model("a = Reciprocal(z) b = Mul(x, a) c = Div(b, z) y = Mul(c, z)")
    x, z = model.graph.inputs
    found = expand(model.graph.outputs[0], (x, z))
    assert found is not None
    assert found.terms == {monomial((x, 1), (z, -1)): 1.0}


@pytest.mark.parametrize(
    "body",
    ["a = Add(x, two) y = Div(x, a)", "y = Erf(x)", "y = Mul(x, w)", "y = Pow(x, half)", "a = Pow(x, x) y = Neg(a)"],
)
def test_what_is_no_polynomial_is_none(body: str) -> None:
    model = _model(body)
    assert expand(model.graph.outputs[0], tuple(model.graph.inputs)) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["Add x", "Mul x", "Sub z", "Mul two", "Div two", "Neg", "Add z"]), max_size=5))
def test_expansion_evaluates_to_the_value(steps: list[str]) -> None:
    body, last, number = "", "x", 3.0
    x_value, z_value = 3.0, -5.0
    values = {"x": x_value, "z": z_value, "two": 2.0}
    for index, step in enumerate([*steps, "Neg"]):
        op, _, operand = step.partition(" ")
        out = "y" if index == len(steps) else f"t{index}"
        body += f"{out} = {op}({last}{', ' + operand if operand else ''}) "
        last = out
        other = values.get(operand, 0.0)
        number = {"Add": number + other, "Sub": number - other, "Mul": number * other, "Neg": -number}.get(
            op, number / other if other else number
        )
    model = _model(body)
    x, z = model.graph.inputs
    found = expand(model.graph.outputs[0], (x, z))
    if found is None:  # degree above the limit
        return
    at = {x: x_value, z: z_value}
    total = 0.0
    for term, coefficient in found.terms.items():
        total += coefficient * math.prod(at[value] ** exponent for value, exponent in term)
    assert total == pytest.approx(number)


def test_matches_is_tight() -> None:
    model = _model("y = Mul(x, half)")
    x = model.graph.inputs[0]
    found = expand(model.graph.outputs[0], (x,))
    assert found is not None
    assert found.matches({monomial((x, 1)): 0.500001}, ir.DataType.FLOAT)
    assert not found.matches({monomial((x, 1)): 0.5001}, ir.DataType.FLOAT)
    assert not found.matches({monomial((x, 1)): -0.5}, ir.DataType.FLOAT)
    assert not found.matches({monomial((x, 2)): 0.5}, ir.DataType.FLOAT)
    assert not found.matches({monomial((x, 1)): 0.5, monomial(): 1.0}, ir.DataType.FLOAT)


def test_candidates_are_nearest_first() -> None:
    model = _model("e = Erf(x) a = Add(e, two) b = Mul(a, z) y = Neg(b)")
    names = {node.outputs[0].name: node.outputs[0] for node in model.graph}
    assert [value.name for value in possible_atoms(names["y"])] == ["y", "b", "a", "z", "e"]
    assert [value.name for value in possible_results(names["e"])] == ["e", "a", "b", "y"]


def test_a_value_that_is_seen_from_outside_is_named() -> None:
    model = _model("a = Mul(x, two) b = Add(a, z) y = Neg(a)", "float[3] y, float[3] b")
    nodes = {node.op_type: node for node in model.graph}
    require_closed({nodes["Mul"]}, nodes["Mul"].outputs[0])
    with pytest.raises(DeclinedError, match="is also read by Add"):
        require_closed({nodes["Mul"], nodes["Neg"]}, nodes["Neg"].outputs[0])
    with pytest.raises(DeclinedError, match="graph output"):
        require_closed(set(model.graph), model.graph.outputs[0])
