"""Masks of attention scores, brought to the shape and the values that onnxruntime's Attention kernel needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.dimensions import Dimension, dimensions
from graphopt.ir.match import scalar
from graphopt.ir.rewrite import DeclinedError, Rewriter, constant, is_op

_LOWEST = float(np.finfo(np.float32).min)
FLOOR = _LOWEST / 2
"""Masked scores stay above this: far below every real score, and not what the kernel takes for fully masked."""
_ABSORBING = -1e30
"""A number this low swallows any score that is added to it, so that adding it equals putting it in its place."""


@dataclass(frozen=True)
class Mask:
    """What is added to the scores, or a choice between the scores and a very negative number.

    Attributes:
        value: float32 mask that is added, or the boolean condition of a Where.
        fill: number in the place of the scores where the condition decides so; None for an added mask.
        keep: value of the condition where the scores stay.
        floor: whether rows may be masked fully by a finite number, so that the mask must not go below FLOOR.
        guarded: whether rows that are masked fully by minus infinity give 0 (a guard behind Softmax).
        rows: elements, or symbol, of the query axis of the scores.
        expand: whether the mask has one row for all queries.
    """

    value: ir.Value
    fill: float | None
    keep: bool
    floor: bool
    guarded: bool
    rows: Dimension
    expand: bool


def read_mask(node: ir.Node, scores_index: int, *, guarded: bool) -> Mask:
    """The mask that an Add or a Where puts on the scores at input `scores_index`.

    Raises:
        DeclinedError: the mask cannot be given to the Attention operator with the same meaning.
    """
    scores = node.inputs[scores_index]
    shape = None if scores is None else dimensions(scores)
    if shape is None:
        raise DeclinedError("the shape of the scores is not known", node)
    if is_op(node, "Add"):
        value, fill, keep = node.inputs[1 - scores_index], None, True
        floor = _may_be_floored(value, guarded=guarded, node=node)
    else:
        value, keep = node.inputs[0], scores_index == 1
        fill = scalar(node.inputs[3 - scores_index]) if scores_index else None
        if fill is None or fill > _ABSORBING:
            raise DeclinedError("the scores of masked keys are replaced by a number that is not very negative", node)
        floor = np.isfinite(fill)
    if value is None:
        raise DeclinedError("there is no mask", node)
    return Mask(value, fill, keep, bool(floor), guarded, shape[2], _needs_rows(value, shape, node))


class MaskBuilder:
    """Builds each prepared mask once, however many layers read it."""

    def __init__(self) -> None:
        self._built: dict[tuple[object, ...], ir.Value] = {}

    def build(self, rewriter: Rewriter, after: ir.Node, mask: Mask, queries: ir.Value, query_axis: int) -> ir.Value:
        """A float32 mask whose last two axes are queries and keys.

        Args:
            rewriter: edits the graph.
            after: new nodes come behind this one.
            mask: what to build.
            queries: a value whose axis `query_axis` is the query axis, for its size at run time.
            query_axis: see `queries`.
        """
        key = (after.graph, mask.value, mask.fill, mask.keep, mask.floor, mask.guarded, mask.rows, mask.expand)
        if key not in self._built:
            array = constant(mask.value)
            self._built[key] = (
                _computed(rewriter, after, mask, queries, query_axis)
                if array is None or (mask.expand and isinstance(mask.rows, str))
                else _constant(rewriter, after, mask, array)
            )
        return self._built[key]


def _may_be_floored(value: ir.Value | None, *, guarded: bool, node: ir.Node) -> bool:
    """Whether an added mask can mask a row fully by finite numbers, as far as the graph tells."""
    if constant(value) is not None:
        return True
    producer = None if value is None else value.producer()
    if producer is not None and is_op(producer, "Where"):
        choices = [scalar(choice) for choice in producer.inputs[1:]]
        if all(choice is not None for choice in choices):
            return any(choice is not None and np.isfinite(choice) and choice < FLOOR for choice in choices)
    if guarded:
        raise DeclinedError("whether fully masked rows give 0 or a mean depends on the mask at run time", node)
    return True


def _needs_rows(value: ir.Value, shape: tuple[Dimension, ...], node: ir.Node) -> bool:
    """Whether the mask must be repeated along the query axis. Raises `DeclinedError` where it does not fit."""
    own = dimensions(value)
    if own is None or len(own) > 4:
        raise DeclinedError("the shape of the mask is not known", node)
    padded: tuple[Dimension, ...] = (1,) * (4 - len(own)) + own
    if any(size not in (1, wanted) for size, wanted in zip(padded[:3], shape[:3], strict=True)):
        raise DeclinedError(f"the mask of shape {list(own)} does not fit the scores of shape {list(shape)}", node)
    if padded[3] != shape[3]:
        raise DeclinedError("the mask has one number for all keys", node)
    return len(own) < 2 or padded[2] != shape[2]


def _constant(rewriter: Rewriter, after: ir.Node, mask: Mask, array: np.ndarray) -> ir.Value:
    """The prepared mask of a constant."""
    added = array if mask.fill is None else np.where(array == mask.keep, 0.0, mask.fill)
    added = added.astype(np.float32)
    if mask.expand and isinstance(mask.rows, int):
        added = np.array(np.broadcast_to(added, (*added.shape[:-2], mask.rows, added.shape[-1])))
    fully_masked = added.max(axis=-1) < FLOOR
    if fully_masked.any():
        floored = np.maximum(added, np.float32(FLOOR))
        added = np.where(np.isneginf(added), added, floored) if mask.guarded or mask.fill is not None else floored
    elif mask.fill is None and not mask.expand:
        return mask.value
    assert isinstance(after.graph, ir.Graph)
    return rewriter.initializer(after.graph, f"{mask.value.name}_mask", ir.Tensor(added.astype(np.float32)))


def _computed(rewriter: Rewriter, after: ir.Node, mask: Mask, queries: ir.Value, query_axis: int) -> ir.Value:
    """The prepared mask of a value that is known at run time only."""
    graph, behind, value = after.graph, after, mask.value
    assert isinstance(graph, ir.Graph)
    like = ir.Value(name=mask.value.name, type=ir.TensorType(ir.DataType.FLOAT))

    def number(name: str, content: float) -> ir.Value:
        return rewriter.initializer(graph, f"{mask.value.name}_{name}", ir.Tensor(np.asarray(content, np.float32)))

    if mask.fill is not None:
        kept, filled = number("kept", 0.0), number("masked", max(mask.fill, FLOOR) if mask.floor else mask.fill)
        branches = [kept, filled] if mask.keep else [filled, kept]
        behind = rewriter.insert(behind, "Where", [value, *branches], like=like, suffix="where")
        value = behind.outputs[0]
    elif mask.floor:
        behind = rewriter.insert(behind, "Max", [value, number("floor", FLOOR)], like=like, suffix="max")
        value = behind.outputs[0]
    if mask.expand:
        behind, rows = _rows(rewriter, behind, mask, queries, query_axis)
        value = rewriter.insert(behind, "Expand", [value, rows], like=like, suffix="expand").outputs[0]
    return value


def _rows(
    rewriter: Rewriter, behind: ir.Node, mask: Mask, queries: ir.Value, query_axis: int
) -> tuple[ir.Node, ir.Value]:
    """The shape [1, 1, S, 1], and the node behind which it is known."""
    assert isinstance(behind.graph, ir.Graph)
    name = f"{mask.value.name}_rows"
    if isinstance(mask.rows, int):
        return behind, rewriter.initializer(
            behind.graph, name, ir.Tensor(np.asarray([1, 1, mask.rows, 1], dtype=np.int64))
        )
    like = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64))
    limits: dict[str, int | float | str | list[int]] = {"start": query_axis, "end": query_axis + 1}
    size = rewriter.insert(behind, "Shape", [queries], attributes=limits, like=like, suffix="shape")  # type: ignore[arg-type]
    two = rewriter.initializer(behind.graph, f"{name}_outer", ir.Tensor(np.ones(2, dtype=np.int64)))
    one = rewriter.initializer(behind.graph, f"{name}_inner", ir.Tensor(np.ones(1, dtype=np.int64)))
    shape = rewriter.insert(
        size, "Concat", [two, size.outputs[0], one], attributes={"axis": 0}, like=like, suffix="concat"
    )
    return shape, shape.outputs[0]
