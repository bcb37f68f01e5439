"""Every operator case that the `onnx` wheel ships: reading and rewriting it gives the outputs that onnx expects.

The cases were written by the authors of the operators, one model of a few nodes each, at every opset since 1. A
case is skipped only where onnxruntime itself cannot run the model as it came; all others must agree.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.backend.test.loader import load_model_tests

import graphopt
from graphopt.errors import GraphoptError
from graphopt.ir.check import check_structure
from graphopt.ir.compare import compare_arrays, exact_tolerance
from graphopt.ir.session import open_session, session_options
from graphopt.passes import Context
from graphopt.recipe import preset

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # onnx's cases divide by zero on purpose

NEWEST_OPSET = 26
"""The newest opset of onnxruntime; a case with a newer import but no newer operator is run at this one."""
NEWEST_IR = 13
AGREED = 1450
"""Fewest cases that must agree, so that a change which makes everything be skipped cannot pass."""
_INVALID = "its Range reads vectors of one element, which shape inference rejects once they are constant"
_TRAINING = "Dropout in training mode is made inactive on purpose, with a note"
BY_DESIGN = {
    "test_affine_grid_2d_expanded": _INVALID,
    "test_affine_grid_2d_align_corners_expanded": _INVALID,
    "test_training_dropout": _TRAINING,
    "test_training_dropout_default": _TRAINING,
    "test_training_dropout_default_mask": _TRAINING,
    "test_training_dropout_mask": _TRAINING,
}
"""Cases in which graphopt and the expected outputs part ways for a reason; they must not crash."""


@dataclass
class Tally:
    """Outcomes of all cases: how many agreed, why others were skipped, and what went wrong."""

    agreed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def test_cases_of_the_onnx_wheel_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")  # onnxruntime: the cases use the newest opset
    tally = Tally()
    for name, model, data in cases():
        try:
            judge(name, model, data, tally)
        except Exception as error:  # a crash of one case must not hide the others
            tally.wrong.append(f"{name}: {type(error).__name__}: {error}")
    print(f"\n{tally.agreed} agreed, {tally.skipped.total()} skipped")  # noqa: T201  (for `pytest -s`)
    for reason, count in tally.skipped.most_common():
        print(f"  {count:4} {reason}")  # noqa: T201
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.agreed >= AGREED


def judge(name: str, proto: onnx.ModelProto, data: Sequence[tuple[dict[str, Any], list[Any]]], tally: Tally) -> None:
    """Load, compare, run the exact passes, compare again; raises only where graphopt crashes."""
    try:
        expected = [run_as_it_came(proto, feeds) for feeds, _ in data]
    except Exception as error:
        expected, reason = None, f"onnxruntime: {kind_of(error)}"
    else:
        reason = None
        if all(agree(wanted, found) for (_, wanted), found in zip(data, expected, strict=True)):
            expected = [wanted for _, wanted in data]
    try:
        model = graphopt.load(proto)
    except GraphoptError as error:
        if expected is not None and "older than" not in error.what and "cannot be lifted" not in error.what:
            tally.wrong.append(f"{name}: refused, yet onnxruntime runs it: {error.what}")
        tally.skipped[f"refused: {error.what}"] += 1
        return
    if name in BY_DESIGN:
        expected, reason = None, BY_DESIGN[name]
    if expected is not None:
        compare(name, "loading", model, data, expected, tally, optimized=False)
    for single in preset("exact").passes:
        single.run(model, Context())
    if expected is None:
        assert reason is not None
        tally.skipped[reason] += 1
    else:
        check_structure(model)
        compare(name, "the exact passes", model, data, expected, tally, optimized=True)
        tally.agreed += 1


def compare(
    name: str,
    step: str,
    model: ir.Model,
    data: Sequence[tuple[dict[str, Any], list[Any]]],
    expected: Sequence[list[Any]],
    tally: Tally,
    *,
    optimized: bool,
) -> None:
    """Note where the outputs are not the expected ones."""
    session = open_session(model, optimized=optimized)
    for (feeds, _), wanted in zip(data, expected, strict=True):
        if not agree(wanted, session.run(None, feeds)):
            tally.wrong.append(f"{name}: outputs differ after {step}")


def cases() -> Iterator[tuple[str, onnx.ModelProto, list[tuple[dict[str, Any], list[Any]]]]]:
    """Name, model (at an opset of onnxruntime where possible) and pairs of feeds and expected outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node")
    for case in found:
        assert case.model is not None
        assert case.data_sets is not None
        proto = lowered(case.model)
        names = [value.name for value in proto.graph.input]
        data = [
            (dict(zip(names, map(plain, inputs), strict=False)), [plain(value) for value in outputs])
            for inputs, outputs in case.data_sets
        ]
        yield case.name, proto, data


def lowered(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with an opset import and IR version that onnxruntime has, where every operator is that old."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    result.ir_version = min(result.ir_version, NEWEST_IR)
    for entry in result.opset_import:
        if entry.domain == "" and entry.version > NEWEST_OPSET:
            since = max(since_version(node, entry.version) for node in result.graph.node)
            entry.version = max(since, NEWEST_OPSET)
    return result


def since_version(node: onnx.NodeProto, version: int) -> int:
    """The opset that introduced this form of the operator."""
    if node.domain not in ("", "ai.onnx"):
        return 1
    return onnx.defs.get_schema(node.op_type, version, "").since_version


def plain(value: Any) -> Any:
    """Arrays for protos, and lists for sequences."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, onnx.SequenceProto):
        return [plain(entry) for entry in onnx.numpy_helper.to_list(value)]
    if isinstance(value, onnx.OptionalProto):
        return onnx.numpy_helper.to_optional(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def run_as_it_came(proto: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """Outputs of the untouched model with onnxruntime's own optimisations off."""
    options = session_options(threads=1, optimized=False)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def agree(wanted: Any, found: Any) -> bool:
    """Whether two outputs (arrays, or sequences and optionals of them) are equal up to rounding."""
    if isinstance(wanted, (list, tuple)) or isinstance(found, (list, tuple)):
        return len(wanted) == len(found) and all(map(agree, wanted, found))
    if wanted is None or found is None:
        return wanted is found
    wanted, found = np.asarray(wanted), np.asarray(found)
    if wanted.dtype.kind in "OU":
        return wanted.shape == found.shape and np.array_equal(wanted.astype(str), found.astype(str))
    return compare_arrays(wanted, found).error <= exact_tolerance(wanted)


def kind_of(error: Exception) -> str:
    """The kind of onnxruntime's refusal, without names and numbers."""
    text = str(error)
    return text.split(" : ")[2] if text.startswith("[ONNXRuntimeError]") else type(error).__name__
