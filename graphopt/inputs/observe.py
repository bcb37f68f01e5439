"""Statistics of many tensors inside a model over many inputs, in bounded memory.

Nothing is kept but what grows with the number of tensors: extremes, moments and one histogram a tensor. A
histogram starts with the first array and widens by whole powers of two, so that what was counted stays counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError
from graphopt.ir.propagate import propagate
from graphopt.ir.session import open_session

BINS = 4096
"""Bins of a histogram. A widening merges bins in pairs; between BINS / 2 and BINS of them span the data."""
OBSERVED_BYTES = 256 * 1024 * 1024
"""How many bytes of observed tensors one run may return; more tensors are observed in several passes."""


@dataclass
class Histogram:
    """Counts over [low, low + width * BINS), both ends on multiples of `width`; widens as values come.

    Attributes:
        low: lower end of the first bin.
        width: width of a bin, > 0; 0 before the first value.
        counts: int64 array of `BINS` counts.

    Example:
        >>> histogram = Histogram()
        >>> histogram.add(np.array([0.0, 1.0])); histogram.add(np.array([5.0]))
        >>> int(histogram.counts.sum())
        3
    """

    low: float = 0.0
    width: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    @property
    def edges(self) -> np.ndarray:
        """The `BINS + 1` bin edges, float64."""
        return self.low + self.width * np.arange(BINS + 1)

    def add(self, values: np.ndarray) -> None:
        """Count finite values of any shape."""
        if values.size == 0:
            return
        least, most = float(values.min()), float(values.max())
        if self.width == 0.0:
            span = max(most - least, max(abs(least), abs(most)) * 1e-6, 1e-30)
            self.width = float(2.0 ** np.ceil(np.log2(span / (BINS - 2))))
            self.low = float(np.floor(least / self.width)) * self.width
        while not (self.low <= least and most < self.low + self.width * BINS):
            self._widen(towards_low=least < self.low)
        index = np.clip(((values.ravel() - self.low) / self.width).astype(np.int64), 0, BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    def _widen(self, *, towards_low: bool) -> None:
        """Double the bin width, merging pairs, and put the freed half on the side where values are missing."""
        if towards_low:
            self.low -= self.width * BINS
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(BINS, np.int64)
        self.counts[BINS // 2 :] = merged if towards_low else 0
        self.counts[: BINS // 2] += 0 if towards_low else merged
        self.width *= 2

    def percentile(self, percent: float) -> tuple[float, float]:
        """The interval that leaves (100 - percent) / 2 percent of the values out on either side."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0, 0.0
        cumulated = np.cumsum(self.counts) / total
        tail = (100.0 - percent) / 200.0
        first = int(np.searchsorted(cumulated, tail, side="right"))
        last = int(np.searchsorted(cumulated, 1.0 - tail, side="left"))
        edges = self.edges
        return float(edges[min(first, BINS - 1)]), float(edges[min(last, BINS - 1) + 1])


