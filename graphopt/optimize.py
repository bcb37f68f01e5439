"""The one call: a trained network in, a verified faster ONNX model and its report out."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from graphopt.errors import DataError, InvalidGraphError
from graphopt.export.report import BUDGET, DEFECT, ROLLED_BACK, SPEED, Report, Step, WeightFate
from graphopt.export.write import save
from graphopt.inputs.calibration import Calibration, as_array, fit_feeds
from graphopt.inputs.probes import InputSpec, check_specs, model_inputs, probe_feeds, runnable_sizes
from graphopt.ir.canonical import NOTES, canonicalize
from graphopt.ir.channel_analysis import check_canonical
from graphopt.ir.check import check_structure
from graphopt.ir.dimensions import dimension_name
from graphopt.ir.lift import lift
from graphopt.ir.load import Source, load, read
from graphopt.ir.ops import default_table
from graphopt.ir.ops.row import OpTable, tensor_shape
from graphopt.ir.opset import check_opset
from graphopt.ir.session import open_session
from graphopt.ir.timing import Benchmark
from graphopt.passes.contract import Context, Pass
from graphopt.pipeline import Budget, Evaluate, Guard, run_recipe
from graphopt.progress import Progress
from graphopt.recipe import Recipe, resolve, with_budget

if TYPE_CHECKING:
    import torch

    from graphopt.ir.lifted import LiftedModule


_SLOWER = "slower than the input, which is returned"
_BUDGET_TOLERANCE = 0.01
"""How far a budget may be missed, relative to it: what widths and a clock can do."""


@runtime_checkable
class Targeted(Protocol):
    """A pass that can be told how much it has to achieve."""

    @property
    def is_target_given(self) -> bool:
        """Whether it was told, and does not go by its default."""
        ...


@dataclass(frozen=True)
class Result:
    """What `optimize` returns.

    Attributes:
        model: the optimized graph.
        report: the proof, see `graphopt.export.report.Report`; print it, or `report.to_json()`.
        original: the graph as it was given (or as torch exported it).
        target: "cpu", "cuda" or "openvino".
    """

    model: ir.Model
    report: Report
    original: ir.Model = field(repr=False)
    target: str = "cpu"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the optimized model, whole or not at all. Raises `WriteError` where the path cannot be written."""
        return save(self.model, path)

    def session(self, *, threads: int = 0) -> onnxruntime.InferenceSession:
        """The optimized model in onnxruntime, ready to run; `threads` 0 is onnxruntime's default."""
        return open_session(self.model, target=self.target, threads=threads)

    def to_torch(self) -> LiftedModule:
        """The optimized model as a trainable torch module, as `graphopt.lift` makes it.

        Raises:
            LiftError: an operator has no torch function.

        Example:
            >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
            ...     ' g (float[1, 4] x) => (float[1, 4] y) { a = Identity (x) y = Relu (a) }')
            >>> print(optimize(model, recipe="exact", quiet=True).to_torch().code.strip())
            def forward(self, x):
                y = torch.relu(x);  x = None
                return y
        """
        return lift(canonical_form(self.model))


