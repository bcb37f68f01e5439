"""All knowledge about operators: one row an op, one column a question, one file a family (design.md D3).

Nothing registers itself: `default_table` is the one place where the rows of the families meet. A user's own
ops go into a copy, `default_table().with_rows([...])`, which every analysis takes as `table`.
"""

from __future__ import annotations

import functools

from graphopt.ir.ops import (
    attention,
    control,
    conv,
    elementwise,
    linear,
    norm,
    pool,
    preprocessing,
    quant,
    recurrent,
    reduce,
    shape,
)
from graphopt.ir.ops.row import OpRow, OpTable

FAMILIES = {
    "conv": conv.ROWS,
    "linear": linear.ROWS,
    "attention": attention.ROWS,
    "recurrent": recurrent.ROWS,
    "norm": norm.ROWS,
    "elementwise": elementwise.ROWS,
    "shape": shape.ROWS,
    "reduce": reduce.ROWS,
    "pool": pool.ROWS,
    "quant": quant.ROWS,
    "control": control.ROWS,
    "preprocessing": preprocessing.ROWS,
}
"""Rows by family, in the order of docs/ops.md; a family is the file of that name."""


@functools.cache
def default_table() -> OpTable:
    """The rows of all families; built once, because a table never changes.

    Example:
        >>> default_table().row("", "Conv", 21).op_type
        'Conv'
    """
    rows: list[OpRow] = [row for family in FAMILIES.values() for row in family]
    return OpTable(rows)
