"""What an optimization did, as records, as JSON and as a table. Holds figures; measures nothing."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphopt.ir.compare import Comparison
from graphopt.ir.timing import Benchmark, Latency
from graphopt.passes.contract import Evidence, Remark

APPLIED, UNCHANGED, ROLLED_BACK = "applied", "unchanged", "rolled back"
DEFECT, BUDGET, SPEED = "defect", "budget", "speed"
"""Why a step was rolled back: it is wrong, it costs more than the budget allows, or it is slower."""
_SHOWN_REMARKS = 8
_WIDEST = 120
"""Characters of a line at most, where no terminal says how wide it is."""


@dataclass(frozen=True)
class Size:
    """How big a graph is.

    Attributes:
        nodes: nodes, subgraphs included.
        parameters: elements of its weights.
        macs: multiply-accumulate operations of one run at the example sizes.
        weight_bytes: bytes of its weights.
    """

    nodes: int
    parameters: int
    macs: int
    weight_bytes: int


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline: the input, the canonical form, or a pass.

    Attributes:
        name: pass name, or "(input)", "(canonical)".
        status: "applied", "unchanged" or "rolled back".
        reason: why it was rolled back, with figures, else None.
        cause: "defect", "budget" or "speed" where it was rolled back, else None.
        size: of the graph as it stands after the step; of the rejected graph where it was rolled back.
        latency: of that graph, None where it was not measured (unchanged).
        speed: how many times faster than the input, None where it was not measured.
        error: outputs against those of the input, see `graphopt.ir.compare`; None where not compared. The table
            shows its `rms_error`, the figure that `tolerance` limits.
        metric: the user's metric, None where it was not evaluated.
        seconds: wall-clock time of the pass and its checks.
        remarks: what the pass declined and noted.
        evidence: what the pass measured, by name: what a search tried, a diagnosis.
    """

    name: str
    status: str
    size: Size
    reason: str | None = None
    cause: str | None = None
    latency: Latency | None = None
    speed: float | None = None
    error: Comparison | None = None
    metric: float | None = None
    seconds: float = 0.0
    remarks: tuple[Remark, ...] = ()
    evidence: Mapping[str, Evidence] = field(default_factory=dict[str, Evidence])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "cause": self.cause,
            **vars(self.size),
            "latency_ms": None if self.latency is None else vars(self.latency),
            "speed": self.speed,
            "error": None if self.error is None else self.error.to_json(),
            "metric": self.metric,
            "seconds": self.seconds,
            "remarks": [vars(remark) for remark in self.remarks],
            "evidence": {name: found.to_json() for name, found in self.evidence.items()},
        }


@dataclass(frozen=True)
class WeightFate:
    """What became of one weight of the input.

    Attributes:
        name: initializer name in the canonical graph.
        status: "changed" or "declined".
        by: the passes that changed it, in order.
        reason: why nothing changed it.
        before: dtype and shape before, for instance "FLOAT[64,3,7,7]".
    """

    name: str
    status: str
    by: tuple[str, ...]
    reason: str | None
    before: str


