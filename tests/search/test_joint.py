"""Widths, ranks and blocks as one problem: what it says of costs and losses is what the model says; solvers agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.criteria import Knowledge
from graphopt.criteria.residual import Residual
from graphopt.ir.channels import ChannelGroups, channel_groups
from graphopt.ir.cost import cost
from graphopt.ir.pieces import Pieces
from graphopt.ir.regions import drop_regions, regions
from graphopt.ir.removal import remove_channels
from graphopt.ir.session import open_session
from graphopt.passes.decompose import Decompose
from graphopt.passes.decompose_plan import DecomposePlan
from graphopt.search import Candidate, CostModel, Costs
from graphopt.search.block_losses import block_losses
from graphopt.search.budget import Assignment, evaluate
from graphopt.search.collaborative import Collaborative, Collaborator
from graphopt.search.joint import Block, JointProblem
from graphopt.search.knapsack import solve_knapsack
from graphopt.search.latency_model import LatencyModel, Measured, Variant
from graphopt.search.latency_variants import measure_latency, variants
from graphopt.search.layer_forms import LayerForm, LayerForms
from graphopt.search.milp import solve_milp
from graphopt.search.node_costs import COUNTED, CountedCosts, NodeCosting
from tests.search.pruning_nets import weighted

NET = """<ir_version: 10, opset_import: ["": 21]>
    g (float[1,8,6,6] x, float[24,8,3,3] wa, float[8,24,3,3] wb, float[24,8,1,1] wc, float[8,24,1,1] wd,
       float[4,8,1,1] we) => (float[1,4,6,6] z) {
      a = Conv <pads = [1, 1, 1, 1]> (x, wa)
      ar = Relu (a)
      b = Conv <pads = [1, 1, 1, 1]> (ar, wb)
      s = Add (x, b)
      c = Conv (s, wc)
      cr = Relu (c)
      d = Conv (cr, wd)
      t = Add (s, d)
      z = Conv (t, we)
    }"""
"""Two residual blocks."""


class Setting:
    """A small net with all that a joint problem is made of."""

    def __init__(self, kind: str = "macs", step: int = 8) -> None:
        self.model: ir.Model = weighted(NET, seed=3)
        self.groups: ChannelGroups = channel_groups(self.model)
        chosen = [group for group in self.groups if group.prunable and group.role == "channels"]
        self.candidates = tuple(Candidate(group, np.arange(group.units, dtype=float), step) for group in chosen)
        self.costs = CostModel(self.model, self.groups)
        numbers = np.random.default_rng(0)
        feeds = [{"x": numbers.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(40)]
        self.feeds = feeds
        self.collaborator = Collaborator(Knowledge(self.model, self.groups, feeds), self.candidates, self.costs)
        self.tables = self.collaborator.tables(Collaborative(round_to=4))
        self.regions = [region for region in regions(self.model) if region.kind == "residual branch"]
        self.losses = block_losses(self.model, self.regions, feeds)
        joins = {region.replaced: node.name for region in self.regions for node in self.model.graph
                 if node.outputs[0].name == region.replaced}  # fmt: skip
        blocks = tuple(
            Block(one.name, frozenset((*one.nodes, joins[one.replaced] or "")), self.losses[one.name])
            for one in self.regions
        )
        self.forms = LayerForms(self.tables, self.collaborator.states, self.costs, 4)
        self.node_costs = CountedCosts(self.costs, kind, self.forms)
        self.problem = JointProblem(self.candidates, self.forms, self.node_costs, blocks)

    @property
    def whole(self) -> float:
        return self.node_costs.fixed + sum(self.node_costs.at(node, {}) for node in self.node_costs.places)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


@pytest.mark.parametrize("kind", COUNTED)
def test_counted_costs_are_those_of_the_model_that_is_left(kind: str) -> None:
    """Of every pair of widths with either block dropped, against the graph that was really cut."""
    setting = Setting(kind)
    problem = setting.problem.within(1e12)
    names = [choice.name for choice in problem.choices]
    assert setting.whole == setting.costs.whole.get(kind)
    blocks = [name for name in names if name.startswith("block ")]
    assert len(blocks) == 2
    for first, second, dropped in itertools.product(range(2), range(2), (None, 0, 1)):
        options = dict.fromkeys(names, 0)
        widths = [name for name in names if name.startswith("width of ")]
        options[widths[0]], options[widths[1]] = first, second
        if dropped is not None:
            options[blocks[dropped]] = 1
        value, counted = evaluate(problem, options)
        taken = setting.problem.taken(
            Assignment(options, value, counted, bound=value, gap=0, optimal=True, solver="", seconds=0)
        )
        selection = {name: tuple(range(count)) for name, count in taken.removed.items()}
        graph = remove_channels(setting.model, selection, groups=setting.groups) if selection else setting.model.clone()
        gone = [region for region in setting.regions if region.name in taken.dropped]
        graph = drop_regions(graph, gone) if gone else graph
        assert counted == Costs.of(cost(graph)).get(kind)


def test_the_exact_solver_is_as_good_as_trying_everything(setting: Setting) -> None:
    problem = setting.problem.within(0.45 * setting.whole)
    best = -math.inf
    for combination in itertools.product(*(range(len(choice.options)) for choice in problem.choices)):
        value, counted = evaluate(
            problem, {choice.name: one for choice, one in zip(problem.choices, combination, strict=True)}
        )
        if counted <= problem.budget and value > best:
            best = value
    found = solve_milp(problem)
    assert found.value == pytest.approx(best, rel=1e-4)
    assert found.cost <= problem.budget
    assert solve_knapsack(problem).value <= found.value + 1e-9


def test_nothing_goes_where_the_budget_is_the_whole(setting: Setting) -> None:
    taken = setting.problem.taken(solve_milp(setting.problem.within(setting.whole)))
    assert (taken.removed, taken.forms, taken.dropped) == ({}, {}, ())


def test_block_losses_are_shares_of_variance(setting: Setting) -> None:
    """What a branch adds, over what is there with it, as onnxruntime computes both."""
    shown = setting.model.clone()
    values = {value.name: value for node in shown.graph for value in node.outputs}
    shown.graph.outputs.extend(values[name] for name in ("b", "s", "d", "t"))
    session = open_session(shown)
    runs = [session.run_feeds(feeds) for feeds in setting.feeds]
    b, s, d, t = (
        np.concatenate([run[index] for run in runs]).astype(np.float64).var(axis=0).sum() for index in range(1, 5)
    )
    assert list(setting.losses.values()) == pytest.approx([b / s, d / t], rel=1e-4)


def test_a_dropped_block_takes_its_widths_and_chains_along(setting: Setting) -> None:
    problem = setting.problem.within(1e12)
    options = {choice.name: len(choice.options) - 1 for choice in problem.choices}
    value, counted = evaluate(problem, options)
    taken = setting.problem.taken(
        Assignment(options, value, counted, bound=value, gap=0, optimal=True, solver="", seconds=0)
    )
    inside = {node for block in setting.problem.blocks for node in block.nodes}
    assert taken.removed == {}
    assert set(taken.forms).isdisjoint(inside)
    assert len(taken.dropped) == 2


def test_other_costs_drive_the_collaborative_search(setting: Setting) -> None:
    """A cost in which only the first layer counts: that one is made smaller, to the share that was asked for."""
    first = setting.tables.layers[0].name

    class OnlyFirst:
        places: Mapping[str, tuple[str, ...]] = {first: setting.node_costs.places[first]}
        fixed = 0.0

        def at(self, node: str, removed: Mapping[str, int], form: LayerForm | None = None) -> float:
            return setting.node_costs.at(node, removed, form) if node == first else 0.0

    before = setting.collaborator.costing
    setting.collaborator.costing = NodeCosting(setting.tables.layers, setting.costs, OnlyFirst())
    try:
        found = setting.collaborator.solve(0.6, Collaborative(round_to=4))
    finally:
        setting.collaborator.costing = before
    assert found.share <= 0.6 * 1.01
    assert found.before == setting.node_costs.at(first, {})


# Latency ----------------------------------------------------------------------------------------------------


def _measured(setting: Setting, chains: Sequence[LayerForm] = (), slope: float = 2e-3) -> list[Measured]:
    """As if every MAC took `slope` microseconds, every layer 5 more, and the whole 10 % and 7 more than its nodes."""
    wanted = [Variant(one) for one in variants(setting.candidates)]
    wanted += [Variant({}, {setting.tables.layers[0].name: chain}) for chain in chains]
    found: list[Measured] = []
    for variant in wanted:
        nodes = {
            name: 5 + slope * setting.node_costs.at(name, variant.removed, variant.forms.get(name))
            for name in setting.node_costs.places
        }
        found.append(Measured(variant, nodes, 1.1 * sum(nodes.values()) + 7))
    return found


def test_latency_is_fitted_node_by_node(setting: Setting) -> None:
    """The widths are multiples of 8 in blocks of 16: what the blocks cost cannot be told from what the units cost."""
    latency = LatencyModel(setting.costs, _measured(setting))
    for removed in variants(setting.candidates, seed=5):
        expected = sum(5 + 2e-3 * setting.node_costs.at(name, removed) for name in setting.node_costs.places)
        assert latency.estimate(Variant(removed)) == pytest.approx(1.1 * expected + 7, rel=2e-3)
    some = next(iter(setting.node_costs.places))
    whole = latency.estimate(Variant())
    assert latency.estimate(Variant(), without={some}) == pytest.approx(whole - latency.at(some, {}))
    assert latency.fixed + sum(latency.at(node, {}) for node in latency.places) == pytest.approx(whole)


@pytest.mark.parametrize("kind", ["channel-svd", "spatial-svd"])
def test_chains_cost_what_they_were_measured_to_take(setting: Setting, kind: str) -> None:
    first = setting.tables.layers[0].name
    more, less = [form for form in setting.forms.of[first] if form.form == kind][:2]
    latency = LatencyModel(setting.costs, _measured(setting, (more, less)), setting.forms)
    without = LatencyModel(setting.costs, _measured(setting))
    assert latency.at(first, {}, less) <= latency.at(first, {}, more)
    expected = [1.1 * (5 + 2e-3 * setting.node_costs.at(first, {}, form)) for form in (more, less)]
    assert expected[1] * 0.99 <= latency.at(first, {}, more) <= expected[0] * 1.01, "ranks count in blocks of 16"
    assert without.at(first, {}, less) == without.at(first, {}), "a form that nobody measured is no cheaper"


@pytest.mark.parametrize("kind", ["channel-svd", "spatial-svd"])
def test_a_form_costs_what_the_pass_that_writes_it_leaves(setting: Setting, kind: str) -> None:
    for node, forms in setting.forms.of.items():
        for form in [one for one in forms if one.form == kind][:2]:
            graph = setting.model.clone()
            plan = DecomposePlan.by_hand(graph, {node: (form.form, form.rank)}, compensation=False)
            Decompose(source="none").apply(graph, plan)
            saved = setting.costs.whole.macs - Costs.of(cost(graph)).macs
            assert setting.node_costs.at(node, {}) - setting.node_costs.at(node, {}, form) == saved


def test_the_spatial_loss_falls_with_the_rank_and_is_none_at_full_rank(setting: Setting) -> None:
    layer = setting.tables.layers[0]
    forms = [form for form in setting.forms.of[layer.name] if form.form == "spatial-svd"]
    losses = [setting.forms.loss(layer, {}, form) for form in forms]
    assert losses == sorted(losses)
    assert losses[0] > 0
    assert setting.forms.full_rank(layer.name, "spatial-svd") == min(8 * 3, 24 * 3)


def test_what_was_measured_is_kept_for_this_machine(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def profiled(model: ir.Model, feeds: Any, *, against: Sequence[ir.Model], **options: Any) -> list[Any]:
        calls.append(len(against))
        nodes = dict.fromkeys(setting.node_costs.places, 5.0)
        return [
            SimpleNamespace(
                by_node=lambda: nodes, latency=SimpleNamespace(median=0.05), notes=(), cost=SimpleNamespace(nodes=())
            )
            for _ in (model, *against)
        ]

    monkeypatch.setattr("graphopt.search.latency_variants.profile_kernels", profiled)
    first = measure_latency(setting.costs, setting.candidates, setting.feeds[0])
    assert calls
    count = len(calls)
    again = measure_latency(setting.costs, setting.candidates, setting.feeds[0])
    assert len(calls) == count
    assert again.estimate(Variant()) == first.estimate(Variant())
    monkeypatch.setattr("graphopt.search.latency_variants.device", lambda target: "another machine")
    measure_latency(setting.costs, setting.candidates, setting.feeds[0])
    assert len(calls) == 2 * count


def test_every_variant_is_of_widths_that_may_be_and_the_whole_comes_first(setting: Setting) -> None:
    found = variants(setting.candidates)
    assert found[0] == dict.fromkeys((one.name for one in setting.candidates), 0)
    assert len(found) == len({tuple(one.items()) for one in found}) > 4
    for one in found:
        for candidate in setting.candidates:
            assert candidate.units - one[candidate.name] in candidate.choices


def test_nothing_is_held_once_losses_are_known(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of a large network fill the memory, were they kept beyond their last use."""
    made: list[Pieces] = []

    class Watched(Pieces):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    rooms = ("criteria.residual_readers", "search.block_losses", "search.collaborative_surrogates")
    for room in rooms:
        monkeypatch.setattr(f"graphopt.{room}.Pieces", Watched)
    knowledge = Knowledge(setting.model, setting.groups, setting.feeds)
    Residual().scores(knowledge, [candidate.group for candidate in setting.candidates])
    block_losses(setting.model, setting.regions, setting.feeds)
    Collaborator(knowledge, setting.candidates, setting.costs)
    assert len(made) == len(rooms)
    assert all(not pieces._held for pieces in made)
