"""Pass meet-budget on models with weights, widths and bodies that are out of the ordinary."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import GraphoptError, TargetMissedError
from graphopt.ir.check import check_structure
from graphopt.optimize import _over_budget  # pyright: ignore[reportPrivateUsage]
from graphopt.passes import Context, MeetBudget
from graphopt.passes.budget_plan import BudgetPlan
from graphopt.search.budget import Assignment
from tests.search.pruning_nets import mlp, weighted

QUICK: dict[str, Any] = {"samples": 16, "source": "probes", "compensation": "none", "round_to": 1}
HEAD = '<ir_version: 10, opset_import: ["": 21]> '


def planned(model: ir.Model, **options: Any) -> BudgetPlan:
    """A plan that was applied, too."""
    single = MeetBudget(**{**QUICK, **options})
    plan = single.plan(model, Context())
    graph = model.clone()
    single.apply(graph, plan)
    check_structure(graph)
    assert plan.tries[-1].measured <= plan.asked
    return plan


def test_a_weight_that_several_read_is_not_taken_apart() -> None:
    text = (
        HEAD
        + """g (float[n,24] x, float[24,24] w, float[24,24] v) => (float[n,24] y) {
        [a] a = MatMul (x, w)  b = Tanh (a)  [c] c = MatMul (b, w)  d = Tanh (c)  [e] y = MatMul (d, v) }"""
    )
    plan = planned(weighted(text), macs=0.8)
    assert [one.node for one in plan.ranks] == ["e"]


def test_a_weight_of_zeros_is_not_taken_apart() -> None:
    model = mlp([16, 32, 32, 8])
    value = model.graph.initializers["w1"]
    value.const_value = ir.Tensor(np.zeros((32, 32), np.float32), name="w1")
    assert "w1" not in {one.node for one in planned(model, macs=0.6).ranks}


def test_no_chain_stays_where_a_layer_became_too_narrow_for_it() -> None:
    search = MeetBudget(macs=0.5, **QUICK).search(mlp([16, 16, 16]), Context())
    joint = search._problem  # pyright: ignore[reportPrivateUsage]
    width, *layers = joint.within(1e9).choices
    (layer,) = (one for one in layers if one.name == "form of node_2")
    chain = next(form for form in search.forms.of["node_2"] if str(form) == layer.options[-1])
    wide = next(form for form in search.forms.of["node_2"] if str(form) == layer.options[1])
    (group,) = search.candidates
    fits = [search.forms.fits("node_2", {group.name: 16 - kept}, wide) for kept in (16, wide.rank, wide.rank - 1)]
    assert fits == [True, True, False]
    assert not search.forms.fits("node_2", {group.name: 15}, chain)
    for kept, chains in (("16", {"node_2": chain}), ("1", {})):
        options = dict.fromkeys((one.name for one in (width, *layers)), 0)
        options |= {width.name: width.options.index(kept), layer.name: layer.options.index(str(chain))}
        assert joint.taken(Assignment(options, 0.0, 0.0, 0.0, 0.0, True, "", 0.0)).forms == chains


def test_what_is_to_be_kept_is_neither_taken_apart_nor_dropped() -> None:
    text = (
        HEAD
        + """g (float[n,32] x, float[32,32] a, float[32,32] b, float[32,32] c) => (float[n,32] z) {
        [one] h = MatMul (x, a)  r = Relu (h)  [two] s = MatMul (r, b)  y = Add (x, s)  [three] z = MatMul (y, c) }"""
    )
    model = weighted(text)
    assert len(planned(model, macs=0.5, choices=("ranks", "blocks")).blocks) == 1
    kept = planned(model, macs=0.85, choices=("ranks", "blocks"), keep=("c", "two"))
    assert {one.node for one in kept.ranks} == {"one"}
    assert not kept.blocks
    with pytest.raises(GraphoptError, match="keep has 'nothing'"):
        planned(model, macs=0.5, choices=("ranks",), keep=("nothing",))


def test_bodies_get_cheaper_with_what_they_read() -> None:
    text = (
        HEAD
        + """g (float[n,16] x, float[16,32] a, float[32,32] b, float[32,8] c) => (float[n,8] y) {
        h = MatMul (x, a)  r = Relu (h)  total = ReduceSum <keepdims = 0> (x)  zero = Sub (total, total)
        condition = Greater (total, zero)
        z = If (condition) <then_branch = one () => (float[n,32] p) { p = MatMul (r, b) },
            else_branch = other () => (float[n,32] q) { q = Relu (r) }>
        y = MatMul (z, c) }"""
    )
    plan = planned(weighted(text), macs=0.6, choices=("channels",))
    assert plan.tries[-1].predicted == plan.tries[-1].measured > 0.5


def test_what_cannot_be_reached_is_told_in_the_unit_of_the_budget() -> None:
    with pytest.raises(TargetMissedError, match="of it is the least") as caught:
        planned(mlp([8, 32, 8]), macs=1e-3)
    least = float((caught.value.help or "").split("ask for ")[1].split(" ")[0])
    assert planned(mlp([8, 32, 8]), macs=least)


def test_milliseconds_are_missed_where_the_input_is_returned() -> None:
    result = graphopt.optimize(mlp([8, 16, 4]), recipe="exact", quiet=True)
    steps = result.report.steps
    latency = steps[0].latency
    assert latency is not None
    (line,) = _over_budget({"latency_ms": latency.median / 2}, steps, None)
    assert "ms of latency is left" in line
    assert not list(_over_budget({"latency_ms": latency.median * 2}, steps, None))
    assert list(_over_budget({"macs": 0.5}, steps, None))
