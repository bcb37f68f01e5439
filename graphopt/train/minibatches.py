"""Inputs of any size as batches to train on: shuffled within a window, streamed, the same order for the same seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.inputs.batches import SampleCounter, batch_dimensions
from graphopt.inputs.probes import model_inputs
from graphopt.ir.dimensions import dimension_name

_WINDOW_BATCHES = 32
"""Batches that are held in memory at once, to be shuffled."""
_WINDOW_BYTES = 2**27
"""Bytes from which fewer are held."""

Feeds = Mapping[str, np.ndarray]


class Minibatches:
    """Batches of one size from feeds of any size. Iterate it anew for another pass, in another order.

    Where the inputs do not all have a dynamic batch dimension on axis 0, feeds are given as they are. A pass ends with
    what is left, fewer samples than a batch, only where it had no whole batch.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }')
        >>> data = [{"x": np.zeros((3, 2), np.float32)}] * 3
        >>> [feeds["x"].shape for feeds in Minibatches(model, data, 4)]
        [(4, 2), (4, 2)]
    """

    def __init__(self, model: ir.Model, source: Iterable[Feeds], size: int, seed: int = 0) -> None:
        """Wrap re-iterable `source` for `model`; `size` samples make a batch."""
        names, inputs = batch_dimensions(model), model_inputs(model)
        self._free = bool(inputs) and all(
            value.shape is not None and len(value.shape) > 0 and dimension_name(value, 0) in names for value in inputs
        )
        self._counter = SampleCounter(model)
        self._source, self._size, self._seed = source, size, seed
        self._passes = 0

    def __iter__(self) -> Iterator[Feeds]:
        """One pass over the source, in an order of its own."""
        generator = np.random.default_rng((self._seed, self._passes))
        self._passes += 1
        waiting: list[Feeds] = []
        samples = given = held = 0
        for feeds in self._source:
            count = self._counter({name: array.shape for name, array in feeds.items()})
            if not self._free or any(len(array) != count for array in feeds.values()):
                yield feeds
                given += 1
                continue
            waiting.append(feeds)
            samples, held = samples + count, held + sum(array.nbytes for array in feeds.values())
            full = samples >= _WINDOW_BATCHES * self._size or held >= _WINDOW_BYTES
            if full and samples >= self._size and _alike(waiting):
                batches, rest = self._shuffled(waiting, generator)
                yield from batches
                given += len(batches)
                waiting, samples = [rest], len(next(iter(rest.values())))
                held = sum(array.nbytes for array in rest.values())
        if waiting and not _alike(waiting):
            yield from waiting
        elif waiting:
            batches, rest = self._shuffled(waiting, generator)
            yield from batches
            if not given and not batches:
                yield rest

    def _shuffled(self, waiting: list[Feeds], generator: np.random.Generator) -> tuple[list[Feeds], Feeds]:
        """Whole batches of what waits, in another order, and what is left."""
        joined = {name: np.concatenate([feeds[name] for feeds in waiting]) for name in waiting[0]}
        order = generator.permutation(len(next(iter(joined.values()))))
        whole = len(order) // self._size * self._size
        chosen = [order[start : start + self._size] for start in range(0, whole, self._size)]
        batches: list[Feeds] = [{name: array[rows] for name, array in joined.items()} for rows in chosen]
        return batches, {name: array[order[whole:]] for name, array in joined.items()}


def _alike(waiting: list[Feeds]) -> bool:
    """Whether feeds differ in axis 0 alone (sequences may have lengths of their own)."""
    return len({tuple((name, array.shape[1:]) for name, array in sorted(feeds.items())) for feeds in waiting}) == 1
