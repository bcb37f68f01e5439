"""Configurations of normalisations, reductions, signal processing, and ops between real and quantized numbers."""

from __future__ import annotations

from tests.laws.channel_cases import Case, Cases, case, codes, const, data, fed, moved, positive, rows, weight

_POSITIVE = weight(4, low=0.5, high=1.5, signed=False)
_STATISTICS = {"s": weight(4), "b": weight(4), "m": weight(4), "v": _POSITIVE}
_VECTORS = {"s": weight(6), "b": weight(6)}
_FROZEN = "the axis that is normalised stays"


def _softmax(operator: str) -> list[Case]:
    return [
        case(f"y = {operator}<axis=1>(a)", a=data(2, 4, 3), passes=(0, 2), groups=2),
        case(f"y = {operator}(a)", a=data(4, 3), passes=(0,), reads="square", groups=0),
        case(f"y = {operator}<axis=-2>(a)", a=rows(4, 3), passes=(2,)),
        case(f"y = {operator}<axis=0>(a)", a=data(4), why=_FROZEN),
    ]


_NORMS: Cases = {
    "BatchNormalization": [
        case("y = BatchNormalization(a, s, b, m, v)", a=data(2, 4, 3), **_STATISTICS, passes=(0, 1, 2), groups=3),
        case("y = BatchNormalization(a, s, b, m, v)", a=rows(4, 3, 3), **_STATISTICS, reads="square"),
        case("y = BatchNormalization(a, s, b, m, v)", a=moved(1, 4, 3), **_STATISTICS, reads="square", groups=1),
        case("y = BatchNormalization(a, s, b, m, v)", a=data(3, 4), **{**_STATISTICS, "b": moved(4)},
             reads="square", groups=0),
        case("y = BatchNormalization<epsilon=0.0>(a, s, b, m, v)", a=data(1, 4, 3), **_STATISTICS, passes=(1, 2)),
        case("y = BatchNormalization(a, s, b, m, v)", a=data(1, 4, 3), s=const([1.0, 1.0, 1.0, 1.0]), b=weight(4),
             m=weight(4), v=const([1.0, 1.0, 1.0, 1.0]), passes=(1, 2)),
    ],
    "InstanceNormalization": [
        case("y = InstanceNormalization(a, s, b)", a=data(2, 6, 5), **_VECTORS, passes=(0, 1, 2), groups=2),
        case("y = InstanceNormalization(a, s, b)", a=rows(6, 3, 3), **_VECTORS, reads="square"),
        case("y = InstanceNormalization(a, s, b)", a=moved(2, 6, 5), s=weight(6), b=moved(6), reads="square",
             groups=0),
    ],
    "LayerNormalization": [
        case("y = LayerNormalization(a, s, b)", a=data(3, 4, 6), **_VECTORS, passes=(0, 1, 2), groups=2),
        case("y, m, d = LayerNormalization<axis=-2>(a, s, b)", a=data(3, 4, 6), s=weight(4, 6), b=weight(4, 6),
             results=("y", "m", "d"), passes=(0, 1, 2), groups=1),
        case("y = LayerNormalization<axis=1>(a, s)", a=rows(4, 6), s=weight(4, 6), passes=(1, 2), groups=0),
        case("y = LayerNormalization(a, s)", a=data(3, 4, 6), s=weight(6), reads="square", groups=0),
        case("y = LayerNormalization<axis=1>(a, s)", a=data(3, 4, 6), s=weight(6), passes=(0, 1, 2), groups=1),
        case("y = LayerNormalization(a, s)", a=data(4, 6), s=const([1.0]), passes=(0, 1), groups=1),
    ],
    "RMSNormalization": [
        case("y = RMSNormalization(a, s)", a=data(3, 4, 6), s=weight(6), opset=23, passes=(0, 1, 2), groups=2),
        case("y = RMSNormalization<axis=-2>(a, s)", a=rows(4, 6), s=weight(4, 6), opset=23, passes=(1, 2), groups=0),
    ],
    "GroupNormalization": [
        case("y = GroupNormalization<num_groups=3>(a, s, b)", a=data(2, 6, 5), **_VECTORS, passes=(0, 1, 2), groups=2),
        case("y = GroupNormalization<num_groups=2>(a, s, b)", a=rows(6, 2, 2), **_VECTORS, reads="square"),
        case("y = GroupNormalization<num_groups=6>(a, s, b)", a=data(1, 6, 5), **_VECTORS, passes=(1, 2)),
        case("y = GroupNormalization<num_groups=1>(a, s, b)", a=data(1, 6, 5), **_VECTORS, passes=(1, 2), groups=0),
        case("y = GroupNormalization<num_groups=3>(a, s, b)", a=moved(1, 6, 5), s=weight(6), b=moved(6),
             reads="square", groups=0),
        case("c = Conv<group=2>(a, w)", "y = GroupNormalization<num_groups=3>(c, s, b)", a=data(1, 4, 5),
             w=weight(12, 2, 1), s=weight(12), b=weight(12), groups=1),
    ],
    "MeanVarianceNormalization": [
        case("y = MeanVarianceNormalization(a)", a=data(2, 4, 3, 3), passes=(0, 1, 2, 3), groups=0),
        case("y = MeanVarianceNormalization<axes=[0, 2]>(a)", a=rows(4, 3), passes=(1, 2), groups=0),
        case("y = MeanVarianceNormalization<axes=[-1]>(a)", a=data(3, 4, 5), passes=(0, 1, 2), groups=0),
        case("y = MeanVarianceNormalization<axes=[-1]>(a)", a=moved(3, 4, 5), reads="square", groups=0),
    ],
    "LRN": [
        case("y = LRN<size=3, alpha=0.5>(a)", a=data(2, 6, 3, 3), passes=(0, 1, 2, 3), groups=3),
        case("y = LRN<size=3, bias=0.5>(a)", a=rows(6, 3, 3), reads="square", passes=(1, 2, 3), groups=2),
    ],
    "LpNormalization": [
        case("y = LpNormalization(a)", a=data(3, 4), passes=(0, 1), groups=2),
        case("y = LpNormalization<axis=0, p=1>(a)", a=data(3, 4, 2), passes=(0, 1, 2), groups=3),
        case("y = LpNormalization<axis=1>(a)", a=rows(4, 3), reads="square", passes=(1, 2), groups=1),
        case("y = LpNormalization<axis=1>(a)", a=moved(3, 4), passes=(0, 1)),
        case("y = LpNormalization<axis=-1>(a)", a=data(3, 4, 2), opset=22, passes=(0, 1, 2), groups=3),
    ],
    "Softmax": [
        *_softmax("Softmax"),
        case("s = Softmax(a)", "y = MatMul(s, v)", a=data(2, 3, 4), v=data(2, 4, 5), passes=(0, 1, 2), groups=3),
    ],
    "LogSoftmax": _softmax("LogSoftmax"),
    "Hardmax": _softmax("Hardmax"),
    "com.microsoft::SkipLayerNormalization": [
        case("y = com.microsoft.SkipLayerNormalization(a, k, s, b, c)", a=data(2, 3, 6), k=data(2, 3, 6), **_VECTORS,
             c=weight(6), passes=(0, 1, 2), groups=2),
        case("y, , , t = com.microsoft.SkipLayerNormalization(a, k, s)", a=data(2, 3, 6), k=moved(2, 3, 6),
             s=weight(6), results=("y", "t"), reads="square", groups=0),
        case("y, , , t = com.microsoft.SkipLayerNormalization(a, k, s, b)", a=rows(3, 6), k=rows(3, 6), **_VECTORS,
             results=("y", "t"), passes=(1, 2), groups=1),
        case("y = com.microsoft.SkipLayerNormalization(a, k, s)", a=data(2, 3, 6), k=data(1, 3, 6), s=weight(6),
             passes=(0, 1, 2), groups=2),
    ],
    "com.microsoft::SkipSimplifiedLayerNormalization": [
        case("y = com.microsoft.SkipSimplifiedLayerNormalization(a, k, s, c)", a=data(2, 3, 6), k=data(2, 3, 6),
             s=weight(6), c=weight(6), passes=(0, 1, 2), groups=2),
        case("y, , , t = com.microsoft.SkipSimplifiedLayerNormalization(a, k, s)", a=rows(3, 6), k=rows(3, 6),
             s=weight(6), results=("y", "t"), passes=(1, 2), groups=1),
    ],
}  # fmt: skip


