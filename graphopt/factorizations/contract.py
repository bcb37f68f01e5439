"""What a factorisation is: one linear layer in, a chain of smaller ones out that together compute nearly the same.

Pure maths over arrays: no graph is written. A weight is [M, C / G, *kernel] for M outputs, C inputs and
G groups, whatever the operator; a Gemm or MatMul has no kernel and one group.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.factorizations.metric import Metric
from graphopt.ir.linear import Linear
from graphopt.ir.rewrite import integers, is_op

Rank = tuple[int, ...]
"""Widths inside of the chain, of one group each: one number, or two (inner inputs, inner outputs) for Tucker-2."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer and what decides its cost.

    Attributes:
        weight: float64 [M, C / G, *kernel].
        groups: G.
        before, after: sizes of the spatial axes of what it reads and makes; empty where there is no kernel.
        rows: how many samples, or rows of a product, there are.
        transposed: whether it is a ConvTranspose.

    Raises:
        GraphoptError: the weight is not finite, or its shape does not fit.

    Example:
        >>> layer = Layer(np.ones((4, 3, 3, 3)), before=(8, 8), after=(6, 6))
        >>> layer.macs, layer.parameters
        (3888, 108)
    """

    weight: np.ndarray
    groups: int = 1
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    rows: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        fits = self.weight.ndim >= 2 and self.weight.size and self.weight.shape[0] % self.groups == 0
        if not fits or not len(self.before) == len(self.after) == len(self.kernel):
            raise GraphoptError(
                f"a weight of shape {list(self.weight.shape)} is none of a layer with {self.groups} groups and "
                f"{len(self.before)} spatial axes",
                help="weights are [outputs, inputs / groups, *kernel], `before` and `after` one size a kernel axis",
            )
        if not np.isfinite(self.weight).all():
            raise GraphoptError("the weight has values that are not finite", help="mend the model: it computes NaN")

    @property
    def outputs(self) -> int:
        """M."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """C."""
        return self.weight.shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of each spatial axis."""
        return self.weight.shape[2:]

    @property
    def columns(self) -> int:
        """K: what an output sums over."""
        return math.prod(self.weight.shape[1:])

    @property
    def matrices(self) -> np.ndarray:
        """The weight of each group as a matrix: float64 [G, M / G, K]."""
        return self.weight.reshape(self.groups, -1, self.columns)

    @property
    def shape(self) -> FactorShape:
        """The layer itself as the only factor of a chain."""
        return FactorShape(self.outputs, self.inputs, self.groups, self.kernel, (True,) * len(self.kernel))

    @property
    def macs(self) -> int:
        """Multiply-accumulates, counted as `graphopt.ir.cost` does."""
        return chain_macs(self, [self.shape])

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.weight.size

    def scaled(self, scale: np.ndarray) -> Layer:
        """The layer with each output times a factor [M]."""
        return replace(self, weight=self.weight * scale.reshape(-1, *[1] * (self.weight.ndim - 1)))


@dataclass(frozen=True)
class FactorShape:
    """One layer of a chain.

    Attributes:
        outputs, inputs: number of channels.
        groups: number of groups.
        kernel: of each spatial axis.
        axes: which spatial axes it walks along: there it has the stride, dilation and padding of the layer, elsewhere
            a kernel of 1 that moves in steps of 1.
    """

    outputs: int
    inputs: int
    groups: int
    kernel: tuple[int, ...] = ()
    axes: tuple[bool, ...] = ()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[outputs, inputs / groups, *kernel]."""
        return self.outputs, self.inputs // self.groups, *self.kernel


@dataclass(frozen=True, eq=False)
class Factor:
    """One layer of a chain with its weight, float64 [outputs, inputs / groups, *kernel]."""

    shape: FactorShape
    weight: np.ndarray


class Fit(abc.ABC):
    """A layer taken apart: every rank from the same work.

    Args:
        form: what took it apart.
        layer: the layer.
        metric: in which errors count.
    """

    def __init__(self, form: Factorization, layer: Layer, metric: Metric) -> None:
        self.form, self.layer, self.metric = form, layer, metric

    @cached_property
    def power(self) -> float:
        """What all of the layer's outputs amount to in the metric."""
        return self.metric.power(self.layer.matrices)

    @abc.abstractmethod
    def residual(self, rank: Rank) -> float:
        """What is lost at a rank, in the unit of `power`."""

    @abc.abstractmethod
    def factors(self, rank: Rank) -> tuple[Factor, ...]:
        """The chain of a rank, the first layer first."""

    def error(self, rank: Rank) -> float:
        """Expected squared error of the outputs over their power: 0 where nothing is lost, 1 where all is."""
        return min(max(self.residual(rank) / self.power, 0.0), 1.0) if self.power > 0 else 0.0

    def errors(self, ranks: Sequence[Rank]) -> np.ndarray:
        """`error` of several ranks: float64."""
        return np.array([self.error(rank) for rank in ranks])


