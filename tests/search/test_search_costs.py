"""The fast count of costs against the count on the pruned graph."""

from __future__ import annotations

import numpy as np
import pytest

import graphopt
from graphopt.ir.channels import channel_groups
from graphopt.ir.cost import cost
from graphopt.search import CostModel, Costs
from graphopt.search.costs import producing_nodes
from tests.laws.channel_law import random_selection
from tests.search.pruning_nets import conv_net, mlp
from tests.zoo.models import zoo_model

ZOO = ("resnet", "vit", "hf-bert", "mobilenet-v2", "densenet", "resnext", "gru", "depthwise-multiplier", "if-weights")


@pytest.mark.torch
@pytest.mark.parametrize("name", ZOO)
def test_estimate_is_what_the_pruned_graph_costs(name: str) -> None:
    model = zoo_model(name)
    groups = channel_groups(model)
    costs = CostModel(model, groups)
    assert costs.whole == Costs.of(cost(model))
    for seed, share in ((0, 0.3), (1, 0.6)):
        selection = random_selection(groups, seed, share, inexact=True)
        after = Costs.of(cost(graphopt.remove_channels(model, selection, groups=groups)))
        found = costs.estimate({name: len(units) for name, units in selection.items()})
        assert found.macs == after.macs
        assert found.params == after.params
        assert abs(found.bytes - after.bytes) <= 512  # removal may write or drop constants of shapes


def test_change_is_the_difference_of_two_estimates() -> None:
    model = conv_net()
    costs = CostModel(model, channel_groups(model))
    names = [group.name for group in costs.groups if group.prunable]
    numbers = np.random.default_rng(0)
    for _ in range(20):
        removed = {name: int(numbers.integers(0, costs.groups.named(name).units)) for name in names}
        name = names[int(numbers.integers(len(names)))]
        count = int(numbers.integers(0, costs.groups.named(name).units))
        expected = costs.estimate({**removed, name: count}) - costs.estimate(removed)
        assert costs.change(removed, name, count) == expected


def test_sizes_scale_macs_and_nothing_else() -> None:
    model = mlp((4, 8, 2))
    groups = channel_groups(model)
    one, three = (CostModel(model, groups, {"n": count}).estimate({groups[1].name: 3}) for count in (1, 3))
    assert (3 * one.macs, one.params, one.bytes) == (three.macs, three.params, three.bytes)


def test_producers_are_the_operators_that_make_the_channels() -> None:
    model = conv_net((3, 4, 5, 6))
    groups = channel_groups(model)
    costs = CostModel(model, groups)
    made = [group for group in groups if group.prunable]
    found = [[node.inputs[1].name for node in producing_nodes(groups, group, costs.linear_nodes)] for group in made]
    assert found == [["w0"], ["w1"]]
    assert costs.macs(costs.linear_nodes[0]) == 4 * 3 * 9 * 64 * 2  # n is 2 where nobody says


def test_remaining_of_nothing_is_everything() -> None:
    model = mlp((4, 8, 2))
    costs = CostModel(model, channel_groups(model))
    assert costs.remaining({}, "macs") == 1.0
    assert costs.remaining({"mlp hidden of w0": 4}, "params") == 0.5
