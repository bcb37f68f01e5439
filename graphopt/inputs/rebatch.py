"""The same samples in batches of a convenient size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError
from graphopt.inputs.batches import batch_dimensions
from graphopt.inputs.probes import model_inputs
from graphopt.ir.dimensions import dimension_name
from graphopt.ir.session import open_session

_ELEMENTS = 64 * 3 * 64 * 64
"""Input elements in a batch, within `_SMALLEST` and `_LARGEST` samples."""
_SMALLEST, _LARGEST = 4, 64

Feeds = Mapping[str, np.ndarray]


def rebatched(model: ir.Model, batches: Iterable[Feeds]) -> list[Feeds]:
    """All samples of `batches`, in batches that are neither single samples nor too large to work on.

    Where the number of samples is fixed, or the model runs with the given one only, the batches stay as they are.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }')
        >>> [feeds["x"].shape for feeds in rebatched(model, [{"x": np.zeros((1, 2), np.float32)}] * 70)]
        [(64, 2), (6, 2)]
    """
    names = batch_dimensions(model)
    inputs = model_inputs(model)
    taken = {value.name for value in inputs}
    given = [{name: array for name, array in feeds.items() if name in taken} for feeds in batches]
    free = bool(inputs) and all(
        value.shape is not None and len(value.shape) > 0 and dimension_name(value, 0) in names for value in inputs
    )
    if not free or not given or not all(_one_size(feeds) for feeds in given):
        return list(given)
    shapes = {name: array.shape[1:] for name, array in given[0].items()}
    if any({name: array.shape[1:] for name, array in feeds.items()} != shapes for feeds in given):
        return list(given)
    elements = max(sum(int(np.prod(shape, dtype=int)) for shape in shapes.values()), 1)
    size = int(np.clip(_ELEMENTS // elements, _SMALLEST, _LARGEST))
    regrouped = list(_regrouped(given, size))
    return regrouped if _runs(model, regrouped[0]) else list(given)


def _one_size(feeds: Feeds) -> bool:
    return len({len(array) for array in feeds.values()}) == 1


def _regrouped(given: list[dict[str, np.ndarray]], size: int) -> Iterator[Feeds]:
    waiting: dict[str, list[np.ndarray]] = {name: [] for name in given[0]}
    count = 0
    for feeds in given:
        for name, array in feeds.items():
            waiting[name].append(array)
        count += len(next(iter(feeds.values())))
        if count >= size:
            joined = {name: np.concatenate(arrays) for name, arrays in waiting.items()}
            whole = count - count % size
            for start in range(0, whole, size):
                yield {name: array[start : start + size] for name, array in joined.items()}
            waiting = {name: [array[whole:]] for name, array in joined.items()}
            count -= whole
    if count:
        yield {name: np.concatenate(arrays) for name, arrays in waiting.items()}


def _runs(model: ir.Model, feeds: Feeds) -> bool:
    try:
        open_session(model, optimized=False, threads=0).run_feeds(feeds)
    except DataError:
        return False
    return True
