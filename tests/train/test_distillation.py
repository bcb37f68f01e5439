"""The distance to a teacher, teachers, and what a checkpoint is told apart by."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import DataError, TrainingError, recover

torch = pytest.importorskip("torch")

from graphopt.train.batches import fit_tensor  # noqa: E402
from graphopt.train.checkpoint import model_digest  # noqa: E402
from graphopt.train.distillation import distillation_loss, relative_error, soft_label_loss  # noqa: E402
from graphopt.train.settings import Settings  # noqa: E402
from tests.train.networks import Gain, convnet, damaged, graph, images, weights_of  # noqa: E402

pytestmark = pytest.mark.torch


def noise(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_relative_error_has_no_scale(scale: float) -> None:
    student, teacher = noise(8, 5), noise(8, 5, seed=1)
    expected = ((student - teacher) ** 2).mean() / teacher.var(correction=0)
    assert relative_error(student * scale, teacher * scale) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("teacher", "expected"), [(torch.full((4,), 2.0), 1.0), (torch.zeros(4), 0.0)])
def test_relative_error_to_a_constant(teacher: Any, expected: float) -> None:
    assert float(relative_error(torch.zeros(4), teacher)) == expected


def test_soft_labels_against_probabilities() -> None:
    student, teacher = noise(2, 3, 5).double(), noise(2, 3, 5, seed=1).double()
    ours, theirs = torch.softmax(student / 3, -1), torch.softmax(teacher / 3, -1)
    expected = 9 * (theirs * (theirs / ours).log()).sum(-1).mean()
    assert float(soft_label_loss(student, teacher, 3.0)) == pytest.approx(float(expected))


def test_losses_of_half_precision_are_single() -> None:
    student, teacher = noise(4, 4).half() * 300, noise(4, 4, seed=1).half() * 300
    for kind in ("mse", "kl"):
        loss = distillation_loss(student, teacher, kind=kind)
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)


def test_outputs_and_matched_values_count_alike() -> None:
    a, b, c, d = (noise(4, 3, seed=seed) for seed in range(4))
    mixed = distillation_loss([a, b], [c, d], kind="kl", matched=1)
    assert float(mixed) == pytest.approx((float(soft_label_loss(a, c)) + float(relative_error(b, d))) / 2)
    integers = torch.arange(3)
    assert float(distillation_loss([a, integers], [c, integers])) == float(relative_error(a, c))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], "returns 1 tensors, the teacher 2"),
        (torch.ones(2, 3), torch.ones(2, 1), r"shape is \[2, 3\], the teacher's \[2, 1\]"),
        (torch.arange(3), torch.arange(3), "no output is a float"),
    ],
)
def test_tensors_that_do_not_fit(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        distillation_loss(student, teacher)


def test_teachers_of_other_names_and_more_outputs() -> None:
    weights = {"w": np.eye(3)}
    student = graph(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x) => (float[n,3] y) { y = MatMul (x, w) }', weights
    )
    other = graph(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,3] a) => (float[n,3] b) { b = MatMul (a, w) }',
        {"w": 2 * np.eye(3)},
    )
    more = graph(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x) => (float[n,3] z, float[n,3] y) '
        "{ y = MatMul (x, w) z = Relu (x) }",
        {"w": 2 * np.eye(3)},
    )
    two = graph(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,3] p, float[n,3] q) => (float[n,3] y) { y = Add (p, q) }'
    )
    x = noise(64, 3)
    for teacher in (other, more, lambda_module()):
        recovery = recover(student, [x], teacher=teacher, steps=150, learning_rate=0.1, quiet=True)
        assert weights_of(recovery.model)["w"] == pytest.approx(2 * np.eye(3), abs=0.02)
    with pytest.raises(TrainingError, match="inputs are x, the teacher's p, q"):
        recover(student, [x], teacher=two, steps=1, quiet=True)
    with pytest.raises(TrainingError, match="outputs are z, y, the teacher's y"):
        recover(more, [x], teacher=student, steps=1, quiet=True)


def lambda_module() -> Any:
    class Double(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> dict[str, Any]:
            return {"cache": x[:1], "y": 2 * x}

    return Double()


def test_the_schedule() -> None:
    settings = Settings(steps=20, warmup=4)
    factors = [settings.factor(step) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.02
    assert Settings(steps=20, schedule="constant").factor(19) == 1


def test_digests_know_weights_and_not_metadata() -> None:
    model = convnet()
    digest = model_digest(model)
    assert digest == model_digest(convnet())
    assert digest != model_digest(damaged(model))
    next(iter(model.graph)).metadata_props["pkg.torch.stack_trace"] = "File here"
    assert digest == model_digest(model)


@pytest.mark.parametrize(
    ("given", "dtype", "shape"),
    [
        (np.arange(6, dtype=np.int32).reshape(2, 3), "int64", None),
        (np.zeros((2, 3), np.float64), "float", None),
        (torch.ones(2, 3, dtype=torch.bfloat16), "float", None),
        ([[1.0, 2.0, 3.0]], "double", None),
        (np.array([[300, 1, 1]]), "uint8", "dtype is int64, the model takes uint8"),
        (np.array([[-1, 1, 1]]), "uint8", "dtype is int64, the model takes uint8"),
        (np.array([[True, False, True]]), "int64", "dtype is bool, the model takes int64"),
        (np.ones((2, 3), np.float32), "int64", "dtype is float32, the model takes int64"),
        (np.ones(3, np.float32), "float", "add the batch axis"),
        (np.ones((2, 4), np.float32), "float", r"shape is \[2, 4\]"),
    ],
)
def test_tensors_are_fitted_to_inputs(given: Any, dtype: str, shape: str | None) -> None:
    text = f'<ir_version: 10, opset_import: ["": 21]> g ({dtype}[n,3] x) => ({dtype}[n,3] y) {{ y = Identity (x) }}'
    value = ir.from_onnx_text(text).graph.inputs[0]
    if shape is not None:
        with pytest.raises(DataError, match=shape):
            fit_tensor(given, value, "input 'x'")
        return
    assert value.dtype is not None
    assert fit_tensor(given, value, "input 'x'").numpy().dtype == value.dtype.numpy()


def test_insertions_in_a_run_with_frozen_statistics_are_in_training_mode() -> None:
    modes: list[tuple[bool, bool]] = []

    class Watched(Gain):
        def penalty(self) -> Any:
            modes.append((self.training, self.gains[0].training))
            return 0.0

    options: dict[str, Any] = {"steps": 2, "quiet": True, "norm": "frozen"}
    recover(convnet(), images(1), insertions={"gain": Watched("flat")}, **options)
    assert modes == [(True, True)] * 2
    assert not graphopt.lift(convnet()).training
