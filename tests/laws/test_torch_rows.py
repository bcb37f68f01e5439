"""The `torch` column against the cases that the authors of the operators wrote; its gradients against differences."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from graphopt.ir.ops import default_table
from graphopt.ir.ops.row import TorchFunction
from tests.laws.torch_conformance import Outcome, counted, outcomes
from tests.laws.torch_gradients import differentiable, gradients
from tests.laws.torch_page import page

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # onnx's cases divide by zero on purpose
PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
FEWEST_OPERATORS, FEWEST_CASES = 150, 1700
"""So that a change which makes everything be skipped cannot pass."""
FAIR_REASONS = ("strings", "random", "torch has no float", "Dropout in training mode", "not loaded: ")
"""Why a case of an operator with a torch function may be skipped."""
WITHOUT_CASES = {
    "GlobalLpPool", "MaxRoiPool", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli",
    "Multinomial", "SimplifiedLayerNormalization", "Scatter", "SequenceConstruct", "SequenceEmpty", "SequenceAt",
    "SequenceErase", "SequenceLength", "ConcatFromSequence", "Optional",
}  # fmt: skip
"""Operators that onnx ships no case for that can be judged; tests/ir/test_lift.py has graphs of them."""


@pytest.fixture(scope="module")
def found() -> list[Outcome]:
    return outcomes()


@pytest.fixture(scope="module")
def held() -> Counter[str]:
    held, failed = gradients()
    assert not failed
    return held


def claimed() -> set[str]:
    return {row.op_type for row in default_table() if row.domain == "" and row.torch is not None}


def test_every_torch_function_loads() -> None:
    for row in default_table():
        if isinstance(row.torch, TorchFunction):
            assert callable(row.torch.load())


def test_every_case_passes(found: list[Outcome]) -> None:
    assert [f"{outcome.case}: {outcome.reason}" for outcome in found if outcome.status == "failed"] == []
    passed = counted(outcome for outcome in found if outcome.status == "passed")
    assert sum(outcome.status == "passed" for outcome in found) >= FEWEST_CASES
    assert len(claimed()) >= FEWEST_OPERATORS
    assert claimed() - set(passed) <= WITHOUT_CASES


def test_cases_are_skipped_for_fair_reasons(found: list[Outcome]) -> None:
    for outcome in found:
        if outcome.status == "skipped" and not outcome.reason.startswith("no torch function"):
            assert outcome.reason.startswith(FAIR_REASONS), outcome


def test_gradients(held: Counter[str]) -> None:
    assert differentiable() - set(held) <= {"GlobalLpPool", "RandomNormal"}


def test_the_page_is_what_was_found(found: list[Outcome], held: Counter[str]) -> None:
    assert PAGE.read_text() == page(found, held), "run `python -m tests.laws.torch_page > docs/conformance.md`"
