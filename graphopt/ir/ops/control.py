"""Rows of control flow, sequences and optionals, and how often a node runs its subgraphs.

A node that holds subgraphs costs nothing itself: `graphopt.ir.cost` counts the nodes inside, as often as
`trip_count` says.
"""

from __future__ import annotations

from functools import partial

from graphopt.ir.ops.channels import control as channels
from graphopt.ir.ops.families import unary
from graphopt.ir.ops.row import OpRow, Site


def trip_count(site: Site) -> int | None:
    """How often the body of a Loop, Scan or SequenceMap runs; None where that is decided at run time.

    Loop: the constant `M` (an upper bound where the body can also stop on its own), or 0 for a condition that
    is false from the start. Scan: the length of its first scanned input (ONNX Scan 9 and later).
    """
    if site.node.op_type == "Loop":
        limit, condition = site.constants[:2]
        if condition is not None and not bool(condition.reshape(())):
            return 0
        return None if limit is None else max(int(limit.reshape(())), 0)
    if site.node.op_type == "Scan":
        return _scan_length(site)
    return None


def _scan_length(site: Site) -> int | None:
    scanned = int(site.attribute("num_scan_inputs", 0))
    if not scanned:
        return None
    shape = site.inputs[len(site.inputs) - scanned]
    axes = site.attribute("scan_input_axes") or [0]
    return None if not shape else shape[axes[0]]


_sequences = partial(unary, frozen="tensors inside sequences and optionals are not followed")

ROWS: tuple[OpRow, ...] = (
    *unary("If", structural=(0,), channels=channels.branching, torch="control"),
    *unary("Loop", structural=(0, 1), channels=channels.looping, torch="control"),
    *unary("Scan", channels=channels.scanning, torch="control"),
    *_sequences("SequenceMap", torch="control"),
    *_sequences("SequenceConstruct", "SequenceEmpty", "SequenceLength", "ConcatFromSequence", torch="sequence"),
    *_sequences("SequenceAt", "SequenceErase", "SplitToSequence", structural=(1,), torch="sequence"),
    *_sequences("SequenceInsert", structural=(2,), torch="sequence"),
    *_sequences("Optional", "OptionalGetElement", "OptionalHasElement", torch="sequence"),
)
