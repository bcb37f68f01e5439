"""The criteria of gradients against finite differences and closed forms, with labels and without."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx_ir as ir
import pytest
import torch

import graphopt
from graphopt.criteria import Knowledge, criterion
from graphopt.criteria.lifted_gradients import split_labels
from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.calibration import Calibration
from graphopt.ir.channels import channel_groups
from graphopt.ir.session import open_session
from tests.criteria.networks import CONVNET, RESIDUAL, convnet, graph, images, score

GRADIENTS = ("taylor", "taylor-batchnorm", "fisher")
STEP = 1e-2


def residual(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (4, 5), "c": (5, 4), "s": (4,), "d": (4, 2)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def labelled(seed: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches for `CONVNET` with four classes."""
    rng = np.random.default_rng(seed)
    return [(feed["x"], rng.integers(0, 4, 2)) for feed in images(3, seed)]


def cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> float:
    shifted = outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).mean())


def output(weights: dict[str, np.ndarray], text: str, x: np.ndarray) -> np.ndarray:
    return open_session(graph(text, weights), optimized=False).run(None, {"x": x})[0]


def derivative(
    weights: dict[str, np.ndarray], places: list[tuple[str, int]], unit: int, x: np.ndarray, labels: np.ndarray
) -> float:
    """Central difference of the loss with respect to one factor on slices of some weights of `CONVNET`."""
    losses: list[float] = []
    for factor in (1 + STEP, 1 - STEP):
        changed = {name: array.copy() for name, array in weights.items()}
        for name, axis in places:
            index = [slice(None)] * changed[name].ndim
            index[axis] = unit
            changed[name][tuple(index)] *= factor
        losses.append(cross_entropy(output(changed, CONVNET, x), labels))
    return (losses[0] - losses[1]) / (2 * STEP)


def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs, labels)


@pytest.mark.parametrize(
    ("name", "places"), [("taylor", [("w", 0), ("b", 0)]), ("taylor-batchnorm", [("gamma", 0), ("beta", 0)])]
)
def test_taylor_is_the_derivative_by_a_factor_on_the_unit(name: str, places: list[tuple[str, int]]) -> None:
    weights, data = convnet(), labelled()
    expected = [np.mean([abs(derivative(weights, places, unit, x, labels)) for x, labels in data]) for unit in range(6)]
    found = score(name, graph(CONVNET, weights), "w", 0, loss=loss, data=data)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-4)


def test_fisher_is_the_mean_square_of_the_derivative() -> None:
    weights = convnet()
    data = [(x[:1], labels[:1]) for x, labels in labelled()]  # batches of one sample
    places = [("gamma", 0), ("beta", 0)]  # one factor on what comes out behind the normalisation
    expected = [
        np.mean([derivative(weights, places, unit, x, labels) ** 2 for x, labels in data]) / 2 for unit in range(6)
    ]
    found = score("fisher", graph(CONVNET, weights), "w", 0, loss=loss, data=data)
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-5)


def test_the_sum_over_coupled_producers_is_inside_the_absolute_value() -> None:
    weights = residual()
    x = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    data = [(x, np.zeros((5, 2), np.float32))]
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in weights.items()}
    stem = torch.tensor(x) @ tensors["a"]
    stream = stem + torch.relu(stem @ tensors["b"]) @ tensors["c"]
    ((stream * tensors["s"]) @ tensors["d"]).square().mean().backward()
    expected = sum((tensors[name] * tensors[name].grad).sum(dim=0) for name in ("a", "c")).abs()
    found = score(
        "taylor", graph(RESIDUAL, weights), "a", 1, loss=lambda y, zeros: (y - zeros).square().mean(), data=data
    )
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(
        score(
            "taylor-batchnorm", graph(RESIDUAL, weights), "a", 1, loss=lambda y, z: (y - z).square().mean(), data=data
        ),
        found,
    )  # there is no BatchNormalization


def test_a_dead_channel_scores_zero_with_labels_and_without() -> None:
    weights = convnet()
    weights["gamma"][3], weights["beta"][3] = 0, -1
    model = graph(CONVNET, weights)
    for name in GRADIENTS:
        for options in ({"loss": loss, "data": labelled()}, {}, {"divergence": "kl"}):
            found = score(name, model, "w", 0, images(), **options)
            assert found[3] == 0
            assert (np.delete(found, 3) > 0).any()


def test_fisher_of_a_producer_without_normalisation_takes_filter_and_bias() -> None:
    weights = residual()
    x = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    options = {"loss": lambda y, zeros: (y - zeros).square().mean(), "data": [(x, np.zeros((5, 2), np.float32))]}
    taylor, fisher = (score(name, graph(RESIDUAL, weights), "a", 1, **options) for name in ("taylor", "fisher"))
    np.testing.assert_allclose(fisher, taylor**2 / 2)


# Without labels -----------------------------------------------------------------------------------------------

