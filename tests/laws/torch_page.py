"""What the node cases say about the torch functions, as a page for people: docs/conformance.md is this text.

Written by `python -m tests.laws.torch_page > docs/conformance.md`; a test keeps the two equal.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch

from graphopt.ir.ops import default_table
from tests.laws.torch_conformance import Outcome, counted, outcomes
from tests.laws.torch_gradients import FLAT, gradients

_INTRODUCTION = """\
# Conformance of lifted operators

Written by `python -m tests.laws.torch_page`; do not edit. Every node case of the `onnx` wheel
(`onnx.backend.test.data.node`) through `graphopt.load` and `graphopt.lift`: values, shapes and dtypes of all outputs
are those that onnx expects. A case of several operators counts for each of them. **gradient**: cases whose gradients
`torch.autograd.gradcheck` confirms in float64 (three of each operator are checked), or why there are none.
"""


def page(found: list[Outcome], held: Counter[str]) -> str:
    """The page for these outcomes and these counts of checked gradients."""
    claimed = sorted({row.op_type for row in default_table() if row.domain == "" and row.torch is not None})
    counts, reasons = counted(found), defaultdict[str, Counter[str]](Counter)
    for outcome in found:
        if outcome.status == "skipped":
            for operator in outcome.operators:
                reasons[operator][outcome.reason] += 1
    total = Counter(outcome.status for outcome in found)
    lines = [
        _INTRODUCTION,
        f"{len(claimed)} operators; {total['passed']} cases passed, {total['failed']} failed, "
        f"{total['skipped']} skipped.",
        "",
        "| operator | passed | failed | skipped | why skipped | gradient |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for operator in claimed:
        numbers = counts.get(operator, Counter[str]())
        why = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons[operator].items()))
        gradient = FLAT.get(operator) or (f"{held[operator]} checked" if held[operator] else "")
        cells = [operator, *(str(numbers[status]) for status in ("passed", "failed", "skipped")), why, gradient]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Cases of operators without a torch function are skipped:", ""]
    others = Counter(outcome.reason for outcome in found if outcome.status == "skipped")
    lines += [f"* {count}: {reason}" for reason, count in sorted(others.items()) if reason.startswith("no torch")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(page(outcomes(), gradients()[0]), end="")  # noqa: T201