def _reduction(operator: str, exact: bool) -> list[Case]:
    """One axis, several with and without keepdims, all, none, at a run-time size, over what is 0 and what is not."""
    text = f"y = {operator}"
    operand = positive if operator.startswith("ReduceLogSum") else data
    kept = 0 if operator == "ReduceLogSum" else 1  # of axes that stay, the logarithm of a masked 0 is infinite
    return [
        case(
            f"{text}<keepdims=0>(a, axes)", a=operand(3, 4, 5), axes=const([1]), passes=(0, 1), groups=2 * kept + exact
        ),
        case(f"{text}(a, axes)", a=operand(2, 3, 4), axes=const([-1, 0]), passes=(1,), groups=kept + 2 * exact),
        case(f"{text}<keepdims=0>(a)", a=operand(3, 4), passes=(), groups=2 * exact),
        case(f"{text}<noop_with_empty_axes=1>(a)", a=operand(3, 4), passes=(0, 1), groups=0),
        case(
            f"{text}(a, axes)", a=rows(4, 3, low=0.3, high=0.7, signed=False), axes=const([2]), passes=(1,), groups=kept
        ),
        case(f"{text}<keepdims=0>(a, axes)", a=moved(3, 4, 5), axes=const([1]), passes=(0, 1), groups=2),
        case(f"{text}<keepdims=0>(a, axes)", a=operand(3, 4, 5), axes=const([1]), reads="square", groups=0),
    ]


