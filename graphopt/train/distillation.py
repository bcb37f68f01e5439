"""The loss against a teacher, and the teachers: another ONNX graph, or any torch module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional

from graphopt.errors import TrainingError
from graphopt.ir.lift import lift
from graphopt.ir.lifted import LiftedModule
from graphopt.ir.ops.row import OpTable

_CONSTANT = 1e-6
"""A teacher whose variance is below this share of its mean square is taken for constant."""


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the variance of the teacher, so that tensors of any scale count alike.

    1 is the error of a student that always says the teacher's mean. A constant teacher has no variance; its mean
    square stands in.

    Args:
        student: float tensor of any shape.
        teacher: float tensor of the same shape.

    Returns:
        A scalar of at least float32.

    Example:
        >>> teacher = torch.tensor([1000.0, -1000.0])
        >>> relative_error(torch.zeros(2), teacher)
        tensor(1.)
    """
    student, teacher = _widened(student), _widened(teacher)
    square = teacher.square().mean()
    variance = teacher.var(correction=0) if teacher.numel() else square
    scale = torch.where(variance > _CONSTANT * square, variance, square)
    return (student - teacher).square().mean() / torch.where(scale > 0, scale, 1.0)


def soft_label_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence of softened class probabilities, times the squared temperature.

    Args:
        student: logits [..., classes].
        teacher: logits of the same shape.
        temperature: both are divided by it first; above 1, small probabilities count more.

    Returns:
        The mean over everything but the last axis, a scalar of at least float32.

    Example:
        >>> soft_label_loss(torch.zeros(3, 4), torch.zeros(3, 4), temperature=4.0)
        tensor(0.)
    """
    classes = student.shape[-1] if student.ndim else 1
    log_student = functional.log_softmax(_widened(student).reshape(-1, classes) / temperature, dim=-1)
    log_teacher = functional.log_softmax(_widened(teacher).reshape(-1, classes) / temperature, dim=-1)
    divergence = functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    return divergence * temperature**2


def distillation_loss(
    student: torch.Tensor | Sequence[torch.Tensor],
    teacher: torch.Tensor | Sequence[torch.Tensor],
    *,
    kind: str = "mse",
    temperature: float = 1.0,
    matched: int = 0,
    names: Sequence[str] = (),
) -> torch.Tensor:
    """How far a student is from its teacher: the mean over all float outputs.

    Args:
        student: outputs, then matched tensors.
        teacher: the same of the teacher; no gradient is wanted here.
        kind: "mse" for `relative_error`, "kl" for `soft_label_loss` (outputs only).
        temperature: for "kl".
        matched: how many of the last tensors are matched ones, which always count by `relative_error`.
        names: of the tensors, for messages.

    Returns:
        A scalar.

    Raises:
        TrainingError: numbers or shapes differ, no tensor is float, or "kl" has an output without classes.

    Example:
        >>> distillation_loss(torch.zeros(4, 3), torch.ones(4, 3))
        tensor(1.)
    """
    students = [student] if isinstance(student, torch.Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, torch.Tensor) else list(teacher)
    if len(students) != len(teachers):
        raise TrainingError(
            f"the student returns {len(students)} tensors, the teacher {len(teachers)}",
            help="teach with a model of the same outputs, or pass `loss`",
        )
    parts: list[torch.Tensor] = []
    for index, (ours, theirs) in enumerate(zip(students, teachers, strict=True)):
        name = names[index] if index < len(names) else f"output {index}"
        if not ours.is_floating_point() or not theirs.is_floating_point():
            continue
        if ours.shape != theirs.shape:
            raise TrainingError(
                f"the student's shape is {list(ours.shape)}, the teacher's {list(theirs.shape)}",
                where=name,
                help="match tensors of equal shape, and teach with a model of the same outputs",
            )
        soft = kind == "kl" and index < len(students) - matched
        if soft and (ours.ndim < 2 or ours.shape[-1] == 1):
            raise TrainingError(
                f"'kl' needs classes on the last axis, and the shape of {name} is {list(ours.shape)}",
                where="distillation",
                help='use distillation="mse"',
            )
        parts.append(soft_label_loss(ours, theirs, temperature) if soft else relative_error(ours, theirs))
    if not parts:
        raise TrainingError("no output is a float, so there is nothing to distil", help="name tensors in `match`")
    return torch.stack(parts).mean()


class Teacher(Protocol):
    """What a student learns from."""

    def __call__(self, feeds: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The teacher's tensors in the order of the student's outputs, then matched ones; without gradients.

        Args:
            feeds: the student's inputs by name, as given.
            inputs: the same in the student's order, on its device.
        """
        ...


