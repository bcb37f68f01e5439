"""`graphopt.recover`: it learns, repeats itself, and says what is wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import DataError, TrainingError, recover

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402

from tests.train.networks import (  # noqa: E402
    Gain,
    Ranged,
    assert_same,
    convnet,
    damaged,
    graph,
    images,
    weights_of,
)

pytestmark = pytest.mark.torch

TEACHER, STUDENT = convnet(), damaged(convnet())


def run(subject: Any = STUDENT, data: Any = None, **options: Any) -> graphopt.Recovery:
    options = {"steps": 6, "teacher": TEACHER, "quiet": True, **options}
    return recover(subject, images() if data is None else data, **options)


def error_of(model: ir.Model) -> float:
    return graphopt.compare(TEACHER, model, {"x": images(1, seed=9)[0]}).error


def agreement(session: Any) -> float:
    """Minus the distance from the teacher, on images that are not trained on."""
    batch = images(1, seed=9)[0]
    (expected,) = graphopt.lift(TEACHER).run_feeds({"x": batch}).values()
    (found,) = session.run(None, {"x": batch})
    return -float(np.abs(found - expected.detach().numpy()).mean())


# It learns


def test_a_damaged_model_finds_back_to_its_teacher() -> None:
    before = weights_of(STUDENT)
    recovery = run(steps=150, learning_rate=1e-2, norm="frozen")
    assert recovery.history[-1][1] < 0.1 * recovery.history[0][1]
    assert error_of(recovery.model) < 0.5 * error_of(STUDENT)
    assert [step for step, _ in recovery.history] == list(range(150))
    assert recovery.best_step == 150
    assert recovery.original is STUDENT
    assert all(np.array_equal(before[name], array) for name, array in weights_of(STUDENT).items())
    assert "steps" in str(recovery)
    assert "loss" in str(recovery)


def test_result_of_optimize_learns_from_its_original() -> None:
    result = graphopt.optimize(TEACHER, recipe="exact", quiet=True)
    pruned = graphopt.Result(damaged(result.model), result.report, result.original)
    recovery = recover(pruned, images(), steps=40, learning_rate=1e-2, norm="frozen", quiet=True)
    assert recovery.history[-1][1] < 0.5 * recovery.history[0][1]
    assert result.to_torch()(torch.from_numpy(images(1)[0])).shape == (16, 3)


def test_a_module_teaches_and_is_not_changed() -> None:
    module = graphopt.lift(TEACHER).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    recovery = run(teacher=module)
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert_same(recovery.model, run().model)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9), {}),
        (None, {"weight_decay": 0.1, "warmup": 5, "clip_norm": 1.0, "learning_rate": 1e-2}),
        (None, {"distillation": "kl", "temperature": 2.0, "learning_rate": 1e-2}),
        (None, {"match": {"hidden": "hidden"}, "learning_rate": 1e-2}),
        (None, {"match": ["hidden"], "schedule": "constant", "learning_rate": 1e-2}),
        (None, {"precision": "bfloat16", "learning_rate": 1e-2}),
        (None, {"precision": "float16", "learning_rate": 1e-2}),
    ],
)
def test_every_way_to_train_learns(optimizer: Any, options: dict[str, Any]) -> None:
    recovery = run(steps=60, norm="frozen", optimizer=optimizer, **options)
    assert recovery.history[-1][1] < 0.7 * recovery.history[0][1]


def test_matched_values_count_in_the_loss() -> None:
    plain, matched = run(steps=1), run(steps=1, match=["hidden"])
    assert plain.history[0][1] != matched.history[0][1]


@pytest.mark.parametrize("kind", ["tuple", "list", "loader", "dict"])
def test_labels(kind: str) -> None:
    labels = [torch.arange(16) % 3 for _ in range(4)]
    pairs: Any = [(batch, label) for batch, label in zip(images(), labels, strict=True)]

    def loss(outputs: Any, label: Any) -> Any:
        return functional.cross_entropy(outputs, label)

    if kind == "list":
        pairs = [list(pair) for pair in pairs]
    if kind == "dict":
        pairs = [{"x": batch, "label": label} for batch, label in pairs]
    if kind == "loader":
        samples = torch.utils.data.TensorDataset(torch.from_numpy(np.concatenate(images())), torch.cat(labels))
        pairs = torch.utils.data.DataLoader(samples, batch_size=16)
    taught = run(data=pairs, loss=loss, teacher=None)
    assert_same(taught.model, run(data=pairs, loss=loss, teacher_weight=0.0).model)
    both = run(data=pairs, loss=loss, teacher_weight=0.5)
    unlabelled = run(data=pairs)
    assert both.history[0][1] == pytest.approx(taught.history[0][1] + 0.5 * unlabelled.history[0][1], rel=1e-5)
    assert_same(unlabelled.model, run().model)


def test_only_what_is_trainable_moves() -> None:
    recovery = run(trainable=["w3", "b*"])
    before, after = weights_of(STUDENT), weights_of(recovery.model)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"w3", "b1", "b3", "beta", "mean", "variance"}


def test_frozen_statistics_stay() -> None:
    before, after = weights_of(STUDENT), weights_of(run(norm="frozen").model)
    assert all(np.array_equal(before[name], after[name]) for name in ("mean", "variance"))
    assert not np.array_equal(before["gamma"], after["gamma"])


def test_half_precision_models_stay_half() -> None:
    weights = {"w": np.ones((4, 4))}
    model = graph(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y) { y = MatMul(x, w) }', weights
    )
    for value in (model.graph.inputs[0], model.graph.outputs[0], model.graph.initializers["w"]):
        value.dtype = ir.DataType.FLOAT16
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((4, 4), np.float16), name="w")
    model = graphopt.load(model)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float16)
    recovery = recover(model, [(x, -x)], loss=functional.mse_loss, teacher=None, steps=20, quiet=True)
    trained = recovery.model.graph.initializers["w"].const_value
    assert trained is not None
    assert trained.dtype == ir.DataType.FLOAT16
    assert recovery.history[-1][1] < recovery.history[0][1]


# Insertions


def test_insertions_are_advanced_penalised_trained_and_folded() -> None:
    Gain.calls.clear()
    gain = Gain("hidden", "flat", penalty=0.1)
    recovery = run(TEACHER, teacher="original", insertions={"gain": gain}, steps=5, learning_rate=0.1)
    assert Gain.calls == [(step, 5) for step in range(5)]
    assert [node.op_type for node in recovery.model.graph].count("Mul") == 2
    assert gain.gains[0].logarithm.item() == 0  # the user's own object is left alone
    assert float(weights_of(recovery.model)["hidden_gain"]) != 1
    assert recovery.session().run(None, {"x": images(1)[0]})[0].shape == (16, 3)


def test_a_penalty_pulls() -> None:
    options: dict[str, Any] = {"trainable": [], "steps": 30, "learning_rate": 0.1, "norm": "frozen"}
    free, pulled = (
        run(TEACHER, insertions={"gain": Gain("flat", penalty=weight)}, **options).model for weight in (0.0, 1.0)
    )
    assert float(weights_of(free)["flat_gain"]) == pytest.approx(1, abs=1e-3)
    assert float(weights_of(pulled)["flat_gain"]) > 1.1


def test_insertions_see_inputs_and_training_reads_them_again() -> None:
    data = images()
    largest = max(float(np.abs(batch).max()) for batch in data)
    options: dict[str, Any] = {"insertions": {"gain": Ranged("hidden")}, "steps": 4, "schedule": "constant"}
    shown = run(TEACHER, iter(data), learning_rate=1e-6, **options)
    assert np.log(weights_of(shown.model)["hidden_gain"]) == pytest.approx(largest / 10, abs=1e-4)
    assert_same(shown.model, run(TEACHER, data, learning_rate=1e-6, **options).model)


def test_weights_that_are_not_settled_cannot_win() -> None:
    metrics = iter([9.0, 8.0, 1.0, 3.0, 2.0])
    recovery = run(
        insertions={"gain": Ranged("hidden")}, steps=4, evaluate=lambda session: next(metrics), evaluate_every=1
    )
    assert recovery.metrics == ((0, 9.0), (1, 8.0), (2, 1.0), (3, 3.0), (4, 2.0))
    assert recovery.best_step == 3


# The same call, the same weights


def noisy() -> Iterator[np.ndarray]:
    """Augmented by all three generators."""
    while True:
        yield images(1)[0] * random.random() + np.random.rand() + torch.rand(()).numpy()  # noqa: NPY002


def test_the_same_call_gives_the_same_weights_and_leaves_generators_alone() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = run(data=noisy(), insertions={"gain": Gain("hidden", noise=0.1)})
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    torch.rand(3)
    second = run(data=noisy(), insertions={"gain": Gain("hidden", noise=0.1)})
    assert_same(first.model, second.model)
    assert first.history == second.history
    assert first.history != run(data=noisy(), insertions={"gain": Gain("hidden", noise=0.1)}, seed=1).history


def test_shuffled_loaders_are_seeded() -> None:
    samples = torch.utils.data.TensorDataset(torch.from_numpy(np.concatenate(images())))
    loader = torch.utils.data.DataLoader(samples, batch_size=16, shuffle=True)
    assert_same(run(data=loader).model, run(data=loader).model)


# Metrics


def test_the_best_weights_win() -> None:
    recovery = run(steps=40, learning_rate=1e-2, norm="frozen", evaluate=agreement, evaluate_every=10)
    assert [step for step, _ in recovery.metrics] == [0, 10, 20, 30, 40]
    best = max(recovery.metrics, key=lambda entry: entry[1])
    assert recovery.best_step == best[0]
    assert agreement(recovery.session()) == pytest.approx(best[1], rel=1e-5)
    assert "metric" in str(recovery)


def test_never_worse_than_before() -> None:
    recovery = run(TEACHER, teacher=STUDENT, steps=6, learning_rate=0.1, evaluate=agreement, evaluate_every=2)
    assert recovery.best_step == 0
    assert_same(recovery.model, TEACHER)
    assert any("after 0 steps are kept" in note for note in recovery.notes)


def test_evaluate_may_draw_random_numbers() -> None:
    def draws(session: Any) -> float:
        return -1.0 - float(torch.rand(()))

    first = run(data=noisy())
    second = run(data=noisy(), evaluate=draws, evaluate_every=1)
    assert first.history == second.history


@pytest.mark.parametrize("value", [float("nan"), "good", ValueError("no data")])
def test_evaluate_that_fails_keeps_the_weights(value: Any) -> None:
    calls: list[int] = []

    def evaluate(session: Any) -> Any:
        calls.append(0)
        if len(calls) < 3:
            return 1.0
        if isinstance(value, Exception):
            raise value
        return value

    with pytest.raises(TrainingError, match=r"metric cannot be measured(.|\n)*step 4") as caught:
        run(evaluate=evaluate, evaluate_every=2)
    assert caught.value.recovery.best_step == 4


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` is 0"),
        ({"steps": 2.5}, "`steps` is 2.5"),
        ({"learning_rate": -1.0}, "`learning_rate` is -1.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan"),
        ({"weight_decay": -1.0}, "`weight_decay`"),
        ({"warmup": 6}, "6 steps of warmup in 6"),
        ({"norm": "off"}, "one of train, frozen"),
        ({"precision": "int8"}, "one of float32, bfloat16, float16"),
        ({"distillation": "l1"}, "one of mse, kl"),
        ({"schedule": "linear"}, "one of cosine, constant"),
        ({"device": "nowhere"}, "no device 'nowhere'"),
        ({"device": "cuda:17"}, "no device 'cuda:17'"),
        ({"optimizer": torch.optim.SGD, "learning_rate": 0.1}, "are for the default optimizer"),
        ({"optimizer": lambda parameters: None}, "`optimizer` returned a NoneType"),
        ({"optimizer": lambda: None}, "`optimizer` raised TypeError"),
        ({"loss": 3}, "`loss` is not callable"),
        ({"evaluate": 3}, "`evaluate` is not callable"),
        ({"teacher": None}, "no teacher and no loss"),
        ({"teacher": "orginal"}, "`teacher` is 'orginal'"),
        ({"teacher": 3}, "a int cannot teach"),
        ({"teacher": "original"}, "nothing to learn"),
        ({"teacher": STUDENT}, "nothing to learn"),
        ({"trainable": ["w9"]}, "`trainable` names 'w9'"),
        ({"trainable": "w1"}, "`trainable` is one string"),
        ({"trainable": []}, "`trainable` names nothing"),
        ({"match": "hidden"}, "`match` is one string"),
        ({"match": {"hidden": "wide", "flat": "pooled"}}, "the student's shape is"),
        ({"resume": True}, "`resume` without `checkpoint`"),
        ({"checkpoint": "/nowhere/file"}, "does not exist"),
        ({"checkpoint": "/"}, "is a directory"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        run(**options)


def test_subjects_that_do_not_fit() -> None:
    with pytest.raises(TrainingError, match="cannot train a str"):
        run("model.onnx")
    with pytest.raises(graphopt.LiftError, match="no value 'nowhere'"):
        run(match=["nowhere"])
    with pytest.raises(graphopt.LiftError, match="no value 'nowhere'"):
        run(insertions={"gain": Gain("nowhere")})
    with pytest.raises(TrainingError, match="`match` needs an ONNX teacher"):
        run(teacher=graphopt.lift(TEACHER), match=["hidden"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([np.zeros((4, 2, 6), np.float32)], r"shape is \[4, 2, 6\](.|\n)*batch 0 of the data, input 'x'"),
        ([np.zeros((4, 2, 6, 6), np.int64)], r"dtype is int64, the model takes float32(.|\n)*input 'x'"),
        ([np.full((4, 2, 6, 6), np.nan, np.float32)], r"NaN or infinity(.|\n)*input 'x'"),
        ([{"image": images(1)[0]}], "lacks input 'x'"),
        ([()], "0 entries, the model has 1 inputs"),
        ([((images(1)[0], 1), 2)], "not an array"),
        ([None], "not an array"),
        (images(1)[0], "one ndarray, not an iterable"),
        ({"x": images(1)[0]}, "one dict, not an iterable"),
        (3, "one int, not an iterable"),
    ],
)
def test_data_that_does_not_fit(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(data=data)


def test_float64_is_cast() -> None:
    assert_same(run(data=[batch.astype(np.float64) for batch in images()]).model, run().model)


def test_a_later_batch_that_does_not_fit_keeps_the_weights() -> None:
    with pytest.raises(DataError, match=r"batch 2 of the data, input 'x', step 2") as caught:
        run(data=[*images(2), images(1)[0][:, :1]], schedule="constant")
    assert isinstance(caught.value, TrainingError)
    assert_same(caught.value.recovery.model, run(steps=2, data=images(2), schedule="constant").model)


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_data(data: Any) -> None:
    with pytest.raises(TrainingError, match="the data is empty"):
        run(data=data)


def test_a_generator_runs_dry() -> None:
    with pytest.raises(TrainingError, match=r"ran dry after 4 steps(.|\n)*step 4") as caught:
        run(data=iter(images()), schedule="constant")
    assert_same(caught.value.recovery.model, run(steps=4, schedule="constant").model)
    assert len(caught.value.recovery.history) == 4


def broken(count: int, error: Exception) -> Iterator[np.ndarray]:
    yield from images(count)
    raise error


def test_data_that_raises() -> None:
    with pytest.raises(TrainingError, match=r"data raised OSError: disk(.|\n)*step 3(.|\n)*resume=True") as caught:
        run(data=broken(3, OSError("disk")), schedule="constant")
    assert isinstance(caught.value.__cause__, OSError)
    assert_same(caught.value.recovery.model, run(steps=3, data=images(3), schedule="constant").model)


def test_a_loss_that_is_not_finite_goes_back() -> None:
    calls: list[int] = []

    def loss(outputs: Any) -> Any:
        calls.append(0)
        return outputs.sum() * (float("nan") if len(calls) == 4 else 0.01)

    with pytest.raises(TrainingError, match=r"loss is nan(.|\n)*step 3(.|\n)*learning rate") as caught:
        run(loss=loss, teacher=None, schedule="constant")
    recovery = caught.value.recovery
    assert recovery.best_step == 2
    expected = run(loss=lambda outputs: outputs.sum() * 0.01, teacher=None, steps=2, schedule="constant").model
    trained = {name: array for name, array in weights_of(recovery.model).items() if name not in ("mean", "variance")}
    assert all(np.array_equal(array, weights_of(expected)[name]) for name, array in trained.items())


def test_a_learning_rate_that_is_far_too_high() -> None:
    with pytest.raises(TrainingError, match="training diverged") as caught:
        run(steps=50, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e9), norm="frozen")
    assert np.isfinite(
        np.concatenate([array.ravel() for array in weights_of(caught.value.recovery.model).values()])
    ).all()


def test_a_gradient_that_is_not_finite() -> None:
    with pytest.raises(TrainingError, match="a gradient is not finite") as caught:
        run(loss=lambda outputs: (outputs * 0).sqrt().sum(), teacher=None)
    assert_same_parameters(caught.value.recovery.model, STUDENT)


def assert_same_parameters(first: ir.Model, second: ir.Model) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours if name not in ("mean", "variance"))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs: outputs, r"`loss` returned a tensor of shape \[16, 3\]"),
        (lambda outputs: 1.0, "`loss` returned float"),
        (lambda outputs, label: 1.0, "`loss` raised TypeError"),
        (lambda outputs: outputs.detach().sum(), "nothing can learn: `loss` returned a number without"),
    ],
)
def test_losses_that_do_not_work(loss: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        run(loss=loss, teacher=None)


def test_one_sample_has_no_statistics() -> None:
    weights = {name: np.ones(4) for name in ("gamma", "beta", "mean", "variance")}
    model = graph(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y) '
        "{ y = BatchNormalization (x, gamma, beta, mean, variance) }",
        weights,
    )
    data = [np.ones((1, 4), np.float32)]
    with pytest.raises(TrainingError, match="norm='frozen'"):
        recover(model, data, loss=lambda outputs: outputs.sum(), teacher=None, steps=1, quiet=True)


# Gradients


BLOCKED = """<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y) {
    a = MatMul (x, w1)
    b = OPERATOR
    y = MatMul (b, w2)
}"""


@pytest.mark.parametrize(
    ("operator", "name"),
    [("Round (a)", "Round"), ("Sign (a)", "Sign"), ("Cast <to = 1> (c)", "Cast")],
)
def test_operators_that_block_are_named(operator: str, name: str) -> None:
    text = BLOCKED.replace("OPERATOR", operator)
    if name == "Cast":
        text = text.replace("    b =", "    c = Cast <to = 7> (a)\n    b =")
    generator = np.random.default_rng(0)
    model = graph(text, {name: generator.standard_normal((4, 4)) * 3 for name in ("w1", "w2")})
    x = generator.standard_normal((8, 4)).astype(np.float32)
    recovery = recover(damaged(model), [x], teacher=model, steps=2, quiet=True)
    (note,) = recovery.notes
    assert note.startswith(f"no gradient for w1: blocked by {name} '")
    with pytest.raises(TrainingError, match=f"nothing can learn: no gradient for w1: blocked by {name}"):
        recover(damaged(model), [x], teacher=model, steps=2, trainable=["w1"], quiet=True)


def test_parameters_outside_the_loss_are_named() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y, float[n,4] z) {
        y = MatMul (x, w1)
        z = MatMul (x, w2)
    }"""
    model = graph(text, {"w1": np.ones((4, 4)), "w2": np.ones((4, 4))})
    recovery = recover(
        model, [np.ones((2, 4), np.float32)], loss=lambda outputs: outputs[0].sum(), teacher=None, steps=1, quiet=True
    )
    assert recovery.notes == ("no gradient for w2: nothing in the loss depends on them",)


def test_integer_weights_are_noted() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y)
        <int8[4,4] q = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float s = {0.1}, int8 z = {0},
        float[4] b = {0,0,0,0}> {
        w = DequantizeLinear (q, s, z)
        m = MatMul (x, w)
        y = Add (m, b)
    }"""
    model = graphopt.load(ir.from_onnx_text(text))
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    recovery = recover(model, [(x, x)], loss=functional.mse_loss, teacher=None, steps=3, quiet=True)
    assert recovery.notes[0].startswith("16 elements of weights are integers and stay as they are; 4 float")


def test_nothing_to_train() -> None:
    model = graph('<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }')
    with pytest.raises(TrainingError, match="no float parameter"):
        recover(model, [np.ones((2, 4), np.float32)], loss=torch.sum, teacher=None, steps=1, quiet=True)
