"""How a training run is to be done, checked before it starts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from graphopt.errors import TrainingError
from graphopt.ir.lifted import Insertion
from graphopt.ir.ops.row import OpTable

MakeOptimizer = Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of the parameters to be trained."""

CHOICES = {
    "distillation": ("mse", "kl"),
    "norm": ("train", "frozen"),
    "precision": ("float32", "bfloat16", "float16"),
    "schedule": ("cosine", "constant"),
}
"""What an option with a fixed set of words may be."""
DEFAULT_LEARNING_RATE = 1e-3
"""Of the default optimizer, AdamW."""
_PARTS = 10
"""Metrics are measured and checkpoints written this many times in a run where nothing else is asked for."""


@dataclass(frozen=True)
class Settings:
    """The options of `graphopt.recover`, as described there.

    Raises:
        TrainingError: when made, where an option is out of range.

    Example:
        >>> Settings(steps=100, warmup=10).factor(0), Settings(steps=100).factor(50)
        (0.1, 0.5)
    """

    steps: int
    loss: Callable[..., torch.Tensor] | None = None
    teacher_weight: float = 1.0
    distillation: str = "mse"
    temperature: float = 1.0
    learning_rate: float | None = None
    optimizer: MakeOptimizer | None = None
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str = "cosine"
    match: Mapping[str, str] = field(default_factory=dict[str, str])
    insertions: Mapping[str, Insertion] = field(default_factory=dict[str, Insertion])
    trainable: tuple[str, ...] | None = None
    norm: str = "train"
    precision: str = "float32"
    device: str = "cpu"
    clip_norm: float | None = None
    evaluate: Callable[[ir.Model], float] | None = None
    evaluate_every: int | None = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    seed: int = 0
    table: OpTable | None = None

    def __post_init__(self) -> None:
        for name, words in CHOICES.items():
            if getattr(self, name) not in words:
                raise TrainingError(
                    f"`{name}` is {getattr(self, name)!r}", where=name, help=f"it is one of {', '.join(words)}"
                )
        for name, least in (("steps", 1), ("warmup", 0), ("evaluate_every", 1), ("checkpoint_every", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name.endswith("_every"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TrainingError(f"`{name}` is {value!r}", where=name, help=f"pass a whole number from {least}")
        for name in ("learning_rate", "temperature", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and value > 0):
                raise TrainingError(f"`{name}` is {value!r}", where=name, help="pass a positive number")
        for name in ("weight_decay", "teacher_weight"):
            value = getattr(self, name)
            if not (_is_finite(value) and value >= 0):
                raise TrainingError(f"`{name}` is {value!r}", where=name, help="pass a number from 0")
        _check_insertions(self.insertions)
        self._check_together()

    def _check_together(self) -> None:
        """Options that exclude or need one another, and what has to exist outside."""
        for name in ("loss", "optimizer", "evaluate"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TrainingError(f"`{name}` is not callable", where=name, help="pass a function")
        if self.loss is None and self.teacher_weight == 0:
            raise TrainingError(
                "nothing would be learned: `teacher_weight` is 0 and there is no `loss`",
                where="teacher_weight",
                help="pass a positive `teacher_weight`, or the labels' `loss`",
            )
        if self.table is not None and not isinstance(self.table, OpTable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TrainingError(
                f"`table` is a {type(self.table).__name__}",
                where="table",
                help="pass op rows: graphopt.ir.ops.default_table().with_rows([...])",
            )
        if self.optimizer is not None and (self.learning_rate is not None or self.weight_decay):
            raise TrainingError(
                "`learning_rate` and `weight_decay` are for the default optimizer",
                where="optimizer",
                help="set them in yours: optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01)",
            )
        if self.warmup >= self.steps:
            raise TrainingError(
                f"{self.warmup} steps of warmup in {self.steps} steps", where="warmup", help="warm up for fewer steps"
            )
        if self.resume and self.checkpoint is None:
            raise TrainingError("`resume` without `checkpoint`", where="resume", help="say which file: checkpoint=path")
        if self.checkpoint is not None:
            _check_writable(Path(self.checkpoint))
        _check_device(self.device)

    @property
    def measured_every(self) -> int:
        """Steps between two measurements of the metric."""
        return self.evaluate_every or max(1, self.steps // _PARTS)

    @property
    def saved_every(self) -> int:
        """Steps between two checkpoints."""
        return self.checkpoint_every or max(1, self.steps // _PARTS)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with at a step: linear warmup, then a cosine to 0, or 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))

    def described(self) -> dict[str, Any]:
        """The options that change what is learned, as plain data: what a checkpoint is only good for."""
        same = ("steps", "teacher_weight", "distillation", "temperature", "learning_rate", "weight_decay", "warmup")
        plain = {name: getattr(self, name) for name in (*same, "schedule", "norm", "precision", "clip_norm", "seed")}
        return {
            **plain,
            "loss": _name_of(self.loss),
            "optimizer": _name_of(self.optimizer),
            "match": dict(self.match),
            "trainable": None if self.trainable is None else list(self.trainable),
        }


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):  # a string, None, several numbers
        return False


def _check_insertions(insertions: Any) -> None:
    found = None
    if not isinstance(insertions, Mapping):
        found = _kind(insertions)
    else:
        for name, insertion in insertions.items():  # pyright: ignore[reportUnknownVariableType]
            if not isinstance(name, str):
                found = f"a dict with the key {name!r}"
            elif not isinstance(insertion, Insertion):
                found = f"a dict with {_kind(insertion)} as {name!r}"
    if found is not None:
        raise TrainingError(
            f"`insertions` is {found}",
            where="insertions",
            help='pass {"name": insertion}, for instance insertions={"quantizers": FakeQuant.for_linear(model)}',
        )


def _kind(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else f"one {type(given).__name__}"


def _name_of(function: Any) -> str | None:
    return None if function is None else getattr(function, "__qualname__", type(function).__qualname__)


def _check_writable(path: Path) -> None:
    folder = path.parent
    if path.is_dir():
        raise TrainingError("the checkpoint is a directory", where=str(path), help="name a file in it")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "cannot be written" if folder.is_dir() else "does not exist"
        raise TrainingError(
            f"the folder of the checkpoint {problem}", where=str(folder), help="create it, or write somewhere else"
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        raise TrainingError(
            f"there is no device {device!r} here: {str(error).partition('.')[0]}",
            where="device",
            help="pass device='cpu', or a device that torch finds",
        ) from error
