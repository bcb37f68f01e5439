"""The criteria that look at activations: against NumPy, on dead and constant channels, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.criteria import Knowledge, criterion
from graphopt.criteria.members import Membership
from graphopt.criteria.observation import living_values
from graphopt.errors import DataError, GraphoptError
from graphopt.ir.channels import channel_groups
from graphopt.ir.session import open_session
from tests.criteria.networks import CONVNET, RESIDUAL, convnet, graph, images, score
from tests.zoo.models import zoo_feeds, zoo_model

NAMES = ("activation-mean", "activation-variance", "apoz")


def hidden(weights: dict[str, np.ndarray], feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    """What the second convolution of `CONVNET` reads: [channels, everything else]."""
    session = open_session(graph(CONVNET, weights), optimized=False, extra_outputs=["hidden"])
    arrays = [session.run(["hidden"], feed)[0] for feed in feeds]
    return np.moveaxis(np.concatenate(arrays), 1, 0).reshape(arrays[0].shape[1], -1).astype(np.float64)


def with_dead(dead: int, constant: int) -> dict[str, np.ndarray]:
    """`CONVNET` with a channel that is always 0, and one that is always the same."""
    weights = convnet()
    weights["gamma"][dead], weights["beta"][dead] = 0, -1
    weights["gamma"][constant], weights["beta"][constant] = 0, 2
    return weights


def test_activations_are_measured_where_they_are_read() -> None:
    weights, feeds = convnet(), images()
    model, seen = graph(CONVNET, weights), hidden(convnet(), images())
    np.testing.assert_allclose(score("activation-mean", model, "w", 0, feeds), np.abs(seen).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(score("activation-variance", model, "w", 0, feeds), seen.var(axis=1), rtol=1e-4)
    share = score("apoz", model, "w", 0, feeds)
    np.testing.assert_allclose(share, (seen != 0).mean(axis=1), atol=1 / seen.shape[1])
    np.testing.assert_allclose(
        score("apoz", model, "w", 0, feeds, threshold=0.3), (seen > 0.3).mean(axis=1), atol=1 / seen.shape[1]
    )


def test_dead_channels_go_first_and_constant_ones_have_no_variance() -> None:
    model, feeds = graph(CONVNET, with_dead(dead=3, constant=5)), images()
    for name in NAMES:
        found = score(name, model, "w", 0, feeds)
        assert found[3] == 0
        assert np.argmin(found) == 3
    assert score("activation-variance", model, "w", 0, feeds)[5] == pytest.approx(0, abs=1e-12)
    assert score("activation-mean", model, "w", 0, feeds)[5] == pytest.approx(2, rel=1e-5)


def test_channels_that_are_zero_equally_often_are_ordered_by_their_mean() -> None:
    weights = convnet()
    weights["beta"][:] = 50  # no zeros at all
    model, feeds = graph(CONVNET, weights), images()
    order = np.argsort(score("apoz", model, "w", 0, feeds))
    np.testing.assert_array_equal(order, np.argsort(score("activation-mean", model, "w", 0, feeds)))


def test_variance_keeps_its_digits_next_to_a_large_mean() -> None:
    weights = convnet()
    weights["beta"][:] = 1e4
    seen = hidden(weights, images())
    found = score("activation-variance", graph(CONVNET, weights), "w", 0, images())
    np.testing.assert_allclose(found, seen.var(axis=1), rtol=1e-3)


@pytest.mark.parametrize(("combine", "function"), [("sum", np.sum), ("max", np.max), ("norm", np.linalg.norm)])
def test_every_reader_of_a_stream_is_looked_at(combine: str, function: object) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4, 5), "c": (5, 4), "s": (4,), "d": (4, 2)}
    model = graph(RESIDUAL, {name: rng.standard_normal(shape) for name, shape in shapes.items()})
    feeds = [{"x": rng.standard_normal((7, 3)).astype(np.float32)}]
    session = open_session(model, optimized=False, extra_outputs=["stem", "scaled"])
    parts = [np.abs(array).mean(axis=0) for array in session.run(["stem", "scaled"], feeds[0])]
    found = score("activation-mean", model, "a", 1, feeds, combine=combine)
    np.testing.assert_allclose(found, function(parts, axis=0), rtol=1e-5)


def test_heads_count_with_the_mean_of_their_width() -> None:
    model = zoo_model("hf-bert")
    groups = channel_groups(model)
    heads = next(group for group in groups if group.name.startswith("heads"))
    feeds = zoo_feeds(model)
    (value,) = living_values(Membership(Knowledge(model, groups)), heads, model)  # what the output projection reads
    array = open_session(model, optimized=False, extra_outputs=[value.name]).run([value.name], feeds)[0]
    expected = np.abs(array).reshape(-1, heads.units, array.shape[-1] // heads.units).mean(axis=(0, 2))
    found = criterion("activation-mean").scores(Knowledge(model, groups, [feeds]), [heads])
    np.testing.assert_allclose(found[heads.name], expected, rtol=1e-5)


def test_memory_is_bounded_by_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo_model("resnet")
    groups = [group for group in channel_groups(model) if group.prunable]
    known = channel_groups(model)
    feeds = [zoo_feeds(model, seed=seed) for seed in range(2)]
    whole = criterion("activation-variance").scores(Knowledge(model, known, feeds), groups)
    monkeypatch.setattr("graphopt.criteria.observation.OBSERVED_BYTES", 1)
    parts = criterion("activation-variance").scores(Knowledge(model, known, feeds), groups)
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values)


def test_batches_are_iterated_anew_and_split_as_one_likes() -> None:
    model, feeds = graph(CONVNET, convnet()), images()
    split = [{"x": feed["x"][index : index + 1]} for feed in feeds for index in range(2)]
    for name in NAMES:
        np.testing.assert_allclose(
            score(name, model, "w", 0, feeds), score(name, model, "w", 0, split), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("name", [*NAMES, "domain-similarity"])
def test_missing_and_wrong_inputs_are_refused(name: str) -> None:
    model = graph(CONVNET, convnet())
    options = {"shifted": images()} if name == "domain-similarity" else {}
    with pytest.raises(DataError, match="needs inputs"):
        score(name, model, "w", 0, None, **options)
    with pytest.raises(DataError, match="no inputs to observe"):
        score(name, model, "w", 0, [], **options)
    for wrong in (np.zeros((2, 3, 7, 8)), np.zeros((2, 3, 8, 8)), np.zeros((3, 8))):
        with pytest.raises(DataError):  # a wrong size, a wrong dtype, a wrong rank
            score(
                name,
                model,
                "w",
                0,
                [{"x": wrong.astype(np.float32 if wrong.shape[-2] == 7 else wrong.dtype)}],
                **options,
            )
    with pytest.raises(DataError, match="NaN or infinite"):
        score(name, model, "w", 0, [{"x": np.full((1, 3, 8, 8), np.nan, np.float32)}], **options)


def test_a_threshold_below_zero_is_refused() -> None:
    with pytest.raises(GraphoptError, match="threshold is -1"):
        criterion("apoz", threshold=-1)


# Two domains --------------------------------------------------------------------------------------------------


def test_equal_domains_are_alike() -> None:
    model = graph(CONVNET, with_dead(dead=2, constant=4))
    found = score("domain-similarity", model, "w", 0, images(), shifted=images())
    assert found[2] == 0
    np.testing.assert_allclose(np.delete(found, 2), 1, atol=1e-6)


def test_similarity_is_the_cosine_of_mean_maps() -> None:
    weights = convnet()
    source, target = images(seed=1), images(seed=9)
    session = open_session(graph(CONVNET, weights), optimized=False, extra_outputs=["hidden"])
    maps = [
        np.concatenate([session.run(["hidden"], feed)[0] for feed in feeds]).mean(axis=0).reshape(6, -1)
        for feeds in (source, target)
    ]
    cosine = (maps[0] * maps[1]).sum(axis=1) / np.linalg.norm(maps[0], axis=1) / np.linalg.norm(maps[1], axis=1)
    found = score("domain-similarity", graph(CONVNET, weights), "w", 0, source, shifted=target)
    np.testing.assert_allclose(found, (1 + cosine) / 2, rtol=1e-5)


def test_rescaling_a_channel_does_not_change_its_similarity() -> None:
    weights = convnet()
    before = score("domain-similarity", graph(CONVNET, weights), "w", 0, images(seed=1), shifted=images(seed=9))
    weights["gamma"][1] *= 5
    weights["beta"][1] *= 5
    after = score("domain-similarity", graph(CONVNET, weights), "w", 0, images(seed=1), shifted=images(seed=9))
    np.testing.assert_allclose(before, after, rtol=1e-5)


def test_channels_without_positions_are_compared_by_size() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,1] y) {
        h = MatMul (x, w) a = Relu (h) y = MatMul (a, u) }"""
    model = graph(text, {"w": np.eye(2), "u": np.ones((2, 1))})
    source, target = ([{"x": np.array([row], np.float32)}] for row in ([1.0, 1.0], [1.0, 4.0]))
    assert score("domain-similarity", model, "w", 1, source, shifted=target).tolist() == [1.0, 0.625]  # (1 + 1 / 4) / 2


