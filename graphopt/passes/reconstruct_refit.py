"""A second look at a pair of linear operators with only elementwise operators between them: the first is solved again.

The kept channels of a pruned layer need not stay what they were: they may become whatever serves the next operator
best. With y = W1 x + b1, h = f(y), z = s (W2 * h + c) + ..., one step of Gauss-Newton is

    d   minimises |z* - z - s W2 * (f'(y) d)|^2       over the activations, by a few steps of conjugate gradients
    W1  moves by the least-squares fit of d on x      a closed form on second moments, as everywhere
    W2  is solved again                               on what h has become

with the length of the step searched and the step taken only where it lowers the error. No gradient of the network is
needed, only the two operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.inputs.moments import SecondMoments
from graphopt.ir.linear import Linear
from graphopt.ir.linear_kernel import LinearKernel
from graphopt.ir.linear_rows import LinearRows, apply_rows, linear_rows
from graphopt.ir.pieces import open_piece
from graphopt.ir.rewrite import DeclinedError
from graphopt.ir.session import Session
from graphopt.passes.reconstruct_sites import Path
from graphopt.passes.reconstruct_sweep import ROWS, Site, Sweep

_CONJUGATE_STEPS = 3
_LENGTHS = (0.5, 1.0, 2.0)
"""Lengths of a step that are tried."""
_DIFFERENCE = 1e-2
"""Step of the numeric derivative of the activation, relative to the root mean square of its input."""
_ROWS_A_COLUMN = 64
"""Rows on which an operator is solved on the way, for each input of an output."""
_ROWS = 1 << 18
"""How many rows of the second operator are looked at; whole batches, so that neighbourhoods stay whole."""
_GAIN = 1e-3
"""A step that lowers the error by a smaller share is the last one."""


@dataclass
class _Pair:
    """Two operators and the path between them, with their weights as they are now.

    Attributes:
        site: the second operator.
        path: the way from the first.
        activation: that way as a session of one input and one output, None where there is nothing on it.
        first, second: the operators as functions of their weight.
        weight, bias: of the first operator: float64 [M, C / G, *kernel] and [M].
        next_weight, next_bias: of the second.
        batches: which batches are looked at.
        first_rows, next_rows: for each of them the rows on which the operators are solved.
        seen: moments of what the first operator reads, which stays the same.
    """

    site: Site
    path: Path
    activation: Session | None
    first: LinearKernel
    second: LinearKernel
    weight: np.ndarray
    bias: np.ndarray
    next_weight: np.ndarray
    next_bias: np.ndarray
    batches: range
    first_rows: list[np.ndarray]
    next_rows: list[np.ndarray]
    seen: SecondMoments | None = None

    def data(self, batch: int) -> np.ndarray:
        """What the first operator reads."""
        return np.asarray(self.site.damaged.array(self.path.producer.data, batch), np.float32)

    def values(self, batch: int) -> np.ndarray:
        """What the first operator makes, in its layout."""
        return self.first.forward(self.data(batch), self.weight) + _along(self.path.producer, self.bias)

    def act(self, values: np.ndarray) -> np.ndarray:
        """f, of an array in the layout of the first operator's result: float32 of the same shape.

        Raises:
            DeclinedError: what lies between the operators repeats elements: a constant with more positions is added.
        """
        if self.activation is None:
            return values
        given = values.astype(self.path.producer.dtype.numpy())
        made = self.activation.run_feeds({self.path.start.name or "": given})[0]
        if made.shape != values.shape:
            raise DeclinedError(f"what it makes is spread from {values.shape} to {made.shape}", self.path.producer.node)
        return np.asarray(made, np.float32)

    def slope(self, values: np.ndarray) -> np.ndarray:
        """f' by central differences."""
        step = np.float32(_DIFFERENCE * max(float(np.sqrt(np.mean(np.square(values)))), 1e-6))
        return (self.act(values + step) - self.act(values - step)) / (2 * step)

    def missing(self, batch: int, activations: np.ndarray) -> np.ndarray:
        """What is missing behind the second operator, in units of its tail, in the layout of its result."""
        made = self.second.forward(activations, self.next_weight) + _along(self.site.linear, self.next_bias)
        rows = self.site.rows.rows(made)
        lacking = (self.site.targets(batch, rows) - rows) * self.site.tail.scale.astype(np.float32)
        return self.site.rows.result(lacking, made)

    def forward(self, change: np.ndarray) -> np.ndarray:
        """s W2 · change, for a change of the activations, in the layout of the second operator's result."""
        return self.second.forward(change, self.next_weight) * _along(self.site.linear, self.site.tail.scale)

    def backward(self, lacking: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The adjoint of `forward`."""
        scaled = lacking * _along(self.site.linear, self.site.tail.scale)
        return self.second.backward(scaled, self.next_weight, shape)


def refit(site: Site, path: Path, sweep: Sweep) -> None:
    """Solve the first operator of `path` and that of `site` again, a few times; what does not help is not kept."""
    first = LinearKernel(linear_rows(path.producer))
    rows = site.rows.count(site.data(0))
    batches = range(max(1, min(site.damaged.batches, _ROWS // max(rows, 1))))
    site.chosen = [None] * site.damaged.batches
    between = None
    if path.nodes:
        types = {path.start: path.producer.dtype.numpy()}
        between = open_piece(sweep.model, path.nodes, [path.start], [path.end], types=types, threads=0)
    pair = _Pair(
        site,
        path,
        between,
        first,
        LinearKernel(site.rows),
        path.producer.weight(),
        path.producer.bias(),
        site.linear.weight(),
        site.linear.bias(),
        batches,
        *_chosen_rows(site, first.rows, batches),
    )
    moved = False
    for _ in range(sweep.effort.refits):
        gain = _step(pair)
        moved |= gain > 0
        if gain < _GAIN:
            break
    if moved:
        sweep.store(path.producer, pair.weight, pair.bias)
        sweep.store(site.linear, pair.next_weight, pair.next_bias)
        sweep.damaged.redo(_nodes(path))


def _along(linear: Linear, vector: np.ndarray) -> np.ndarray:
    """A number a channel [M], so that it broadcasts against the operator's result: float32."""
    axes = len(linear.kernel) + 2 if linear.kernel else (linear.rank or 2)
    behind = axes - 1 - linear.out_axis if linear.out_axis >= 0 else -linear.out_axis - 1
    return vector.astype(np.float32).reshape(-1, *[1] * behind)


def _chosen_rows(site: Site, first: LinearRows, batches: range) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of the first and of the second operator, the same share of each batch."""
    generator = np.random.default_rng(0)
    operators = ((first, first.linear.data), (site.rows, site.linear.data))
    result: list[list[np.ndarray]] = []
    for rows, value in operators:
        counts = [rows.count(site.damaged.array(value, batch)) for batch in batches]
        share = min(1.0, (_ROWS_A_COLUMN * rows.columns + ROWS) / max(sum(counts), 1))
        result.append([generator.permutation(count)[: max(1, int(count * share))] for count in counts])
    return result[0], result[1]


def _nodes(path: Path) -> Iterator[ir.Node]:
    yield path.producer.node
    if path.producer.bias_node is not None:
        yield path.producer.bias_node
    yield from path.nodes


def _step(pair: _Pair) -> float:
    """One step of Gauss-Newton; by which share it lowered the error, 0 where it did not."""
    rows = pair.first.rows
    moments = SecondMoments.empty(rows.groups, rows.columns, rows.linear.out_channels // rows.groups)
    before = 0.0
    for batch, chosen in zip(pair.batches, pair.first_rows, strict=True):
        wanted, error = _wanted_change(pair, pair.values(batch), batch)
        before += error
        moments.add(rows.patches(pair.data(batch), chosen), rows.rows(wanted)[chosen], inner=pair.seen is None)
    moments = moments if pair.seen is None else pair.seen.with_targets_of(moments)
    pair.seen = moments
    change, offset = moments.solve(np.zeros((rows.groups, *moments.cross.shape[1:])), pair.site.ridge)
    change = rows.as_weight(change)
    errors = np.zeros(len(_LENGTHS))
    for batch in pair.batches:
        values = pair.values(batch)
        direction = pair.first.forward(pair.data(batch), change) + _along(rows.linear, offset)
        for index, length in enumerate(_LENGTHS):
            lacking = pair.missing(batch, pair.act(values + np.float32(length) * direction))
            errors[index] += float(np.square(lacking).sum())
    best = int(np.argmin(errors))
    if not errors[best] < before:
        return 0.0
    pair.weight = pair.weight + _LENGTHS[best] * change
    pair.bias = pair.bias + _LENGTHS[best] * offset
    _solve_second(pair)
    return 1.0 - errors[best] / before


def _wanted_change(pair: _Pair, values: np.ndarray, batch: int) -> tuple[np.ndarray, float]:
    """How the first operator's result should change, in its layout, and the square error as it is."""
    missing = pair.missing(batch, pair.act(values))
    slope = pair.slope(values)
    change = np.zeros_like(values)
    residual = pair.backward(missing, values.shape) * slope
    direction, power = residual.copy(), float(np.square(residual).sum())
    for step in range(_CONJUGATE_STEPS):
        if not power > 0:
            break
        image = pair.forward(direction * slope)
        length = power / max(float(np.square(image).sum()), 1e-30)
        change += np.float32(length) * direction
        if step == _CONJUGATE_STEPS - 1:
            break
        residual -= np.float32(length) * pair.backward(image, values.shape) * slope
        new_power = float(np.square(residual).sum())
        direction = residual + np.float32(new_power / power) * direction
        power = new_power
    return change, float(np.square(missing).sum())


def _solve_second(pair: _Pair) -> None:
    """The second operator anew, on what the first one makes now."""
    rows = pair.site.rows
    moments = SecondMoments.empty(rows.groups, rows.columns, pair.site.linear.out_channels // rows.groups)
    prior = rows.by_group(pair.next_weight)
    for batch, chosen in zip(pair.batches, pair.next_rows, strict=True):
        now = rows.patches(pair.act(pair.values(batch)), chosen)
        moments.add(now, pair.site.targets(batch, apply_rows(now, prior, pair.next_bias), chosen))
    solved, pair.next_bias = moments.solve(prior, pair.site.ridge)
    pair.next_weight = rows.as_weight(solved)
