"""The training loop: a lifted graph, batches, a loss, and nothing lost when something goes wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from graphopt.errors import GraphoptError, TrainingError
from graphopt.ir.lift import lower
from graphopt.ir.lifted import Insertion, LiftedModule
from graphopt.train.batches import Batch, Batches
from graphopt.train.checkpoint import (
    model_digest,
    read_checkpoint,
    state_digest,
    structure_digest,
    write_checkpoint,
)
from graphopt.train.distillation import GraphTeacher, ModuleTeacher, Teacher, ask_teacher, distillation_loss, tensors_of
from graphopt.train.gradients import blocked_parameters
from graphopt.train.preparation import integer_note, make_optimizer, prepare_module, trained_parameters
from graphopt.train.randomness import random_state, seeded, set_random_state, untouched
from graphopt.train.settings import Settings

Watch = Callable[[int, float], None]
"""Called after every step with its number, from 1, and its loss."""

_SHOWN_BATCHES = 8
"""Batches that insertions see before training."""
_SMALLEST_SCALE = 1.0
"""A loss scale below this means that float16 gradients overflow whatever the scale."""
_NO_DIFFERENCE = 1e-9
"""A relative error below this at the start is rounding: there is nothing to learn from the teacher."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        model: the trained graph, lowered; None where the weights cannot be lowered (then there is an error).
        history: step, from 0, and loss before its update.
        metrics: number of steps done and metric of the graph after them.
        best_step: number of steps done to get to the weights of `model`.
        notes: what the user should know, one sentence each.
        seconds: wall clock time, earlier runs of the same checkpoint included.
        module: what was trained, insertions in it, with the weights of `model`.
        error: what stopped the run, or None.
        feeds: the inputs of the last batch, by name; empty where none was read.
    """

    model: ir.Model | None
    history: tuple[tuple[int, float], ...]
    metrics: tuple[tuple[int, float], ...]
    best_step: int
    notes: tuple[str, ...]
    seconds: float
    module: LiftedModule
    error: TrainingError | None = None
    feeds: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


def train(
    model: ir.Model, data: Any, settings: Settings, teacher: ir.Model | nn.Module | None, watch: Watch | None = None
) -> Outcome:
    """Train a canonical graph as `graphopt.recover` describes it.

    The generators of random numbers are seeded for the run and given back as they were.

    Raises:
        TrainingError, DataError, LiftError: the run cannot start. What stops it later is in `Outcome.error`.
    """
    device = torch.device(settings.device)
    with seeded(settings.seed, device):
        return Trainer(model, data, settings, teacher, watch).run()


@dataclass(frozen=True)
class _Mark:
    """Where everything is that moves with the steps, but for weights: steps done, data, random numbers."""

    step: int
    data: dict[str, Any]
    random: dict[str, Any]


@dataclass(frozen=True)
class _Best:
    metric: float
    step: int
    state: dict[str, Any]


class Trainer:
    """One run. Made and run inside `seeded`."""

    def __init__(
        self,
        model: ir.Model,
        data: Any,
        settings: Settings,
        teacher: ir.Model | nn.Module | None,
        watch: Watch | None,
    ) -> None:
        self.model, self.settings, self._watch = model, settings, watch
        self.device = torch.device(settings.device)
        self.module = prepare_module(model, settings)
        self._tapped = self.module.with_outputs(list(settings.match)) if settings.match else self.module
        self._teacher = self._resolve(teacher)
        self._batches = Batches(model, data, self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self._purpose = self._describe(teacher) if settings.checkpoint is not None else {}
        self._step, self._history, self._metrics = 0, list[float](), list[tuple[int, float]]()
        self._best: _Best | None = None
        self._notes: dict[str, None] = {}
        self._began, self._earlier = time.perf_counter(), 0.0
        self._mark = self._good_mark = _Mark(0, self._batches.state(), random_state(self.device))
        self._optimizer: torch.optim.Optimizer
        self._rates: list[float] = []
        self._good: list[torch.Tensor] = []
        self._moments_fit, self._checked, self._detached = True, False, False
        self._feeds: Mapping[str, torch.Tensor] = {}

    def run(self) -> Outcome:
        """Train to the end, or to what stops it."""
        self._begin()
        try:
            self._loop()
            self._settle()
        except TrainingError as error:
            return self._stopped(error)
        kept = self._best.step if self._best is not None else self._step
        return self._outcome(self._lowered(), kept, None)

    # Beginning

    def _resolve(self, teacher: ir.Model | nn.Module | None) -> Teacher | None:
        if teacher is None:
            return None
        if isinstance(teacher, ir.Model):
            matched = list(self.settings.match.values())
            return GraphTeacher(teacher, self.module, matched, self.device, self.settings.table)
        if self.settings.match:
            raise TrainingError(
                "`match` needs an ONNX teacher", where="match", help="trace the module: graphopt.trace(module, inputs)"
            )
        return ModuleTeacher(teacher, self.module, self.device)

    def _describe(self, teacher: ir.Model | nn.Module | None) -> dict[str, Any]:
        """What a checkpoint of this run is good for."""
        if isinstance(teacher, nn.Module):
            taught = state_digest(teacher)
        else:
            taught = None if teacher is None else model_digest(teacher)
        inserted = structure_digest(self.module)
        described = self.settings.described()
        return {"model": model_digest(self.model), "insertions": inserted, "teacher": taught, **described}

    def _begin(self) -> None:
        note = integer_note(self.model, trained_parameters(self.module))
        if note is not None:
            self._notes[note] = None
        content = None
        if self.settings.resume and self.settings.checkpoint is not None:
            content = read_checkpoint(self.settings.checkpoint, self._purpose)
        if content is None:
            self._prepare_insertions()
        else:
            self.module.load_state_dict(content["module"])
        # Only now: finding ranges, and loading them, may put new parameters in the place of old ones.
        self._optimizer = make_optimizer(self.module, self.settings)
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        if content is not None:
            self._continue(content)
        self._set_modes()
        self._good = [tensor.detach().clone() for tensor in self._moving()]

    def _prepare_insertions(self) -> None:
        """Show some inputs to the insertions that ask for them."""
        asking = [each for each in self._insertions() if type(each).prepare is not Insertion.prepare]
        if asking:
            batches = [self.module.tensors(batch.feeds) for batch in self._batches.peek(_SHOWN_BATCHES)]
            for insertion in asking:
                insertion.prepare(self.module, batches)

    def _continue(self, content: Mapping[str, Any]) -> None:
        """Be where a checkpoint was written; the weights are those of it already."""
        if content["optimizer"] is not None:
            self._optimizer.load_state_dict(content["optimizer"])
        self._scaler.load_state_dict(content["scaler"])
        self._step, self._history = content["step"], list(content["history"])
        self._metrics = [(step, metric) for step, metric in content["metrics"]]
        self._best = None if content["best"] is None else _Best(*content["best"])
        self._notes.update(dict.fromkeys(content["notes"]))
        self._earlier = content["seconds"]
        self._batches.restore(content["data"], self._step)
        set_random_state(content["random"], self.device)
        self._mark = self._good_mark = _Mark(self._step, self._batches.state(), random_state(self.device))

    def _set_modes(self) -> None:
        """Insertions learn in any case; the graph itself is in training mode unless its statistics are frozen."""
        for module in (self.module, self._tapped):
            module.train(self.settings.norm == "train")
        self.module.insertions.train()

    # Steps

    def _loop(self) -> None:
        settings, first = self.settings, self._step
        while True:
            self._mark = _Mark(self._step, self._batches.state(), random_state(self.device))
            last = self._step == settings.steps
            if settings.evaluate is not None and (last or self._step % settings.measured_every == 0):
                self._measure(settings.evaluate)
            due = last or self._step % settings.saved_every == 0
            if settings.checkpoint is not None and due and self._step > first:
                self._save()
            if last:
                return
            self._take_step()
            self._step += 1
            if self._watch is not None:
                self._watch(self._step, self._history[-1])

    def _take_step(self) -> None:
        """One step, whole: what fails inside leaves as a `TrainingError` that names it."""
        batch = self._batches.read(self._step)
        self._feeds = batch.feeds
        try:
            self._learn(batch)
        except GraphoptError as error:
            if isinstance(error, TrainingError):
                raise
            raise TrainingError(f"the step failed: {error.what}", where=self._where(), help=error.help) from error
        except Exception as error:  # torch raises many types; so do a user's loss, optimizer and insertions
            lines = str(error).strip().splitlines() or [""]
            small = "more than 1 value per channel" in lines[0]
            raise TrainingError(
                f"the step failed: {type(error).__name__}: {lines[0]}",
                where=self._where(),
                help="statistics need larger batches: pass them, or norm='frozen'"
                if small
                else "mend what the cause above names; the last good weights are in `.recovery` of this error",
            ) from error

    def _learn(self, batch: Batch) -> None:
        for insertion in self._insertions():
            insertion.advance(self._step, self.settings.steps)
        factor = self.settings.factor(self._step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.zero_grad(set_to_none=True)
        inputs = self._tapped.tensors(batch.feeds)
        loss = self._loss(batch, inputs)
        value = loss.detach().item()
        if not math.isfinite(value):
            self._go_back()
            raise self._diverged(f"the loss is {value}")
        self._remember()
        if loss.requires_grad:
            self._scaler.scale(loss).backward()
        if not self._checked:
            self._check_gradients(inputs)
        if loss.requires_grad:  # not where a branch without parameters ran
            self._update()
        self._history.append(value)

    def _loss(self, batch: Batch, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        settings = self.settings
        halved = settings.precision != "float32"
        with torch.autocast(self.device.type, getattr(torch, settings.precision) if halved else None, enabled=halved):
            outputs = tensors_of(self._tapped(*inputs))
            total: torch.Tensor | float = 0.0
            if self._teacher is not None:
                distance = distillation_loss(
                    outputs,
                    ask_teacher(self._teacher, batch.feeds, inputs, self._where()),
                    kind=settings.distillation,
                    temperature=settings.temperature,
                    matched=len(settings.match),
                    names=self._tapped.interface.outputs,
                )
                if self._step == 0 and float(distance.detach()) < _NO_DIFFERENCE:
                    self._agree()
                total = total + settings.teacher_weight * distance
            if settings.loss is not None:
                total = total + self._labelled(outputs[: len(self.module.interface.outputs)], batch)
        for insertion in self._insertions():
            total = total + insertion.penalty()
        return torch.as_tensor(total)

    def _agree(self) -> None:
        """The teacher has nothing to say: a note, or an error where nothing else is learned from."""
        if self.settings.loss is None and not self.settings.insertions:
            raise TrainingError(
                "teacher and model agree, there is nothing to learn",
                where="teacher",
                help="pass the unpruned model as `teacher`, the labels' `loss`, or `insertions`",
            )
        self._notes["teacher and model agree before training: they differ by rounding at most"] = None

    def _labelled(self, outputs: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        assert self.settings.loss is not None
        labels, named = batch.labels_on(self.device)
        try:
            value: Any = self.settings.loss(outputs[0] if len(outputs) == 1 else tuple(outputs), *labels, **named)
        except TypeError as error:
            if labels or named:
                raise
            raise TrainingError(
                f"`loss` raised TypeError: {error}",
                where=self._where(),
                help="the batches have no labels: those are what a tuple has beyond the model's "
                f"{len(batch.feeds)} inputs, or a dict beyond their names",
            ) from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = (
                f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            )
            raise TrainingError(f"`loss` returned {found}", where="loss", help="return one number as a tensor")
        self._detached = not value.requires_grad and any(output.requires_grad for output in outputs)
        return value.reshape(())

    def _update(self) -> None:
        """Clip, and let the optimizer step, unless a gradient is not finite."""
        self._scaler.unscale_(self._optimizer)
        moved = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in moved if parameter.grad is not None])
        finite = bool(torch.isfinite(norm))
        if not finite and not (self._scaler.is_enabled() and self._scaler.get_scale() >= _SMALLEST_SCALE):
            self._go_back()
            raise self._diverged("a gradient is not finite")
        if finite and self.settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(moved, self.settings.clip_norm, norm)
        self._scaler.step(self._optimizer)  # skips the step itself where float16 overflowed
        self._scaler.update()

    def _check_gradients(self, inputs: Sequence[torch.Tensor]) -> None:
        """After the first backward pass: name what cannot learn, and refuse where nothing can."""
        self._checked = True
        trained = trained_parameters(self.module)
        with untouched(self.device):
            blocked = blocked_parameters(self._tapped, self.model, inputs, trained)
        self._set_modes()
        learning = [name for name, parameter in self.module.named_parameters() if parameter.grad is not None]
        stuck = blocked is not None and len(blocked.parameters) == len(trained) and not self.settings.insertions
        if not learning and self._detached:
            raise TrainingError(
                "nothing can learn: `loss` returned a number without a gradient, it is detached from the outputs",
                where="loss",
                help="compute it of the outputs in torch, without detach(), item(), numpy or torch.no_grad()",
            )
        if not learning or stuck:
            raise TrainingError(
                f"nothing can learn: {blocked or 'the loss depends on no parameter'}",
                where=self._where(),
                help="insert something that passes gradients, match values before those operators, or leave them out",
            )
        if blocked is not None:
            self._notes[str(blocked)] = None

    # What is kept

    def _moving(self) -> list[torch.Tensor]:
        """Everything that a step changes: trained parameters, buffers, and all of the insertions."""
        kept = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return [*kept, *(buffer for buffer in self.module.buffers() if buffer.numel())]

    @torch.no_grad()
    def _remember(self) -> None:
        """The weights that go into this step gave a finite loss."""
        for kept, tensor in zip(self._good, self._moving(), strict=True):
            kept.copy_(tensor)
        self._good_mark = self._mark

    @torch.no_grad()
    def _go_back(self) -> None:
        """To the last weights that gave a finite loss. Moments of the optimizer are not kept for that."""
        for kept, tensor in zip(self._good, self._moving(), strict=True):
            tensor.copy_(kept)
        self._mark, self._moments_fit = self._good_mark, False

    def _measure(self, evaluate: Callable[[ir.Model], float]) -> None:
        if any(step == self._step for step, _ in self._metrics):
            return
        self._check_finite()
        try:
            with untouched(self.device):
                metric = evaluate(self._lowered())
        except GraphoptError as error:
            raise TrainingError(
                f"the metric cannot be measured: {error.what}", where=self._where(), help=error.help
            ) from error
        self._metrics.append((self._step, metric))
        settled = all(each.settled(self._step, self.settings.steps) for each in self._insertions())
        if settled and (self._best is None or metric >= self._best.metric):
            self._best = _Best(metric, self._step, _copied(self.module.state_dict()))

    def _save(self) -> None:
        assert self.settings.checkpoint is not None
        mark, best = self._mark, self._best
        content = {
            "step": mark.step,
            "module": _copied(self.module.state_dict()),
            "optimizer": self._optimizer.state_dict() if self._moments_fit else None,
            "scaler": self._scaler.state_dict(),
            "random": mark.random,
            "data": mark.data,
            "history": self._history[: mark.step],
            "metrics": [entry for entry in self._metrics if entry[0] <= mark.step],
            "best": None if best is None else (best.metric, best.step, best.state),
            "notes": list(self._notes),
            "seconds": self._seconds(),
        }
        write_checkpoint(self.settings.checkpoint, content, self._purpose)

    # Ending

    def _check_finite(self) -> None:
        """The last update, which no loss has seen yet, left finite weights."""
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._moving() if tensor.is_floating_point()):
            self._go_back()
            raise self._diverged("a weight is not finite")

    def _settle(self) -> None:
        """Choose the weights that win."""
        self._check_finite()
        if self._best is None:
            return
        if self._best.step != self._step:
            self.module.load_state_dict(self._best.state)
            self._notes[
                f"the weights after {self._best.step} steps are kept, their metric is the best: "
                f"{self._best.metric:.6g}, and {self._metrics[-1][1]:.6g} at the end"
            ] = None

    def _stopped(self, error: TrainingError) -> Outcome:
        """What is left after an error: a checkpoint, and the last good weights."""
        if self.settings.checkpoint is not None and self._mark.step > 0:
            try:
                self._save()
            except TrainingError as second:
                self._notes[second.what] = None
        try:
            model = self._lowered()
        except GraphoptError as second:
            self._notes[f"the weights cannot be lowered: {second.what}"] = None
            model = None
        return self._outcome(model, self._mark.step, error)

    def _outcome(self, model: ir.Model | None, best_step: int, error: TrainingError | None) -> Outcome:
        history, metrics = tuple(enumerate(self._history)), tuple(self._metrics)
        notes, module = tuple(self._notes), self.module.eval()
        return Outcome(model, history, metrics, best_step, notes, self._seconds(), module, error, self._feeds)

    def _lowered(self) -> ir.Model:
        return lower(self.module, self.model, table=self.settings.table)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"training diverged: {what}",
            where=self._where(),
            help="lower the learning rate, warm up longer, clip gradients (clip_norm=1.0), or use precision='float32'; "
            "the last good weights are in `.recovery` of this error",
        )

    def _insertions(self) -> list[Insertion]:
        return [entry for entry in self.module.insertions.children() if isinstance(entry, Insertion)]

    def _where(self) -> str:
        return f"step {self._step}"

    def _seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._began


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state on the host that later steps do not change."""
    return {
        name: entry.detach().to("cpu", copy=True) if isinstance(entry, torch.Tensor) else entry
        for name, entry in state.items()
    }
