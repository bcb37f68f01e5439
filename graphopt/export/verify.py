"""Whether one model file computes what another one does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import DataError
from graphopt.inputs.calibration import fit_feeds
from graphopt.inputs.probes import model_inputs, probe_feeds, runnable_sizes
from graphopt.ir.compare import Comparison, compare, exact_tolerance, reference_outputs
from graphopt.ir.load import Source, read


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

    def __str__(self) -> str:
        verdict = "same" if self.passed else "different"
        return f"{verdict} (inputs: {self.inputs})\n{self.comparison}"


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
    first, second = read(reference), read(candidate)
    for kind, ours, theirs in (
        ("inputs", model_inputs(first), model_inputs(second)),
        ("outputs", first.graph.outputs, second.graph.outputs),
    ):
        if [value.name for value in ours] != [value.name for value in theirs]:
            names = [", ".join(value.name or "?" for value in values) for values in (ours, theirs)]
            raise DataError(
                f"the models have different {kind}: {names[0]} and {names[1]}",
                help="only models with the same interface can be compared",
            )
    if inputs is None:
        sizes = runnable_sizes(first)
        feeds = probe_feeds(first, sizes=sizes, count=2)
    else:
        feeds = [fit_feeds(first, inputs)]
    expected = reference_outputs(first, feeds[:1])[0]
    names = [value.name or "" for value in first.graph.outputs]
    limits = {name: exact_tolerance(np.asarray(array)) for name, array in zip(names, expected, strict=True)}
    source = "probes" if inputs is None else "given"
    return Verdict(compare(first, second, feeds), tolerance, limits, source)
