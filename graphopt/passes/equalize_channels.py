"""Pass equalize-channels: the ranges of channels move between the weights that make them and those that read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.channel_scales import FIXED, ChannelScales, LinearScales, channel_scales
from graphopt.ir.origin import origin_of
from graphopt.ir.rewrite import DeclinedError
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from graphopt.passes.contract import Context, Pass, Semantics

WHAT = "equalize channels"
BALANCES = ("weights", "activations")
"""What may be asked for as `EqualizeChannels.balance`."""
_ROUNDS = 100
_FLOOR = 2.0**-8
"""Part of the largest range of its kind below which a channel counts as this large: dead ones are not blown up."""
_REACH = 4.0
"""Standard deviations from the mean within which a channel lies, for all practical purposes."""


@dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Multiply what makes a channel, and divide what reads it, so that all channels have like ranges on both sides.

    For every f with f(s x) = s f(x), s > 0 (Relu, LeakyRelu, pooling, Reshape, Concat, sums), and any diagonal S > 0

        W2 f(W1 x + b1) + b2  =  (W2 S^-1) f((S W1) x + S b1) + b2

    With r1 the largest magnitude of each channel where it is made, r2 where it is read, s = sqrt(r1 r2) / r1 makes
    both sqrt(r1 r2) (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction").
    Channels that a graph couples (residual streams, concatenations, groups) have one s: the largest r1 and r2 of all
    that make and read them count. Channels are visited in turns until nothing moves. Each s is a power of two, so that
    the graph computes the same to the last bit.

    A Clip with a finite bound, as Relu6 is, has one bound for all channels: no s passes it, and the remark says so.

    Options:
        balance: "weights" takes r1 from the weights that make a channel; "activations" from the mean and deviation
            that BatchNormalization has left of it, where it has.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2] x) => (float[N,1] y) <float[2,2] a = {1, 16, 1, 8}, float[2,1] b = {4, 1}>
        { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2] x) => (float[N,1] y) <float[2,2] a = {2, 4, 2, 2}, float[2,1] b = {2, 4}>
        { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }
    """

    name: ClassVar[str] = "equalize-channels"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = (
        "fold-constants",
        "fold-batchnorm",
        "fold-affine",
        "merge-linear",
        "merge-branches",
        "prune-channels",
    )

    balance: str = "activations"

    def __post_init__(self) -> None:
        if self.balance not in BALANCES:
            raise GraphoptError(f"unknown balance {self.balance!r}", help=f"one of {', '.join(BALANCES)}")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Equalize in place; the remarks say which operators have channels that no factor reaches, and why."""
        if origin_of(model) is not None:
            context.missed(
                WHAT, "an earlier pass has damaged the graph, and what it was is known by unscaled values", "model"
            )
            return
        scales = channel_scales(model)
        for node, why in scales.refused:
            context.missed(WHAT, why, node)
        for one in scales.linears:
            if one.why_outs is not None:
                why, blamed = one.why_outs
                context.missed(WHAT, f"{why} ({blamed})", one.linear.node)
        factors = equalized(scales, _activations(scales) if self.balance == "activations" else None)
        moved = int(np.count_nonzero(factors != 1.0))
        if not moved:
            return
        try:
            scales.apply(factors)
        except DeclinedError as refusal:
            context.missed(WHAT, refusal.why, "model")
            return
        spread = np.log2(factors.max() / factors.min())
        context.note(WHAT, f"{moved} of {scales.count} channels scaled, by factors 2^{spread:.0f} apart", "model")


def equalized(scales: ChannelScales, activations: np.ndarray | None = None) -> np.ndarray:
    """The factor of each variable, a power of two, that brings its ranges where made and where read together.

    Args:
        scales: the variables of a model, whose weights are read.
        activations: float64 [count], range of each channel as it is, NaN where it is not known; None where none is.

    Returns:
        Float64 [count], 1 for what is not both made and read by a linear operator.
    """
    blocks = _blocks(scales)
    exponents = np.zeros(scales.count)
    magnitudes = {one: one.magnitudes() for one in scales.linears}
    for _ in range(_ROUNDS):
        moved = False
        for block in blocks:
            factors = 2.0**exponents
            made = _largest(scales, block.makers, block, factors, magnitudes, lambda one: one.outs[:, None])
            read = _largest(scales, block.readers, block, factors, magnitudes, lambda one: one.ins_by_row())
            if activations is not None:
                known = activations[block.variables]
                made = np.where(np.isnan(known), made, known * factors[block.variables])
            usable = (made > 0) & (read > 0)
            if not usable.any():
                continue
            made, read = (np.maximum(side, _FLOOR * side.max()) for side in (made, read))
            steps = np.where(usable, np.rint(np.log2(read / made) / 2), 0.0)
            exponents[block.variables] += steps
            moved = moved or bool(steps.any())
        if not moved:
            break
    return 2.0**exponents


@dataclass(frozen=True)
class _Block:
    """Variables that the same operators make and read."""

    variables: np.ndarray
    makers: tuple[LinearScales, ...]
    readers: tuple[LinearScales, ...]


def _blocks(scales: ChannelScales) -> list[_Block]:
    sides: dict[int, tuple[list[int], list[int]]] = {}
    for number, one in enumerate(scales.linears):
        for side, variables in enumerate((one.outs, one.ins)):
            for variable in np.unique(variables[variables != FIXED]):
                sides.setdefault(int(variable), ([], []))[side].append(number)
    grouped: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for variable, (makers, readers) in sorted(sides.items()):
        if makers and readers:
            grouped.setdefault((tuple(makers), tuple(readers)), []).append(variable)
    return [
        _Block(np.array(variables), *(tuple(scales.linears[number] for number in side) for side in key))
        for key, variables in grouped.items()
    ]


def _largest(
    scales: ChannelScales,
    linears: tuple[LinearScales, ...],
    block: _Block,
    factors: np.ndarray,
    magnitudes: dict[LinearScales, np.ndarray],
    variables: Callable[[LinearScales], np.ndarray],
) -> np.ndarray:
    """Largest magnitude of the scaled weights of some operators, for each variable of a block."""
    found = np.zeros(scales.count + 1)
    for one in linears:
        scaled = magnitudes[one] * scales.scaled(one, factors)
        np.maximum.at(found, np.broadcast_to(variables(one), scaled.shape), scaled)
    return found[block.variables]


def _activations(scales: ChannelScales) -> np.ndarray:
    """How far each channel reaches as BatchNormalization has seen it, NaN where it has not."""
    found = np.full(scales.count + 1, np.nan)
    for value, variables in scales.values.items():
        statistics = value.meta.get(BATCHNORM_STATISTICS)
        if statistics is None or variables.ndim < 2 or variables.size != variables.shape[1]:
            continue
        mean, std = statistics
        reach = np.abs(mean) + _REACH * std
        if variables.size == reach.size:
            np.fmax.at(found, variables.reshape(-1), reach)
    return found[:-1]
