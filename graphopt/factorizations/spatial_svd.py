"""Spatial SVD: a k x k convolution as k x 1, then 1 x k."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.linalg

from graphopt.factorizations.contract import (
    Factor,
    Factorization,
    FactorShape,
    Fit,
    Layer,
    Rank,
    as_factor,
    by_group,
    walking_axes,
)
from graphopt.factorizations.metric import Metric, Regression
from graphopt.factorizations.svd import largest_spectrum


@dataclass(frozen=True)
class SpatialSvd(Factorization):
    """Filters that walk along one axis, then filters that walk along the others.

        W[m, c, i, j]  ~  sum over s < r of B[m, s, j] A[s, c, i]

    (Jaderberg, Vedaldi, Zisserman 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions"). A comes
    from the SVD of W as [C i, M j], with what is known of the inputs split into a part for (c, i) and one for j; given
    A, B is the exact minimum in the whole metric, for all r from one Cholesky factor (`Regression`). The first layer
    has stride, padding and dilation of its axis, the second those of the others. Each group is taken apart by itself:
    of a depthwise k x k convolution r = 1 is a depthwise k x 1 and a depthwise 1 x k.

    Example:
        >>> layer = Layer(np.ones((16, 8, 3, 3)), before=(8, 8), after=(8, 8))
        >>> [shape.weight_shape for shape in SpatialSvd().shapes(layer, (4,))]
        [(4, 8, 3, 1), (16, 4, 1, 3)]
    """

    name: ClassVar[str] = "spatial-svd"

    def refusal(self, layer: Layer) -> str | None:
        """There must be two axes to walk along."""
        count = len(walking_axes(layer))
        return None if count > 1 else f"its kernel is larger than 1 along {count} axes, and two are needed"

    def full(self, layer: Layer) -> Rank:
        """The smaller one of C / G times the kernel of the first axis, and M / G times that of the others."""
        split = Split.of(layer)
        return (min(layer.weight.shape[1] * split.first, layer.outputs // layer.groups * split.others),)

    def shapes(self, layer: Layer, rank: Rank) -> tuple[FactorShape, ...]:
        """Along the first axis, then along the others."""
        inner, chosen = layer.groups * rank[0], walking_axes(layer)[0]
        axes = tuple(axis == chosen for axis in range(len(layer.kernel)))
        first, others = (
            tuple(size if walks == side else 1 for size, walks in zip(layer.kernel, axes, strict=True))
            for side in (True, False)
        )
        return (
            FactorShape(inner, layer.inputs, layer.groups, first, axes),
            FactorShape(layer.outputs, inner, layer.groups, others, tuple(not walks for walks in axes)),
        )

    def fit(self, layer: Layer, metric: Metric) -> Fit:
        """One SVD and one Cholesky factor a group."""
        return _SpatialFit(self, layer, metric)

    def spectra(self, layer: Layer) -> tuple[tuple[np.ndarray, tuple[int, int]], ...]:
        """Singular values of the weight as [C i, M j]."""
        split = Split.of(layer)
        return (largest_spectrum([split.unfolded(matrix) for _, matrix in by_group(layer)]),)


@dataclass(frozen=True)
class Split:
    """How the columns of a layer are [C / G, first axis, other axes], the first axis being moved to the front.

    Attributes:
        kernel: of the layer.
        axis: the first spatial axis with a kernel above 1.
        channels: C / G.
    """

    kernel: tuple[int, ...]
    axis: int
    channels: int

    @classmethod
    def of(cls, layer: Layer) -> Split:
        """Of a layer with such an axis."""
        return cls(layer.kernel, walking_axes(layer)[0], layer.weight.shape[1])

    @property
    def first(self) -> int:
        """Size of the kernel along the first axis."""
        return self.kernel[self.axis]

    @property
    def others(self) -> int:
        """Size of the kernel along all others."""
        return math.prod(self.kernel) // self.first

    @property
    def order(self) -> np.ndarray:
        """Where each column of the new order was: int64 [K]."""
        index = np.arange(self.channels * math.prod(self.kernel)).reshape(self.channels, *self.kernel)
        return np.moveaxis(index, self.axis + 1, 1).reshape(-1)

    def unfolded(self, matrix: np.ndarray) -> np.ndarray:
        """[M, K] as [C i, M j]."""
        cube = matrix[:, self.order].reshape(len(matrix), -1, self.others)
        return cube.transpose(1, 0, 2).reshape(cube.shape[1], -1)


class _SpatialFit(Fit):
    def __init__(self, form: Factorization, layer: Layer, metric: Metric) -> None:
        super().__init__(form, layer, metric)
        self._split = Split.of(layer)
        most = max((rank for rank in range(1, form.full(layer)[0] + 1) if form.is_cheaper(layer, (rank,))), default=1)
        self._fitted = most
        self._parts = [self._taken_apart(matrix, group, most) for group, matrix in by_group(layer)]

    def _taken_apart(self, matrix: np.ndarray, group: int, most: int) -> tuple[np.ndarray, Regression]:
        """A [r, C i] and the regression on its features, (s, j) in this order."""
        split = self._split
        unfolded = split.unfolded(matrix)
        wide = unfolded.reshape(len(unfolded), len(matrix), split.others)
        if self.metric.matrices is None:
            directions = np.linalg.svd(unfolded, full_matrices=False)[0][:, :most]
            outer = directions.T
            cross = np.einsum("sx,xmj->msj", outer, wide, optimize=True)
            return outer, Regression(np.eye(len(outer) * split.others), cross.reshape(len(matrix), -1))
        order = split.order
        cube = self.metric.matrices[group][np.ix_(order, order)]
        cube = cube.reshape(len(unfolded), split.others, len(unfolded), split.others)
        left = np.einsum("xjyj->xy", cube) / split.others
        right = np.einsum("xixj->ij", cube)
        lower = scipy.linalg.cholesky(left, lower=True)
        side = scipy.linalg.cholesky(right / np.trace(right), lower=True)
        weighted = (lower.T @ unfolded).reshape(wide.shape) @ side
        directions = np.linalg.svd(weighted.reshape(len(unfolded), -1), full_matrices=False)[0][:, :most]
        outer = scipy.linalg.solve_triangular(lower, directions, lower=True, trans=1).T
        outer = outer / np.linalg.norm(outer, axis=1, keepdims=True)
        through = (outer @ cube.reshape(len(unfolded), -1)).reshape(len(outer), split.others, len(unfolded), -1)
        gram = np.einsum("sjyi,ty->sjti", through, outer, optimize=True)
        cross = np.einsum("myi,sjyi->msj", wide.transpose(1, 0, 2), through, optimize=True)
        size = len(outer) * split.others
        return outer, Regression(gram.reshape(size, size), cross.reshape(len(matrix), size))

    def _at_least(self, rank: int) -> None:
        """Take the layer apart further, where a rank beyond what is cheaper is asked for."""
        if rank > self._fitted:
            self._fitted = self.form.full(self.layer)[0]
            self._parts = [self._taken_apart(matrix, group, self._fitted) for group, matrix in by_group(self.layer)]

    def residual(self, rank: Rank) -> float:
        self._at_least(rank[0])
        count = rank[0] * self._split.others
        held = sum(float(part.explained[min(count, len(part.explained)) - 1]) for _, part in self._parts)
        return self.power - held

    def factors(self, rank: Rank) -> tuple[Factor, ...]:
        self._at_least(rank[0])
        split, first, last = self._split, *self.form.shapes(self.layer, rank)
        outer = np.stack([outer[: rank[0]] for outer, _ in self._parts])
        inner = np.stack([part.solution(rank[0] * split.others) for _, part in self._parts])
        return as_factor(first, outer), as_factor(last, inner)
