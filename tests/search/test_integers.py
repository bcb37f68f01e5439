"""Integers as a choice of each operator: borders are where numbers change, and costs and losses are counted there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.search.budget import evaluate
from graphopt.search.integers import Border, IntegerForms, find_borders
from graphopt.search.joint import Block, JointProblem
from graphopt.search.latency_model import LatencyModel, Measured, Variant
from graphopt.search.latency_variants import _measured, _on_integers, variants
from graphopt.search.layer_forms import LayerForm
from graphopt.search.milp import solve_milp
from graphopt.search.node_costs import CountedCosts
from tests.search.test_joint import Setting

RESIDUAL = """<ir_version: 10, opset_import: ["": 21]>
    g (float[1,8,6,6] x, float[8,8,1,1] wa, float[8,8,1,1] wb) => (float[1,8,6,6] y, float[1,8,6,6] r) {
      [a] c = Conv (x, wa)
      [relu] r = Relu (c)
      [b] d = Conv (r, wb)
      [add] s = Add (r, d)
      [exp] y = Exp (s)
    }"""
FORMS = {"a": "static", "relu": "folded", "b": "static", "add": "static"}


def _residual() -> ir.Model:
    model = ir.from_onnx_text(RESIDUAL)
    for value in model.graph.inputs[1:]:
        value.const_value = ir.tensor(np.zeros([int(size) for size in value.shape or ()], np.float32))
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    return model


def test_borders_look_through_activations_that_a_quantizer_does() -> None:
    model = _residual()
    names = {node.name or "" for node in model.graph}
    found = {border.ends: border for border in find_borders(list(model.graph), FORMS, model.graph.outputs, names)}
    assert set(found) == {("a",), ("a", "b", "add"), ("b", "add"), ("add",)}
    assert found["a",] == Border("a", True, 0, None, ("a",), False)
    assert found["a", "b", "add"] == Border("a", False, 0, "a", ("b", "add"), True), "r is an output as well"
    assert found["add",].read_as_float


def test_borders_of_unknown_nodes_are_told_by_their_readers() -> None:
    model = _residual()
    found = find_borders(list(model.graph), FORMS, model.graph.outputs, {"b"})
    assert [(border.node, border.inwards, border.maker) for border in found] == [("b", True, "a"), ("b", False, "b")]


@pytest.mark.parametrize(
    ("border", "chosen", "expected"),
    [
        (Border("x", True, 0, None, ("b",), False), "", []),
        (Border("x", True, 0, None, ("b",), False), "b", [True]),
        (Border("x", True, 0, None, ("b", "c"), True), "bc", [True]),
        (Border("a", False, 0, "a", ("b", "c"), False), "abc", []),
        (Border("a", False, 0, "a", ("b", "c"), False), "ab", [False]),
        (Border("a", False, 0, "a", ("b", "c"), False), "bc", [True]),
        (Border("a", False, 0, "a", (), True), "a", [False]),
        (Border("a", False, 0, "a", (), True, writes_both=True), "a", []),
        (Border("a", False, 0, "a", ("b",), True, writes_both=True), "ab", [False]),
    ],
)
def test_a_value_is_converted_where_numbers_change(border: Border, chosen: str, expected: list[bool]) -> None:
    assert list(border.conversions(set(chosen))) == expected


class Priced:
    """Costs by hand: 10 a node in floats, 4 on integers, and a fixed price of conversions."""

    fixed = 0.0

    def __init__(self, setting: Setting, price: float) -> None:
        self.places = dict(setting.node_costs.places)
        self._price = price

    def at(
        self, node: str, removed: Mapping[str, int], form: LayerForm | None = None, *, integer: bool = False
    ) -> float:
        return (4.0 if integer else 10.0) * (0.5 if form else 1.0) - 0.01 * sum(
            removed.get(name, 0) for name in self.places[node]
        )

    def conversion(self, border: Border, removed: Mapping[str, int], *, to_integers: bool) -> float:
        return self._price * (1.0 if to_integers else 1.5)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def _chain(setting: Setting, price: float, blocks: tuple[Block, ...] = ()) -> JointProblem:
    names = list(setting.node_costs.places)
    borders = [Border(first, False, 0, first, (second,), False) for first, second in itertools.pairwise(names)]
    borders = [Border(names[0], True, 0, None, (names[0],), False), *borders]
    borders.append(Border(names[-1], False, 0, names[-1], (), True))
    integers = IntegerForms({name: 0.001 * (1 + place) for place, name in enumerate(names)}, tuple(borders))
    return JointProblem((), setting.forms, Priced(setting, price), blocks, low_rank=False, integers=integers)


@pytest.mark.parametrize("price", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.55])
def test_the_solver_is_as_good_as_trying_everything(setting: Setting, price: float, share: float) -> None:
    problem = _chain(setting, price).within(share * 50.0)
    best = -math.inf
    for options in itertools.product(range(2), repeat=len(problem.choices)):
        value, spent = evaluate(problem, dict(zip((one.name for one in problem.choices), options, strict=True)))
        best = max(best, value) if spent <= problem.budget else best
    assert best > -math.inf
    assert solve_milp(problem).value == pytest.approx(best)


def test_conversions_keep_neighbours_together(setting: Setting) -> None:
    """Free conversions: those that lose least, wherever they are. Dear ones: a run of neighbours, converted twice."""
    names = list(setting.node_costs.places)
    free, dear = _chain(setting, 0.0), _chain(setting, 2.0)
    taken = free.taken(solve_milp(free.within(38.0)))
    assert taken.integers == set(names[:2])
    taken = dear.taken(solve_milp(dear.within(38.0)))
    places = sorted(names.index(name) for name in taken.integers)
    assert len(places) > 2
    assert places == list(range(places[0], places[-1] + 1))


def test_nothing_is_on_integers_in_a_block_that_goes(setting: Setting) -> None:
    names = list(setting.node_costs.places)
    problem = _chain(setting, 0.0, (Block("block", frozenset(names[:2]), 0.01),))
    stated = problem.within(1e9)
    options = dict.fromkeys((one.name for one in stated.choices), 1)
    value, spent = evaluate(stated, options)
    taken = problem.taken(SimpleNamespace(options=options))  # pyright: ignore[reportArgumentType]
    assert taken.integers == set(names[2:])
    assert spent == pytest.approx(4.0 * len(names[2:]))
    assert value == pytest.approx(-0.01 - sum(0.001 * (1 + place) for place in range(2, len(names))))


def test_values_with_many_readers_are_looked_at_reader_by_reader(setting: Setting) -> None:
    names = list(setting.node_costs.places)
    border = Border(names[0], False, 0, names[0], (*names[1:], "e", "f"), False)
    integers = IntegerForms(dict.fromkeys((*names, "e", "f"), 0.0), (border,))
    problem = JointProblem((), setting.forms, Priced(setting, 6.0), (), low_rank=False, integers=integers).within(1e9)
    options = dict.fromkeys((one.name for one in problem.choices), 0)
    _, floats = evaluate(problem, options)
    _, split = evaluate(problem, {**options, f"numbers of {names[0]}": 1})
    assert split - floats == pytest.approx(-6.0 + 9.0), "all read it as floats: one conversion"


def test_bytes_of_integers_are_a_quarter_with_scales_beside_and_macs_the_same(setting: Setting) -> None:
    outputs = {node.name: int(list(node.outputs[0].shape or ())[1]) for node in setting.model.graph}
    for kind, share, each in (("bytes", 0.25, 9), ("macs", 1.0, 0), ("params", 1.0, 0)):
        counted = CountedCosts(setting.costs, kind, setting.forms)
        for node in counted.places:
            whole, scales = counted.at(node, {}), each * outputs[node]
            assert counted.at(node, {}, integer=True) == share * whole + scales
        assert counted.conversion(Border("a", False, 0, None, (), False), {}, to_integers=True) == 0.0


def _variants(setting: Setting) -> tuple[list[Measured], IntegerForms]:
    """A node takes 1 + MACs / 1000, on integers 1 + MACs / 4000; a conversion 2, and 3 more that no kernel shows."""
    nodes = {node.name or "": node for node in setting.model.graph}
    names = list(setting.node_costs.places)
    integers = IntegerForms(dict.fromkeys(names, 0.1), (Border(names[0], False, 0, names[0], (names[1],), False),))
    found: list[Measured] = []
    halves = (frozenset[str](), frozenset(names), frozenset(names[:1]), frozenset(names[1:]))
    for removed in variants(setting.candidates):
        for half in halves:
            times = {
                name: 1 + setting.costs.macs_without(nodes[name], removed) / (4000 if name in half else 1000)
                for name in names
            }
            crossed = (names[0] in half) != (names[1] in half)
            pairs: Any = [[], []]
            if crossed:
                pairs[0 if names[1] in half else 1].append((864.0, 2.0))
            total = sum(times.values()) + (5.0 if crossed else 0.0)
            found.append(Measured(Variant(removed, {}, half), times, total, tuple(pairs)))
    return found, integers


def test_integers_have_latencies_of_their_own_and_conversions_cost_what_they_add(setting: Setting) -> None:
    measured, integers = _variants(setting)
    latency = LatencyModel(setting.costs, measured, None, integers)
    for one in measured:
        assert latency.estimate(one.variant) == pytest.approx(one.total, rel=0.01)
    name = next(iter(setting.node_costs.places))
    assert latency.at(name, {}, integer=True) < latency.at(name, {})
    again = [Measured.from_json(one.to_json()) for one in measured]
    assert LatencyModel(setting.costs, again, None, integers).estimate(again[-1].variant) == pytest.approx(
        latency.estimate(measured[-1].variant)
    )
    floats = LatencyModel(setting.costs, [one for one in measured if not one.variant.integers], None)
    assert floats.at(name, {}, integer=True) == floats.at(name, {}), "what nobody measured is no cheaper"


def test_variants_on_integers_are_of_all_and_of_halves(setting: Setting) -> None:
    integers = IntegerForms(dict.fromkeys(setting.node_costs.places, 0.0))
    found = _on_integers(integers, variants(setting.candidates), setting.forms, seed=0)
    everything = frozenset(integers.losses)
    assert any(one.integers == everything and not one.removed and one.forms for one in found)
    assert any(one.integers < everything for one in found)
    assert len({repr(one.to_json()) for one in found}) == len(found)


def test_what_stands_for_a_node_counts_as_it_and_conversions_apart() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 21]>
        g (float[4] x, float[4] z, float s, uint8 o) => (float[4] y, int32[4] i) {
          q = QuantizeLinear (x, s, o)
          d = DequantizeLinear (q, s, o)
          a = Relu (d)
          b = Relu (a)
          c = Relu (b)
          e, f, h = DynamicQuantizeLinear (z)
          i = MatMulInteger (e, e)
          y = Relu (c)
        }""")
    names = ("x.quantized", "x.dequantized", "block.conv", "block.conv/factor_0", "block.conv.scale/mul")
    names += ("z.quantized", "block.product/matmulinteger", "other")
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    times = {node.name or "": float(2**place) for place, node in enumerate(model.graph)}
    entries = [SimpleNamespace(node=node, bytes_read=16, bytes_written=4) for node in model.graph]
    profile: Any = SimpleNamespace(
        by_node=lambda: times, latency=SimpleNamespace(median=0.3), cost=SimpleNamespace(nodes=entries)
    )
    found = _measured(Variant(), model, profile, {"block.conv", "block.product"}, 1.0)
    assert found.nodes == {"block.conv": 4.0 + 8.0 + 16.0, "block.product": 32.0 + 64.0, "other": 128.0}
    assert found.conversions == ([(4.0, 1.0)], [(4.0, 2.0)])
    assert found.total == pytest.approx(300.0)
