"""What a pass is (design.md D4): a frozen dataclass of options that rewrites an `onnx_ir.Model` in place.

The contract only. A pass does not report on itself: whether it changed anything is measured by comparing the
graph before and after. What it must say is what it *declined*, and why: one remark for every refusal.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import onnx_ir as ir

from graphopt.inputs.probes import InputSpec
from graphopt.inputs.source import Inputs, InputSource, find_inputs
from graphopt.inputs.synthetic import Synthetic
from graphopt.ir.fingerprint import fingerprint


class Semantics(enum.Enum):
    """What a pass may do to the function that the graph computes."""

    EXACT = "exact"
    """Outputs stay equal bit by bit, or up to floating-point rounding."""
    LOSSY = "lossy"
    """Outputs change on purpose; by how much is measured and reported."""


@dataclass(frozen=True)
class Remark:
    """One thing that a pass declined or that the user should know.

    Attributes:
        kind: "missed" (a rewrite that was declined) or "note" (a fact worth knowing).
        what: the rewrite or weight in question, for instance "fold BatchNormalization into Conv".
        why: the reason, one clause.
        where: name of the node or tensor.
    """

    kind: str
    what: str
    why: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind} {self.what}: {self.why}, at {self.where}"


@dataclass(frozen=True)
class Verdict:
    """What the guard would say of a graph.

    Attributes:
        within: whether it is within the budget.
        error: how far its outputs moved: root mean square relative to the original's, infinite where they cannot be
            compared.
        metric: the user's metric, None where there is none or the outputs alone decided.
        reason: why it is not within the budget, with figures; empty where it is.
        budget: the budget in words, for instance "tolerance 0.02".
    """

    within: bool
    error: float
    metric: float | None = None
    reason: str = ""
    budget: str = ""


class Evidence(Protocol):
    """Figures that a pass measured: printable, and as plain data."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        ...

    def summary(self) -> list[str]:
        """The lines that a report prints, the fewest that say it."""
        ...


@dataclass
class Context:
    """What a pass may know besides its options and the graph.

    Attributes:
        target: "cpu", "cuda" or "openvino", the onnxruntime provider that the result is for.
        threads: intra-op threads of the sessions that a pass opens, 0 for onnxruntime's default.
        sizes: number of elements of each symbolic dimension in the example inputs, by its name.
        calibration: iterable of feeds that the user gave, re-iterable, or None when data-free.
        remarks: filled by the passes.
        specs: what the user stated about the inputs, by name.
        reference: the model that inputs are made up for in the place of the one that a pass works on: of the same
            interface, and as it was before any pass. In a run all passes then share the same inputs, made while
            BatchNormalization was still there. None outside of a run: each model then gets its own.
        progress: `progress(done, total, text)`, called while something takes long.
        judge: says of a candidate graph whether it is within the budget of the run, exactly as the guard will; None
            where there is no budget.
        evidence: what passes measured and the report is to show, by name; a pass adds to it.
    """

    target: str = "cpu"
    threads: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    calibration: Any = None
    remarks: list[Remark] = field(default_factory=list)
    specs: Mapping[str, InputSpec] = field(default_factory=dict)
    reference: ir.Model | None = field(default=None, repr=False)
    progress: Callable[[int, int, str], None] | None = field(default=None, repr=False)
    judge: Callable[[ir.Model], Verdict] | None = field(default=None, repr=False)
    evidence: dict[str, Evidence] = field(default_factory=dict[str, "Evidence"], repr=False)
    _memo: dict[str, Inputs] = field(default_factory=dict, init=False, repr=False, compare=False)

    def inputs(self, model: ir.Model, source: str | InputSource = "auto", samples: int | None = None) -> Inputs:
        """Inputs for a model; whoever asks for the same model, source and number of samples gets the same ones.

        Args:
            model: the model that is to be fed; it is not changed. Inputs are made for `reference` instead, where that
                is set and takes the same inputs.
            source: one of `graphopt.inputs.source.SOURCES`, or a source with settings of its own. "auto" is the
                user's calibration where given, else synthetic where torch is installed and the model can be lifted,
                else probes.
            samples: at most how many samples, whole batches where the batch is fixed; None leaves it to the source
                (512 where they are small, 256 where they are large).

        Returns:
            Re-iterable batches with their source, and why it is that one.

        Raises:
            DataError: the source is unknown, "calibration" was asked for and not given, or the model cannot be fed.

        Example:
            >>> model = ir.from_onnx_text(
            ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }')
            >>> found = Context().inputs(model, "probes", samples=5)
            >>> found.source, [feeds["x"].shape for feeds in found.batches]
            ('probes', [(5, 3)])
        """
        of = self.reference if self.reference is not None and _interface(self.reference) == _interface(model) else model
        if self.target == "cuda" and source in ("auto", "synthetic") and (source != "auto" or self.calibration is None):
            source = Synthetic(device="cuda")
        return find_inputs(
            of,
            source,
            calibration=self.calibration,
            specs=self.specs,
            sizes=self.sizes,
            samples=samples,
            threads=self.threads,
            progress=self.progress,
            note=lambda line: self.note("keep inputs on disk", line, of.graph.name or "?"),
            memo=self._memo,
        )

    def silent(self) -> Context:
        """The same knowledge, whose remarks and evidence go nowhere: for what is only tried."""
        other = dataclasses.replace(self, remarks=[], evidence={}, progress=None)
        other._memo = self._memo
        return other

    def missed(self, what: str, why: str, where: ir.Node | ir.Value | str) -> None:
        """Record that a rewrite was declined."""
        self.remarks.append(Remark("missed", what, why, _name(where)))

    def note(self, what: str, why: str, where: ir.Node | ir.Value | str) -> None:
        """Record a fact that the user should know."""
        self.remarks.append(Remark("note", what, why, _name(where)))


