"""Whether one model computes what another one does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError
from graphopt.inputs.calibration import fit_feeds
from graphopt.inputs.probes import model_inputs, probe_feeds, runnable_sizes
from graphopt.ir.compare import Comparison, compare_runs, exact_tolerance, reference_outputs
from graphopt.ir.load import Source, read
from graphopt.ir.session import open_session


def compare(reference: Source, candidate: Source, inputs: Any = None, *, target: str = "cpu") -> Comparison:
    """Run two models on the same inputs and compare every output.

    The reference runs with onnxruntime's own graph optimisations disabled, the candidate as it would be deployed.

    Args:
        reference: the model whose outputs are right, as for `graphopt.load`.
        candidate: the model to judge.
        inputs: one set of inputs (an array, a tuple of arrays in the order of the inputs, a dict by name), or a list
            of such sets, of which the worst counts; two sets of probes where not given.
        target: provider of the candidate, "cpu", "cuda" or "openvino".

    Raises:
        DataError: the models have different inputs or outputs, or the inputs do not fit.
        LoadError, InvalidGraphError: a model cannot be read or loaded.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) {{ y = {} (x) }}'
        >>> relu, absolute = (ir.from_onnx_text(text.format(op)) for op in ("Relu", "Abs"))
        >>> compare(relu, absolute, np.array([3, -1], np.float32)).error
        0.3333333333333333
    """
    return _compare(read(reference), read(candidate), inputs, target)[0]


def _compare(first: ir.Model, second: ir.Model, inputs: Any, target: str) -> tuple[Comparison, dict[str, float]]:
    """The comparison, and how far each output may be off in an exact rewrite."""
    _require_same_interface(first, second)
    if inputs is None:
        feeds = probe_feeds(first, sizes=runnable_sizes(first), count=2)
    else:
        feeds = [fit_feeds(first, entry) for entry in (inputs if isinstance(inputs, list) else [inputs])]
    if not feeds:
        raise DataError("no inputs to compare on", help="pass at least one set of inputs, or none for probes")
    expected = reference_outputs(first, feeds)
    session = open_session(second, target=target)
    names = [value.name or "" for value in first.graph.outputs]
    comparison = compare_runs(names, expected, [session.run_feeds(entry) for entry in feeds])
    limits = {name: exact_tolerance(np.asarray(array)) for name, array in zip(names, expected[0], strict=True)}
    return comparison, limits


def _require_same_interface(first: ir.Model, second: ir.Model) -> None:
    for kind, ours, theirs in (
        ("inputs", model_inputs(first), model_inputs(second)),
        ("outputs", first.graph.outputs, second.graph.outputs),
    ):
        names = [", ".join(value.name or "?" for value in values) for values in (ours, theirs)]
        if names[0] != names[1]:
            raise DataError(
                f"the models have different {kind}: {names[0]} and {names[1]}",
                help="only models with the same interface can be compared",
            )


@dataclass(frozen=True)
class Verdict:
    """The comparison of two models and whether it passed.

    Attributes:
        comparison: errors per output.
        tolerance: largest root-mean-square error allowed, or None for the rounding of an exact rewrite.
        limits: largest error (of the output's scale) allowed by output name, where there is no tolerance.
        inputs: "given" or "probes".
    """

    comparison: Comparison
    tolerance: float | None
    limits: Mapping[str, float]
    inputs: str

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        if self.tolerance is not None:
            return self.comparison.rms_error <= self.tolerance
        return all(output.error <= self.limits.get(output.name, 0.0) for output in self.comparison.outputs)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        document = self.comparison.to_json()
        return {
            "passed": self.passed,
            "inputs": self.inputs,
            "tolerance": self.tolerance,
            "limits": dict(self.limits),
            **document,
        }

    @property
    def judged(self) -> str:
        """What was compared with what, in words."""
        if self.tolerance is not None:
            return f"rms error {self.comparison.rms_error:.2e}, tolerance {self.tolerance:.2e}"
        allowed = max(self.limits.values(), default=0.0)
        return f"largest error {self.comparison.error:.2e} of the output's scale, allowed {allowed:.0e}"

    def __str__(self) -> str:
        verdict = "same" if self.passed else "different"
        return f"{verdict} (inputs: {self.inputs}), {self.judged}\n{self.comparison}"


def verify(
    reference: Source,
    candidate: Source,
    inputs: Mapping[str, np.ndarray] | np.ndarray | None = None,
    tolerance: float | None = None,
) -> Verdict:
    """Run two models on the same inputs and judge every output.

    Args:
        reference: the model whose outputs are right; it runs without onnxruntime's graph optimisations.
        candidate: the model to judge; it runs as deployed.
        inputs: arrays by input name, or one array; two sets of probes where not given.
        tolerance: largest root-mean-square error of an output, relative to it; None allows the rounding of an
            exact rewrite, judged by the largest difference.

    Raises:
        DataError: the models have different inputs or outputs, or the inputs do not fit.
        LoadError, InvalidGraphError: a model cannot be read.
    """
    comparison, limits = _compare(read(reference), read(candidate), inputs, "cpu")
    return Verdict(comparison, tolerance, limits, "probes" if inputs is None else "given")
