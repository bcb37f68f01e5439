"""What is lost of a network when a whole block goes: how much of the variance behind it was its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir.pieces import Pieces
from graphopt.ir.regions import Region


def block_losses(
    model: ir.Model,
    regions: Sequence[Region],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    threads: int = 0,
) -> dict[str, float]:
    """The share of the variance of what a block makes that what stands for it once it is gone does not have.

    With y what is replaced and x what takes its place, var(y - x) / var(y), variances over the samples of each element,
    summed: means go into biases behind. It is the coin of `graphopt.search.collaborative_surrogates.SecondOrder`: a
    block without channels would lose as much.

    Args:
        model: canonical.
        regions: of it, that can be replaced.
        batches: inputs; the first axis of a value counts as samples.
        threads: intra-op threads of onnxruntime.

    Returns:
        By name of the region; 1 where variances are not finite or there is nothing to compare with.

    Example:
        >>> import graphopt
        >>> from graphopt.ir.regions import regions
        >>> text = ('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,2] z)
        ...     <float[2,2] w = {0, 0, 0, 0}> { h = MatMul (x, w)  r = Relu (h)  y = Add (x, r)  z = Relu (y) }''')
        >>> model = graphopt.load(ir.from_onnx_text(text))
        >>> branch = [region for region in regions(model) if region.replaceable]
        >>> feeds = [{"x": np.array([[1, 2], [3, 5]], np.float32)}]
        >>> list(block_losses(model, branch, feeds).values())
        [0.0]
    """
    pieces = Pieces(model, batches, threads=threads)
    values = {
        value.name: value for value in (*model.graph.inputs, *(out for node in model.graph for out in node.outputs))
    }
    watched = [[values[region.replaced], values[region.replacement or ""]] for region in regions]
    pieces.hold(value for pair in watched for value in pair)
    found: dict[str, float] = {}
    for region, (made, left) in zip(regions, watched, strict=True):
        pieces.compute([made, left])
        change, whole = _Variance(), _Variance()
        for batch in range(pieces.batches):
            of_block = np.asarray(pieces.array(made, batch), np.float64)
            change.add(of_block - np.asarray(pieces.array(left, batch), np.float64))
            whole.add(of_block)
        share = change.total / whole.total if whole.total > 0 else np.nan
        found[region.name] = float(share) if np.isfinite(share) else 1.0
        pieces.release((made, left) * 2)  # held once from the beginning and once by `compute`
    return found


class _Variance:
    """Variance over samples, summed over all other axes, of arrays that come one after the other."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, np.zeros(()), 0.0

    def add(self, array: np.ndarray) -> None:
        """Take samples in, along the first axis; those of another shape are left out."""
        if array.ndim and (not self._count or array.shape[1:] == self._sum.shape):
            self._count += len(array)
            self._sum = self._sum + array.sum(axis=0)
            self._squares += float(np.square(array).sum())

    @property
    def total(self) -> float:
        """Of all that was taken in."""
        if not self._count:
            return 0.0
        return max(self._squares / self._count - float(np.square(self._sum / self._count).sum()), 0.0)
