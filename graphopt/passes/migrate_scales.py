"""Pass migrate-scales: what is hard to quantize in the inputs of a linear layer moves into its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.source import SOURCES, FirstSamples
from graphopt.ir.channel_scales import FIXED, ChannelScales, LinearScales, channel_scales
from graphopt.ir.linear_rows import LinearRows, apply_rows, linear_rows
from graphopt.ir.origin import origin_of
from graphopt.ir.pieces import Pieces
from graphopt.ir.rewrite import DeclinedError
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.quantize_ranges import asymmetric_quantizer, symmetric_scales
from graphopt.passes.quantize_saturation import SAFE_BITS, kernels_of, saturating_kernels

WHAT = "migrate scales"
ALPHAS = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
"""What is tried where no alpha is given."""
_SAMPLES = 64
_ROWS = 512
"""Rows of each operator's input that an alpha is judged on."""
_GAIN = 0.9
"""Part of the error that may be left for a change to be worth it: less is within what other inputs would say."""
_FLOOR = 1e-3
"""Part of the largest magnitude of its kind below which a channel counts as this large: silent ones stay silent."""


@dataclass(frozen=True)
class MigrateScales(Pass):
    """Divide each channel that a linear layer reads by s_j, multiply its weights by it, where no node is needed for it.

        W x  =  (W diag(s)) (diag(s)^-1 x),      s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

    Large channels, which would take all the resolution of a scale for the whole tensor, shrink, and the weights take
    them up (Xiao et al. 2023, "SmoothQuant"). With 1 / s the layer's input is made: by the scale and bias of the
    LayerNormalization or RMSNormalization before it, by the value projection whose mixture the output projection
    reads, by the up-projection of a gated MLP, by whatever makes it where all between passes a factor on. All that
    reads it shares s. Where something else reads it, or no such maker exists, it stays and the remark says why.

    alpha is given, or the one of `ALPHAS` with the smallest error of the products of rounded inputs and rounded weights
    over inputs of the layers (the search of Lin et al. 2024, "AWQ", over both operands), or none where that is better.
    Each s is a power of two, so that the graph computes the same to the last bit.

    Options:
        alpha: share of the difficulty that goes into the weights, 0 to 1; None to search.
        bits: width of the inputs that is planned for, 2 to 8.
        weight_bits: width of the weights, None for `bits`.
        source: "calibration", "probes" or "synthetic": where inputs come from; "auto" is calibration where given, else
            probes.
        samples: how many at most.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x) => (float[N,2] y) <float[4] gain = {1, 1, 1, 64}, float[4,2] w = {1, 2, 3, 1, 2, 3, 1, 1}>
        { n = LayerNormalization (x, gain) y = MatMul (n, w) }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x) => (float[N,2] y)
        <float[4] gain = {1, 1, 1, 2}, float[4,2] w = {1, 2, 3, 1, 2, 3, 32, 32}>
        { n = LayerNormalization (x, gain) y = MatMul (n, w) }
    """

    name: ClassVar[str] = "migrate-scales"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = (
        "fold-constants",
        "fuse-attention",
        "fuse-normalization",
        "fold-batchnorm",
        "fold-affine",
        "merge-linear",
        "merge-branches",
        "prune-channels",
        "equalize-channels",
    )

    alpha: float | None = None
    bits: int = 8
    weight_bits: int | None = None
    source: str = "auto"
    samples: int = _SAMPLES

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0.0 <= self.alpha <= 1.0:
            raise GraphoptError(f"alpha is {self.alpha}, it must be between 0 and 1", help="leave it out to search")
        for name, value in (("bits", self.bits), ("weight_bits", self.weight_bits)):
            if value is not None and (isinstance(value, bool) or value not in range(2, 9)):
                raise GraphoptError(f"{name} is {value!r}, it must be a whole number between 2 and 8")
        if self.source not in SOURCES:
            raise GraphoptError(f"unknown source {self.source!r}", help=f"one of {', '.join(SOURCES)}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:  # pyright: ignore
            raise GraphoptError(f"samples is {self.samples!r}", help="give a whole number of at least 1")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Migrate in place; the remarks say what was declined, and which alphas were taken."""
        if origin_of(model) is not None:
            context.missed(
                WHAT, "an earlier pass has damaged the graph, and what it was is known by unscaled values", "model"
            )
            return
        scales = channel_scales(model)
        for node, why in scales.refused:
            context.missed(WHAT, why, node)
        for one in scales.linears:
            if one.why_ins is not None:
                why, blamed = one.why_ins
                context.missed(WHAT, f"{why} ({blamed})", one.linear.node)
        readers = [one for one in scales.linears if (one.ins != FIXED).any()]
        if not readers:
            return
        made_up = self.source == "auto" and context.calibration is None
        found = context.inputs(model, "probes" if made_up else self.source, self.samples)
        context.note(WHAT, f"inputs from {found.source}: {found.why}", "model")
        seen = _observed(
            model,
            scales,
            readers,
            FirstSamples(model, found.batches, self.samples),
            context,
            self.weight_bits or self.bits,
        )
        factors, alphas = self._search(scales, seen)
        if not (factors != 1.0).any():
            return
        try:
            scales.apply(factors)
        except DeclinedError as refusal:
            context.missed(WHAT, refusal.why, "model")
            return
        taken = ", ".join(f"{alpha:g}" for alpha in sorted(set(alphas)))
        context.note(WHAT, f"{len(alphas)} sets of channels, alpha {taken}", "model")

    def _search(self, scales: ChannelScales, seen: _Seen) -> tuple[np.ndarray, list[float]]:
        """Factors of all variables, and the alphas that were taken."""
        factors, alphas = np.ones(scales.count), list[float]()
        for variables, readers in _sets(scales, list(seen.layers)):
            read = np.zeros(scales.count + 1)
            for one in readers:
                by_row = one.ins_by_row()
                np.maximum.at(read, by_row, one.magnitudes())
            weights, inputs = read[variables], seen.largest[variables]
            usable = (weights > 0) & (inputs > 0) & np.isfinite(inputs)
            if not usable.any():
                continue
            weights, inputs = (np.maximum(side, _FLOOR * side[usable].max()) for side in (weights, inputs))
            before = sum(seen.error(one, factors, scales, self) for one in readers)
            best, least, chosen = None, before * (_GAIN if self.alpha is None else np.inf), 0.0
            for alpha in ALPHAS if self.alpha is None else (self.alpha,):
                logarithms = (1 - alpha) * np.log2(weights) - alpha * np.log2(inputs)
                steps = np.where(usable, np.rint(logarithms - np.median(logarithms[usable])), 0.0)
                attempt = factors.copy()
                attempt[variables] = 2.0**steps
                error = sum(seen.error(one, attempt, scales, self) for one in readers)
                if error < least or (self.alpha is not None and steps.any()):
                    best, least, chosen = attempt, error, alpha
            if best is not None and (best != factors).any():
                factors = best
                alphas.append(chosen)
        return factors, alphas


@dataclass(frozen=True)
class _Layer:
    """One linear operator over some inputs.

    Attributes:
        rows: its matrices.
        patches: float32 [G, R, K], of some rows.
        low, high: float64 [in channels], extremes over all rows.
        weight_bits: the width that its weight will have.
    """

    rows: LinearRows
    patches: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight_bits: int


@dataclass
class _Seen:
    """What linear operators read over some inputs.

    Attributes:
        largest: float64 [count + 1]: largest magnitude of each variable, the last place for those that are fixed.
        layers: what is known of each operator.
    """

    largest: np.ndarray
    layers: dict[LinearScales, _Layer] = field(default_factory=dict["LinearScales", "_Layer"])

    def error(self, one: LinearScales, factors: np.ndarray, scales: ChannelScales, options: MigrateScales) -> float:
        """Mean square of what rounding does to the results of an operator, relative to their own."""
        layer = self.layers[one]
        rows, patches = layer.rows, layer.patches
        by_channel = scales.factors_of(one.ins, factors)
        by = by_channel.reshape(rows.groups, 1, -1, 1)
        kernel = rows.columns // (one.linear.in_channels // rows.groups)
        columns = np.repeat(by, kernel, axis=3).reshape(rows.groups, 1, rows.columns).astype(np.float32)
        weight = rows.weight().astype(np.float32)
        exact = apply_rows(patches, weight)
        low, high = float((layer.low * by_channel).min()), float((layer.high * by_channel).max())
        data = _rounded_data(patches * columns, low, high, options.bits)
        stored = _rounded_weight(weight / columns, layer.weight_bits)
        wrong = np.square(apply_rows(data, stored) - exact).mean(dtype=np.float64)
        return float(wrong / max(np.square(exact).mean(dtype=np.float64), 1e-30))


def _rounded_data(data: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    scale, zero = asymmetric_quantizer(low, high, bits)
    return (np.clip(np.rint(data / np.float32(scale)) + zero, 0, 2**bits - 1) - zero) * np.float32(scale)


def _rounded_weight(weight: np.ndarray, bits: int) -> np.ndarray:
    """[G, M / G, K], one scale an output."""
    matrix = weight.reshape(-1, weight.shape[2])
    scale = symmetric_scales(matrix, 0, bits)[:, None]
    return (np.rint(matrix / scale) * scale).reshape(weight.shape)


def _observed(
    model: ir.Model,
    scales: ChannelScales,
    readers: list[LinearScales],
    batches: Iterable[Mapping[str, np.ndarray]],
    context: Context,
    width: int,
) -> _Seen:
    """Run the model once, operator by operator, and keep what each reads: extremes, and some rows."""
    seen = _Seen(np.zeros(scales.count + 1))
    pieces = Pieces(model, batches, threads=context.threads)
    pieces.hold(one.linear.data for one in readers)
    known: dict[tuple[object, ...], _Layer] = {}
    wrong = saturating_kernels(context.target) if width > SAFE_BITS else frozenset[str]()
    for one in readers:
        pieces.compute([one.linear.data])
        try:
            rows = linear_rows(one.linear)
            key = (one.linear.data, *_layout(rows))
            if key not in known:
                known[key] = _layer(pieces, rows, width)
            low, high = known[key].low, known[key].high
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise DeclinedError("it reads NaN or infinity", one.linear.node)
            saturates = any(kernels_of(one.linear.node, form) & wrong for form in ("static", "dynamic"))
            bits = SAFE_BITS if saturates else width
            seen.layers[one] = replace(known[key], rows=rows, weight_bits=bits)
            np.maximum.at(seen.largest, one.ins, np.maximum(-low, high))
        except DeclinedError as refusal:
            context.missed(WHAT, refusal.why, one.linear.node)
        pieces.release([one.linear.data, one.linear.data])
    return seen


def _layout(rows: LinearRows) -> tuple[object, ...]:
    linear = rows.linear
    place = (rows.strides, rows.dilations, rows.begins, rows.ends, rows.spread)
    return linear.in_axis, linear.in_channels, linear.kernel, linear.groups, *place


def _layer(pieces: Pieces, rows: LinearRows, width: int) -> _Layer:
    """Extremes of the channels that an operator reads, and rows evenly over all batches."""
    linear = rows.linear
    low, high = np.zeros(linear.in_channels), np.zeros(linear.in_channels)
    found: list[np.ndarray] = []
    draw = np.random.default_rng(0)
    each = max(1, -(-_ROWS // pieces.batches))
    for batch in range(pieces.batches):
        data = np.asarray(pieces.array(linear.data, batch), np.float32)
        channels = np.moveaxis(data, linear.in_axis, 0).reshape(linear.in_channels, -1)
        low = np.minimum(low, channels.min(axis=1, initial=0.0))
        high = np.maximum(high, channels.max(axis=1, initial=0.0))
        count = rows.count(data)
        found.append(rows.patches(data, np.sort(draw.choice(count, min(each, count), replace=False))))
    return _Layer(rows, np.concatenate(found, axis=1), low, high, width)


def _sets(scales: ChannelScales, readers: list[LinearScales]) -> list[tuple[np.ndarray, list[LinearScales]]]:
    """Variables that the same operators read, in the order of the first of these."""
    reading: dict[int, list[int]] = {}
    for number, one in enumerate(readers):
        for variable in np.unique(one.ins[one.ins != FIXED]):
            reading.setdefault(int(variable), []).append(number)
    grouped: dict[tuple[int, ...], list[int]] = {}
    for variable, numbers in sorted(reading.items()):
        grouped.setdefault(tuple(numbers), []).append(variable)
    return [(np.array(grouped[numbers]), [readers[number] for number in numbers]) for numbers in sorted(grouped)]
