"""What holds for every criterion: right shapes on every model of the zoo, and scores that move with the channels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from graphopt.criteria import CRITERIA, Criterion, Knowledge, criterion
from graphopt.ir.channels import channel_groups
from tests.criteria.networks import CONVNET, convnet, graph, images, score
from tests.zoo.models import QUICK, zoo_feeds, zoo_model

OF_WEIGHTS = [name for name, kind in CRITERIA.items() if kind.needs == "weights" and name != "unanimous"]
OTHERS = [name for name, kind in CRITERIA.items() if kind.needs != "weights"]
FEW = {
    "resnet",
    "mobilenet-v2",
    "densenet",
    "conv-1d-3d",
    "llama",
    "recurrent",
    "gru",
    "moe-top-k",
    "if-captures",
    "swin",
}
"""Models on which the quick tests measure activations and gradients."""
SOME = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in QUICK]


def options(name: str, shifted: Any) -> dict[str, Any]:
    """What a criterion cannot do without."""
    if name == "unanimous":
        return {"criteria": (criterion("l1"), criterion("fpgm"))}
    if name == "domain-similarity":
        return {"shifted": shifted}
    return {"projections": 2} if CRITERIA[name].needs == "gradients" else {}


def check(names: list[str], zoo: str, *, data: bool) -> None:
    model = zoo_model(zoo)
    known = channel_groups(model)
    groups = [group for group in known if group.prunable]
    feeds = [zoo_feeds(model, seed=0)] if data else None
    knowledge = Knowledge(model, known, feeds)
    for name in names:
        found = criterion(name, **options(name, [zoo_feeds(model, seed=1)] if data else None)).scores(knowledge, groups)
        assert list(found) == [group.name for group in groups]
        for group in groups:
            scores = found[group.name]
            assert scores.shape == (group.units,)
            assert scores.dtype == np.float64
            assert np.isfinite(scores).all(), (name, group.name)
            assert (scores >= 0).all(), (name, group.name)


@pytest.mark.parametrize("zoo", QUICK)
def test_weights_score_every_group(zoo: str) -> None:
    check(OF_WEIGHTS, zoo, data=False)


@pytest.mark.parametrize("zoo", SOME)
def test_inputs_and_gradients_score_every_group(zoo: str) -> None:
    check(OTHERS, zoo, data=True)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_scores_move_with_the_channels(name: str) -> None:
    weights = convnet(filters=9)
    order = np.random.default_rng(5).permutation(9)
    turned = dict(weights)
    for tensor, axis in (("w", 0), ("b", 0), ("gamma", 0), ("beta", 0), ("mean", 0), ("variance", 0), ("u", 1)):
        turned[tensor] = np.take(weights[tensor], order, axis)
    chosen = options(name, images(seed=7))
    before, after = (score(name, graph(CONVNET, each), "w", 0, images(), **chosen) for each in (weights, turned))
    assert np.ptp(before) > 0
    np.testing.assert_allclose(after, before[order], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_keeps_the_contract(name: str) -> None:
    kind = CRITERIA[name]
    assert issubclass(kind, Criterion)
    assert kind.name == name
    assert kind.needs in ("weights", "inputs", "gradients")
    assert ">>>" in (kind.__doc__ or "")
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    made = criterion(name, **options(name, []))
    assert made == criterion(name, **options(name, []))
    assert hash(made) == hash(criterion(name, **options(name, [])))
