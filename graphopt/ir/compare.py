"""How far two sets of outputs are apart, and how far apart they may be. The only home of tolerances.

The error of an output is its largest absolute difference divided by the largest absolute value of the reference:
relative to the output's own scale, so that small entries of a large output do not dominate. Whatever cannot be
compared (shape, dtype, a NaN on one side only) is infinitely far apart, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.session import open_session

_EXACT_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest error of an exact rewrite by dtype of the output: rounding, accumulated over a deep network."""
_EXACT_TOLERANCE_DISCRETE = 1e-2
"""Share of integer or boolean entries (class indices, masks) that may flip where rounding breaks a tie."""
QUANTIZATION_TOLERANCE = 0.06
"""Largest root-mean-square error that 8-bit quantization of a small well-conditioned network may leave."""


@dataclass(frozen=True)
class OutputError:
    """One output, compared.

    Attributes:
        name: output name.
        error: max|a - b| / max|a|; for integers and booleans the share of entries that differ.
        rms_error: root mean square of a - b over that of a; the same as `error` for integers and booleans.
        reason: why the two cannot be compared (then both errors are infinite), or None.
    """

    name: str
    error: float
    rms_error: float
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Every output of two models, compared on one or more sets of inputs (the worst set counts)."""

    outputs: tuple[OutputError, ...]

    @property
    def error(self) -> float:
        """Largest error of any output."""
        return max((output.error for output in self.outputs), default=0.0)

    @property
    def rms_error(self) -> float:
        """Largest root-mean-square error of any output."""
        return max((output.rms_error for output in self.outputs), default=0.0)

    @property
    def worst(self) -> OutputError | None:
        """The output with the largest error."""
        return max(self.outputs, key=lambda output: output.error, default=None)

    def to_json(self) -> dict[str, object]:
        """Plain data: errors overall and per output."""
        return {
            "error": self.error,
            "rms_error": self.rms_error,
            "outputs": [vars(output) for output in self.outputs],
        }

    def __str__(self) -> str:
        lines = [f"error {self.error:.2e} of the output's scale, rms {self.rms_error:.2e}"]
        for output in self.outputs:
            why = f"  ({output.reason})" if output.reason else ""
            lines.append(f"  {output.name}: {output.error:.2e}, rms {output.rms_error:.2e}{why}")
        return "\n".join(lines)


def compare_arrays(reference: np.ndarray, candidate: np.ndarray, name: str = "output") -> OutputError:
    """Compare one output.

    Example:
        >>> compare_arrays(np.array([1.0, 4.0]), np.array([1.0, 3.0])).error
        0.25
        >>> compare_arrays(np.array([1.0]), np.array([np.nan])).error
        inf
    """
    reference, candidate = np.asarray(reference), np.asarray(candidate)
    reason = None
    if reference.dtype != candidate.dtype:
        reason = f"dtype {candidate.dtype}, expected {reference.dtype}"
    elif reference.shape != candidate.shape:
        reason = f"shape {list(candidate.shape)}, expected {list(reference.shape)}"
    if reason is not None:
        return OutputError(name, float("inf"), float("inf"), reason)
    if reference.size == 0:
        return OutputError(name, 0.0, 0.0)
    if not _is_float(reference):
        share = float(np.mean(reference != candidate))
        return OutputError(name, share, share)
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return OutputError(name, float("inf"), float("inf"), "NaN or infinity at different places")
    a, b = a[finite], b[finite]
    if a.size == 0:
        return OutputError(name, 0.0, 0.0)
    difference = a - b
    scale, rms = float(np.abs(a).max()), float(np.sqrt(np.mean(a * a)))
    return OutputError(
        name,
        _ratio(float(np.abs(difference).max()), scale),
        _ratio(float(np.sqrt(np.mean(difference * difference))), rms),
    )


def compare_outputs(reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray]) -> float:
    """Largest error over a list of outputs; infinite where their number differs."""
    if len(reference) != len(candidate):
        return float("inf")
    return max((compare_arrays(a, b).error for a, b in zip(reference, candidate, strict=True)), default=0.0)


def exact_tolerance(array: np.ndarray) -> float:
    """Largest error that an exact rewrite may leave on an output like this one."""
    return _EXACT_TOLERANCE.get(array.dtype.name, _EXACT_TOLERANCE_DISCRETE)


def within_exact(reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray]) -> bool:
    """Whether the candidate outputs equal the reference up to the rounding of an exact rewrite."""
    return len(reference) == len(candidate) and all(
        compare_arrays(a, b).error <= exact_tolerance(np.asarray(a)) for a, b in zip(reference, candidate, strict=True)
    )


def reference_outputs(model: ir.Model, inputs: Sequence[Mapping[str, np.ndarray]]) -> list[list[np.ndarray]]:
    """Outputs of a model for each set of inputs, onnxruntime's graph optimisations disabled."""
    session = open_session(model, optimized=False)
    return [session.run_feeds(feeds) for feeds in inputs]


def compare_runs(
    names: Sequence[str],
    reference: Sequence[Sequence[np.ndarray]],
    candidate: Sequence[Sequence[np.ndarray]],
) -> Comparison:
    """Compare the outputs of several runs, output by output; the worst run of each output counts."""
    worst: dict[str, OutputError] = {}
    for expected, found in zip(reference, candidate, strict=True):
        if len(expected) != len(found):
            reason = f"{len(found)} outputs, expected {len(expected)}"
            return Comparison((OutputError("all outputs", float("inf"), float("inf"), reason),))
        for name, a, b in zip(names, expected, found, strict=True):
            compared = compare_arrays(a, b, name)
            if name not in worst or compared.error > worst[name].error:
                worst[name] = compared
    return Comparison(tuple(worst.values()))


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name in _EXACT_TOLERANCE


def _ratio(difference: float, scale: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else float("inf")
