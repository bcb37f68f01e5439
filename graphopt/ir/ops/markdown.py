"""The op table as a page for people: docs/ops.md is this text, and a test keeps the two equal."""

from __future__ import annotations

from functools import partial

from graphopt.ir.ops import FAMILIES
from graphopt.ir.ops.families import no_macs
from graphopt.ir.ops.row import OpRow

_INTRODUCTION = """\
# Operators that graphopt knows

Written by `python -m graphopt.ir.ops`; do not edit. One row an operator, valid from the opset `since` on.

* **MACs**: multiply-accumulate operations of one run. Only the products of linear operators count: each term
  of a contraction of two operands is one, border padding included. Everything else is 0 by convention, its
  price is the bytes that it moves. "unknown" is counted as 0 and listed by `graphopt.ir.cost`.
* **structural**: inputs that say how (axes, target shapes), not what. **quantization**: inputs that are
  scales or zero points. Neither holds parameters.
* **shape**: where graphopt infers the output shapes; `onnx.shape_inference` does otherwise.
* **channels**, **repair**, **torch**: whether the row can be pruned through, repaired after, and lifted.
  An empty cell means hands off: axes are frozen (the reasons are at the end of the page), lifting refuses; an
  empty repair says that no attribute or size depends on how many channels there are.

An operator that is not here is never guessed: its axes are frozen, its cost is listed as unknown.
"""
_COLUMNS = ("operator", "since", "MACs", "structural", "quantization", "shape", "channels", "repair", "torch")


def table_as_markdown() -> str:
    """The default table, a section a family, rows in the order of their file."""
    sections = [_INTRODUCTION]
    for family, rows in FAMILIES.items():
        lines = [f"## {family}", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
        lines += [_line(_cells(row)) for row in rows]
        sections.append("\n".join(lines) + "\n")
    sections.append(_frozen())
    return "\n".join(sections)


def _frozen() -> str:
    """The operators that channels cannot pass, and why."""
    lines = ["## Frozen", "", "Operators without a `channels` rule: every axis that they touch must stay.", ""]
    lines += [_line(["operator", "reason"]), _line(["---", "---"])]
    rows = [row for family in FAMILIES.values() for row in family if row.channels is None]
    lines += [_line([_operator(row), row.why_frozen]) for row in rows if not row.domain]
    others = [row for row in rows if row.domain]
    lines.append(_line([", ".join(map(_operator, others)), others[0].why_frozen]))
    return "\n".join(lines) + "\n"


def _operator(row: OpRow) -> str:
    return f"{row.domain}::{row.op_type}" if row.domain else row.op_type


def _cells(row: OpRow) -> list[str]:
    return [
        _operator(row),
        str(row.since),
        _formula(row),
        _indices(row.structural),
        _indices(row.quantization),
        _tick(row.shape),
        _tick(row.channels),
        _tick(row.repair),
        _tick(row.torch),
    ]


def _formula(row: OpRow) -> str:
    """The first line of the cost rule's docstring, which is its formula."""
    if row.cost is None:
        return "unknown"
    rule = row.cost.func if isinstance(row.cost, partial) else row.cost
    if rule is no_macs:
        return "0"
    return (rule.__doc__ or "counted").splitlines()[0].rstrip(".")


def _indices(indices: tuple[int, ...]) -> str:
    """Indices as "1, 3" or, for long lists, "0, 1, 3, ...", which QLinearConcat needs."""
    shown = [str(index) for index in indices[:10]]
    return ", ".join([*shown, "..."] if len(indices) > len(shown) else shown)


def _tick(column: object) -> str:
    return "" if column is None else "yes"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
