"""The activations on which the units of a group live, seen over many inputs in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.criteria.members import Membership
from graphopt.errors import DataError
from graphopt.inputs.observe import OBSERVED_BYTES, bound_sizes
from graphopt.ir.channels import ChannelGroup
from graphopt.ir.propagate import propagate
from graphopt.ir.session import open_session

Feeds = Iterable[Mapping[str, np.ndarray]]
"""Batches of inputs by name, iterable more than once."""


def living_values(membership: Membership, group: ChannelGroup, model: ir.Model) -> list[ir.Value]:
    """The values of the main graph on which the channels of a group are looked at, in the order of the graph.

    They are what the consumers of the channels read. Where no weight reads them, the values behind which they end;
    where there are none of these either, every value that carries them; none where they live in subgraphs alone.
    """
    ownership = membership.ownership(group)
    inside = {value for node in model.graph for value in node.outputs}
    carrying = [value for value in ownership.values if value in inside and not membership.is_weight(value)]
    readers = membership.readers(group)
    read = [value for value in carrying if any(use.node in readers for use in value.uses())]
    if not read:
        read = [value for value in carrying if not any(_carries(use.node, ownership.axes) for use in value.uses())]
    chosen = set(read or carrying)
    return [value for node in model.graph for value in node.outputs if value in chosen]


def stream(
    model: ir.Model,
    values: Sequence[ir.Value],
    feeds: Feeds,
    see: Callable[[ir.Value, np.ndarray], None],
    threads: int,
) -> None:
    """Show `see` each of some values of the main graph for each batch.

    The values are divided so that one run returns at most `OBSERVED_BYTES` (measured on the first batch); there is one
    pass over `feeds` for each part, so that memory does not grow with their number.

    Raises:
        DataError: there is not a single batch, a batch does not fit the model, or a value is NaN or infinite.
    """
    waiting = list(dict.fromkeys(values))
    while waiting:
        chosen: list[ir.Value] = []
        session = None
        for batch in feeds:
            if session is None:
                chosen = _fitting(model, waiting, batch)
                outputs = [value.name or "" for value in chosen]
                session = open_session(model, optimized=False, threads=threads, extra_outputs=outputs)
            returned = dict(
                zip((output.name for output in session.get_outputs()), session.run_feeds(batch), strict=True)
            )
            for value in chosen:
                array = returned[value.name or ""]
                if not np.isfinite(array).all():
                    raise DataError(
                        "an activation is NaN or infinite on these inputs",
                        where=value.name,
                        help="pass inputs of the range that the model was trained on",
                    )
                see(value, array if array.dtype.kind == "f" else array.astype(np.float32))
        if session is None:
            raise DataError("no inputs to observe the model on", help="pass at least one set of inputs")
        waiting = waiting[len(chosen) :]


def by_channel(array: np.ndarray, axis: int) -> np.ndarray:
    """An array as [coordinates of an axis, everything else]."""
    front = np.moveaxis(array, axis, 0)
    return front.reshape(front.shape[0], -1)


def differing_shapes(value: ir.Value) -> DataError:
    """The error to raise where activations of several batches do not fit together."""
    return DataError(
        "an activation has another shape from one batch to the next, so that channels cannot be averaged",
        where=value.name,
        help="pass inputs of one size",
    )


def _fitting(model: ir.Model, values: Sequence[ir.Value], batch: Mapping[str, np.ndarray]) -> list[ir.Value]:
    """The longest start of `values` that fits into `OBSERVED_BYTES` for inputs of this size; at least one."""
    try:
        shapes = propagate(model, bound_sizes(model, batch)).shapes
    except (ValueError, KeyError):
        shapes = {}  # inputs of another rank: onnxruntime says so in better words
    chosen: list[ir.Value] = []
    total = 0
    for value in values:
        total += 4 * math.prod(shapes.get(value, ()))
        if chosen and total > OBSERVED_BYTES:
            break
        chosen.append(value)
    return chosen


def _carries(node: ir.Node, axes: Callable[[ir.Value | None], list[int]]) -> bool:
    return any(axes(value) for value in node.outputs)