def optimize(
    model: Source | torch.nn.Module | torch.export.ExportedProgram,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | os.PathLike[str] | Recipe | Sequence[Pass | str] = "default",
    target: str = "cpu",
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    inputs: Mapping[str, InputSpec] | None = None,
    evaluate: Evaluate | None = None,
    max_drop: float | None = None,
    tolerance: float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,  # noqa: A002
    threads: int = 1,
    quiet: bool = False,
) -> Result:
    """Make a trained network faster and smaller in onnxruntime, and prove it.

    Every pass of the recipe works on a clone. It is kept only if the graph is valid and loads, if its outputs on
    the example inputs stay within rounding (exact passes) or within the budget (lossy ones), and if it is not
    slower, timed in turns with the best graph so far. What is rolled back says why, with figures.

    Args:
        model: a `torch.nn.Module`, a `torch.export.ExportedProgram`, the path of an .onnx file, its bytes, an
            `onnx.ModelProto` or an `onnx_ir.Model`. It is not changed.
        args: example inputs. For torch as for `torch.export.export`; for ONNX one array, a tuple of arrays in the
            order of the model's inputs, or a dict by input name. ONNX models need none: probes are made up.
        kwargs: example keyword inputs of a module; for ONNX, arrays by input name.
        recipe: "default", "exact", "int8", "prune", "prune-int8", "int8-qat" or another of
            `graphopt.recipe.PRESETS`, the path of a TOML file, a `Recipe`, or a list of passes.
        target: "cpu", "cuda" or "openvino", where the result is to run.
        dynamic_shapes: for a module, as for `torch.export.export`.
        calibration: iterable of inputs (arrays, tuples or dicts) for quantization and reconstruction; None works
            without data.
        inputs: what is known of the inputs, by name (`graphopt.InputSpec`: kind, mean, standard deviation, range);
            inputs that are made up follow it. What is left out is read off the graph.
        evaluate: called with an `onnxruntime.InferenceSession`, returns one number, higher is better.
        max_drop: how much of `evaluate` lossy passes may cost, in its own unit; None allows 1 % of the original's.
        tolerance: how far outputs may move without `evaluate`: root mean square of the difference over that of
            the output; None leaves it to the recipe (`default` allows 0.1).
        latency: the share of the input's latency that may be left, in (0, 1], as measured at the example inputs; the
            recipe is `latency-int8` then (`latency` for macs), unless another one with `meet-budget` is given. At most
            one of the four budgets.
        latency_ms: the same in milliseconds.
        macs, bytes: the share of multiply-accumulates, or of the bytes of the weights, that is to be left, in (0, 1].
        threads: intra-op threads for all timings, 0 for onnxruntime's default.
        quiet: show no progress on the terminal.

    Raises:
        LoadError, InvalidGraphError: the ONNX model cannot be read or is not valid.
        TraceError: the torch model cannot be exported, or its export computes something else.
        DataError: example inputs, calibration, `inputs` or `evaluate` do not fit.
        RecipeError: unknown recipe, pass or option, or an order that a contract forbids.
        TargetMissedError, GraphoptError: a pruning target cannot be met, or nothing can be pruned.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[1, 4] x) => (float[1, 4] y) { a = Identity (x) y = Relu (a) }')
        >>> result = optimize(model, recipe="exact", quiet=True)
        >>> [node.op_type for node in result.model.graph]
        ['Relu']
    """
    shares = _shares(latency=latency, latency_ms=latency_ms, macs=macs, bytes=bytes)
    chosen = with_budget(resolve(recipe), shares)
    budget = _budget(evaluate, max_drop, tolerance, chosen)
    with Progress(quiet=quiet, total=len(chosen.passes) + 3) as progress:
        progress.start("read the model")
        subject = _read(model, args, kwargs, dynamic_shapes)
        original = subject.original
        data = None if calibration is None else Calibration(original, calibration)
        feeds, sizes = _feeds(subject, data, inputs or {})
        canonical = subject.canonical or canonicalize(original.clone(), sizes=sizes)
        given = len(subject.feeds) or (1 if data is not None else None)
        guard = Guard(original, feeds, budget, target, threads, sizes, given)
        context = Context(target, threads, sizes, data, specs=inputs or {}, reference=canonical)
        context.progress = progress.detail
        progress.start("measure the input")
        best, steps, history = run_recipe(canonical, chosen.passes, guard, context, progress)
        progress.start("measure the result")
        final = guard.final()
    if final.timing.is_slower() and guard.original_loads:
        best, final = original, None
        steps.append(Step("(result)", ROLLED_BACK, steps[0].size, reason=_SLOWER, cause=SPEED))
    timing = None if final is None else final.timing
    report = Report(
        source=subject.name,
        recipe=chosen.name,
        target=target,
        threads=threads,
        data=_data_sentence(data),
        inputs={name: f"{array.dtype}{list(array.shape)}" for name, array in feeds[0].items()},
        steps=tuple(steps),
        final=timing,
        error=None if final is None else final.error,
        metric=None if final is None else final.metric,
        weights=_fates(canonical, history, steps),
        notes=_notes(original, canonical, best, guard, data),
        missed=(*_missed(steps, chosen, (max_drop, tolerance) != (None, None)), *_over_budget(shares, steps, timing)),
        environment=_environment(),
    )
    return Result(best, report, original, target)


def canonical_form(model: ir.Model) -> ir.Model:
    """The model itself where it is canonical, else what `load` makes of it: a graph as it was given need not be."""
    try:
        check_canonical(model, constants=True)
    except InvalidGraphError:
        return load(model)
    return model


@dataclass(frozen=True)
class _Subject:
    """What is to be optimized: the graph as given, its canonical form where known, its name, the user's inputs."""

    original: ir.Model
    canonical: ir.Model | None
    name: str
    feeds: tuple[dict[str, np.ndarray], ...]