class Factorization(abc.ABC):
    """One form of chain: subclasses are frozen dataclasses.

    Class attributes:
        name: kebab-case, the key in `graphopt.factorizations.FORMS`.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def refusal(self, layer: Layer) -> str | None:
        """Why a layer has no such form, one clause; None where it has."""

    @abc.abstractmethod
    def full(self, layer: Layer) -> Rank:
        """The smallest rank at which the chain equals any layer of this shape."""

    @abc.abstractmethod
    def shapes(self, layer: Layer, rank: Rank) -> tuple[FactorShape, ...]:
        """The chain of a rank."""

    @abc.abstractmethod
    def fit(self, layer: Layer, metric: Metric) -> Fit:
        """Take a layer apart, so that errors and factors of all ranks are at hand."""

    @abc.abstractmethod
    def spectra(self, layer: Layer) -> tuple[tuple[np.ndarray, tuple[int, int]], ...]:
        """For each number of a rank the singular values that it cuts, with the shape of the matrix; largest group."""

    def factorize(self, layer: Layer, rank: Rank, metric: Metric | None = None) -> tuple[Factor, ...]:
        """The chain of one rank that is nearest to the layer in a metric, the identity where none is given.

        Raises:
            GraphoptError: the layer has no such form, or no such rank.
        """
        self.check(layer, rank)
        return self.fit(layer, metric or Metric.identity(layer.groups, layer.columns)).factors(rank)

    def check(self, layer: Layer, rank: Rank) -> None:
        """Raise `GraphoptError` where the layer has no such form, or no such rank."""
        refusal = self.refusal(layer)
        if refusal is not None:
            raise GraphoptError(f"{self.name} does not fit the layer: {refusal}", help="choose another form")
        full = self.full(layer)
        if len(rank) != len(full) or not all(
            type(one) is int and 1 <= one <= most for one, most in zip(rank, full, strict=True)
        ):
            raise GraphoptError(
                f"{self.name} has no rank {rank}", help=f"give whole numbers from 1 to {', '.join(map(str, full))}"
            )

    def macs(self, layer: Layer, rank: Rank) -> int:
        """Multiply-accumulates of the chain."""
        return chain_macs(layer, self.shapes(layer, rank))

    def parameters(self, layer: Layer, rank: Rank) -> int:
        """Elements of all weights of the chain."""
        return sum(math.prod(shape.weight_shape) for shape in self.shapes(layer, rank))

    def is_cheaper(self, layer: Layer, rank: Rank) -> bool:
        """Whether the chain has fewer multiply-accumulates than the layer, and no more parameters."""
        return self.macs(layer, rank) < layer.macs and self.parameters(layer, rank) <= layer.parameters


def chain_macs(layer: Layer, shapes: Sequence[FactorShape]) -> int:
    """Multiply-accumulates of a chain in the place of a layer."""
    sizes, total = list(layer.before), 0
    for shape in shapes:
        entering = math.prod(sizes)
        sizes = [b if walks else size for size, b, walks in zip(sizes, layer.after, shape.axes, strict=True)]
        # a ConvTranspose scatters each input, a Conv gathers each output
        places = entering if layer.transposed and any(shape.axes) else math.prod(sizes)
        total += layer.rows * places * math.prod(shape.weight_shape)
    return total


def pointwise(layer: Layer, outputs: int, inputs: int) -> FactorShape:
    """A factor that mixes channels at each place, in the groups of the layer."""
    count = len(layer.kernel)
    return FactorShape(outputs, inputs, layer.groups, (1,) * count, (False,) * count)


def as_factor(shape: FactorShape, weight: np.ndarray) -> Factor:
    """A weight of any arrangement with the right order of elements."""
    return Factor(shape, np.ascontiguousarray(weight, np.float64).reshape(shape.weight_shape))


def composed(layer: Layer, factors: Sequence[Factor]) -> np.ndarray:
    """The weight of the one layer that equals a chain: float64 [M, C / G, *kernel].

    Example:
        >>> from graphopt.factorizations import ChannelSvd
        >>> layer = Layer(np.random.default_rng(0).standard_normal((4, 3, 3, 3)), before=(8, 8), after=(6, 6))
        >>> bool(np.allclose(composed(layer, ChannelSvd().factorize(layer, (4,))), layer.weight))
        True
    """
    blocks = [_chain_of_group(layer.groups, factors, group) for group in range(layer.groups)]
    return np.concatenate(blocks).reshape(layer.weight.shape)


def _chain_of_group(groups: int, factors: Sequence[Factor], group: int) -> np.ndarray:
    """[M / G, C / G, *kernel] of one group of the layer."""
    total: np.ndarray | None = None
    for factor in factors:
        dense = _dense_block(factor, groups, group)
        if total is None:
            total = dense
            continue
        axes = tuple(range(2, dense.ndim))
        kernel = np.broadcast_shapes(dense.shape[2:], total.shape[2:])
        left, right = (
            np.moveaxis(np.broadcast_to(one, (*one.shape[:2], *kernel)), axes, tuple(range(len(axes))))
            for one in (dense, total)
        )
        total = np.moveaxis(left @ right, tuple(range(len(axes))), axes)
    assert total is not None
    return total


def _dense_block(factor: Factor, groups: int, group: int) -> np.ndarray:
    """The weight of a factor between its channels of one group of the layer, zeros where nothing connects them."""
    shape = factor.shape
    outputs, inputs, inner = shape.outputs // groups, shape.inputs // groups, shape.groups // groups
    weight = factor.weight[group * outputs : (group + 1) * outputs]
    dense = np.zeros((outputs, inputs, *shape.kernel))
    for index in range(inner):
        rows = slice(index * outputs // inner, (index + 1) * outputs // inner)
        columns = slice(index * inputs // inner, (index + 1) * inputs // inner)
        dense[rows, columns] = weight[rows]
    return dense


def layer_of(linear: Linear, data: Sequence[int] | None = None, result: Sequence[int] | None = None) -> Layer:
    """The layer of an operator in a graph.

    Args:
        linear: its view.
        data, result: shapes of what it reads and makes, every size a number; None where they are not known: then
            costs are those of one place of the result.

    Raises:
        GraphoptError: the weight is not finite.
    """
    node, kernel = linear.node, linear.kernel
    transposed = is_op(node, "ConvTranspose")
    if data is None or result is None:
        steps = integers(node, "strides") or (1,) * len(kernel)
        ones = (1,) * len(kernel)
        before, after, rows = (ones, steps, 1) if transposed else (steps, ones, 1)
    elif kernel:
        before, after, rows = tuple(data[2:]), tuple(result[2:]), int(data[0])
    else:
        before, after, rows = (), (), math.prod(result) // max(linear.out_channels, 1)
    weight = np.asarray(linear.weight(), np.float64)
    return Layer(weight, linear.groups, tuple(map(int, before)), tuple(map(int, after)), rows, transposed)


def walking_axes(layer: Layer) -> list[int]:
    """The spatial axes whose kernel is larger than 1."""
    return [axis for axis, size in enumerate(layer.kernel) if size > 1]


def by_group(layer: Layer) -> Iterator[tuple[int, np.ndarray]]:
    """Number and matrix [M / G, K] of each group."""
    yield from enumerate(layer.matrices)
