"""Node cases of the `onnx` wheel through load and lift: `python -m tests.laws.torch_conformance --op Conv --op Gemm`.

Imported by the tests, and a script for whoever writes a torch function.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from graphopt.errors import GraphoptError
from graphopt.ir.channel_analysis import nodes_below
from graphopt.ir.compare import compare_arrays, exact_tolerance
from graphopt.ir.lift import lift
from graphopt.ir.lifted import LiftedModule, as_array, as_tensor
from graphopt.ir.load import load
from graphopt.ir.ops import default_table
from tests.laws.test_onnx_node_cases import cases

RANDOM = {"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
TRAINING = {
    "test_training_dropout", "test_training_dropout_default", "test_training_dropout_default_mask",
    "test_training_dropout_mask", "test_training_dropout_zero_ratio", "test_training_dropout_zero_ratio_mask",
}  # fmt: skip
ROUNDED = {"test_averagepool_2d_ceil_last_window_starts_on_pad": 1e-3}
"""Cases whose expected outputs are written with four digits."""
MISSING_TYPES = {
    "STRING": "strings",
    "FLOAT4E2M1": "torch has no float4e2m1",
    "FLOAT6E2M3": "torch has no float6e2m3",
    "FLOAT6E3M2": "torch has no float6e3m2",
}


@dataclass
class Outcome:
    """One case: "passed", "skipped" or "failed", and why."""

    case: str
    operators: tuple[str, ...]
    status: str
    reason: str = ""


@functools.cache
def raw_cases() -> list[tuple[str, onnx.ModelProto, list[tuple[dict[str, Any], list[Any]]]]]:
    return list(cases())


def operators_of(proto: onnx.ModelProto) -> tuple[str, ...]:
    """The operators of a case, those in subgraphs left out."""
    return tuple(dict.fromkeys(node.op_type for node in proto.graph.node))


def judge(name: str, proto: onnx.ModelProto, data: list[tuple[dict[str, Any], list[Any]]]) -> Outcome:
    """Run one case through load and lift."""
    operators = operators_of(proto)
    reason = why_skipped(name, proto)
    if reason:
        return Outcome(name, operators, "skipped", reason)
    try:
        model = load(proto)
    except GraphoptError as error:
        return Outcome(name, operators, "skipped", f"not loaded: {error.what.splitlines()[0][:70]}")
    missing = unclaimed(model)
    if missing:
        return Outcome(name, operators, "skipped", f"no torch function for {', '.join(sorted(missing))}")
    try:
        module = lift(model)
        for feeds, expected in data:
            found = run(module, feeds)
            for index, (wanted, got) in enumerate(zip(expected, found, strict=True)):
                problem = difference(wanted, got, ROUNDED.get(name))
                if problem:
                    return Outcome(name, operators, "failed", f"output {index}: {problem}")
    except Exception as error:
        return Outcome(name, operators, "failed", f"{type(error).__name__}: {str(error)[:300]}")
    return Outcome(name, operators, "passed")


def unclaimed(model: ir.Model) -> set[str]:
    table = default_table()
    missing = set()
    for node in nodes_below(model.graph):
        row = table.row(node.domain, node.op_type, model.opset_imports.get(node.domain, 1))
        if row is None or row.torch is None:
            missing.add(node.op_type)
    return missing


def why_skipped(name: str, proto: onnx.ModelProto) -> str:
    """Why a case cannot be judged, empty where it can."""
    for operator in operators_of(proto):
        if operator in RANDOM:
            return "random"
    if name in TRAINING:
        return "Dropout in training mode is made inactive on purpose"
    for value in (*proto.graph.input, *proto.graph.output):
        kind = value.type
        while not kind.HasField("tensor_type"):
            if kind.HasField("sequence_type"):
                kind = kind.sequence_type.elem_type
            elif kind.HasField("optional_type"):
                kind = kind.optional_type.elem_type
            else:
                break
        reason = MISSING_TYPES.get(onnx.TensorProto.DataType.Name(kind.tensor_type.elem_type))
        if reason:
            return reason
    return ""


def to_torch(value: Any) -> Any:
    if isinstance(value, list):
        return [to_torch(entry) for entry in value]
    return None if value is None else as_tensor(value)


def run(module: LiftedModule, feeds: dict[str, Any]) -> list[Any]:
    outputs = module(*[to_torch(feeds.get(name)) for name in module.interface.inputs])
    return list(outputs) if len(module.interface.outputs) > 1 else [outputs]


def difference(wanted: Any, got: Any, tolerance: float | None = None) -> str:
    """What is wrong with an output, empty where nothing is."""
    if isinstance(wanted, list) or isinstance(got, list):
        if not isinstance(got, list) or len(wanted) != len(got):
            return f"expected a sequence of {len(wanted)}"
        return next(filter(None, map(difference, wanted, got)), "")
    if wanted is None or got is None:
        return "" if wanted is got else f"expected {wanted}, got {got}"
    wanted = np.asarray(wanted)
    if not isinstance(got, torch.Tensor):
        return f"got a {type(got).__name__}"
    expected_dtype = as_tensor(wanted).dtype
    if got.dtype != expected_dtype:
        return f"dtype {got.dtype}, expected {expected_dtype}"
    found = as_array(got)
    if wanted.dtype.name in ("int4", "uint4", "int2", "uint2"):
        wanted = wanted.astype(found.dtype)
    if wanted.dtype.kind == "c":
        return difference(np.stack([wanted.real, wanted.imag]), torch.view_as_real(got).movedim(-1, 0))
    if wanted.dtype.name.startswith("float8"):
        wanted, found = wanted.astype(np.float32), found.astype(np.float32)
    compared = compare_arrays(wanted, found)
    tolerance = exact_tolerance(wanted) if tolerance is None else tolerance
    return compared.reason or (f"error {compared.error:.2e}" if compared.error > tolerance else "")


def outcomes(operators: Iterable[str] = ()) -> list[Outcome]:
    """All cases, or those that hold one of the operators."""
    wanted = set(operators)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            judge(name, proto, data)
            for name, proto, data in raw_cases()
            if not wanted or wanted & set(operators_of(proto))
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", default=[], help="operator type, may be repeated; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = outcomes(arguments.op)
    for operator, counts in sorted(counted(found).items()):
        print(f"{operator:40} {dict(counts)}")  # noqa: T201
    for reason, count in Counter(outcome.reason for outcome in found if outcome.status == "skipped").most_common():
        print(f"skipped {count:4} {reason}")  # noqa: T201
    for outcome in found:
        if outcome.status == "failed":
            print(f"FAILED {outcome.case}: {outcome.reason}")  # noqa: T201
    print(Counter(outcome.status for outcome in found))  # noqa: T201
    sys.exit(any(outcome.status == "failed" for outcome in found))


def counted(found: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """Cases by operator and status; a case of several operators counts for each of them."""
    by_operator: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in found:
        for operator in outcome.operators:
            by_operator[operator][outcome.status] += 1
    return by_operator


if __name__ == "__main__":
    main()
