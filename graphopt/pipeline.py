"""Running passes under the guard (design.md D6): structure, numbers, speed, metric; what breaks one is rolled back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir
import onnxruntime

from graphopt.errors import DataError, GraphoptError, InvalidGraphError
from graphopt.export.report import APPLIED, BUDGET, DEFECT, ROLLED_BACK, SPEED, UNCHANGED, Size, Step
from graphopt.ir.check import check_structure
from graphopt.ir.compare import Comparison, compare_runs, exact_tolerance
from graphopt.ir.cost import cost
from graphopt.ir.session import Session, open_session
from graphopt.ir.timing import Benchmark, interleave
from graphopt.passes.contract import Context, Evidence, Pass, Remark, Semantics, Verdict
from graphopt.passes.quantize_protection import RUINED

Evaluate = Callable[[onnxruntime.InferenceSession], float]
"""The user's metric of a session, higher is better."""

_MOST_SECONDS, _LEAST_SECONDS, _ROUNDS = 1.0, 0.2, 200
"""A timing takes about this many rounds, within these bounds."""
_DEFAULT_DROP = 0.01
"""Share of the original's metric that may be lost where the user gave `evaluate` without `max_drop`."""


@dataclass(frozen=True)
class Budget:
    """What lossy passes may cost.

    Attributes:
        evaluate: the user's metric, or None.
        max_drop: how much of it may be lost, in its own unit; None stands for 1 % of the original's value.
        tolerance: how far outputs may move, root mean square over that of the output; None means no limit.
    """

    evaluate: Evaluate | None = None
    max_drop: float | None = None
    tolerance: float | None = None

    @property
    def is_limited(self) -> bool:
        """Whether anything is asked of lossy passes."""
        return self.evaluate is not None or self.tolerance is not None

    def allowed_drop(self, metric: float) -> float:
        """How much may be lost of a metric that the original has."""
        return abs(metric) * _DEFAULT_DROP if self.max_drop is None else self.max_drop

    def in_words(self, metric: float | None) -> str:
        """The limits in one clause, given the metric of the original.

        Example:
            >>> Budget(tolerance=0.02).in_words(None)
            'tolerance 0.02'
        """
        limits = [] if self.tolerance is None else [f"tolerance {self.tolerance:.2g}"]
        if metric is not None:
            limits.append(f"metric at least {metric - self.allowed_drop(metric):.4g}")
        return ", ".join(limits)


@dataclass(frozen=True)
class Final:
    """The original and the result beside each other.

    Attributes:
        timing: both timed in turns.
        error: outputs of the result against those of the original.
        metric: the user's metric of both, or None.
    """

    timing: Benchmark
    error: Comparison
    metric: tuple[float, float] | None


