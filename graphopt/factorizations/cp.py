"""CP: a convolution as 1 x 1, one depthwise filter along each axis, 1 x 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
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
from graphopt.factorizations.spatial_svd import SpatialSvd
from graphopt.factorizations.svd import largest_spectrum

_SWEEPS = 25
_MOST_WORK = 2e11
"""Multiplications that the alternation of one rank may take; there are fewer sweeps where one takes more."""
_RIDGE = 1e-6
"""Pull of each factor to 0, relative to the mean diagonal of its normal equations: components that cancel each other
grow without bound otherwise."""
_ENOUGH = 1e-5
"""The alternation ends once a sweep lowers the error by less than this share."""


@dataclass(frozen=True)
class Cp(Factorization):
    """A sum of r products of one filter for each axis.

        W[m, c, i, j]  ~  sum over s < r of U[m, s] H[s, i] V[s, j] A[s, c]

    (Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition"). Alternating
    least squares with a ridge and balanced norms, begun from the leading rank-one parts of the leading filters, in the
    metric of single channels; U at last by least squares in the whole metric. There is no nested solution: each rank is
    solved by itself, and the error is not certain to fall with it. A layer with one input a group (depthwise) needs no
    1 x 1, and is taken apart as `SpatialSvd` does: depthwise k x 1, then 1 x k.

    Example:
        >>> layer = Layer(np.ones((16, 8, 3, 3)), before=(8, 8), after=(8, 8))
        >>> [shape.weight_shape for shape in Cp().shapes(layer, (4,))]
        [(4, 8, 1, 1), (4, 1, 3, 1), (4, 1, 1, 3), (16, 4, 1, 1)]
    """

    name: ClassVar[str] = "cp"

    def refusal(self, layer: Layer) -> str | None:
        """There must be a kernel; a depthwise one must have two axes."""
        if not walking_axes(layer):
            return "its kernel is 1"
        return SpatialSvd().refusal(layer) if _is_depthwise(layer) else None

    def full(self, layer: Layer) -> Rank:
        """As many products as a group has columns: each layer can be written with that many."""
        return SpatialSvd().full(layer) if _is_depthwise(layer) else (layer.columns,)

    def shapes(self, layer: Layer, rank: Rank) -> tuple[FactorShape, ...]:
        """1 x 1, a depthwise filter along each axis, 1 x 1."""
        if _is_depthwise(layer):
            return SpatialSvd().shapes(layer, rank)
        inner = layer.groups * rank[0]
        between: list[FactorShape] = []
        walking = walking_axes(layer)
        for axis in walking:
            # the first one also has what strides and padding there are along axes with a kernel of 1
            axes = tuple(
                other == axis or (axis == walking[0] and other not in walking) for other in range(len(layer.kernel))
            )
            kernel = tuple(size if other == axis else 1 for other, size in enumerate(layer.kernel))
            between.append(FactorShape(inner, inner, inner, kernel, axes))
        return pointwise(layer, inner, layer.inputs), *between, pointwise(layer, layer.outputs, inner)

    def fit(self, layer: Layer, metric: Metric) -> Fit:
        """Nothing yet: each rank is solved when it is first asked for."""
        return SpatialSvd().fit(layer, metric) if _is_depthwise(layer) else _CpFit(self, layer, metric)

    def spectra(self, layer: Layer) -> tuple[tuple[np.ndarray, tuple[int, int]], ...]:
        """Singular values of the weight as [M, K]: no number of products below their number can do."""
        if _is_depthwise(layer):
            return SpatialSvd().spectra(layer)
        return (largest_spectrum([matrix for _, matrix in by_group(layer)]),)


def _is_depthwise(layer: Layer) -> bool:
    return layer.weight.shape[1] == 1


class _CpFit(Fit):
    def __init__(self, form: Factorization, layer: Layer, metric: Metric) -> None:
        super().__init__(form, layer, metric)
        self._solved = cache(self._solve)

    def residual(self, rank: Rank) -> float:
        return self._solved(rank)[0]

    def factors(self, rank: Rank) -> tuple[Factor, ...]:
        return self._solved(rank)[1]

    def _solve(self, rank: Rank) -> tuple[float, tuple[Factor, ...]]:
        layer, shapes = self.layer, self.form.shapes(self.layer, rank)
        parts: list[list[np.ndarray]] = []
        held = 0.0
        for group, matrix in by_group(layer):
            found = self._products(group, matrix.reshape(len(matrix), *layer.weight.shape[1:]), rank[0])
            features = _khatri_rao(found).T
            gram = self.metric.applied(group, features) @ features.T
            regression = Regression(gram, self.metric.applied(group, matrix) @ features.T)
            held += float(regression.explained[-1])
            parts.append([*(one.T for one in found), regression.solution(rank[0])])
        walking = [0, *(1 + axis for axis in walking_axes(layer)), len(parts[0]) - 1]
        idle = [index for index in range(len(parts[0])) if index not in walking]
        for part in parts:  # axes with a kernel of 1 hold numbers, not filters
            for index in idle:
                part[0] = part[0] * part[index]
        chosen = zip(*([part[index] for index in walking] for part in parts), strict=True)
        factors = tuple(as_factor(shape, np.stack(arrays)) for shape, arrays in zip(shapes, chosen, strict=True))
        return self.power - held, factors

    def _products(self, group: int, weight: np.ndarray, rank: int) -> list[np.ndarray]:
        """A [C, r] and the filters [k, r] of each axis, of one group [M, C, *kernel]."""
        inputs, places = weight.shape[1], math.prod(weight.shape[2:])
        if self.metric.matrices is None:
            lower = np.eye(inputs)
        else:
            cube = self.metric.matrices[group].reshape(inputs, places, inputs, places)
            lower = scipy.linalg.cholesky(np.einsum("ckdk->cd", cube) / places, lower=True)
        seen = np.moveaxis(np.tensordot(lower, weight, axes=(0, 1)), 0, 1)
        found = _alternated(seen, rank)
        found[0] = scipy.linalg.solve_triangular(lower, found[0], lower=True, trans=1)
        return found


def _alternated(tensor: np.ndarray, rank: int) -> list[np.ndarray]:
    """Factors [C, r], [k, r] ... of a tensor [M, C, *kernel], by alternating least squares."""
    outputs, inputs = tensor.shape[:2]
    kernel = tensor.shape[2:]
    matrix = tensor.reshape(outputs, -1)
    power = float(np.square(matrix).sum())
    factors = _leading_products(tensor, rank)
    sweeps = int(np.clip(_MOST_WORK / max(2.0 * matrix.size * rank, 1.0), 3, _SWEEPS))
    last = np.inf
    for _ in range(sweeps):
        features = _khatri_rao(factors)
        gram = _hadamard(factors)
        right = matrix @ features
        outer = _solved(gram, right)
        left = power - 2 * float(np.vdot(right, outer)) + float(np.vdot(outer @ gram, outer))
        if left >= last * (1 - _ENOUGH) or left <= 1e-14 * power:
            break
        last = left
        through = (matrix.T @ outer).reshape(inputs, *kernel, rank)
        for mode in range(len(factors)):
            others = [factor for index, factor in enumerate(factors) if index != mode]
            seen = through
            for index in reversed(range(len(factors))):
                if index != mode:
                    shape = [1] * seen.ndim
                    shape[index], shape[-1] = factors[index].shape
                    seen = (seen * factors[index].reshape(shape)).sum(axis=index, keepdims=True)
            factors[mode] = _solved(_hadamard([*others, outer]), seen.reshape(-1, rank))
        norms = np.stack([np.linalg.norm(factor, axis=0) for factor in factors])
        norms = np.where(norms > 0, norms, 1.0)
        factors = [factor / norm for factor, norm in zip(factors, norms, strict=True)]
    return factors


def _leading_products(tensor: np.ndarray, rank: int) -> list[np.ndarray]:
    """Where the alternation begins: rank-one parts of the leading filters, by falling norm; seeded noise beyond."""
    inputs, kernel = tensor.shape[1], tensor.shape[2:]
    values, filters = np.linalg.svd(tensor.reshape(len(tensor), -1), full_matrices=False)[1:]
    filters = (values[:, None] * filters)[:rank].reshape(-1, inputs, math.prod(kernel))
    left, sizes, right = np.linalg.svd(filters, full_matrices=False)
    count, parts = sizes.shape
    parts_of = [left.swapaxes(1, 2).reshape(count * parts, inputs)]
    rest, norms = right.reshape(count * parts, *kernel), sizes.reshape(-1)
    for _ in kernel[:-1]:
        flat = rest.reshape(*rest.shape[:2], -1)
        first, size, others = np.linalg.svd(flat, full_matrices=False)
        more = size.shape[1]
        parts_of = [np.repeat(one, more, axis=0) for one in parts_of]
        parts_of.append(first.swapaxes(1, 2).reshape(-1, flat.shape[1]))
        norms = (norms[:, None] * size).reshape(-1)
        rest = others.reshape(-1, *rest.shape[2:])
    parts_of.append(rest)
    chosen = np.argsort(-norms, kind="stable")[:rank]
    noise = np.random.default_rng(0)
    found: list[np.ndarray] = []
    for one in parts_of:
        columns = one[chosen].T
        missing = rank - columns.shape[1]
        found.append(np.concatenate([columns, noise.standard_normal((len(columns), missing))], axis=1))
    return found


def _khatri_rao(factors: list[np.ndarray]) -> np.ndarray:
    """[C, r], [k, r] ... as [C k ..., r]."""
    total = factors[0]
    for factor in factors[1:]:
        total = (total[:, None] * factor[None]).reshape(-1, factor.shape[1])
    return total


def _hadamard(factors: list[np.ndarray]) -> np.ndarray:
    """The product of all Gram matrices, [r, r]."""
    total = factors[0].T @ factors[0]
    for factor in factors[1:]:
        total = total * (factor.T @ factor)
    return total


def _solved(gram: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The factor [d, r] with factor · gram = right, drawn to 0 by the ridge."""
    level = float(np.trace(gram)) / len(gram)
    regular = gram + max(_RIDGE * level, 1e-30) * np.eye(len(gram))
    return scipy.linalg.solve(regular, right.T, assume_a="pos").T
