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
from graphopt.ir.linear_rows import LinearRows, apply_rows, linear_rows, split_rows
from graphopt.ir.pieces import open_piece
from graphopt.ir.session import Session
from graphopt.passes.reconstruct_sites import Path
from graphopt.passes.reconstruct_sweep import ROWS, ROWS_A_COLUMN, Site, Sweep

_CONJUGATE_STEPS = 3
_LENGTHS = (0.5, 1.0, 2.0)
"""Lengths of a step that are tried."""
_DIFFERENCE = 1e-2
"""Step of the numeric derivative of the activation, relative to the root mean square of its input."""
_ROWS = 1 << 18
"""How many rows of the second operator are looked at; whole batches, so that neighbourhoods stay whole."""
_GAIN = 1e-3
"""A step that lowers the error by a smaller share is the last one."""


@dataclass
class _Pair:
    """Two operators and the path between them, with their weights as they are now.

    Attributes:
        site: the second operator.
        first: the first one as a product of matrices.
        activation: the path between, as a session of one input and one output.
        weight, bias: of the first operator: float64 [G, M / G, K] and [M].
        next_weight, next_bias: of the second.
        batches: which batches are looked at.
        first_rows, next_rows: for each of them the rows on which the operators are solved.
        seen: moments of what the first operator reads, which stays the same.
    """

    site: Site
    first: LinearRows
    path: Path
    activation: Session | None
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
        return np.asarray(self.site.damaged.array(self.first.linear.data, batch), np.float32)

    def act(self, values: np.ndarray) -> np.ndarray:
        """f, of an array in the layout of the first operator's result."""
        if self.activation is None:
            return values
        return self.activation.run_feeds({self.path.start.name or "": values})[0]

    def slope(self, values: np.ndarray) -> np.ndarray:
        """f' by central differences."""
        step = np.float32(_DIFFERENCE * max(float(np.sqrt(np.mean(np.square(values)))), 1e-6))
        return (self.act(values + step) - self.act(values - step)) / (2 * step)

    def made(self, activations: np.ndarray) -> np.ndarray:
        """What the second operator makes of the activations: [R, M]."""
        return apply_rows(self.site.rows.patches(activations), self.next_weight, self.next_bias)

    def missing(self, batch: int, made: np.ndarray) -> np.ndarray:
        """What is missing behind the second operator, in units of its tail: [R, M]."""
        return (self.site.targets(batch, made) - made) * self._scale

    @property
    def _scale(self) -> np.ndarray:
        return self.site.tail.scale.astype(np.float32)

    def forward(self, change: np.ndarray) -> np.ndarray:
        """s W2 · change, for a change of the activations: [R, M]."""
        return apply_rows(self.site.rows.patches(change), self.next_weight) * self._scale

    def backward(self, rows: np.ndarray, like: np.ndarray) -> np.ndarray:
        """The adjoint of `forward`."""
        groups = split_rows(rows * self._scale, self.site.rows.groups)
        return self.site.rows.adjoint(groups @ self.next_weight.astype(np.float32), like)