LINEAR = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x) => (float[n,4] y) {
    h = MatMul (x, w) y = MatMul (h, u) }"""


def linear(seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {"w": rng.standard_normal((3, 5)), "u": rng.standard_normal((5, 4))}
    return {name: array.astype(np.float32) for name, array in weights.items()}, rng.standard_normal((6, 3)).astype(
        np.float32
    )


def test_fisher_without_labels_estimates_the_divergence_that_removal_causes() -> None:
    weights, x = linear()  # a linear net: first order in the outputs is all there is
    y = x @ weights["w"] @ weights["u"]
    lost = [(x @ weights["w"][:, unit])[:, None] * weights["u"][unit] for unit in range(5)]
    expected = np.array([np.square(change).mean() / y.var() for change in lost])
    found = score("fisher", graph(LINEAR, weights), "w", 1, [{"x": x}], projections=3000)
    np.testing.assert_allclose(found, expected, rtol=0.15)


def test_the_projections_of_kl_give_its_curvature() -> None:
    weights, x = linear()
    y = (x @ weights["w"] @ weights["u"]).astype(np.float64)
    shares = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
    expected = []
    for unit in range(5):
        change = (x @ weights["w"][:, unit])[:, None] * weights["u"][unit]
        mean = (shares * change).sum(axis=1)
        expected.append(((shares * change**2).sum(axis=1) - mean**2).mean() / 2)  # d'(diag(p) - pp')d / 2
    found = score("fisher", graph(LINEAR, weights), "w", 1, [{"x": x}], projections=3000, divergence="kl")
    np.testing.assert_allclose(found, expected, rtol=0.15)


def test_taylor_without_labels_is_the_mean_absolute_projection() -> None:
    weights, x = linear()
    options = {"projections": 1000}
    root = np.sqrt(2 * score("fisher", graph(LINEAR, weights), "w", 1, [{"x": x}], **options))
    found = score("taylor", graph(LINEAR, weights), "w", 1, [{"x": x}], **options)
    np.testing.assert_allclose(found / root, np.sqrt(2 / np.pi), rtol=0.1)  # E|z| of a normal number


def test_the_same_seed_gives_the_same_scores() -> None:
    model = graph(CONVNET, convnet())
    first, again = (score("taylor", model, "w", 0, images()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    groups = channel_groups(model)
    group = next(group for group in groups if ("w", 0) in group.members)
    other = criterion("taylor").scores(Knowledge(model, groups, images(), seed=5), [group])[group.name]
    assert (other != first).all()


TWO = """<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,1] left, float[n,1] right) {
    h = MatMul (x, w) a = Relu (h) left = MatMul (a, u) right = MatMul (a, v) }"""


def test_tasks_vote_by_the_outputs_that_count() -> None:
    weights = {
        "w": np.array([[1.0, 1, 1], [1, 1, 1]]),
        "u": np.array([[1.0], [0], [0]]),
        "v": np.array([[0.0], [100], [0]]),
    }
    model, feeds = graph(TWO, weights), [{"x": np.random.default_rng(0).random((4, 2)).astype(np.float32)}]
    left, right = (criterion("taylor", outputs=(name,)) for name in ("left", "right"))
    assert np.flatnonzero(score(left, model, "w", 1, feeds)).tolist() == [0]
    assert np.flatnonzero(score(right, model, "w", 1, feeds)).tolist() == [1]
    votes = criterion("unanimous", criteria=(left, right))
    assert votes.needs == "gradients"
    np.testing.assert_allclose(score(votes, model, "w", 1, feeds), [1, 1, 0])


def test_computed_weights_have_gradients() -> None:
    text = LINEAR.replace("h = MatMul (x, w)", "t = Transpose <perm = [1, 0]> (w) h = MatMul (x, t)")
    weights, x = linear()
    turned = {**weights, "w": np.ascontiguousarray(weights["w"].T)}
    found = score("taylor", graph(text, turned), "w", 0, [{"x": x}])
    np.testing.assert_allclose(found, score("taylor", graph(LINEAR, weights), "w", 1, [{"x": x}]), rtol=1e-5)


# Bad input ----------------------------------------------------------------------------------------------------


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(GraphoptError, match="come together"):
        criterion("taylor", loss=loss)
    with pytest.raises(GraphoptError, match="come together"):
        criterion("fisher", data=labelled())
    with pytest.raises(GraphoptError, match="without a loss"):
        criterion("taylor", loss=loss, data=labelled(), outputs=("y",))
    with pytest.raises(GraphoptError, match="no divergence 'l2'"):
        criterion("taylor", divergence="l2")
    with pytest.raises(GraphoptError, match="projections is 0"):
        criterion("taylor", projections=0)


@pytest.mark.parametrize("name", GRADIENTS)
def test_missing_data_is_refused(name: str) -> None:
    model = graph(CONVNET, convnet())
    with pytest.raises(DataError, match="needs inputs"):
        score(name, model, "w", 0)
    with pytest.raises(DataError, match="no inputs to take gradients on"):
        score(name, model, "w", 0, [])
    with pytest.raises(DataError, match="the model has no output 'z'"):
        score(name, model, "w", 0, images(), outputs=("z",))
    with pytest.raises(DataError, match="no inputs to take gradients on"):
        score(name, model, "w", 0, loss=loss, data=[])


def test_a_loss_that_is_no_number_is_refused() -> None:
    model = graph(CONVNET, convnet())
    with pytest.raises(GraphoptError, match="no single number"):
        score("taylor", model, "w", 0, loss=lambda y, labels: y, data=labelled())
    with pytest.raises(GraphoptError, match="no single number"):
        score("taylor", model, "w", 0, loss=lambda y, labels: y.detach().sum(), data=labelled())


def test_a_gradient_that_is_no_number_is_refused() -> None:
    with pytest.raises(GraphoptError, match="NaN or infinite"):
        score("taylor", graph(CONVNET, convnet()), "w", 0, loss=lambda y, labels: (y * np.inf).sum(), data=labelled())


def test_outputs_without_gradient_are_refused() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x) => (int64[n,1] y) {
        h = MatMul (x, w) a = Relu (h) z = MatMul (a, u) y = ArgMax <axis = 1> (z) }"""
    weights, x = linear()
    with pytest.raises(GraphoptError, match="no output is a float"):
        score("taylor", graph(text, weights), "w", 1, [{"x": x}])


