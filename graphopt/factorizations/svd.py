"""Truncated SVD: W = U V of a product or a 1 x 1 convolution, M x K by way of r channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.factorizations.contract import (
    Factor,
    Factorization,
    FactorShape,
    Fit,
    Layer,
    Rank,
    as_factor,
    by_group,
    pointwise,
    walking_axes,
)
from graphopt.factorizations.metric import Metric


@dataclass(frozen=True)
class Svd(Factorization):
    """The r directions of the outputs that hold most of their power, and the outputs as they depend on these.

        y = W x  ~  U_r (U_r^T W) x,      U_r the leading eigenvectors of W C W^T

    With C the second moments of x this is the minimum of E |y - y_r|^2 over all matrices of rank r: (W - W_r) C^{1/2}
    is smallest (Eckart and Young 1936, in the metric of C); with C = I it is the truncated SVD of W. Each group of a
    grouped convolution is taken apart by itself. ONNX: Gemm 13, MatMul 13, Conv 11, ConvTranspose 11.

    Example:
        >>> weight = np.outer([1.0, 2.0, 3.0], [1.0, 0.0, -1.0, 2.0])
        >>> fit = Svd().fit(Layer(weight), Metric.identity(1, 4))
        >>> round(fit.error((1,)), 12), [one.weight.shape for one in fit.factors((1,))]
        (0.0, [(1, 4), (3, 1)])
    """

    name: ClassVar[str] = "svd"

    def refusal(self, layer: Layer) -> str | None:
        """Layers with a kernel have better forms."""
        if walking_axes(layer):
            return "its kernel is larger than 1"
        return None if min(layer.matrices.shape[1:]) > 1 else "one group has one input or output: nothing to factorise"

    def full(self, layer: Layer) -> Rank:
        """min(M / G, K)."""
        return (min(layer.matrices.shape[1:]),)

    def shapes(self, layer: Layer, rank: Rank) -> tuple[FactorShape, ...]:
        """r filters a group, then a 1 x 1 convolution."""
        inner = layer.groups * rank[0]
        first = FactorShape(inner, layer.inputs, layer.groups, layer.kernel, (True,) * len(layer.kernel))
        return first, pointwise(layer, layer.outputs, inner)

    def fit(self, layer: Layer, metric: Metric) -> Fit:
        """One eigendecomposition of [M, M], or one SVD of the weight where the metric is the identity."""
        return _OutputDirections(self, layer, metric)

    def spectra(self, layer: Layer) -> tuple[tuple[np.ndarray, tuple[int, int]], ...]:
        """Singular values of the weight as [M / G, K]."""
        return (largest_spectrum([matrix for _, matrix in by_group(layer)]),)


class _OutputDirections(Fit):
    """Directions of the outputs of each group, by falling power."""

    def __init__(self, form: Factorization, layer: Layer, metric: Metric) -> None:
        super().__init__(form, layer, metric)
        found = [output_directions(matrix, metric, group) for group, matrix in by_group(layer)]
        self._directions = np.stack([directions for directions, _ in found])
        self._left = self.power - np.cumsum(sum(powers for _, powers in found))

    def residual(self, rank: Rank) -> float:
        return float(self._left[rank[0] - 1]) if rank != self.form.full(self.layer) else 0.0

    def factors(self, rank: Rank) -> tuple[Factor, ...]:
        kept = self._directions[:, :, : rank[0]]
        first, last = self.form.shapes(self.layer, rank)
        return as_factor(first, kept.transpose(0, 2, 1) @ self.layer.matrices), as_factor(last, kept)


def output_directions(matrix: np.ndarray, metric: Metric, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal directions [M, min(M, K)] of the outputs of a matrix [M, K], and their power, falling."""
    most = min(matrix.shape)
    if metric.matrices is None:
        directions, values, _ = np.linalg.svd(matrix, full_matrices=False)
        return directions, np.square(values)
    powers, directions = np.linalg.eigh(metric.applied(group, matrix) @ matrix.T)
    return directions[:, ::-1][:, :most], np.maximum(powers[::-1][:most], 0.0)


def largest_spectrum(matrices: list[np.ndarray]) -> tuple[np.ndarray, tuple[int, int]]:
    """Singular values, falling, and shape: of the matrix with the largest ones."""
    values = [np.linalg.svd(matrix, compute_uv=False) for matrix in matrices]
    index = int(np.argmax([float(one[0]) for one in values]))
    rows, columns = matrices[index].shape
    return values[index], (rows, columns)