def _read(model: Any, args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any) -> _Subject:
    if is_torch(model):
        from graphopt.ir.trace import trace_with_feeds

        traced = trace_with_feeds(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        return _Subject(traced.model, traced.model.clone(), type(model).__name__, traced.feeds)
    if dynamic_shapes is not None:
        raise DataError("dynamic_shapes is for torch modules", help="ONNX files carry their dynamic dimensions")
    if not isinstance(model, (str, os.PathLike, bytes, onnx.ModelProto, ir.Model)):
        raise DataError(
            f"cannot optimize a {type(model).__name__}",
            help="pass a torch module, an exported program, a path, bytes, an onnx.ModelProto or an onnx_ir.Model",
        )
    original = read(model)
    check_opset(original)
    check_structure(original)
    name = Path(model).name if isinstance(model, (str, os.PathLike)) else (original.graph.name or "model")
    example = example_feeds(original, args, kwargs)
    return _Subject(original, None, name, () if example is None else (example,))


def example_feeds(model: ir.Model, args: Any, kwargs: Mapping[str, Any] | None) -> dict[str, np.ndarray] | None:
    """Example inputs of an ONNX model by name; None where there are none. Raises `DataError` where they misfit."""
    if args is None and not kwargs:
        return None
    given: Any = dict(kwargs or {})
    if isinstance(args, Mapping):
        given = {**args, **given}
    elif args is not None:
        positional = args if isinstance(args, (tuple, list)) else (args,)
        inputs = model_inputs(model)
        if len(positional) > len(inputs):
            raise DataError(
                f"{len(positional)} example inputs for a model with {len(inputs)}",
                where="args",
                help=f"inputs are {', '.join(value.name or '?' for value in inputs)}",
            )
        named = {value.name or "": entry for value, entry in zip(inputs, positional, strict=False)}
        given = {**named, **given}
    return fit_feeds(model, {name: as_array(entry, name) for name, entry in given.items()})


def _feeds(
    subject: _Subject, data: Calibration | None, specs: Mapping[str, InputSpec]
) -> tuple[list[dict[str, np.ndarray]], dict[str, int]]:
    """Inputs on which outputs are compared (the first is timed), and the sizes of the symbolic dimensions in it.

    The user's come first, then made-up ones of other sizes.
    """
    model, feeds = subject.original, list(subject.feeds)
    check_specs(model, specs)
    if not feeds and data is not None:
        feeds = [next(iter(data))]
    if not feeds:
        feeds = probe_feeds(model, sizes=runnable_sizes(model, specs), specs=specs)
    sizes = _sizes_in(model, feeds[0])
    if sizes and len(feeds) == 1:
        other = probe_feeds(model, sizes={name: 2 * size for name, size in sizes.items()}, seed=1, specs=specs)[0]
        if _runs(model, other):
            feeds.append(other)
    return feeds, sizes


def _sizes_in(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value in model_inputs(model):
        array = feeds[value.name or ""]
        for axis in range(len(value.shape) if value.shape is not None else 0):
            name = dimension_name(value, axis)
            if name is not None:
                sizes[name] = int(array.shape[axis])
    return sizes


def _runs(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> bool:
    try:
        open_session(model, optimized=False).run_feeds(feeds)
    except DataError:
        return False
    return True


def is_torch(model: Any) -> bool:
    """Whether the object is torch's, without importing torch for the ONNX path."""
    return any(base.__module__.partition(".")[0] == "torch" for base in type(model).__mro__)


def _shares(**budgets: float | None) -> dict[str, float]:
    """The budgets that were given."""
    return {name: share for name, share in budgets.items() if share is not None}


def _budget(evaluate: Evaluate | None, max_drop: float | None, tolerance: float | None, recipe: Recipe) -> Budget:
    """What lossy passes may cost. Raises `DataError` where the limits do not fit."""
    if evaluate is not None and not callable(evaluate):
        raise DataError("`evaluate` is not callable", help="pass a function of an onnxruntime.InferenceSession")
    if max_drop is not None and evaluate is None:
        raise DataError("`max_drop` needs `evaluate`", help="pass a metric, or use `tolerance` for output error")
    for name, value in (("max_drop", max_drop), ("tolerance", tolerance)):
        if value is not None and not value >= 0:
            raise DataError(f"`{name}` is {value}, but must be at least 0", where=name)
    limit = tolerance if tolerance is not None or evaluate is not None else recipe.tolerance
    return Budget(evaluate, max_drop, limit)


def _notes(
    original: ir.Model, canonical: ir.Model, best: ir.Model, guard: Guard, data: Calibration | None
) -> tuple[str, ...]:
    """What the user should know of the model, the measurements, the data and the result; each sentence once."""
    reached, given = best.opset_imports.get("", 0), original.opset_imports.get("", 0)
    changed = [f"the result uses opset {reached}, the input {given}"] if reached != given else []
    graphs = (*original.meta.get(NOTES, ()), *canonical.meta.get(NOTES, ()))
    return tuple(dict.fromkeys([*graphs, *guard.notes, *changed, *(data.notes if data else ())]))


def _data_sentence(data: Calibration | None) -> str:
    if data is None:
        return "data-free"
    return f"{data.samples} calibration samples" if data.samples is not None else "calibration data"


def _missed(steps: Sequence[Step], recipe: Recipe, explicit: bool) -> tuple[str, ...]:
    """What was asked for and not delivered: a budget that is the user's, or a step that is wrong.

    A step that is merely slower is no missed target, for never slower is what was asked for, unless it carries out
    a target that the user has set (a share of the units that is to go, a share of the MACs that is to be left).
    """
    budget_counts = explicit or recipe.tolerance is None
    targeted = [isinstance(single, Targeted) and single.is_target_given for single in recipe.passes]
    behind_canonical = [False, False, *targeted]  # (input) and (canonical) come first, then one step a pass

    def counts(index: int, step: Step) -> bool:
        if step.cause == SPEED:
            return behind_canonical[index] if index < len(behind_canonical) else any(targeted)
        return step.cause == DEFECT or (step.cause == BUDGET and budget_counts)

    return tuple(
        f"{step.name} was rolled back: {step.reason}" for index, step in enumerate(steps) if counts(index, step)
    )


def _over_budget(shares: Mapping[str, float], steps: Sequence[Step], final: Benchmark | None) -> Iterator[str]:
    """What is left of a cost beyond what may be, measured on the result; noise is no reason."""
    for kind, share in shares.items():
        left, low = 1.0, 1.0
        if kind in ("latency", "latency_ms"):
            if final is not None:
                left, low = 1 / final.speeds[-1].median, 1 / final.speeds[-1].high
            if kind == "latency_ms":
                whole = steps[0].latency if final is None else final.latencies[0]
                scale = math.inf if whole is None else whole.median
                left, low = left * scale, low * scale
        elif final is not None:  # else the input is what is returned
            before, after = (
                {"macs": size.macs, "bytes": size.weight_bytes}[kind]
                for size in (steps[0].size, [step for step in steps if step.status != ROLLED_BACK][-1].size)
            )
            left = low = after / max(before, 1)
        if low > share * (1 + _BUDGET_TOLERANCE):
            unit = " ms" if kind == "latency_ms" else ""
            yield f"{left:.3f}{unit} of {kind.removesuffix('_ms')} is left, and {share:g}{unit} was asked for"


def _fates(canonical: ir.Model, history: Mapping[str, Sequence[str]], steps: Sequence[Step]) -> tuple[WeightFate, ...]:
    """What became of each weight: the passes that changed it, or the remark that explains why none did."""
    reasons = {remark.where: f"{remark.what}: {remark.why}" for step in steps for remark in step.remarks}
    rolled_back = [f"{step.name} was rolled back" for step in steps if step.status == ROLLED_BACK]
    default = rolled_back[0] if rolled_back else "the recipe found nothing around it to fold, fuse, merge or quantize"
    fates: list[WeightFate] = []
    table, opset = default_table(), canonical.opset_imports.get("", 0)
    for name, value in canonical.graph.initializers.items():
        tensor = value.const_value
        if (
            tensor is None
            or not tensor.dtype.is_floating_point()
            or tensor.size < 2
            or _is_setting(value, table, opset)
        ):
            continue
        by = tuple(history.get(name, ()))
        where = [name, *(consumer.name or "" for consumer in value.consumers())]
        reason = next((reasons[place] for place in where if place in reasons), default)
        before = f"{tensor.dtype.name}{list(tensor_shape(tensor))}"
        fates.append(WeightFate(name, "changed" if by else "declined", by, None if by else reason, before))
    return tuple(fates)


def _is_setting(value: ir.Value, table: OpTable, opset: int) -> bool:
    """Whether a constant only says how operators work (scales of Resize, bounds of Clip): no weight of the network."""
    rows = [(table.row(use.node.domain, use.node.op_type, opset), use.idx) for use in value.uses()]
    return bool(rows) and all(row is not None and index in row.structural for row, index in rows)


def _environment() -> dict[str, str]:
    return {
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
    }
