"""Checkpoints: an interrupted run goes on as if nothing had been, and another run's file is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt import TrainingError, recover

torch = pytest.importorskip("torch")

from tests.train.networks import Gain, Ranged, assert_same, convnet, damaged, images  # noqa: E402

pytestmark = pytest.mark.torch

TEACHER, STUDENT = convnet(), damaged(convnet())


class Augmented:
    """Batches that are shuffled and changed at random, and fail once they have been asked for often enough."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.left = fails_after

    def __iter__(self) -> Iterator[Any]:
        batches = images()
        for index in torch.randperm(4).tolist():
            if self.left is not None:
                if self.left == 0:
                    raise ConnectionError("the network drive is gone")
                self.left -= 1
            noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
            yield batches[index] * noise


def metric(session: Any) -> float:
    (found,) = session.run(None, {"x": images(1, seed=9)[0]})
    return -float(np.abs(found).mean())


def run(data: Any, checkpoint: Path | None, **options: Any) -> graphopt.Recovery:
    options = {"steps": 11, "teacher": TEACHER, "quiet": True, "checkpoint": checkpoint, **options}
    options.setdefault("insertions", {"gain": Gain("hidden", noise=0.1)})
    return recover(options.pop("subject", STUDENT), data, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"evaluate": metric, "evaluate_every": 2},
        {"insertions": {"gain": Ranged("hidden", noise=0.1)}},
        {"precision": "float16"},
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)},
    ],
    ids=["plain", "metric", "shown", "float16", "sgd"],
)
@pytest.mark.parametrize("step", [4, 6])
def test_resumed_is_as_uninterrupted(tmp_path: Path, step: int, options: dict[str, Any]) -> None:
    whole = run(Augmented(), None, **options)
    with pytest.raises(TrainingError, match=f"ConnectionError(.|\n)*step {step}"):
        run(Augmented(step), tmp_path / "run", **options)
    resumed = run(Augmented(), tmp_path / "run", resume=True, **options)
    assert_same(whole.model, resumed.model)
    assert whole.history == resumed.history
    assert whole.metrics == resumed.metrics
    assert whole.best_step == resumed.best_step
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("insertion", [Gain("hidden"), Ranged("hidden")], ids=["plain", "shown"])
def test_resumed_from_a_periodic_checkpoint_with_a_generator(tmp_path: Path, insertion: Gain) -> None:
    """As after a power cut: nothing could be written at the end. Ranged reads 8 batches ahead."""
    insertions = {"gain": insertion}

    class PowerCutError(BaseException):
        pass

    def stream(count: int) -> Iterator[np.ndarray]:
        for number in range(count):
            yield images(1, seed=number)[0] * torch.rand(()).numpy()
        raise PowerCutError

    whole = run(stream(12), None, insertions=insertions)
    with pytest.raises(PowerCutError):
        run(stream(8), tmp_path / "run", checkpoint_every=5, insertions=insertions)
    assert torch.load(tmp_path / "run", weights_only=True)["step"] == 5
    resumed = run(stream(12), tmp_path / "run", resume=True, insertions=insertions)
    assert_same(whole.model, resumed.model)
    with pytest.raises(TrainingError, match=r"ends after 2 batches, the checkpoint was written after 11"):
        run(images(2).__iter__(), tmp_path / "run", resume=True, insertions=insertions)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(Augmented(), tmp_path / "run")
    again = run(Augmented(), tmp_path / "run", resume=True)
    assert_same(first.model, again.model)
    assert first.history == again.history


def test_resume_without_a_file_starts(tmp_path: Path) -> None:
    assert_same(run(Augmented(), tmp_path / "run", resume=True).model, run(Augmented(), None).model)
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject": damaged(TEACHER, seed=5)}, "of another model"),
        ({"teacher": damaged(TEACHER, seed=5)}, "of another teacher"),
        ({"insertions": {"gain": Gain("flat", noise=0.1)}}, "of other insertions"),
        ({"insertions": {}}, "of other insertions"),
        ({"steps": 12}, "steps was 11, is 12"),
        ({"learning_rate": 0.1}, "learning_rate was None, is 0.1"),
        ({"seed": 3, "norm": "frozen"}, "norm was 'train', is 'frozen'; seed was 0, is 3"),
        ({"trainable": ["w1"]}, r"trainable was None, is \['w1'\]"),
        ({"match": ["hidden"]}, "other"),
    ],
)
def test_checkpoints_of_another_run_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    run(Augmented(), tmp_path / "run", steps=11)
    before = (tmp_path / "run").read_bytes()
    with pytest.raises(TrainingError, match=message):
        run(Augmented(), tmp_path / "run", resume=True, **options)
    assert (tmp_path / "run").read_bytes() == before


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run(Augmented(), path)
    whole = path.read_bytes()
    torch.save({"weights": torch.ones(1)}, tmp_path / "other")
    for content in (b"", b"hello", whole[:-100], whole[:200], (tmp_path / "other").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match="no checkpoint of graphopt"):
            run(Augmented(), path, resume=True)


def test_a_diverged_run_leaves_its_last_good_weights(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(outputs: Any) -> Any:
        calls.append(0)
        return outputs.sum() * (float("inf") if len(calls) == 5 else 0.01)

    with pytest.raises(TrainingError, match=r"loss is (inf|-inf|nan)(.|\n)*step 4") as caught:
        run(images(), tmp_path / "run", loss=loss, teacher=None, insertions={})
    content = torch.load(tmp_path / "run", weights_only=True)
    assert content["step"] == 3
    assert len(content["history"]) == 3
    trained = content["module"]["w1"].numpy()
    assert np.array_equal(trained, caught.value.recovery.model.graph.initializers["w1"].const_value.numpy())


def test_a_full_disk_keeps_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphopt.train.checkpoint.torch.save", full)
    with pytest.raises(TrainingError, match=r"cannot be written: .*No space left") as caught:
        run(Augmented(), tmp_path / "run", checkpoint_every=4)
    assert caught.value.recovery.best_step == 4
    assert list(tmp_path.iterdir()) == []