@dataclass
class Guard:
    """Judges a candidate graph against the original and against the best graph so far.

    Attributes:
        original: the model as the user gave it.
        feeds: example or probe inputs; outputs are compared on all, time is taken on the first.
        budget: what lossy passes may cost.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads of all sessions.
        sizes: elements of the symbolic dimensions in the feeds.
        counted: on how many of the feeds, from the first, the error of a lossy graph is judged; None for all. The
            others are made up beside inputs of the user's: on them only what must stay within rounding is compared.
        notes: what the user should know about the original and the result, filled while measuring them.
    """

    original: ir.Model
    feeds: Sequence[Mapping[str, np.ndarray]]
    budget: Budget
    target: str
    threads: int
    sizes: Mapping[str, int]
    counted: int | None = None
    notes: list[str] = field(default_factory=list)
    _reference: list[list[np.ndarray]] = field(default_factory=list)
    _anchor: list[list[np.ndarray]] = field(default_factory=list)
    _anchor_error: float = 0.0
    _is_lossy: bool = False
    _metric: float | None = None
    _best: Session | None = None
    _best_speed: float = 1.0
    _seconds: float = _LEAST_SECONDS
    _refused: InvalidGraphError | None = None
    """Why the original does not load on the target; it runs on the CPU then."""
    _best_loads: bool = True
    """Whether the best graph loads on the target."""

    @property
    def original_loads(self) -> bool:
        """Whether the original loads on the target, so that it can be the result."""
        return self._refused is None

    def first_step(self) -> Step:
        """Measure the original: reference outputs with onnxruntime's optimisations off, metric, latency."""
        start = time.perf_counter()
        reference = open_session(self.original, optimized=False, threads=self.threads)
        self._reference = [reference.run_feeds(feeds) for feeds in self.feeds]
        del reference
        self._best = self._open_original()
        self._anchor = self._choose_anchor([self._best.run_feeds(feeds) for feeds in self.feeds])
        if self.budget.evaluate is not None:
            self._metric = measure_metric(self.budget.evaluate, self._best)
        timing = self._time(self._best)
        self._seconds = min(max(2 * _ROUNDS * timing.latencies[0].median / 1e3, _LEAST_SECONDS), _MOST_SECONDS)
        return Step(
            "(input)",
            APPLIED,
            size_of(self.original, self.sizes),
            latency=timing.latencies[0],
            speed=1.0,
            metric=self._metric,
            seconds=time.perf_counter() - start,
        )

    def _choose_anchor(self, deployed: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        """The reference outputs, unless onnxruntime's own optimisations change what the original computes."""
        moved = self._compare(deployed)
        worst = moved.worst
        if worst is None or all(
            output.error <= exact_tolerance(np.asarray(reference))
            for output, reference in zip(moved.outputs, self._reference[0], strict=False)
        ):
            return self._reference
        self.notes.append(
            f"onnxruntime's own optimisations move output {worst.name} of the input by {worst.error:.1e}; "
            "passes are compared with the input as onnxruntime runs it"
        )
        return deployed

    def judge(self, name: str, candidate: ir.Model, semantics: Semantics, *, must_keep: bool = False) -> Step:
        """Check a candidate. The step says "applied", or "rolled back" with the reason and figures.

        With `must_keep` a slower candidate is accepted (the canonical form, on which all passes stand).
        """
        size = size_of(candidate, self.sizes)
        try:
            check_structure(candidate)
            session, loads = self._open(candidate)
            outputs = [session.run_feeds(feeds) for feeds in self.feeds]
        except GraphoptError as error:
            return Step(name, ROLLED_BACK, size, reason=error.what, cause=DEFECT)
        lossy = semantics is Semantics.LOSSY or self._is_lossy
        comparison = self._compare(outputs[: self.counted] if lossy else outputs)
        reason = self._numbers_reason(comparison, outputs, semantics)
        if reason is not None:
            cause = BUDGET if semantics is Semantics.LOSSY else DEFECT
            return Step(name, ROLLED_BACK, size, reason=reason, cause=cause, error=comparison)
        assert self._best is not None
        timing = self._time(self._best, session)
        must_keep |= loads and not self._best_loads  # the first that loads on the target, however fast the CPU is
        if timing.is_slower() and not must_keep:
            del session  # placement of buffers alone makes a few percent: judge a second loading, for longer
            session, _ = self._open(candidate)
            timing = self._time(self._best, session, seconds=4 * self._seconds)
        speed = self._best_speed * timing.speeds[1].median
        step = Step(name, APPLIED, size, latency=timing.latencies[1], speed=speed, error=comparison)
        if timing.is_slower() and not must_keep:
            slower = f"slower: {timing.latencies[1].median:.3g} ms > {timing.latencies[0].median:.3g} ms"
            return _rejected(step, slower, SPEED)
        if semantics is Semantics.LOSSY and self.budget.evaluate is not None:
            metric = measure_metric(self.budget.evaluate, session)
            step = replace(step, metric=metric)
            reason = self._metric_reason(metric)
            if reason is not None:
                return _rejected(step, reason, BUDGET)
        self._best, self._best_speed, self._best_loads = session, speed, loads
        if semantics is Semantics.LOSSY:
            self._anchor, self._anchor_error, self._is_lossy = outputs, self._compare(outputs).error, True
        return step

    def verdict(self, candidate: ir.Model) -> Verdict:
        """What `judge` will say of the outputs and the metric of a lossy candidate; time is not taken, nothing is kept.

        A pass asks it, through `Context.judge`, to try several graphs and to leave one that is within the budget.
        """
        budget = self.budget.in_words(self._metric)
        try:
            session, _ = self._open(candidate)
            outputs = [session.run_feeds(feeds) for feeds in self.feeds[: self.counted]]
        except GraphoptError as error:
            return Verdict(False, math.inf, reason=error.what, budget=budget)
        comparison = self._compare(outputs)
        reason, metric = self._numbers_reason(comparison, outputs, Semantics.LOSSY), None
        if reason is None and self.budget.evaluate is not None:
            metric = measure_metric(self.budget.evaluate, session)
            reason = self._metric_reason(metric)
        return Verdict(reason is None, comparison.rms_error, metric, reason or "", budget)

    def final(self) -> Final:
        """Time the original and the best graph in turns once more, compare their outputs and evaluate both.

        Raises:
            InvalidGraphError: the original does not load on the target, and no pass has changed that.
        """
        assert self._best is not None
        if self._refused is not None and not self._best_loads:
            raise self._refused
        where = self.target if self.original_loads else "cpu"
        original = open_session(self.original, target=where, threads=self.threads)
        timing = self._time(original, self._best, seconds=3 * self._seconds)
        if timing.is_slower():
            timing = self._time(original, self._best, seconds=6 * self._seconds)
        feeds = self.feeds[: self.counted] if self._is_lossy else self.feeds
        error = self._compare([self._best.run_feeds(one) for one in feeds])
        if self._is_lossy and not self.budget.is_limited and error.rms_error > RUINED:
            self.notes.append(
                f"outputs moved by {error.rms_error:.2g} of what they are (rms), and no `evaluate` and no `tolerance` "
                "says how much may be lost: measure the accuracy before you deploy this"
            )
        metric = None
        if self.budget.evaluate is not None and self._metric is not None:
            metric = (self._metric, measure_metric(self.budget.evaluate, self._best))
        return Final(replace(timing, names=("input", "result")), error, metric)

    def _compare(
        self, outputs: Sequence[Sequence[np.ndarray]], reference: Sequence[Sequence[np.ndarray]] | None = None
    ) -> Comparison:
        names = [value.name or "" for value in self.original.graph.outputs]
        reference = self._reference if reference is None else reference
        return compare_runs(names, reference[: len(outputs)], outputs)

    def _numbers_reason(
        self, comparison: Comparison, outputs: Sequence[Sequence[np.ndarray]], semantics: Semantics
    ) -> str | None:
        """Why the outputs are too far away: from the original for a lossy pass, from the anchor for an exact one.

        The anchor is the last lossy graph that was accepted, or the original. Behind a lossy graph rounding may
        tip a quantizer into the next step, so a quarter of the error that the user has accepted is allowed then.
        """
        worst = comparison.worst
        if worst is None:
            return None
        if not math.isfinite(comparison.error):
            return f"output {worst.name}: {worst.reason or 'no finite error'}"
        if semantics is Semantics.EXACT:
            moved = self._compare(outputs, self._anchor)
            for output, reference in zip(moved.outputs, self._anchor[0], strict=False):
                limit = exact_tolerance(np.asarray(reference)) + self._anchor_error / 4
                if output.error > limit:
                    return f"output {output.name} moved by {output.error:.1e}, more than rounding ({limit:.0e})"
            return None
        limit = self.budget.tolerance
        if limit is not None and comparison.rms_error > limit:
            moved_most = max(comparison.outputs, key=lambda output: output.rms_error)
            return f"output {moved_most.name} moved by {moved_most.rms_error:.2g} (rms), tolerance {limit:.2g}"
        return None

    def _metric_reason(self, metric: float) -> str | None:
        assert self._metric is not None
        allowed = self.budget.allowed_drop(self._metric)
        drop = self._metric - metric
        if drop > allowed:
            return f"metric fell by {drop:.3g} ({self._metric:.4g} -> {metric:.4g}), allowed {allowed:.3g}"
        return None

    def _open_original(self) -> Session:
        try:
            return self._open(self.original)[0]
        except InvalidGraphError as error:
            if self.target == "cpu":
                raise
            self._refused, self._best_loads = error, False
            self.notes.append(
                f"the input does not load on {self.target}, the result is compared with it on cpu: {error.what}"
            )
            return self._open(self.original)[0]

    def _open(self, model: ir.Model) -> tuple[Session, bool]:
        """A session, and whether it is on the target: on the CPU only as long as the best graph is there, too."""
        try:
            return open_session(model, target=self.target, threads=self.threads), True
        except InvalidGraphError:
            if self._best_loads:
                raise
            return open_session(model, threads=self.threads), False

    def _time(self, *sessions: Session, seconds: float | None = None) -> Benchmark:
        return interleave(
            sessions,
            self.feeds[0],
            names=("best so far", "candidate")[: len(sessions)],
            seconds=seconds or self._seconds,
            threads=self.threads,
            target=self.target,
        )


class Listener(Protocol):
    """Who hears how far a run is."""

    def start(self, name: str) -> None:
        """A pass begins."""

    def finish(self, step: Step) -> None:
        """A pass and its checks are done."""


History = dict[str, list[str]]
"""For each weight of the canonical graph, the accepted passes that changed it, in order."""


def run_recipe(
    canonical: ir.Model, passes: Sequence[Pass], guard: Guard, context: Context, listener: Listener
) -> tuple[ir.Model, list[Step], History]:
    """Measure the original, judge its canonical form, and run the passes on that.

    Returns:
        The best graph (the original where its canonical form is rejected), one step a stage, and what changed
        each weight.

    Raises:
        GraphoptError: a pass refuses the user's data or options. What a pass finds wrong with the graph it
            records as remarks instead.
    """
    steps = [guard.first_step()]
    context.judge = guard.verdict if guard.budget.is_limited else None
    start = time.perf_counter()
    first = guard.judge("(canonical)", canonical, Semantics.EXACT, must_keep=True)
    steps.append(replace(first, seconds=time.perf_counter() - start))
    history: History = {name: [] for name in canonical.graph.initializers}
    if first.status == ROLLED_BACK:
        return guard.original, steps, history
    return _run_passes(canonical, passes, guard, context, listener, steps, history)


def _run_passes(
    best: ir.Model,
    passes: Sequence[Pass],
    guard: Guard,
    context: Context,
    listener: Listener,
    steps: list[Step],
    history: History,
) -> tuple[ir.Model, list[Step], History]:
    """Run passes in order, each on a clone that replaces the best graph only when the guard accepts it."""
    for single in passes:
        start = time.perf_counter()
        listener.start(single.name)
        candidate = best.clone()
        try:
            result = single.run(candidate, context)
        except GraphoptError:
            raise
        except Exception as error:  # a defect of a pass must not cost the user the passes before and after it
            size = size_of(best, context.sizes)
            step = Step(single.name, ROLLED_BACK, size, reason=_defect(single, error), cause=DEFECT)
            remarks: tuple[Remark, ...] = ()
            evidence: Mapping[str, Evidence] = {}
        else:
            remarks, evidence = result.remarks, result.evidence
            if result.modified:
                step = guard.judge(single.name, candidate, single.semantics)
            else:
                step = Step(single.name, UNCHANGED, size_of(best, context.sizes))
        step = replace(step, seconds=time.perf_counter() - start, remarks=remarks, evidence=evidence)
        if step.status == APPLIED:
            _record_changes(history, best, candidate, single.name)
            best = candidate
        steps.append(step)
        listener.finish(step)
    return best, steps, history


def _record_changes(history: History, before: ir.Model, after: ir.Model, name: str) -> None:
    old, new = before.graph.initializers, after.graph.initializers
    for weight, passes in history.items():
        if weight in old and (weight not in new or new[weight].const_value is not old[weight].const_value):
            passes.append(name)


def size_of(model: ir.Model, sizes: Mapping[str, int]) -> Size:
    """Nodes, parameters, MACs and weight bytes of a graph at these sizes of its symbolic dimensions."""
    total = cost(model, sizes)
    nodes = sum(1 for graph in model.graphs() for _ in graph)
    return Size(nodes, total.parameters, total.macs, total.weight_bytes)


def measure_metric(evaluate: Evaluate, session: onnxruntime.InferenceSession) -> float:
    """The user's metric as a finite float. Raises `DataError` where it raises or returns something else."""
    try:
        value = evaluate(session)
    except GraphoptError:
        raise
    except Exception as error:
        raise DataError(
            f"`evaluate` raised {type(error).__name__}: {error}",
            where="evaluate",
            help="it is called with an onnxruntime.InferenceSession and returns one number, higher is better",
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"`evaluate` returned {type(value).__name__}, not a number",
            where="evaluate",
            help="return one number, higher is better",
        ) from error
    if not math.isfinite(number):
        raise DataError(
            f"`evaluate` returned {number}",
            where="evaluate",
            help="return one finite number, higher is better",
        )
    return number


def _defect(single: Pass, error: Exception) -> str:
    owner = "graphopt" if type(single).__module__.startswith("graphopt.") else "this pass"
    return f"the pass failed: {type(error).__name__}: {error} (a defect of {owner}, please report it)"


def _rejected(step: Step, reason: str, cause: str) -> Step:
    return replace(step, status=ROLLED_BACK, reason=reason, cause=cause)
