"""Rounding of weights with error feedback: each input makes up for what rounding did to those before it.

    min over q:  E |x (s (q - z)) - x w|^2 = sum over outputs of (s (q - z) - w)^T E[x x^T] (s (q - z) - w)

The scales are found first, by least squares in which each input counts as much as it varies; then
`graphopt.passes.reconstruct_rounding` rounds (GPTQ, Frantar et al. 2022, arXiv 2210.17323). There is no bias that
could take up the mean, so the moments are those about 0. The inputs are those of the graph as rounded so far, one
operator after the other, and the moments of one value are in memory at a time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.inputs.moments import SecondMoments
from graphopt.ir.pieces import Pieces
from graphopt.ir.rewrite import DeclinedError
from graphopt.passes.contract import Context
from graphopt.passes.quantize_blocks import Blocks, Grid, block_scales, chunks
from graphopt.passes.reconstruct_rounding import round_with_feedback

_DAMPING = 0.01
"""Share of the mean second moment that each input counts in addition, as published."""
_CHUNK = 2**21
"""Elements of a weight that are rounded at a time, in float64."""


class Feedback:
    """Runs a graph piece by piece while its weights are rounded, in graph order.

    Args:
        model: the graph that is being rewritten.
        context: gives the inputs.

    Raises:
        DataError: there are no inputs for the model.
    """

    def __init__(self, model: ir.Model, context: Context) -> None:
        found = context.inputs(model)
        context.note("quantize", f"rounding with error feedback on {found.source} inputs: {found.why}", "model")
        self._context = context
        self._pieces = Pieces(model, found.batches, threads=context.threads)
        self._known: tuple[ir.Value, np.ndarray] | None = None

    def rounded(self, node: ir.Node, weight: np.ndarray, grid: Grid, scale_type: np.dtype) -> Blocks:
        """The integers of the weight [K, N] of an operator, no worse than the nearest ones for any output."""
        data = node.inputs[0]
        assert data is not None
        metric = self._metric(data, len(weight))
        if metric is None:
            self._context.missed("round with error feedback", "its inputs are not finite", node)
            return block_scales(weight, grid, scale_type)
        found = block_scales(weight, grid, scale_type, np.diagonal(metric))
        low, high = grid.limits
        for columns in chunks(*weight.shape, elements=_CHUNK):
            wanted = weight[:, columns].T.astype(np.float64)[None]
            scale, zero = (
                np.repeat(one[:, columns].astype(np.float64), found.block_size, 0)[: len(weight)].T[None]
                for one in (found.scale, found.zero_point)
            )
            nearest = found.integers[:, columns].T[None] - zero
            try:
                fed_back = round_with_feedback(wanted, metric[None], scale, (low - zero, high - zero))
            except DeclinedError as refusal:
                self._context.missed("round with error feedback", refusal.why, node)
                return found
            errors = [_error(one * scale - wanted, metric) for one in (nearest, fed_back)]
            chosen = np.where((errors[1] < errors[0])[None, :, None], fed_back, nearest)
            found.integers[:, columns] = (chosen + zero)[0].T
        return found

    def _metric(self, data: ir.Value, columns: int) -> np.ndarray | None:
        """E[x x^T] of a value with damping, float64 [K, K]; None where it is not finite."""
        if self._known is not None and self._known[0] is data:
            return self._known[1]
        self._known = None
        moments = SecondMoments.empty(1, columns, 0)
        self._pieces.compute([data])
        for batch in range(self._pieces.batches):
            rows = self._pieces.array(data, batch).reshape(1, -1, columns).astype(np.float32)
            moments.add(rows, np.zeros((rows.shape[1], 0), np.float32))
        self._pieces.release([data])
        if not moments.is_usable:
            return None
        metric = moments.inner[0] / moments.count
        level = float(np.mean(np.diagonal(metric)))
        metric[np.diag_indices(columns)] += _DAMPING * level if level > 0 else 1.0
        self._known = (data, metric)
        return metric


def _error(change: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """Squared error of each output for a change [1, N, K] of its weight."""
    return ((change[0] @ metric) * change[0]).sum(axis=1)
