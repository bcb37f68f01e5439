"""Recovery: a short training of an optimized model, with the original as its teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime

from graphopt.errors import GraphoptError, TrainingError
from graphopt.export.write import save
from graphopt.ir.lift import lift
from graphopt.ir.ops.row import OpTable
from graphopt.ir.session import open_session
from graphopt.optimize import Result, canonical_form
from graphopt.pipeline import Evaluate, measure_metric
from graphopt.progress import Progress

if TYPE_CHECKING:
    import torch

    from graphopt.ir.lifted import Insertion, LiftedModule
    from graphopt.train.trainer import Outcome

_COMPARED_SAMPLES = 32
"""Samples of the last batch on which onnxruntime is held against the trained module."""
_COMPARED_ERROR = 0.02
"""Root mean square error, relative to the output's, above which onnxruntime computes something else."""


@dataclass(frozen=True)
class Recovery:
    """What `recover` returns; print it for a short table.

    Attributes:
        model: the trained graph: the same names and operators, new weights, insertions folded.
        original: the graph before training.
        history: pairs of step, from 0, and loss before its update; teacher, `loss` and penalties in sum.
        metrics: pairs of number of steps done and what `evaluate` said then; empty without `evaluate`.
        best_step: number of steps after which the weights of `model` were reached.
        notes: what you should know, one sentence each.
        seconds: wall clock time, measurements included.
        module: what was trained, with its insertions and the weights of `model`, in evaluation mode.
        target: "cpu", "cuda" or "openvino", where sessions run.
        table: the op rows that were passed, or None.
    """

    model: ir.Model = field(repr=False)
    original: ir.Model = field(repr=False)
    history: tuple[tuple[int, float], ...] = field(repr=False)
    metrics: tuple[tuple[int, float], ...]
    best_step: int
    notes: tuple[str, ...]
    seconds: float
    module: LiftedModule = field(repr=False)
    target: str = "cpu"
    table: OpTable | None = field(default=None, repr=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trained model, whole or not at all. Raises `WriteError` where the path cannot be written."""
        return save(self.model, path)

    def session(self, *, threads: int = 0) -> onnxruntime.InferenceSession:
        """The trained model in onnxruntime, ready to run; `threads` 0 is onnxruntime's default."""
        return open_session(self.model, target=self.target, threads=threads)

    def to_torch(self) -> LiftedModule:
        """The trained model as a torch module, as `graphopt.lift` makes it."""
        return lift(self.model, table=self.table)

    def __str__(self) -> str:
        rows = [("steps", f"{len(self.history)} in {self.seconds:.1f} s, weights after {self.best_step} kept")]
        if self.history:
            rows.append(("loss", f"{self.history[0][1]:.4g} -> {self.history[-1][1]:.4g} (first and last batch)"))
        if self.metrics:
            kept = dict(self.metrics).get(self.best_step)
            after = "not measured" if kept is None else f"{kept:.6g}"
            rows.append(("metric", f"{self.metrics[0][1]:.6g} -> {after}"))
        return "\n".join([*(f"{name:7} {text}" for name, text in rows), *(f"note: {note}" for note in self.notes)])


def recover(
    subject: Result | ir.Model,
    data: Iterable[Any],
    *,
    steps: int,
    teacher: Literal["original"] | ir.Model | torch.nn.Module | None = "original",
    loss: Callable[..., torch.Tensor] | None = None,
    teacher_weight: float = 1.0,
    distillation: Literal["mse", "kl"] = "mse",
    temperature: float = 1.0,
    learning_rate: float | None = None,
    optimizer: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: Literal["cosine", "constant"] = "cosine",
    match: Mapping[str, str] | Sequence[str] = (),
    insertions: Mapping[str, Insertion] | None = None,
    trainable: Iterable[str] | None = None,
    norm: Literal["train", "frozen"] = "train",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    clip_norm: float | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    seed: int = 0,
    table: OpTable | None = None,
    quiet: bool = False,
) -> Recovery:
    """Train an optimized model for a short while, so that it does what the original did.

    The graph is lifted to torch, trained on batches of inputs against the outputs of the teacher, and lowered: the
    result has the same operators with new weights. No labels are needed. Nothing that is passed is changed. The same
    call gives the same weights (bit by bit on the CPU, with the same number of threads).

    Args:
        subject: what `graphopt.optimize` returned, or a graph (pruned, say, by `graphopt.remove_channels`).
        data: iterable of batches, iterated anew when it ends before `steps`: arrays or tensors for a model of one
            input, tuples in the order of the inputs, or dicts by input name. What a tuple has beyond the inputs, or
            a dict beyond their names, are labels; a DataLoader of (image, label) works as it is.
        steps: how many batches to train on.
        teacher: "original" is the graph that was optimized (for a bare graph: this graph before the insertions); or
            another graph, or a module that is called with the inputs in their order; None learns from `loss` alone.
        loss: `loss(outputs, *labels)`, or with labels by keyword where batches are dicts, returns one number;
            `outputs` is one tensor or a tuple. It is added to the teacher's. None leaves labels unread.
        teacher_weight: what the distance to the teacher is multiplied with.
        distillation: "mse": mean squared difference of each float output over the variance of the teacher's in the
            batch, averaged; 1 means knowing nothing. "kl": divergence of softmax(outputs / temperature) on the last
            axis, times the squared temperature.
        temperature: for "kl".
        learning_rate: of the default optimizer, AdamW; None is 1e-3.
        optimizer: makes another one of a list of parameters; its own learning rates follow the schedule.
        weight_decay: of the default optimizer, on weights with two axes or more.
        warmup: steps in which the learning rate rises.
        schedule: "cosine" falls to 0 at the end, "constant" stays.
        match: names of further values whose distance to the teacher's counts, as in "mse"; from the subject's name to
            the teacher's where they differ.
        insertions: trained along and folded at the end, by name; copies are trained.
        trainable: names or patterns (`*`) of the initializers to train; None trains all float weights.
        norm: BatchNormalization uses and updates the statistics of batches ("train"), or keeps its own ("frozen").
        precision: of the forward pass, by autocast; weights stay float32.
        device: of torch, for instance "cuda".
        clip_norm: largest norm of all gradients together.
        evaluate: called with an onnxruntime session of the model so far, returns one number, higher is better. The
            best weights win, those before training included, of equal ones the last. Without it the last ones win.
        evaluate_every: steps between two measurements; None measures ten times, and before training in any case.
        checkpoint: path of a file to write the state of the run to.
        checkpoint_every: steps between two checkpoints; None writes ten.
        resume: go on from the checkpoint, where there is one, as if never interrupted. Pass the same arguments, and
            data that begins from its beginning.
        seed: of all random numbers in the run, those of `data` included. The caller's generators stay as they are.
        table: op rows, for lifting subject and teacher and for lowering; `default_table().with_rows([...])` adds custom
            operators. None is the default table. A checkpoint does not ask for the same one.
        quiet: show no progress on the terminal.

    Raises:
        TrainingError: an option, the data or the checkpoint does not fit; nothing can learn; or training stopped: the
            data ended or raised, the loss was not finite. Then the error's `recovery` has the last good weights.
        DataError: a batch does not fit the model.
        LiftError: an operator has no torch function, or an insertion does not fit.

    Example:
        >>> import numpy as np
        >>> teacher, student = (ir.from_onnx_text(f'''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,1] y) <float[2,1] w = {weights}> {{ y = MatMul(x, w) }}''')
        ...     for weights in ("{1, 2}", "{0, 0}"))
        >>> x = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32)
        >>> recovery = recover(student, [x], teacher=teacher, steps=200, learning_rate=0.1, quiet=True)
        >>> recovery.model.graph.initializers["w"].const_value.numpy().round(2).tolist()
        [[1.0], [2.0]]
    """
    from graphopt.train.settings import Settings

    graph, target = _graph_of(subject)
    settings = Settings(
        steps=steps,
        loss=loss,
        teacher_weight=teacher_weight,
        distillation=distillation,
        temperature=temperature,
        learning_rate=learning_rate,
        optimizer=optimizer,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        norm=norm,
        precision=precision,
        device=device,
        clip_norm=clip_norm,
        evaluate=None if evaluate is None else _Metric(evaluate, target),
        evaluate_every=evaluate_every,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        seed=seed,
        table=table,
        **_by_name(match, insertions, trainable),
    )
    return _run(subject, graph, target, data, settings, _teacher_of(subject, graph, teacher, settings), quiet=quiet)


def _run(
    subject: Result | ir.Model, graph: ir.Model, target: str, data: Any, settings: Any, teacher: Any, *, quiet: bool
) -> Recovery:
    from graphopt.train.trainer import train

    original = subject.model if isinstance(subject, Result) else subject
    with Progress(quiet=quiet, total=settings.steps + 1) as progress:
        progress.start("prepare")

        def watch(step: int, value: float) -> None:
            progress.start(f"step {step}, loss {value:.3g}")

        outcome = train(graph, data, settings, teacher, watch)
    error = outcome.error
    recovery = None if outcome.model is None else _recovery(outcome, outcome.model, original, target, settings.table)
    if recovery is not None and error is None and settings.insertions:
        note = _runtime_note(recovery, outcome.feeds)
        recovery = recovery if note is None else replace(recovery, notes=(*recovery.notes, note))
    if error is not None:
        error.recovery = recovery
        raise error
    assert recovery is not None
    return recovery


def _recovery(outcome: Outcome, model: ir.Model, original: ir.Model, target: str, table: OpTable | None) -> Recovery:
    return Recovery(
        model=model,
        original=original,
        history=outcome.history,
        metrics=outcome.metrics,
        best_step=outcome.best_step,
        notes=outcome.notes,
        seconds=outcome.seconds,
        module=outcome.module,
        target=target,
        table=table,
    )


def _runtime_note(recovery: Recovery, feeds: Mapping[str, torch.Tensor]) -> str | None:
    """A sentence where onnxruntime computes something else of these inputs than the module that was trained."""
    import torch

    from graphopt.ir.lifted import as_array
    from graphopt.train.batches import first_samples
    from graphopt.train.randomness import untouched

    if not feeds:
        return None
    module, shown = recovery.module, first_samples(recovery.model, feeds, _COMPARED_SAMPLES)
    try:
        session = open_session(recovery.model, target=recovery.target, threads=0)
        found = session.run_feeds({name: as_array(tensor) for name, tensor in shown.items()})
        with untouched(module.device), torch.no_grad():
            expected = [as_array(tensor) for tensor in module.run_feeds(shown).values()]
        worst = max(map(_difference, found, expected), default=0.0)
    except Exception as error:  # the trained weights are worth more than this comparison
        what = error.what if isinstance(error, GraphoptError) else f"{type(error).__name__}: {error}"
        return f"whether onnxruntime computes what was trained is unknown: {what}"
    if worst <= _COMPARED_ERROR:
        return None
    differs = "onnxruntime computes something else than the trained module on this machine"
    note = f"{differs} (rms {worst:.2f} of the output's scale)"
    if not any(node.op_type == "DequantizeLinear" for node in recovery.model.graph):
        return note
    return f"{note}: int8 kernels of x86 without VNNI saturate on 8-bit weights; train with weight_bits=7"


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square error of floats over the root mean square of what is expected, where that is finite."""
    if found.dtype.kind in "biuOSU" or not found.size:
        return 0.0
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    known = np.isfinite(expected)
    error, scale = np.square(found - expected)[known], np.square(expected)[known]
    if not error.any():
        return 0.0
    ratio = float(np.sqrt(error.sum() / (scale.sum() or 1.0)))
    return ratio if np.isfinite(ratio) else float("inf")


@dataclass(frozen=True)
class _Metric:
    """The user's metric of a session, as a metric of a graph."""

    evaluate: Evaluate
    target: str

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise TrainingError(
                "`evaluate` is not callable",
                where="evaluate",
                help="pass a function of an onnxruntime.InferenceSession",
            )

    def __call__(self, model: ir.Model) -> float:
        return measure_metric(self.evaluate, open_session(model, target=self.target, threads=0))


def _graph_of(subject: Any) -> tuple[ir.Model, str]:
    """The graph to be trained, canonical, and where it is to run."""
    if isinstance(subject, Result):
        return canonical_form(subject.model), subject.target
    if not isinstance(subject, ir.Model):
        raise TrainingError(
            f"cannot train a {type(subject).__name__}",
            where="subject",
            help="pass what graphopt.optimize, graphopt.load (of a file) or graphopt.trace (of a module) returns",
        )
    return canonical_form(subject), "cpu"


def _teacher_of(subject: Result | ir.Model, graph: ir.Model, teacher: Any, settings: Any) -> Any:
    """The teacher as a canonical graph or a module. Refuses where there would be nothing to learn."""
    if teacher is None:
        if settings.loss is None:
            raise TrainingError(
                "there is no teacher and no loss", where="teacher", help="leave `teacher` as it is, or pass `loss`"
            )
        return None
    if isinstance(teacher, str):
        if teacher != "original":
            raise TrainingError(
                f"`teacher` is {teacher!r}", where="teacher", help='pass "original", a graph, a torch module or None'
            )
        teacher = subject.original if isinstance(subject, Result) else subject
    if isinstance(teacher, ir.Model):
        own = subject.model if isinstance(subject, Result) else subject
        if teacher is own and not settings.insertions and settings.loss is None:
            raise TrainingError(
                "teacher and model are the same graph, so there is nothing to learn",
                where="teacher",
                help="pass the original as `teacher`, the labels' `loss`, or `insertions`",
            )
        return graph if teacher is own else canonical_form(teacher)
    if not any(base.__module__.partition(".")[0] == "torch" for base in type(teacher).__mro__):
        raise TrainingError(
            f"a {type(teacher).__name__} cannot teach",
            where="teacher",
            help='pass "original", an onnx_ir.Model (graphopt.load reads files), a torch module or None',
        )
    return teacher


def _by_name(match: Any, insertions: Any, trainable: Any) -> dict[str, Any]:
    """The options that name values and weights, as the settings hold them."""
    return {
        "match": _pairs(match),
        "insertions": {} if insertions is None else insertions,
        "trainable": None if trainable is None else _names("trainable", trainable),
    }


def _pairs(match: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    return dict(match) if isinstance(match, Mapping) else {name: name for name in _names("match", match)}


def _names(option: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TrainingError(f"`{option}` is one string", where=option, help=f"pass a list: {option}=[{names!r}]")
    return tuple(names)