def test_domains_of_different_sizes_are_refused() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,2,h] x) => (float[n,1,h] y) {
        a = Conv (x, w) r = Relu (a) y = Conv (r, u) }"""
    model = graph(text, {"w": np.ones((3, 2, 1)), "u": np.ones((1, 3, 1))})
    short, long = ([{"x": np.ones((1, 2, size), np.float32)}] for size in (4, 5))
    with pytest.raises(DataError, match="another shape"):
        score("domain-similarity", model, "w", 0, short, shifted=long)
    with pytest.raises(DataError, match="another shape"):
        score("domain-similarity", model, "w", 0, [*short, *long], shifted=short)


def test_one_domain_is_not_two() -> None:
    with pytest.raises(DataError, match="compares two domains"):
        score("domain-similarity", graph(CONVNET, convnet()), "w", 0, images())


def test_the_other_domain_comes_in_any_form_of_calibration() -> None:
    model, source, target = graph(CONVNET, convnet()), images(seed=1), images(seed=9)
    found = score("domain-similarity", model, "w", 0, source, shifted=[feeds["x"] for feeds in target])
    np.testing.assert_array_equal(found, score("domain-similarity", model, "w", 0, source, shifted=target))
    with pytest.raises(DataError, match="shifted item 1, input 'x'"):
        score("domain-similarity", model, "w", 0, source, shifted=[target[0], target[0]["x"][:, :2]])
    with pytest.raises(DataError, match="shifted is one ndarray"):
        score("domain-similarity", model, "w", 0, source, shifted=target[0]["x"])
    with pytest.raises(DataError, match="the shifted data is empty"):
        score("domain-similarity", model, "w", 0, source, shifted=[])