def refit(site: Site, path: Path, sweep: Sweep) -> None:
    """Solve the first operator of `path` and that of `site` again, a few times; what does not help is not kept."""
    first = linear_rows(path.producer)
    rows = site.rows.count(site.data(0))
    batches = range(max(1, min(site.damaged.batches, _ROWS // max(rows, 1))))
    session = open_piece(sweep.model, path.nodes, [path.start], [path.end], threads=0) if path.nodes else None
    site.chosen = [None] * site.damaged.batches
    pair = _Pair(
        site,
        first,
        path,
        session,
        first.weight(),
        path.producer.bias(),
        site.rows.weight(),
        site.linear.bias(),
        batches,
        *_chosen_rows(site, first, batches),
    )
    moved = False
    for _ in range(sweep.effort.refits):
        gain = _step(pair, sweep)
        moved |= gain > 0
        if gain < _GAIN:
            break
    if moved:
        sweep.store(path.producer, first.as_weight(pair.weight), pair.bias)
        sweep.store(site.linear, site.rows.as_weight(pair.next_weight), pair.next_bias)
        sweep.damaged.redo(_nodes(path))


def _chosen_rows(site: Site, first: LinearRows, batches: range) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of the first and of the second operator, the same share of each batch."""
    generator = np.random.default_rng(0)
    operators = ((first, first.linear.data), (site.rows, site.linear.data))
    result: list[list[np.ndarray]] = []
    for rows, value in operators:
        counts = [rows.count(site.damaged.array(value, batch)) for batch in batches]
        share = min(1.0, (ROWS_A_COLUMN * rows.columns + ROWS) / max(sum(counts), 1))
        result.append([generator.permutation(count)[: max(1, int(count * share))] for count in counts])
    return result[0], result[1]


def _nodes(path: Path) -> Iterator[ir.Node]:
    yield path.producer.node
    if path.producer.bias_node is not None:
        yield path.producer.bias_node
    yield from path.nodes


def _step(pair: _Pair, sweep: Sweep) -> float:
    """One step of Gauss-Newton; by which share it lowered the error, 0 where it did not."""
    first = pair.first
    moments = SecondMoments.empty(first.groups, first.columns, first.linear.out_channels // first.groups)
    before = 0.0
    for batch, rows in zip(pair.batches, pair.first_rows, strict=True):
        patches = first.patches(pair.data(batch))
        values = _result(pair, patches, pair.weight, pair.bias, batch)
        wanted, error = _wanted_change(pair, values, batch)
        before += error
        moments.add(patches[:, rows], first.rows(wanted)[rows], inner=pair.seen is None)
    moments = moments if pair.seen is None else pair.seen.with_targets_of(moments)
    pair.seen = moments
    change, offset = moments.solve(np.zeros_like(pair.weight), sweep.effort.ridge)
    errors = np.zeros(len(_LENGTHS))
    for batch in pair.batches:
        patches = pair.first.patches(pair.data(batch))
        values = _result(pair, patches, pair.weight, pair.bias, batch)
        direction = _result(pair, patches, change, offset, batch)
        for index, length in enumerate(_LENGTHS):
            made = pair.made(pair.act(values + np.float32(length) * direction))
            errors[index] += float(np.square(pair.missing(batch, made)).sum())
    best = int(np.argmin(errors))
    if not errors[best] < before:
        return 0.0
    pair.weight = pair.weight + _LENGTHS[best] * change
    pair.bias = pair.bias + _LENGTHS[best] * offset
    _solve_second(pair, sweep)
    return 1.0 - errors[best] / before


def _wanted_change(pair: _Pair, values: np.ndarray, batch: int) -> tuple[np.ndarray, float]:
    """How the first operator's result should change, in its layout, and the square error as it is."""
    made = pair.made(pair.act(values))
    missing = pair.missing(batch, made)
    slope = pair.slope(values)
    change = np.zeros_like(values)
    residual = pair.backward(missing, values) * slope
    direction, power = residual.copy(), float(np.square(residual).sum())
    for _ in range(_CONJUGATE_STEPS):
        if not power > 0:
            break
        image = pair.forward(direction * slope)
        length = power / max(float(np.square(image).sum()), 1e-30)
        change += np.float32(length) * direction
        residual -= np.float32(length) * pair.backward(image, values) * slope
        new_power = float(np.square(residual).sum())
        direction = residual + np.float32(new_power / power) * direction
        power = new_power
    return change, float(np.square(missing).sum())


def _solve_second(pair: _Pair, sweep: Sweep) -> None:
    """The second operator anew, on what the first one makes now."""
    rows = pair.site.rows
    moments = SecondMoments.empty(rows.groups, rows.columns, pair.site.linear.out_channels // rows.groups)
    for batch, chosen in zip(pair.batches, pair.next_rows, strict=True):
        patches = pair.first.patches(pair.data(batch))
        activations = pair.act(_result(pair, patches, pair.weight, pair.bias, batch))
        now = rows.patches(activations, chosen)
        made = apply_rows(now, pair.next_weight, pair.next_bias)
        moments.add(now, pair.site.targets(batch, made, chosen))
    pair.next_weight, pair.next_bias = moments.solve(pair.next_weight, sweep.effort.ridge)


def _result(pair: _Pair, patches: np.ndarray, weight: np.ndarray, bias: np.ndarray, batch: int) -> np.ndarray:
    """The first operator's result in its own layout."""
    like = pair.site.damaged.array(pair.site.linear.data, batch)
    return pair.first.result(apply_rows(patches, weight, bias), like)
