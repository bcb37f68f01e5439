"""Widths that kernels are fast at."""

from __future__ import annotations

import pytest

from graphopt.errors import GraphoptError
from graphopt.ir.channels import channel_groups
from graphopt.search import step_of, unit_step
from graphopt.search.rounding import coordinates_per_unit, kept_choices, nearest
from tests.search.pruning_nets import conv_net, weighted
from tests.zoo.models import zoo_model


@pytest.mark.parametrize(
    ("width", "step"),
    [(1, 1), (3, 1), (4, 4), (12, 4), (15, 4), (16, 8), (20, 8), (31, 8), (32, 16), (63, 16), (64, 16), (2048, 16)],
)
def test_steps_follow_the_staircase(width: int, step: int) -> None:
    assert step_of(width) == step


def test_choices_never_are_none_and_never_more_than_there_is() -> None:
    for units in range(1, 70):
        for step in (1, 3, 4, 8, 16, 100):
            for least in {1, min(2, units), units}:
                choices = kept_choices(units, step, least)
                assert choices[-1] == units
                assert choices[0] >= least
                assert all(kept % step == 0 or kept == units for kept in choices)
                for kept in (0.0, 0.4 * units, units / 2, units):
                    index = nearest(choices, kept)
                    assert abs(choices - kept).min() == abs(choices[index] - kept)


def test_units_of_plain_channels_go_by_their_width() -> None:
    groups = [group for group in channel_groups(conv_net((3, 16, 64, 8))) if group.prunable]
    assert [unit_step(group) for group in groups] == [8, 16]
    assert [unit_step(group, 1) for group in groups] == [1, 1]
    assert [unit_step(group, 6) for group in groups] == [6, 6]


def test_a_flattened_channel_counts_as_one() -> None:
    model = weighted("""<ir_version: 10, opset_import: ["": 21]>
        g (float[n,3,8,8] x, float[32,3,3,3] w, float[1152,5] v) => (float[n,5] y) {
          c = Conv(x, w) r = Relu(c) f = Flatten(r) y = MatMul(f, v) }""")
    (group,) = [group for group in channel_groups(model) if group.prunable]
    assert coordinates_per_unit(group) == 1
    assert unit_step(group) == 16


@pytest.mark.torch
def test_heads_count_as_the_coordinates_that_they_own() -> None:
    groups = {group.role: group for group in channel_groups(zoo_model("vit")) if group.prunable}
    assert coordinates_per_unit(groups["heads"]) == 8
    assert unit_step(groups["heads"]) == 2  # 4 heads of 8: two are 16 coordinates
    assert unit_step(groups["heads"], 16) == 2
    assert unit_step(groups["mlp hidden"]) == 16


@pytest.mark.torch
def test_gates_do_not_coarsen_the_steps_of_hidden_units() -> None:
    (group,) = [group for group in channel_groups(zoo_model("gru")) if group.role == "hidden units"]
    assert group.prunable
    assert unit_step(group) == step_of(group.units)


@pytest.mark.parametrize("wrong", [0, -4, True, 2.5, "16"])
def test_wrong_round_to(wrong: object) -> None:
    (group, *_) = [group for group in channel_groups(conv_net()) if group.prunable]
    with pytest.raises(GraphoptError, match="round_to"):
        unit_step(group, wrong)  # type: ignore[arg-type]