_INDEX = "positions along this axis count"
_REDUCTIONS: Cases = {
    **{name: _reduction(name, True) for name in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")},
    **{name: _reduction(name, False) for name in ("ReduceMean", "ReduceMin", "ReduceProd")},
    **{name: _reduction(name, False) for name in ("ReduceLogSum", "ReduceLogSumExp")},
    "ReduceMax": [
        *_reduction("ReduceMax", False),
        case("y = ReduceMax(a, axes)", a=positive(3, 4).then("Neg"), axes=const([1]), passes=(0,)),
    ],
    **{
        name: [
            case(f"y = {name}<axis=1, keepdims=0>(a)", a=data(3, 4, 5), passes=(0, 1), groups=2),
            case(f"y = {name}<axis=-1, select_last_index=1>(a)", a=rows(4, 5), passes=(1,)),
            case(f"y = {name}<axis=0>(a)", a=data(4), groups=0, passes=()),
        ]
        for name in ("ArgMax", "ArgMin")
    },
    "TopK": [
        case("y, i = TopK(a, k)", a=data(3, 6), k=const([2]), results=("y", "i"), passes=(0,)),
        case("y, i = TopK<axis=1, largest=0>(a, k)", a=rows(5, 4), k=const([3]), passes=(2,)),
        case("y, i = TopK<axis=0, sorted=1>(a, k)", a=data(5, 4), k=const([5]), reads="square", groups=0),
    ],
    "CumSum": [
        case("y = CumSum(a, i)", a=data(3, 4), i=const(1), passes=(0,)),
        case("y = CumSum<exclusive=1, reverse=1>(a, i)", a=rows(4, 3), i=const([-2]), passes=(2,)),
        case("y = CumSum(a, i)", a=data(4), i=const(0), why=_INDEX),
    ],
    "CumProd": [
        case("y = CumProd(a, i)", a=data(3, 4), i=const(1), opset=26, passes=(0,)),
        case("y = CumProd<exclusive=1>(a, i)", a=data(3, 4), i=const(-1), opset=26, reads="square", groups=0),
    ],
}
_PER_TENSOR = {"s": const(0.02), "z": const(110, "uint8")}
_PER_CHANNEL = {"s": const([0.02, 0.03, 0.04, 0.02]), "z": const([100, 110, 120, 130], "uint8")}
_QUANTIZATION: Cases = {
    "QuantizeLinear": [
        case("q = QuantizeLinear(a, s, z)", "y = DequantizeLinear(q, s, z)", a=data(3, 4), **_PER_TENSOR,
             passes=(0, 1), groups=2),
        case("q = QuantizeLinear(a, s, z)", "y = DequantizeLinear(q, s, z)", a=data(3, 4, 2), **_PER_CHANNEL,
             reads="square", groups=3),
        case("q = QuantizeLinear<axis=0>(a, s)", "y = DequantizeLinear<axis=0>(q, s)", a=data(4, 3),
             s=_PER_CHANNEL["s"], passes=(0, 1), groups=2),
        case("u = Mul(a, x)", "q = QuantizeLinear<axis=1, block_size=2>(u, s, z)",
             "y = DequantizeLinear<axis=1, block_size=2>(q, s, z)", a=data(8), x=fed([[1.0], [0.5], [0.8]]),
             s=const([[0.02, 0.03, 0.04, 0.05]] * 3), z=const([[0, 1, 2, 3]] * 3, "int8"), passes=(1,)),
        case("q = QuantizeLinear(a, s, z)", "y = DequantizeLinear(q, s, z)", a=rows(4, 3), **_PER_TENSOR,
             reads="square", groups=2),
        case("q = QuantizeLinear(a, s, z)", "y = DequantizeLinear(q, s, z)", a=moved(3, 4), **_PER_TENSOR,
             reads="square", groups=0),
        case("q = QuantizeLinear(a, s, z)", "y = Cast<to=1>(q)", a=data(3, 4), **_PER_TENSOR, reads="square",
             groups=0),
        case("q = QuantizeLinear(a, s, z)", "p = Pad(q, pads)", "d = DequantizeLinear(p, s, z)", "y = Mul(d, w)",
             a=data(3, 4), **_PER_TENSOR, pads=const([0, 1, 0, 2]), w=moved(7), reads="square", groups=0),
        case("q = QuantizeLinear<axis=1, block_size=3>(a, s)", "y = DequantizeLinear<axis=1, block_size=3>(q, s)",
             a=data(3, 8), s=const([[0.02, 0.03, 0.04]] * 3), groups=0),
    ],
    "DequantizeLinear": [
        case("w = DequantizeLinear(q, s, z)", "y = MatMul(a, w)", a=data(2, 3), q=codes(3, 4, dtype="uint8", low=0,
             high=200), **_PER_CHANNEL, passes=(0, 1), groups=3),
        case("w = DequantizeLinear<axis=0>(q, s)", "y = Conv(a, w)", a=moved(1, 3, 5), q=codes(4, 3, 2),
             s=_PER_CHANNEL["s"], passes=(1,), groups=2),
        case("w = DequantizeLinear(q, s, z)", "y = Gemm<transB=1>(a, w)", a=data(2, 3),
             q=codes(4, 3, dtype="uint8", low=0, high=200), **_PER_TENSOR, reads="square", groups=3),
        case("w = DequantizeLinear<axis=0, block_size=2>(q, s, z)", "y = MatMul(a, w)", a=moved(2, 6), q=codes(6, 4),
             s=const([[0.02, 0.03, 0.04, 0.05]] * 3), z=const([[1, 2, 3, 4]] * 3, "int8"), passes=(0, 1), groups=2),
        case("b = DequantizeLinear(q, s)", "y = Add(a, b)", a=data(2, 4), q=codes(4, dtype="int32"), s=const(0.02),
             reads="square", groups=1),
        case("t = Transpose(q)", "w = DequantizeLinear(t, s, z)", "y = MatMul(a, w)", a=data(2, 3),
             q=codes(4, 3, dtype="uint8", low=0, high=200), **_PER_TENSOR, passes=(0, 1), groups=3),
        case("t = Transpose(q)", "w = DequantizeLinear(t, s, z)", "y = MatMul(a, w)", a=moved(2, 3),
             q=codes(4, 3, dtype="uint8", low=0, high=200), **_PER_TENSOR, passes=(0, 1), groups=1),
        case("c = Cast<to=2>(a)", "y = DequantizeLinear(c, s, z)", a=data(3, 4, low=1, high=50, signed=False),
             **_PER_TENSOR, reads="square", groups=0),
        case("w = DequantizeLinear(q, s, z)", "u = DequantizeLinear(q, s)", "m = MatMul(a, w)", "y = MatMul(m, u)",
             a=moved(2, 4), q=codes(4, 4, dtype="uint8", low=0, high=200), **_PER_TENSOR, groups=0),
    ],
    "DynamicQuantizeLinear": [
        case("q, s, z = DynamicQuantizeLinear(a)", "y = DequantizeLinear(q, s, z)", a=data(3, 4), passes=(0, 1),
             groups=0),
        case("q, s, z = DynamicQuantizeLinear(a)", "y = DequantizeLinear(q, s, z)", a=data(3, 4), reads="square",
             groups=2),
        case("q, s, z = DynamicQuantizeLinear(a)", "y = DequantizeLinear(q, s, z)", a=rows(4, 3), passes=(1, 2),
             groups=2),
        case("u = Mul(a, f)", "q, s, z = DynamicQuantizeLinear(u)", "y = DequantizeLinear(q, s, z)", a=data(3, 4),
             f=const([[100.0], [1.0], [1.0]]), passes=(0, 1), groups=0),
        case("u = Exp(a)", "q, s, z = DynamicQuantizeLinear(u)", "y = DequantizeLinear(q, s, z)",
             a=positive(3, 4, low=-3.0, high=-2.0), passes=(0, 1), groups=0),
    ],
}  # fmt: skip
_FREQUENCIES = "its positions are frequencies or moments"
_MEL = {"l": const(4), "f": fed(16, "int64"), "r": const(8000), "b": const(20.0), "t": const(4000.0)}
_SIGNALS: Cases = {
    **{
        name: [case(f"h = {name}(n)", "y = Mul(a, h)", n=fed(5, "int64"), a=data(3, 5), groups=0)]
        for name in ("BlackmanWindow", "HammingWindow", "HannWindow")
    },
    "MelWeightMatrix": [
        case("m = MelWeightMatrix(l, f, r, b, t)", "y = MatMul(a, m)", **_MEL, a=data(3, 9), groups=0),
    ],
    "DFT": [
        case("y = DFT(a, , i)", a=data(2, 3, 4, 1), i=const(-2), passes=(0, 1), groups=2),
        case("y = DFT<onesided=1>(a, , i)", a=data(2, 3, 6, 1), i=const(1), reads="square", passes=(0, 2), groups=2),
        case("y = DFT<inverse=1>(a)", a=rows(3, 4, 2), groups=0),
        case("y = DFT(a)", a=data(3, 4, 5, 1), opset=19, passes=(0, 2)),
        case("y = DFT<axis=0>(a)", a=data(4, 3, 1), opset=19, groups=0),
        case("y = DFT<axis=2>(a)", a=data(2, 3, 4, 1), opset=19, passes=(0, 1), groups=2),
    ],
    "STFT": [
        case("y = STFT(a, k, w)", a=data(2, 16, 1), k=const(4), w=weight(8), why=_FREQUENCIES),
        case("y = STFT<onesided=0>(a, k, , l)", a=data(2, 16, 1), k=const(4), l=const(8), why=_FREQUENCIES),
    ],
    "AffineGrid": [
        case("g = AffineGrid(t, s)", "y = GridSample(a, g)", t=data(2, 2, 3), s=const([2, 4, 3, 3]), a=data(2, 4, 5, 5),
             passes=(1,)),
    ],
}  # fmt: skip
NORMS: Cases = {**_NORMS, **_REDUCTIONS, **_QUANTIZATION, **_SIGNALS}