def test_kl_needs_classes() -> None:
    weights, x = linear()
    model = graph(LINEAR.replace("float[n,4] y", "float[n,1] y"), {**weights, "u": weights["u"][:, :1]})
    with pytest.raises(GraphoptError, match="'kl' needs classes"):
        score("fisher", model, "w", 1, [{"x": x}], divergence="kl")


def test_without_torch_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(GraphoptError, match="needs torch"):
        score("taylor", graph(CONVNET, convnet()), "w", 0, images())


def test_labels_come_by_position_or_by_name() -> None:
    x = np.ones((1, 2), np.float32)
    feeds, labels, named = split_labels({"x": x, "target": np.zeros(1)}, ["x"], "batch 0")
    assert list(feeds) == ["x"]
    assert not labels
    assert list(named) == ["target"]
    feeds, labels, named = split_labels([x, np.zeros(1), "note"], ["x"], "batch 0")
    assert labels[1] == "note"
    assert split_labels(x, ["x"], "batch 0")[1:] == ([], {})
    with pytest.raises(DataError, match="'x' is missing"):
        split_labels({"y": x}, ["x"], "batch 0")
    with pytest.raises(DataError, match="1 arrays"):
        split_labels((x,), ["x", "y"], "batch 0")
    with pytest.raises(DataError, match="an input is a str"):
        split_labels(("x",), ["x"], "batch 0")


def test_half_precision_models_are_differentiated_in_float32() -> None:
    weights, x = linear()
    shapes = "float16[3,5] w, float16[5,4] u"
    model = ir.from_onnx_text(LINEAR.replace("float[", "float16[").replace(") =>", f", {shapes}) =>", 1))
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.Tensor(weights[value.name].astype(np.float16), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    found = score("taylor", graphopt.load(model), "w", 1, [{"x": x.astype(np.float16)}])
    np.testing.assert_allclose(found, score("taylor", graph(LINEAR, weights), "w", 1, [{"x": x}]), rtol=0.02)


# Labelled data that does not fit ------------------------------------------------------------------------------


def test_labelled_data_that_does_not_fit_names_the_batch() -> None:
    model, (x, labels) = graph(CONVNET, convnet()), labelled()[0]
    for wrong, message in (
        ((x[:, :2], labels), "the shape is"),
        ((np.zeros(np.shape(x), np.int64), labels), "the dtype is int64"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            score("taylor", model, "w", 0, loss=loss, data=[(x, labels), wrong])
        assert "batch 1 of the data, input 'x'" in str(caught.value)
    with pytest.raises(GraphoptError, match="which cannot be iterated"):
        criterion("taylor", loss=loss, data=3)


def test_a_loss_that_raises_is_named_with_the_batch_and_the_labels() -> None:
    model, (x, labels) = graph(CONVNET, convnet()), labelled()[0]
    with pytest.raises(GraphoptError, match="the loss raised TypeError") as caught:
        score("taylor", model, "w", 0, loss=loss, data=[(x, labels), (x,)])
    assert caught.value.where == "batch 1 of the data"
    assert "no labels" in str(caught.value.help)
    assert isinstance(caught.value.__cause__, TypeError)


def test_inputs_that_torch_cannot_run_name_the_item() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x, float[m,3] z) => (float[n,4] y) {
        s = Add (x, z) h = MatMul (s, w) a = Relu (h) y = MatMul (a, u) }"""
    weights, x = linear()
    model = graph(text, weights)
    items = [{"x": x, "z": x}, {"x": x, "z": np.concatenate([x, x])}]
    with pytest.raises(DataError, match="torch cannot run") as caught:
        score("taylor", model, "w", 1, Calibration(model, items))  # type: ignore[arg-type]
    assert "calibration item 1, x: float32" in str(caught.value)
    with pytest.raises(DataError, match="batch 1 of the inputs"):
        score("taylor", model, "w", 1, items)