def _interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    return [(value.name, str(value.type), str(value.shape)) for value in model.graph.inputs]


def _name(where: ir.Node | ir.Value | str) -> str:
    if isinstance(where, str):
        return where
    if isinstance(where, ir.Node):
        return where.name or (where.outputs[0].name if where.outputs else None) or where.op_type
    return where.name or "?"


@dataclass
class RewriteResult(ir.passes.PassResult):
    """An `onnx_ir` pass result with the remarks of the pass and the evidence that it left."""

    remarks: tuple[Remark, ...] = ()
    evidence: Mapping[str, Evidence] = field(default_factory=dict[str, Evidence])


class Pass(ir.passes.InPlacePass):
    """Base of every pass: subclasses are frozen dataclasses, fields are options, class attributes the contract.

    Class attributes:
        name: kebab-case, the file name with dashes.
        semantics: EXACT or LOSSY.
        runs_after: names of passes that must come earlier when both are in one recipe.

    A pass works alone (`FoldBatchnorm()(model)`), inside any `onnx_ir.passes.Sequential`, and under the
    guard of `graphopt.pipeline`, which hands it a filled `Context`.
    """

    name: ClassVar[str]
    semantics: ClassVar[Semantics]
    runs_after: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Rewrite `model` in place; leave one remark in `context` for each refusal."""

    def run(self, model: ir.Model, context: Context) -> RewriteResult:
        """`rewrite` under `context`, with the remarks and the measured change of this run."""
        before, first_remark = fingerprint(model), len(context.remarks)
        known = dict(context.evidence)
        self.rewrite(model, context)
        remarks = tuple(context.remarks[first_remark:])
        evidence = {name: found for name, found in context.evidence.items() if known.get(name) is not found}
        return RewriteResult(model, fingerprint(model) != before, remarks, evidence)

    def call(self, model: ir.Model) -> RewriteResult:
        """Run with default knowledge: CPU target, no data, default sizes."""
        return self.run(model, Context())

    def options(self) -> Iterator[tuple[str, Any]]:
        """Name and value of each option, in declaration order."""
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            yield option.name, getattr(self, option.name)

    def __str__(self) -> str:
        defaults = {option.name: option.default for option in dataclasses.fields(self)}  # type: ignore[arg-type]
        changed = [f"{name}={value!r}" for name, value in self.options() if value != defaults[name]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name
