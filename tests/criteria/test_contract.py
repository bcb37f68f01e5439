"""What anybody's criterion is held to, how criteria print, and what they have to remark."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from graphopt.criteria import Criterion, Knowledge, checked_scores, criterion
from graphopt.errors import DataError, GraphoptError
from graphopt.ir.channels import ChannelGroup, channel_groups
from graphopt.passes import Context, PruneChannels
from tests.criteria.networks import CONVNET, convnet, graph, group_with


@dataclass(frozen=True)
class Own(Criterion):
    """Returns, or raises, what it is told to."""

    name: ClassVar[str] = "own"
    needs: ClassVar[str] = "weights"
    answer: Any = None

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer if self.answer is None else {group.name: self.answer for group in groups}


class Ascending(Own):
    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        return {group.name: np.arange(group.units) for group in groups}


class Empty(Own):
    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        return {}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (Empty(), "returned no scores for"),
        (Own(), "returned a NoneType"),
        (Own(answer=KeyError("z")), "raised KeyError: 'z'"),
        (Own(answer=np.arange(3.0)), r"scores of shape \[3\] for 6 units"),
        (Own(answer=np.ones((6, 1))), r"scores of shape \[6, 1\] for 6 units"),
        (Own(answer=[1.0, 2, 3, 4, 5, np.nan]), "NaN or infinite"),
        (Own(answer=[1.0, 2, 3, 4, 5, -7]), "below 0, the smallest -7"),
        (Own(answer=["a"] * 6), "no numbers but a list"),
    ],
)
def test_scores_that_break_the_contract_are_refused_with_the_name(own: Criterion, message: str) -> None:
    model = graph(CONVNET, convnet())
    for taken in (own, criterion("unanimous", criteria=("l1", own))):
        with pytest.raises(GraphoptError, match=message) as caught:
            PruneChannels(criterion=taken, ratio=0.5, round_to=1).plan(model)
        assert caught.value.where == "criterion 'own'"
        assert caught.value.help


def test_errors_of_graphopt_pass_and_good_scores_come_as_float64() -> None:
    model = graph(CONVNET, convnet())
    knowledge, group = Knowledge(model, channel_groups(model)), group_with(model, "w", 0)
    with pytest.raises(DataError, match="mine"):
        checked_scores(Own(answer=DataError("mine")), knowledge, [group])
    found = checked_scores(Own(answer=[3, 1, 2, 5, 4, 0]), knowledge, [group])[group.name]
    assert found.dtype == np.float64
    assert found.tolist() == [3, 1, 2, 5, 4, 0]


@pytest.mark.parametrize("seed", ["x", 1.5, -1, True, None])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(GraphoptError, match="seed is"):
        PruneChannels(seed=seed)
    model = graph(CONVNET, convnet())
    with pytest.raises(GraphoptError, match="seed is"):
        Knowledge(model, channel_groups(model), seed=seed)


def loss(outputs: Any, labels: Any) -> Any:
    return ((outputs - labels) ** 2).mean()


def test_criteria_print_without_addresses() -> None:
    taylor = criterion("taylor", loss=loss, data=[])
    assert str(taylor) == "Taylor(loss=loss, divergence='mse', projections=8, outputs=())"
    assert str(criterion("unanimous", criteria=(taylor,))) == f"Unanimous(criteria=({taylor},))"
    for other in (functools.partial(loss, labels=0), Own().scores, lambda y: y, object()):
        assert "0x" not in str(Own(answer=other))
    assert str(criterion("l1")) == "L1(combine='sum')"
    plan = PruneChannels(criterion=Ascending(answer=loss), ratio=0.5, round_to=1).plan(graph(CONVNET, convnet()))
    assert plan.criterion == "Ascending(answer=loss)"


PLAIN = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x) => (float[n,4] y) {
    h = MatMul (x, w) a = Relu (h) s = Mul (a, scale) g = MatMul (s, v) b = Relu (g) y = MatMul (b, u) }"""


def test_what_ranks_where_there_is_no_batchnorm_is_said() -> None:
    shapes = {"w": (3, 5), "scale": (5,), "v": (5, 6), "u": (6, 4)}
    weights = {name: np.random.default_rng(0).standard_normal(shape) for name, shape in shapes.items()}
    plain, normal = graph(PLAIN, weights), graph(CONVNET, convnet())
    context = Context()
    plan = PruneChannels(criterion="batchnorm-scale", ratio=0.5, round_to=1).plan(plain, context)
    said = "criterion batchnorm-scale: no BatchNormalization, ranked by other scales or l2"
    assert said in str(plan)
    assert said in [remark.why for remark in context.remarks]
    for name in ("batchnorm-scale", "taylor-batchnorm", "unanimous"):
        options: dict[str, Any] = {"criteria": ("batchnorm-scale",)} if name == "unanimous" else {}
        for model, expected in ((plain, 1), (normal, 0)):
            groups = channel_groups(model)
            chosen = [group for group in groups if group.units > 1 and not group.role.startswith("residual")]
            lines = criterion(name, **options).remarks(Knowledge(model, groups), chosen)
            assert sum("no BatchNormalization, ranked by" in line for line in lines) == expected, (name, lines)
    assert criterion("l1").remarks(Knowledge(plain, channel_groups(plain)), list(channel_groups(plain))) == ()
