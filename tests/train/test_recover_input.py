"""`graphopt.recover`: what it says to arguments that cannot work, and where onnxruntime disagrees with the module."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import LiftError, TrainingError, recover
from graphopt.ir.ops import default_table
from graphopt.ir.ops.row import OpRow

torch = pytest.importorskip("torch")
from graphopt.ir.lower import Link  # noqa: E402
from graphopt.train.batches import first_samples  # noqa: E402
from graphopt.train.fake_quant import FakeQuant  # noqa: E402
from tests.train.networks import Gain, convnet, damaged, graph, images, weights_of  # noqa: E402

pytestmark = pytest.mark.torch

TEACHER, STUDENT = convnet(), damaged(convnet())
WARP = """<ir_version: 10, opset_import: ["": 21, "com.acme": 1]> g (float[n,4] x) => (float[n,4] y) {
    h = MatMul (x, w)
    y = com.acme.Warp <amount = 3.0> (h)
}"""


def run(subject: Any = STUDENT, data: Any = None, **options: Any) -> graphopt.Recovery:
    options = {"steps": 2, "teacher": TEACHER, "quiet": True, **options}
    return recover(subject, images() if data is None else data, **options)


class Lying(Gain):
    """A `Gain` that folds to another factor than the one that was trained."""

    def fold(self, folding: Any) -> None:
        folding.insert_after("flat", [Link("Mul", [folding.add_constant("factor", np.array(1.5, np.float32))])])


# Op rows


def test_custom_operators_are_trained_by_the_rows_that_are_passed() -> None:
    weights = {"w": np.eye(4)}
    row = OpRow("Warp", domain="com.acme", torch=lambda x, *, amount=1.0: x * amount)
    table = default_table().with_rows([row])
    student, teacher = graph(WARP, weights), graph(WARP, {"w": 2 * np.eye(4)})
    data = [np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)]
    with pytest.raises(LiftError, match=r"com\.acme::Warp"):
        recover(student, data, teacher=teacher, steps=1, quiet=True)
    recovery = recover(student, data, teacher=teacher, steps=100, learning_rate=0.1, table=table, quiet=True)
    assert weights_of(recovery.model)["w"] == pytest.approx(2 * np.eye(4), abs=0.02)
    assert recovery.to_torch()(torch.ones(1, 4)).shape == (1, 4)
    inserted = recover(student, data, insertions={"gain": Gain("h")}, steps=1, table=table, quiet=True)
    assert inserted.notes[-1].startswith("whether onnxruntime computes what was trained is unknown: onnxruntime")


# onnxruntime


def test_a_difference_of_onnxruntime_is_noted() -> None:
    assert not any("onnxruntime" in note for note in run(insertions={"gain": Gain("flat")}).notes)
    (note,) = run(insertions={"gain": Lying("flat")}).notes
    assert note.startswith("onnxruntime computes something else than the trained module on this machine (rms 0.")
    assert "VNNI" not in note
    quantized = {"quantizers": FakeQuant.for_linear(STUDENT), "gain": Lying("flat")}
    assert run(insertions=quantized).notes[-1].endswith("train with weight_bits=7")


def test_the_comparison_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    run(insertions={"gain": Gain("flat", noise=0.1)})
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("inputs", "count"),
    [("float[n,2] x, float[n,2] z", 3), ("float[n,2] x, float[m,2] z", 5), ("float[5,2] x, float[n,2] z", 5)],
)
def test_first_samples(inputs: str, count: int) -> None:
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => (float[2,2] y) '
        "{ t = Transpose (x) y = MatMul (t, z) }"
    )
    feeds = {"x": torch.ones(5, 2), "z": torch.ones(6 if "[m" in inputs else 5, 2)}
    assert len(first_samples(model, feeds, 3)["x"]) == count


def test_a_representation_without_graphs() -> None:
    assert len(repr(run())) < 500


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "1e-3"}, "`learning_rate` is '1e-3'"),
        ({"temperature": "2"}, "`temperature` is '2'"),
        ({"clip_norm": "1"}, "`clip_norm` is '1'"),
        ({"weight_decay": "0.1"}, "`weight_decay` is '0.1'"),
        ({"teacher_weight": None}, "`teacher_weight` is None"),
        ({"warmup": None}, "`warmup` is None"),
        ({"steps": "10"}, "`steps` is '10'"),
        ({"table": {}}, "`table` is a dict"),
        ({"teacher_weight": 0}, "nothing would be learned"),
        ({"insertions": Gain("flat")}, r'`insertions` is one Gain(.|\n)*pass {"name": insertion}'),
        ({"insertions": [Gain("flat")]}, r'`insertions` is one list(.|\n)*pass {"name": insertion}'),
        ({"insertions": Gain}, "`insertions` is the class Gain"),
        ({"insertions": {"gain": Gain}}, "`insertions` is a dict with the class Gain as 'gain'"),
        ({"insertions": {"gain": torch.nn.ReLU()}}, "`insertions` is a dict with one ReLU as 'gain'"),
        ({"insertions": {3: Gain("flat")}}, "`insertions` is a dict with the key 3"),
        ({"trainable": []}, "`trainable` names nothing"),
    ],
)
def test_arguments_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        run(**options)


def test_insertions_alone_may_be_trained() -> None:
    before, after = weights_of(STUDENT), weights_of(run(trainable=[], insertions={"gain": Gain("flat")}).model)
    assert np.array_equal(before["w1"], after["w1"])


@pytest.mark.parametrize("shape", ["[n,1]", "[n]"])
def test_divergence_needs_classes(shape: str) -> None:
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float{shape} y) {{ y = MatMul (x, w) }}'
    weights = np.ones((4, 1) if "1" in shape else 4)
    student, teacher = graph(text, {"w": weights}), graph(text, {"w": 2 * weights})
    options: dict[str, Any] = {"teacher": teacher, "steps": 1, "quiet": True}
    with pytest.raises(TrainingError, match=r'shape of y is \[8(.|\n)*at distillation(.|\n)*"mse"'):
        recover(student, [np.ones((8, 4), np.float32)], distillation="kl", **options)


# Losses and teachers


def test_a_loss_that_wants_labels_which_are_not_there() -> None:
    with pytest.raises(TrainingError, match=r"`loss` raised TypeError(.|\n)*the batches have no labels"):
        run(loss=lambda outputs, label: outputs.sum(), teacher=None)
    labelled = [(batch, 0, 1) for batch in images()]
    with pytest.raises(TrainingError, match=r"the step failed: TypeError(.|\n)*mend") as caught:
        run(data=labelled, loss=lambda outputs, label: outputs.sum(), teacher=None)
    assert "no labels" not in str(caught.value)


def test_a_detached_loss() -> None:
    with pytest.raises(TrainingError, match=r"`loss` returned a number without a gradient") as caught:
        run(loss=lambda outputs: outputs.detach().sum(), teacher=None)
    assert "insert" not in str(caught.value)


def test_a_teacher_that_raises() -> None:
    class Broken(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return torch.nn.functional.linear(x, torch.ones(3, 5))

    message = r"the teacher failed: RuntimeError: mat1(.|\n)*at step 0(.|\n)*float32 \[16, 2, 6, 6\]"
    with pytest.raises(TrainingError, match=message):
        run(teacher=Broken())


def test_a_teacher_that_agrees() -> None:
    result = graphopt.optimize(TEACHER, recipe="exact", quiet=True)
    options: dict[str, Any] = {"steps": 1, "norm": "frozen", "quiet": True}
    with pytest.raises(TrainingError, match=r"teacher and model agree(.|\n)*pass the unpruned model"):
        recover(result, images(), **options)
    extra: list[dict[str, Any]] = [
        {"insertions": {"gain": Gain("flat")}},
        {"loss": lambda outputs: outputs.square().mean()},
    ]
    for each in extra:
        notes = recover(TEACHER, images(), **options, **each).notes
        assert notes[0].startswith("teacher and model agree before training")


def test_matched_values_may_differ_where_outputs_agree() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y) {
        h = MatMul (x, w)
        y = Mul (h, v)
    }"""
    student = graph(text, {"w": np.eye(4), "v": np.full(4, 2.0)})
    teacher = graph(text, {"w": 2 * np.eye(4), "v": np.ones(4)})
    data = [np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)]
    with pytest.raises(TrainingError, match="teacher and model agree"):
        recover(student, data, teacher=teacher, steps=1, quiet=True)
    assert recover(student, data, teacher=teacher, match=["h"], steps=1, quiet=True).history[0][1] > 0.1