class GraphTeacher:
    """An ONNX graph as teacher: lifted, in evaluation mode, asked for the student's outputs and matched values."""

    def __init__(
        self,
        model: ir.Model,
        student: LiftedModule,
        matched: Sequence[str],
        device: str | torch.device,
        table: OpTable | None = None,
    ) -> None:
        """Lift the teacher, by the op rows of `table`.

        Raises:
            TrainingError: its inputs or outputs are not those of the student.
            LiftError: an operator has no torch function, or a matched value is not in the teacher.
        """
        module = lift(model, table=table)
        self._order = self._outputs(module, student)
        self._inputs = self._fitting(module, student)
        if module.dtype.itemsize < 4:
            module.to(torch.float32)
        module.to(device)
        self._own = len(module.interface.outputs)
        self._module = module.with_outputs(matched) if matched else module
        self._module.eval()

    def _outputs(self, module: LiftedModule, student: LiftedModule) -> list[int]:
        ours, theirs = student.interface.outputs, module.interface.outputs
        if set(ours) <= set(theirs):
            return [theirs.index(name) for name in ours]
        if len(ours) != len(theirs):
            raise TrainingError(
                f"the student's outputs are {', '.join(ours)}, the teacher's {', '.join(theirs)}",
                where="teacher",
                help="teach with a model of the same outputs",
            )
        return list(range(len(ours)))

    def _fitting(self, module: LiftedModule, student: LiftedModule) -> dict[str, str]:
        """The student's input that feeds each of the teacher's."""
        ours, theirs = student.interface.inputs, module.interface.inputs
        if set(theirs) <= set(ours):
            return {name: name for name in theirs}
        if len(ours) != len(theirs):
            raise TrainingError(
                f"the student's inputs are {', '.join(ours)}, the teacher's {', '.join(theirs)}",
                where="teacher",
                help="teach with a model of the same inputs",
            )
        return dict(zip(theirs, ours, strict=True))

    def __call__(self, feeds: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Teacher`."""
        with torch.no_grad():
            given = {theirs: feeds[ours] for theirs, ours in self._inputs.items()}
            found = tensors_of(self._module(*self._module.tensors(given)))
        return [*(found[index] for index in self._order), *found[self._own :]]


class ModuleTeacher:
    """A torch module as teacher, called with the student's inputs in their order. It is not changed."""

    def __init__(self, module: nn.Module, student: LiftedModule, device: str | torch.device) -> None:
        self._names = student.interface.outputs
        here = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        elsewhere = any(found.type != torch.device(device).type for found in here)
        self._module = copy.deepcopy(module).to(device) if elsewhere else module

    def __call__(self, feeds: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Teacher`."""
        training = [part for part in self._module.modules() if part.training]
        self._module.eval()
        try:
            with torch.no_grad():
                outputs = self._module(*inputs)
        finally:
            for part in training:
                part.training = True
        if isinstance(outputs, Mapping) and set(self._names) <= set(outputs):
            return [outputs[name] for name in self._names]
        return tensors_of(outputs)


def ask_teacher(
    teacher: Teacher, feeds: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], where: str
) -> list[torch.Tensor]:
    """What the teacher says; what it raises becomes a `TrainingError`, `where` being the step."""
    try:
        return teacher(feeds, inputs)
    except Exception as error:  # torch raises many types
        shapes = ", ".join(f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in inputs)
        cause = (str(error).strip().splitlines() or [""])[0]
        raise TrainingError(
            f"the teacher failed: {type(error).__name__}: {cause}",
            where=where,
            help=f"it is called with the inputs of the model that is trained, in their order: {shapes}",
        ) from error


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """The tensors that a module returned: one, a tuple or list, or a dict (`transformers` outputs too).

    Example:
        >>> len(tensors_of({"logits": torch.ones(1), "hidden": (torch.ones(1), None)}))
        2
    """
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [tensor for entry in outputs or () for tensor in tensors_of(entry)]


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: squares and logarithms do not fit half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