@dataclass
class Statistics:
    """What is known of one tensor over all inputs seen so far. Non-finite values are counted and left out.

    Attributes:
        count: number of finite elements.
        minimum: smallest value, +inf before the first.
        maximum: largest value, -inf before the first.
        total: sum of the values.
        squares: sum of their squares.
        non_finite: number of NaN and infinite elements.
        histogram: distribution, or None where it was not asked for.
    """

    count: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")
    total: float = 0.0
    squares: float = 0.0
    non_finite: int = 0
    histogram: Histogram | None = None

    @property
    def mean(self) -> float:
        """Mean of the values, 0 where there are none."""
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the values, 0 where there are none."""
        return float(np.sqrt(max(self.squares / self.count - self.mean**2, 0.0))) if self.count else 0.0

    def add(self, array: np.ndarray) -> None:
        """Take in one array of any shape and float or integer dtype."""
        values = np.asarray(array, np.float32 if array.dtype.itemsize <= 4 else np.float64).ravel()
        if values.size and not np.isfinite([values.min(), values.max()]).all():
            finite = np.isfinite(values)
            self.non_finite += int(values.size - finite.sum())
            values = values[finite]
        if values.size == 0:
            return
        self.count += values.size
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        self.total += float(values.sum(dtype=np.float64))
        self.squares += float(np.vdot(values, values))
        if self.histogram is not None:
            self.histogram.add(values)


def observe(
    model: ir.Model,
    names: Sequence[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    histograms: bool = False,
    threads: int = 0,
) -> dict[str, Statistics]:
    """Run a model over inputs and gather statistics of tensors of its main graph.

    The tensors are divided into groups of at most `OBSERVED_BYTES` a run (measured on the first input), one pass
    over `feeds` each; memory does not grow with the number of inputs.

    Args:
        model: the model; it is not changed. onnxruntime runs it unoptimised, so that every tensor exists.
        names: inputs, or outputs of nodes of the main graph.
        feeds: inputs, iterable more than once.
        histograms: also gather a histogram a tensor, for percentiles and entropy.
        threads: intra-op threads, 0 for onnxruntime's default.

    Returns:
        Statistics by name, every name present.

    Raises:
        DataError: there is not a single set of inputs, or the inputs do not fit.
    """
    if any(not isinstance(one, Mapping) for one in itertools.islice(feeds, 1)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(
            "inputs to observe a model on must be dicts by input name",
            help="wrap what you have: graphopt.inputs.calibration.Calibration(model, [images])",
        )
    statistics = {name: Statistics(histogram=Histogram() if histograms else None) for name in names}
    inputs = {value.name for value in model.graph.inputs}
    _observe_inputs(statistics, [name for name in names if name in inputs], feeds)
    inside = [name for name in names if name not in inputs]
    while inside:
        inside = inside[_observe_some(model, inside, feeds, statistics, threads) :]
    return statistics


def _observe_inputs(
    statistics: Mapping[str, Statistics], names: Sequence[str], feeds: Iterable[Mapping[str, np.ndarray]]
) -> None:
    if not names:
        return
    seen = False
    for one in feeds:
        seen = True
        for name in names:
            statistics[name].add(one[name])
    if not seen:
        raise DataError("no inputs to observe the model on", help="pass at least one set of inputs")


def _observe_some(
    model: ir.Model,
    names: Sequence[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    statistics: Mapping[str, Statistics],
    threads: int,
) -> int:
    """Observe as many of the first `names` as fit into memory, over all inputs; how many they were."""
    chosen = list(names)
    first = True
    session = None
    for one in feeds:
        if first:
            chosen = _fitting(model, names, one)
            session = open_session(model, optimized=False, threads=threads, extra_outputs=chosen)
            first = False
        assert session is not None
        for name, array in zip(chosen, session.run(chosen, dict(one)), strict=True):
            statistics[name].add(np.asarray(array))
    if first:
        raise DataError("no inputs to observe the model on", help="pass at least one set of inputs")
    return len(chosen)


def _fitting(model: ir.Model, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[str]:
    """The longest start of `names` whose tensors fit into `OBSERVED_BYTES` for inputs of this size; at least one."""
    shapes = propagate(model, bound_sizes(model, feeds)).shapes
    by_name = {value.name: value for value in shapes}
    chosen: list[str] = []
    total = 0
    for name in names:
        value = by_name.get(name)
        shape = () if value is None else shapes[value]
        total += 4 * math.prod(shape)
        if chosen and total > OBSERVED_BYTES:
            break
        chosen.append(name)
    return chosen


def bound_sizes(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The number of elements of each symbolic dimension of the inputs, as these feeds have it."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        fed = feeds.get(value.name or "")
        if fed is not None and value.shape is not None:
            for dimension, size in zip(value.shape, fed.shape, strict=True):
                if not isinstance(dimension, int) and dimension.value:
                    sizes[dimension.value] = int(size)
    return sizes
