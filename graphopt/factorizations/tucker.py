"""Tucker-2: a k x k convolution as 1 x 1, k x k between fewer channels, 1 x 1."""

from __future__ import annotations

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
    pointwise,
    walking_axes,
)
from graphopt.factorizations.metric import Metric, Regression
from graphopt.factorizations.svd import largest_spectrum

_SWEEPS = 3
"""How often the two subspaces are found anew, each given the other."""


@dataclass(frozen=True)
class Tucker(Factorization):
    """Fewer channels into the kernel and fewer out of it.

        W[m, c, k]  ~  sum over a < r1, b < r2 of U[m, b] G[b, a, k] V[a, c],      rank (r1, r2)

    (Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications").
    V comes from the weight unfolded along its inputs, in the metric of single channels; given V, core and U are the
    exact minimum in the whole metric: least squares on the r1 k k features, and of what these explain the r2 leading
    directions of the outputs (reduced-rank regression). The factors of one rank are improved by alternation (HOOI, De
    Lathauwer, De Moor, Vandewalle 2000) as long as that lowers the error. Each group is taken apart by itself.

    Example:
        >>> layer = Layer(np.ones((16, 8, 3, 3)), before=(8, 8), after=(8, 8))
        >>> [shape.weight_shape for shape in Tucker().shapes(layer, (4, 6))]
        [(4, 8, 1, 1), (6, 4, 3, 3), (16, 6, 1, 1)]
    """

    name: ClassVar[str] = "tucker"

    def refusal(self, layer: Layer) -> str | None:
        """There must be a kernel, and several channels on both sides of it."""
        if not walking_axes(layer):
            return "its kernel is 1"
        alone = layer.weight.shape[1] == 1 or layer.outputs == layer.groups
        return "each group has one input or one output" if alone else None

    def full(self, layer: Layer) -> Rank:
        """Inner inputs and inner outputs that any layer needs."""
        outputs, inputs = layer.outputs // layer.groups, layer.weight.shape[1]
        places = layer.columns // inputs
        return min(inputs, outputs * places), min(outputs, inputs * places)

    def shapes(self, layer: Layer, rank: Rank) -> tuple[FactorShape, ...]:
        """1 x 1 to r1 channels, the kernel to r2, 1 x 1 to all."""
        first, second = (layer.groups * one for one in rank)
        core = FactorShape(second, first, layer.groups, layer.kernel, (True,) * len(layer.kernel))
        return pointwise(layer, first, layer.inputs), core, pointwise(layer, layer.outputs, second)

    def fit(self, layer: Layer, metric: Metric) -> Fit:
        """One SVD and one Cholesky factor a group, and an eigendecomposition for each number of inner inputs."""
        return _TuckerFit(self, layer, metric)

    def spectra(self, layer: Layer) -> tuple[tuple[np.ndarray, tuple[int, int]], ...]:
        """Singular values of the weight unfolded along its inputs, and along its outputs."""
        matrices = [matrix for _, matrix in by_group(layer)]
        inputs = layer.weight.shape[1]
        along = [matrix.reshape(len(matrix), inputs, -1).transpose(1, 0, 2).reshape(inputs, -1) for matrix in matrices]
        return largest_spectrum(along), largest_spectrum(matrices)


class _Half:
    """One group: its weight as [M, C, k] and its metric as [C, k, C, k]."""

    def __init__(self, matrix: np.ndarray, inputs: int, metric: Metric, group: int) -> None:
        self.cube = matrix.reshape(len(matrix), inputs, -1)
        places = self.cube.shape[2]
        whole = None if metric.matrices is None else metric.matrices[group]
        self.metric = None if whole is None else whole.reshape(inputs, places, inputs, places)
        of_channels = np.eye(inputs) if self.metric is None else np.einsum("ckdk->cd", self.metric) / places
        self._lower = scipy.linalg.cholesky(of_channels, lower=True)

    def subspace(self, cube: np.ndarray) -> np.ndarray:
        """Rows V [C, C], the ones that the most power of [M, C, k] goes through first."""
        along = cube.transpose(1, 0, 2).reshape(cube.shape[1], -1)
        directions = np.linalg.svd(self._lower.T @ along, full_matrices=False)[0]
        return scipy.linalg.solve_triangular(self._lower, directions, lower=True, trans=1).T

    def regression(self, subspace: np.ndarray) -> Regression:
        """On the features V x at each place of the kernel, in the order (inner input, place)."""
        outputs, inputs, places = self.cube.shape
        size = len(subspace) * places
        if self.metric is None:
            gram = np.kron(subspace @ subspace.T, np.eye(places))
            cross = np.einsum("mck,sc->msk", self.cube, subspace, optimize=True)
            return Regression(gram, cross.reshape(outputs, size))
        through = subspace @ self.metric.reshape(inputs, -1)
        gram = (through.reshape(-1, inputs, places).swapaxes(1, 2) @ subspace.T).swapaxes(1, 2)
        cross = self.cube.reshape(outputs, -1) @ through.reshape(size, -1).T
        return Regression(gram.reshape(size, size), cross)


class _TuckerFit(Fit):
    def __init__(self, form: Factorization, layer: Layer, metric: Metric) -> None:
        super().__init__(form, layer, metric)
        inputs = layer.weight.shape[1]
        self._halves = [_Half(matrix, inputs, metric, group) for group, matrix in by_group(layer)]
        self._bases = [half.subspace(half.cube) for half in self._halves]
        self._regressions = [half.regression(base) for half, base in zip(self._halves, self._bases, strict=True)]
        self._places = layer.columns // inputs
        self._held: dict[int, np.ndarray] = {}

    def residual(self, rank: Rank) -> float:
        inner, outer = rank
        if inner not in self._held:
            pairs = [one.shadows[: inner * self._places] for one in self._regressions]
            values = [np.linalg.eigvalsh(shadows.T @ shadows)[::-1] for shadows in pairs]
            self._held[inner] = np.cumsum(np.sum(values, axis=0))
        return self.power - float(self._held[inner][outer - 1])

    def factors(self, rank: Rank) -> tuple[Factor, ...]:
        found = [self._group(index, rank) for index in range(len(self._halves))]
        shapes = self.form.shapes(self.layer, rank)
        parts = zip(shapes, zip(*found, strict=True), strict=True)
        return tuple(as_factor(shape, np.stack(arrays)) for shape, arrays in parts)

    def _group(self, index: int, rank: Rank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """V [r1, C], core [r2, r1 k] and U [M, r2] of one group."""
        half, (inner, outer) = self._halves[index], rank
        subspace, regression = self._bases[index][:inner], self._regressions[index]
        best: tuple[float, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
        for _ in range(_SWEEPS):
            size = inner * self._places
            shadows = regression.shadows[:size]
            powers, directions = np.linalg.eigh(shadows.T @ shadows)
            held, directions = float(powers[-outer:].sum()), directions[:, ::-1][:, :outer]
            if best is not None and held <= best[0] * (1 + 1e-6):
                break
            best = held, (subspace, directions.T @ regression.solution(size), directions)
            if rank == self.form.full(self.layer):
                break
            subspace = half.subspace(np.einsum("mr,mck->rck", directions, half.cube, optimize=True))
            if len(subspace) < inner:  # fewer directions than asked for are in use
                break
            subspace = subspace[:inner]
            regression = half.regression(subspace)
        assert best is not None
        return best[1]