@dataclass(frozen=True)
class Report:
    """The proof: every step with its figures, the totals, and what became of each weight.

    Attributes:
        source: what was optimized, for instance the file name.
        recipe: recipe name.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads of all timings, 0 for onnxruntime's default.
        inputs: dtype and shape of each input that was timed, by name.
        data: where inputs came from, for instance "data-free" or "256 calibration inputs".
        steps: the stages in order.
        final: the input and the result timed once more in turns, the totals' speed.
        error: outputs of the result against those of the input.
        metric: the user's metric of the input and of the result, or None.
        weights: what became of each weight.
        notes: sentences about how the model was read.
        missed: targets that were asked for and not met, each a sentence; empty when all is well.
    """

    source: str
    recipe: str
    target: str
    threads: int
    data: str
    inputs: dict[str, str]
    steps: tuple[Step, ...]
    final: Benchmark | None
    error: Comparison | None
    metric: tuple[float, float] | None = None
    weights: tuple[WeightFate, ...] = ()
    notes: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """How many times faster the result is than the input, measured in turns at the end."""
        return self.final.speeds[-1].median if self.final is not None else 1.0

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """The remarks of all steps."""
        return tuple(remark for step in self.steps for remark in step.remarks)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`; infinities become None."""
        document = {
            "source": self.source,
            "recipe": self.recipe,
            "target": self.target,
            "threads": self.threads,
            "data": self.data,
            "inputs": self.inputs,
            "speed": self.speed,
            "steps": [step.to_json() for step in self.steps],
            "final": None if self.final is None else self.final.to_json(),
            "error": None if self.error is None else self.error.to_json(),
            "metric": None if self.metric is None else list(self.metric),
            "weights": [{**vars(weight), "by": list(weight.by)} for weight in self.weights],
            "notes": list(self.notes),
            "missed": list(self.missed),
            "environment": self.environment,
        }
        finite: dict[str, Any] = _finite(document)
        json.dumps(finite, allow_nan=False)
        return finite

    def __str__(self) -> str:
        stream = io.StringIO()
        width = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
        Console(file=stream, width=width, color_system=None, force_terminal=False).print(self)
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else "default threads"
        title = f"graphopt · {self.source} · recipe {self.recipe} · {self.target} ({threads}) · {self.data}"
        yield Text(title, style="bold")
        timed = ", ".join(f"{name} {kind}" for name, kind in self.inputs.items())
        yield Text(f"timed on {timed}; x: speed over the input, from interleaved rounds", style="dim")
        yield self._steps_table(wide=options.max_width >= _WIDE)
        for line, style in self._closing_lines():
            indent = len(line) - len(line.lstrip())
            yield Padding(Text(line.strip(), style=style), (0, 0, 0, indent), expand=False)

    def _steps_table(self, *, wide: bool) -> Table:
        """One row a step that did something; a narrow screen does without the columns that the JSON also has."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("#", justify="right", no_wrap=True, min_width=2)
        table.add_column("pass", no_wrap=True)
        shown = [column for column in _COLUMNS if wide or column.always]
        for column in shown:
            table.add_column(column.heading, justify="right", no_wrap=True)
        previous: Step | None = None
        for number, step in enumerate(self.steps):
            if step.status == UNCHANGED:
                continue
            rolled_back = step.status == ROLLED_BACK
            name = f"{step.name} (rolled back)" if rolled_back else step.name
            cells = [column.cell(step, previous) for column in shown]
            table.add_row(str(number), name, *cells, style="yellow" if rolled_back else None)
            previous = previous if rolled_back else step
        return table

    def _closing_lines(self) -> list[tuple[str, str]]:
        lines: list[tuple[str, str]] = []
        unchanged = [step.name for step in self.steps if step.status == UNCHANGED]
        if unchanged:
            lines.append((f"   nothing to do: {', '.join(unchanged)}", "dim"))
        for step in self.steps:
            if step.status == ROLLED_BACK:
                lines.append((f"   {step.name} rolled back: {step.reason}", "yellow"))
            for found in step.evidence.values():
                lines += [(f"   {line}", "") for line in found.summary()]
        if self.final is not None:
            first, last = self.steps[0], self._last_kept()
            speed = self.final.speeds[-1]
            error = "" if self.error is None else f", error {_error(self.error)}"
            metric = "" if self.metric is None else f", metric {self.metric[0]:.4g} -> {self.metric[1]:.4g}"
            lines.append(
                (
                    f"   total: {speed.median:.2f} x faster ({speed.low:.2f} to {speed.high:.2f}, "
                    f"{self.final.rounds} interleaved rounds), "
                    f"{_bytes(first.size.weight_bytes)} -> {_bytes(last.size.weight_bytes)}{error}{metric}",
                    "bold green" if not self.missed else "bold",
                )
            )
        changed = sum(weight.status == "changed" for weight in self.weights)
        if self.weights:
            declined = Counter(weight.reason or "" for weight in self.weights if weight.status == "declined")
            lines.append((f"   weights: {changed} changed, {len(self.weights) - changed} declined", ""))
            lines += [(f"     {count} declined: {reason}", "dim") for reason, count in declined.most_common(4)]
        lines += self._remark_lines()
        lines += [(f"   note: {sentence}", "dim") for sentence in self.notes]
        lines += [(f"   target missed: {sentence}", "bold red") for sentence in self.missed]
        return lines

    def _remark_lines(self) -> list[tuple[str, str]]:
        by_reason = Counter((remark.kind, remark.what, remark.why) for remark in self.remarks)
        lines = [
            (f"   {kind} {what}: {why}" + (f" ({count} places)" if count > 1 else ""), "dim")
            for (kind, what, why), count in by_reason.most_common(_SHOWN_REMARKS)
        ]
        if len(by_reason) > _SHOWN_REMARKS:
            lines.append(
                (
                    f"   {len(by_reason) - _SHOWN_REMARKS} more kinds of remarks in report.remarks and --json",
                    "dim",
                )
            )
        return lines

    def _last_kept(self) -> Step:
        return next(step for step in reversed(self.steps) if step.status != ROLLED_BACK)


@dataclass(frozen=True)
class _Column:
    """One column of the steps table: how to write it, given the step and the one kept before it."""

    heading: str
    cell: Callable[[Step, Step | None], str]
    always: bool = True


def _nodes(step: Step, previous: Step | None) -> str:
    change = 0 if previous is None else step.size.nodes - previous.size.nodes
    return f"{step.size.nodes} ({change:+d})" if change else str(step.size.nodes)


def _or_dash(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if value is None else text(value)


_WIDE = 100
"""Characters from which the table shows all its columns."""
_COLUMNS = (
    _Column("nodes", _nodes),
    _Column("params", lambda step, _: _count(step.size.parameters), always=False),
    _Column("MACs", lambda step, _: _count(step.size.macs), always=False),
    _Column("size", lambda step, _: _bytes(step.size.weight_bytes)),
    _Column("ms", lambda step, _: _or_dash(step.latency, lambda latency: f"{latency.median:.3g}")),
    _Column("±", lambda step, _: _or_dash(step.latency, lambda latency: f"{latency.spread:.0%}"), always=False),
    _Column("x", lambda step, _: _or_dash(step.speed, lambda speed: f"{speed:.2f}")),
    _Column("error", lambda step, _: _or_dash(step.error, lambda error: _error(error))),
    _Column("metric", lambda step, _: _or_dash(step.metric, lambda metric: f"{metric:.4g}")),
    _Column("s", lambda step, _: f"{step.seconds:.1f}", always=False),
)


def _error(comparison: Comparison) -> str:
    return f"{comparison.rms_error:.1e}" if comparison.rms_error else "0"


def _count(number: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number} B"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
