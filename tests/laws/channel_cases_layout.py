"""Configurations of the operators that regroup, select, join, pad, pool and sample, and of control flow."""

from __future__ import annotations

import numpy as np

from tests.laws.channel_cases import Case, Cases, case, const, data, fed, moved, numbers, rows, weight

_LAYOUT: Cases = {
    "Reshape": [
        case("y = Reshape(a, t)", a=data(2, 12), t=const([2, 3, 4]), passes=(0, 1, 2), groups=3),
        case("y = Reshape(a, t)", a=data(2, 3, 4), t=const([0, -1]), passes=(0, 1), groups=3),
        case("y = Reshape(a, t)", a=data(4, 8), t=const([8, 4]), passes=(0, 1), groups=3),
        case("y = Reshape(a, t)", a=data(2, 6, 6), t=const([12, 0]), passes=(0, 1), groups=2),
        case("y = Reshape(a, t)", a=data(6, 4), t=const([0, 2, 2, 1]), passes=(0, 1, 2), groups=3),
        case("y = Reshape(a, t)", a=data(4, 6), t=const([-1]), passes=(0,), groups=2),
        case("y = Reshape(a, t)", a=rows(12), t=const([0, 3, 4]), passes=(1, 2), groups=2),
        case("y = Reshape(a, t)", a=rows(3, 4), t=const([-1, 12]), passes=(1,), groups=2),
        case("y = Reshape(a, t)", a=rows(3, 4), t=const([-1, 4]), passes=(0, 1), groups=2),
        case("s = Shape<end=2>(a)", "t = Concat<axis=0>(s, r)", "y = Reshape(a, t)", a=rows(3, 8), r=const([2, 4]),
             passes=(1, 2, 3), groups=3),
        case("s = Shape(a)", "n = Gather(s, i)", "p = Mul(n, h)", "t = Concat<axis=0>(p, w)", "y = Reshape(a, t)",
             a=rows(3, 4), i=const([0]), h=const([3]), w=const([4]), passes=(0, 1), groups=2),
        case("b = Reshape(a, t)", "c = Transpose<perm=[0, 2, 1]>(b)", "y = Reshape(c, u)", a=data(2, 12),
             t=const([2, 3, 4]), u=const([2, 12]), passes=(0, 1), groups=2),
        case("b = Reshape(a, t)", "c = Add(b, d)", "y = Reshape(c, u)", a=data(2, 24), t=const([2, 4, 6]),
             d=data(6), u=const([2, 6, 4]), passes=(0, 1, 2), groups=2),
        case("b = Reshape(a, t)", "y = MatMul(b, w)", a=rows(4, 5), t=const([0, -1]), w=weight(20, 3), passes=(1,),
             groups=3),
        case("y = Reshape<allowzero=1>(a, t)", a=data(3, 8), t=const([6, 4]), passes=(0, 1), groups=2),
        case("y = Reshape(a, t)", a=data(2, 3, 4), t=const([1, 2, 12, 1]), passes=(1, 2), groups=3),
        case("y = Reshape(a, t)", a=data(4, 9), t=const([6, 6]), groups=0),
    ],
    "Flatten": [
        case("y = Flatten(a)", a=data(2, 3, 4), passes=(0, 1), groups=3),
        case("y = Flatten<axis=2>(a)", a=rows(3, 4), passes=(0, 1), groups=2),
        case("y = Flatten<axis=-1>(a)", a=data(2, 3, 4), passes=(0, 1), groups=3),
        case("y = Flatten<axis=0>(a)", a=data(3, 4), passes=(1,), groups=2),
    ],
    "Squeeze": [
        case("y = Squeeze(a, i)", a=data(2, 1, 4, 1), i=const([1, -1]), passes=(0, 1), groups=2),
        case("y = Squeeze(a)", a=data(2, 1, 2), passes=(0, 1), groups=2),
        case("y = Squeeze(a, i)", a=rows(1, 4), i=const([1]), passes=(1,)),
    ],
    "Unsqueeze": [
        case("y = Unsqueeze(a, i)", a=data(3, 4), i=const([0, -1]), passes=(1, 2), groups=2),
        case("y = Unsqueeze(a, i)", a=rows(4), i=const([1]), passes=(2,)),
    ],
    "Transpose": [
        case("y = Transpose(a)", a=data(2, 3, 4), passes=(0, 1, 2), groups=3),
        case("y = Transpose<perm=[1, 0, 2]>(a)", a=rows(3, 4), passes=(0, 2), groups=2),
    ],
    "Concat": [
        case("y = Concat<axis=1>(a, b)", a=data(3, 4), b=data(3, 2), passes=(0, 1), groups=3),
        case("y = Concat<axis=-1>(a, a)", a=data(3, 4), passes=(0, 1), groups=2),
        case("y = Concat<axis=0>(a, b, a)", a=data(3, 4), b=moved(2, 4), reads="square", groups=0),
        case("y = Concat<axis=1>(x, a)", a=data(2, 4), x=fed(np.ones((2, 3), np.float32)), passes=(1,)),
        case("y = Concat<axis=1>(a, b)", a=rows(4, 3), b=rows(2, 3), passes=(1, 2), groups=3),
        case("y = Concat<axis=0>(a, b)", a=rows(4), b=data(2, 4), passes=(1,)),
        case("y = Concat<axis=1>(a, b)", a=data(3, 4), b=const(np.zeros((3, 0), np.float32)), passes=(0, 1), groups=2),
        case("c = Concat<axis=1>(a, b)", "y = Concat<axis=1>(c, a)", a=data(2, 3), b=data(2, 2), passes=(0, 1),
             groups=3),
        case("y = Concat<axis=0>(a)", a=data(3, 4), groups=2),
    ],
    "DepthToSpace": [
        case("y = DepthToSpace<blocksize=2>(a)", a=data(1, 12, 2, 3), passes=(1,)),
        case('y = DepthToSpace<blocksize=2, mode="CRD">(a)', a=rows(12, 2, 3), reads="square"),
        case('c = Conv<group=2>(a, w)', 'y = DepthToSpace<blocksize=2, mode="DCR">(c)', a=data(1, 4, 2, 2),
             w=weight(24, 2, 1, 1), passes=(1,), groups=2),
    ],
    "SpaceToDepth": [
        case("y = SpaceToDepth<blocksize=2>(a)", a=data(2, 3, 4, 2), passes=(0, 1), groups=2),
        case("y = SpaceToDepth<blocksize=2>(a)", a=rows(3, 2, 2), reads="square"),
    ],
    "Expand": [
        case("y = Expand(a, t)", a=data(3, 1), t=const([2, 1, 4]), passes=(0, 1, 2), groups=3),
        case("u = Unsqueeze(a, i)", "e = Expand(u, t)", "y = Reshape(e, v)", a=data(1, 2, 3, 4), i=const([2]),
             t=const([1, 2, 2, 3, 4]), v=const([1, 4, 3, 4]), passes=(1, 2, 3), groups=4),
        case("s = Shape(b)", "y = Expand(a, s)", a=data(1, 4), b=rows(4), passes=(1,)),
        case("s = Shape(b)", "y = Expand(a, s)", a=data(4), b=data(3, 4), passes=(0, 1)),
        case("y = Expand(a, t)", a=data(3, 1), t=const([3, 4]), reads="square", groups=1),
        case("y = Expand(a, t)", a=rows(1), t=const([1, 5]), passes=(1,)),
    ],
    "Tile": [
        case("y = Tile(a, r)", a=data(3, 4), r=const([1, 2]), passes=(0, 1), groups=2),
        case("y = Tile(a, r)", a=data(3, 1), r=const([2, 4]), passes=(0, 1), groups=2),
        case("y = Tile(a, r)", a=rows(3), r=const([2, 3]), passes=(1,)),
        case("b = Tile(a, r)", "y = Add(b, c)", a=data(4), r=const([3]), c=data(12), passes=(0,)),
        case("y = Tile(a, r)", a=data(1, 3), r=const([1, 2]), reads="square", groups=1),
    ],
    "Trilu": [
        case("y = Trilu(a)", a=data(2, 4, 4), passes=(0,)),
        case("y = Trilu<upper=0>(a, k)", a=data(2, 3, 4), k=const(1), reads="square", passes=(0,)),
    ],
    "ReverseSequence": [
        case("y = ReverseSequence(a, l)", a=data(4, 3, 5), l=const([1, 4, 2]), passes=(2,)),
        case("y = ReverseSequence<batch_axis=0, time_axis=1>(a, l)", a=data(3, 4, 5), l=const([1, 4, 2]),
             reads="square", passes=(2,)),
    ],
    "Shape": [
        case("s = Shape(a)", "n = Gather(s, i)", "f = Cast<to=1>(n)", "y = Div(a, f)", a=data(3, 4), i=const(1),
             passes=(0, 1), groups=2),
        case("s = Shape<start=-1>(a)", "f = Cast<to=1>(s)", "q = Sqrt(f)", "y = Mul(a, q)", a=rows(4, 3),
             passes=(1, 2), groups=2),
        case("s = Shape(a)", "f = Cast<to=1>(s)", "y = Mul(f, w)", a=rows(4), w=weight(2), groups=0),
    ],
    "Size": [
        case("s = Size(a)", "f = Cast<to=1>(s)", "y = Div(a, f)", a=data(3, 4), passes=(0, 1), groups=2),
        case("s = Size(a)", "f = Cast<to=1>(s)", "y = Div(a, f)", a=rows(4), passes=(1,)),
    ],
    "ConstantOfShape": [
        case("s = Shape(a)", "f = ConstantOfShape<value=float[1] {2.0}>(s)", "y = Add(a, f)", a=rows(4), passes=(1,)),
        case("s = Shape(b)", "n = Gather(s, i)", "t = Concat<axis=0>(n, k)", "f = ConstantOfShape(t)",
             "y = Add(a, f)", a=data(4), b=rows(2), i=const([0]), k=const([4]), passes=(1,)),
        case("s = Shape(a)", "f = ConstantOfShape<value=float[1] {2.0}>(s)", "y = Mul(f, w)", a=rows(4),
             w=weight(1, 4), reads="square"),
    ],
    "EyeLike": [case("e = EyeLike(a)", "y = Add(a, e)", a=data(3, 4), why="its positions are on the diagonal")],
    "Range": [
        case("s = Shape(a)", "n = Gather(s, i)", "r = Range(o, n, k)", "e = Gather(t, r)", "y = Add(a, e)",
             a=rows(3), i=const(0), o=const(0), k=const(1), t=weight(9, 3), passes=(1,), groups=1),
        case("s = Shape(a)", "n = Gather(s, i)", "r = Range(o, n, k)", "e = Gather(t, r)", "y = Add(a, e)",
             a=data(2, 4, 3), i=const(1), o=const(0), k=const(1), t=weight(9, 3), passes=(0, 1, 2), groups=3),
    ],
    "OneHot": [
        case("y = OneHot(i, d, v)", i=numbers(3, 4), d=const(5), v=const([0.0, 1.0]), passes=(0, 1), groups=2),
        case("h = OneHot<axis=1>(i, d, v)", "y = MatMul(h, w)", i=numbers(4, 3), d=const([4]), v=const([0.0, 1.0]),
             w=weight(3, 5), groups=1),
    ],
}  # fmt: skip
_STARTS = {"s": const([1]), "e": const([5]), "i": const([1])}
_TABLE = weight(9, 4)
_INDEXING: Cases = {
    "Split": [
        case("y, z = Split<axis=1>(a, s)", a=data(2, 7), s=const([2, 5]), results=("y", "z"), passes=(0, 1), groups=3),
        case("y, z = Split<axis=1, num_outputs=2>(a)", a=data(2, 6), results=("y", "z"), passes=(0, 1), groups=3),
        case("p, q, r = Split<axis=-1, num_outputs=3>(a)", "y = Add(p, r)", "z = Mul(q, q)", a=rows(2, 9),
             results=("y", "z"), groups=0),
        case("y, z = Split<axis=0>(a, s)", a=data(6, 2), s=const([1, 5]), results=("y", "z"), passes=(1,), groups=2),
        case("p, q = Split<axis=1, num_outputs=2>(a)", "y = Mul(p, q)", a=data(2, 8), passes=(0, 1), groups=2),
        case("y, z = Split<num_outputs=2>(a)", a=data(5, 2), results=("y", "z"), passes=(0, 1), groups=3),
    ],
    "Slice": [
        case("y = Slice(a, s, e, i)", a=data(2, 8), **_STARTS, passes=(0, 1), groups=2),
        case("y = Slice(a, s, e, i, t)", a=data(2, 9), **{**_STARTS, "e": const([8])}, t=const([2]), passes=(0, 1),
             groups=2),
        case("y = Slice(a, s, e, i, t)", a=data(2, 9), s=const([-1]), e=const([-100]), i=const([-1]), t=const([-1]),
             passes=(0, 1), groups=2),
        case("y = Slice(a, s, e, i, t)", a=data(9, 2), s=const([100]), e=const([0]), i=const([0]), t=const([-3]),
             passes=(0, 1), groups=2),
        case("y = Slice(a, s, e)", a=data(5, 6), s=const([1, -5]), e=const([100, -1]), passes=(0, 1), groups=2),
        case("y = Slice(a, s, e, i, t)", a=data(5, 6, 3), s=const([4, 0]), e=const([0, 6]), i=const([0, 1]),
             t=const([-1, 3]), passes=(0, 1, 2), groups=3),
        case("y = Slice(a, s, e, i)", a=data(2, 8), s=const([3]), e=const([4]), i=const([1]), passes=(0,), groups=1),
        case("b = Slice(a, s, e, i)", "c = Slice(a, e, u, i)", "y = Mul(b, c)", a=data(2, 8), s=const([0]),
             e=const([4]), u=const([8]), i=const([1]), passes=(0, 1), groups=2),
        case("b = Slice(a, s, u, i, t)", "c = Slice(a, o, u, i, t)", "y = Mul(b, c)", a=data(2, 8), s=const([0]),
             o=const([1]), u=const([8]), i=const([1]), t=const([2]), passes=(0, 1), groups=2),
        case("b = Slice(a, s, e, i)", "c = Slice(a, e, u, i)", "d = Concat<axis=1>(c, b)", "y = Mul(a, d)",
             a=data(2, 8), s=const([0]), e=const([4]), u=const([8]), i=const([1]), passes=(0, 1), groups=2),
        case("y = Slice(a, s, e, i)", a=rows(8), **_STARTS, passes=(1,)),
        case("y = Slice(a, s, e, i)", a=rows(8), s=const([0]), e=const([2]), i=const([0]), passes=(1,)),
        case("n = Shape(x)", "y = Slice(a, s, n, i)", a=data(4, 9), x=rows().then("Identity"), s=const([0]),
             i=const([1]), passes=(0,), groups=1),
        case("b = Slice(a, s, e, i)", "y = Concat<axis=1>(b, a)", a=data(2, 4), s=const([2]), e=const([2]),
             i=const([1]), passes=(0, 1), groups=2),
    ],
    "Gather": [
        case("y = Gather<axis=1>(a, i)", a=data(2, 6), i=const([0, 3, 5]), passes=(0, 1), groups=2),
        case("y = Gather<axis=1>(a, i)", a=data(2, 6), i=const([-1, 2, 2, 0]), passes=(0, 1), groups=2),
        case("y = Gather<axis=1>(a, i)", a=data(2, 6), i=const(2), passes=(0,), groups=1),
        case("y = Gather<axis=0>(a, i)", a=data(6, 2), i=const([[0, 1], [2, 3]]), passes=(0, 1, 2), groups=2),
        case("y = Gather<axis=0>(a, i)", a=data(6, 2), i=const([[0, 1], [1, -3]]), groups=1),
        case("y = Gather<axis=0>(a, i)", a=data(6, 2), i=const([[4, 4, 4], [2, 2, 2]]), groups=1),
        case("y = Gather(t, i)", i=fed([[1, 0, 3]], "int64"), t=_TABLE, passes=(2,)),
        case("y = Gather(t, i)", i=numbers(2, 3), t=_TABLE, passes=(0, 1, 2), groups=3),
        case("y = Gather<axis=1>(x, i)", x=fed(np.ones((2, 5), np.float32)), i=const([4, 0, 2]), passes=(1,)),
        case("y = Gather<axis=1>(x, i)", "z = Gather<axis=1>(a, i)", "w = Mul(y, z)", i=const([4, 0, 2]), a=data(2, 5),
             x=fed(np.ones((2, 5), np.float32)), results=("w",), groups=0),
        case("y = Gather<axis=1>(a, i)", a=rows(6), i=const([5, 1], "int32"), passes=(1,)),
        case("b = Gather<axis=1>(a, i)", "c = Gather<axis=1>(a, j)", "y = Mul(b, c)", a=data(2, 6), i=const([0, 1, 2]),
             j=const([5, 4, 3]), passes=(0, 1), groups=2),
        case("b = Gather<axis=1>(a, i)", "y = Gather<axis=1>(a, j)", a=data(2, 6), i=const(-2), j=const([5, 3, 1]),
             passes=(0, 1), groups=2),
        case("y = Gather<axis=1>(a, i)", a=data(2, 6), i=const([3]), passes=(0,), groups=1),
    ],
    "GatherElements": [
        case("y = GatherElements<axis=1>(a, i)", a=data(3, 4), i=const([[0, 1], [3, 2], [1, 1]]), passes=(0, 1),
             groups=1),
        case("y = GatherElements<axis=0>(a, i)", a=data(3, 4), i=const([[0, 1, 2]]), groups=0),
        case("y = GatherElements<axis=-1>(a, i)", a=data(3, 4), i=numbers(3, 2), reads="square", groups=0),
        case("y = GatherElements(t, i)", t=weight(5, 4), i=numbers(3, 4), passes=(0, 1), groups=1),
    ],
    "GatherND": [
        case("y = GatherND(a, i)", a=data(3, 4, 5), i=const([[0], [2]]), passes=(0, 1, 2), groups=3),
        case("y = GatherND(a, i)", a=data(3, 4, 5), i=const([[0, 1], [2, -1], [1, 3]]), passes=(0, 1), groups=1),
        case("y = GatherND<batch_dims=1>(a, i)", a=data(3, 4, 5), i=const([[1], [3], [0]]), passes=(0, 1), groups=2),
        case("y = GatherND(a, i)", a=rows(4, 5), i=const([[0, 1], [1, 2]]), passes=(0, 1), reads="square", groups=0),
    ],
    "ScatterElements": [
        case("y = ScatterElements<axis=1>(a, i, u)", a=data(3, 4), i=const([[0, 1], [3, 2], [1, 0]]), u=data(3, 2),
             passes=(0,)),
        case('y = ScatterElements<axis=0, reduction="add">(a, i, u)', a=data(3, 4), i=const([[0, 1, 2, 0]]),
             u=data(1, 4), groups=0),
        case('y = ScatterElements<axis=1, reduction="mul">(a, i, u)', a=data(3, 4), i=const([[1], [3], [1]]),
             u=moved(3, 1), reads="square", groups=0),
        case('y = ScatterElements<axis=1, reduction="max">(a, i, u)', a=moved(3, 4), i=const([[1], [3], [1]]),
             u=data(3, 1), passes=(0,)),
    ],
    "ScatterND": [
        case("y = ScatterND(a, i, u)", a=data(4, 5), i=const([[1], [3]]), u=data(2, 5), passes=(1,), groups=1),
        case('y = ScatterND<reduction="add">(a, i, u)', a=data(4, 5, 2), i=const([[1, 0], [3, 2]]), u=moved(2, 2),
             reads="square", groups=0),
        case('y = ScatterND<reduction="mul">(a, i, u)', a=data(4, 5), i=const([[1], [3]]), u=moved(2, 5), groups=1),
        case("y = ScatterND(a, i, u)", a=rows(5), i=const([[1], [0]]), u=data(2, 5), reads="square", groups=1),
    ],
    "TensorScatter": [
        case("y = TensorScatter(a, u, i)", a=data(2, 3, 6, 4), u=data(2, 3, 2, 4), i=const([0, 3]), opset=24,
             groups=2),
        case('y = TensorScatter<mode="circular", axis=1>(a, u, i)', a=data(1, 6, 4), u=moved(1, 2, 4), i=const([5]),
             opset=24, reads="square", groups=0),
        case("y = TensorScatter(a, u)", a=data(2, 3, 6, 4), u=data(2, 3, 2, 4), opset=24, passes=(0, 1, 3), groups=3),
    ],
    "Pad": [
        case("y = Pad(a, p)", a=data(2, 4), p=const([0, 1, 0, 2]), passes=(0, 1), groups=3),
        case("y = Pad(a, p, v)", a=data(2, 4), p=const([1, 1, 0, 2]), v=const(0.5), passes=(0, 1), groups=3),
        case("y = Pad(a, p, v)", a=data(2, 4, 3), p=const([0, 0, 1, 0, 0, 1]), v=const(0.5), reads="square", groups=0),
        case("y = Pad(a, p)", a=data(2, 6, 3), p=const([0, -1, 0, 0, -2, 0]), passes=(0, 2), groups=2),
        case("y = Pad(a, p)", a=data(2, 6), p=const([0, 2, 0, -2]), passes=(0,), groups=1),
        case("y = Pad(a, p, , i)", a=data(2, 4, 3), p=const([1, 2]), i=const([-2]), passes=(0, 1, 2), groups=4),
        case('y = Pad<mode="reflect">(a, p)', a=data(2, 4, 3), p=const([0, 0, 1, 0, 0, 1]), reads="square",
             passes=(0, 1), groups=2),
        case('y = Pad<mode="edge">(a, p)', a=data(2, 4), p=const([0, 1, 0, 1]), passes=(0,), groups=1),
        case('y = Pad<mode="wrap">(a, p)', a=rows(4, 3), p=const([0, 0, 1, 0, 0, 1]), passes=(1,), groups=1),
        case("y = Pad(a, p)", a=rows(4), p=const([0, 0, 0, 3]), passes=(1,), groups=2),
        case("b = Pad(a, p)", "y = Add(b, c)", a=data(1, 4, 3), p=const([0, 2, 0, 0, 2, 0]), c=data(1, 8, 3),
             passes=(1, 2), groups=2),
        case("y = Pad(a, p)", a=rows(4), p=const([1, 0, 1, 0]), passes=(1,), groups=1),
    ],
    "CenterCropPad": [
        case("y = CenterCropPad(a, t)", a=data(2, 4, 5), t=const([2, 4, 3]), passes=(0, 1), groups=2),
        case("y = CenterCropPad<axes=[1, -1]>(a, t)", a=rows(4, 5), t=const([4, 8]), passes=(1,), groups=1),
    ],
}  # fmt: skip
_IMAGE = (1, 4, 5, 5)


def _pools(operator: str, *attributes: str) -> list[Case]:
    return [
        case(f"y = {operator}{attributes[0]}(a)", a=data(2, 4, 6), passes=(0, 1), groups=2),
        case(f"y = {operator}{attributes[1]}(a)", a=rows(4, 5, 5), passes=(1,), reads="square"),
        case(f"y = {operator}{attributes[2]}(a)", a=moved(1, 4, 3, 4, 5), passes=(1,)),
    ]


_WINDOWS = (
    "<kernel_shape=[2], strides=[2]>",
    "<kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]>",
    '<kernel_shape=[2, 2, 2], auto_pad="SAME_UPPER">',
)
_REGIONS = {"r": const([[0.0, 0.0, 3.0, 3.0], [1.0, 1.0, 4.0, 4.0]]), "b": const([0, 1])}
_POOLING: Cases = {
    "AveragePool": [
        *_pools("AveragePool", *_WINDOWS),
        case("y = AveragePool<kernel_shape=[3], pads=[1, 1], count_include_pad=1, ceil_mode=1>(a)", a=data(1, 4, 5),
             passes=(1,)),
    ],
    "MaxPool": [
        *_pools("MaxPool", *_WINDOWS),
        case("y, i = MaxPool<kernel_shape=[2]>(a)", a=data(2, 4, 6), results=("y", "i"), why="indices count"),
        case("y = MaxPool<kernel_shape=[3], pads=[2, 2], dilations=[2]>(a)", a=data(1, 4, 6), reads="square"),
    ],
    "LpPool": [*_pools("LpPool", *_WINDOWS), case("y = LpPool<kernel_shape=[2], p=1>(a)", a=data(1, 4, 6))],
    "GlobalAveragePool": _pools("GlobalAveragePool", "", "", ""),
    "GlobalMaxPool": _pools("GlobalMaxPool", "", "", ""),
    "GlobalLpPool": _pools("GlobalLpPool", "", "<p=1>", ""),
    "MaxRoiPool": [
        case("y = MaxRoiPool<pooled_shape=[2, 2]>(a, r)", a=data(*_IMAGE), opset=21,
             r=const([[0.0, 0.0, 0.0, 3.0, 3.0], [0.0, 1.0, 1.0, 4.0, 4.0]]), passes=(1,)),
    ],
    "RoiAlign": [
        case("y = RoiAlign<output_height=2, output_width=2>(a, r, b)", a=data(2, 4, 5, 5), **_REGIONS, passes=(1,)),
        case('y = RoiAlign<mode="max", output_height=2, output_width=2>(a, r, b)', a=data(2, 4, 5, 5), **_REGIONS,
             reads="square", passes=(1,)),
    ],
    "Resize": [
        case('y = Resize<mode="nearest">(a, , f)', a=data(*_IMAGE), f=const([1.0, 1.0, 2.0, 2.0]), passes=(1,)),
        case('y = Resize<mode="linear">(a, , , t)', a=data(2, 4, 3, 3), t=const([2, 4, 5, 6]), passes=(0, 1),
             groups=2),
        case('y = Resize<mode="linear", axes=[2, 3]>(a, , , t)', a=rows(4, 3, 3), t=const([5, 6]), reads="square"),
        case('y = Resize<mode="cubic", coordinate_transformation_mode="align_corners">(a, , , t)', a=data(1, 4, 3, 3),
             t=const([1, 4, 6, 6]), passes=(1,)),
        case('y = Resize<mode="nearest", axes=[3, 1]>(a, , , t)', a=data(1, 4, 3, 3), t=const([6, 4]),
             passes=(1, 2), groups=2),
        case('y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(a, , f)',
             a=data(3, 3, 4), f=const([1.0, 1.3, 2.0]), passes=(0,), groups=1),
        case('y = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(a, r, f)',
             a=data(1, 4, 3, 3), r=const([0.0, 0.0, 0.2, 0.2, 1.0, 1.0, 0.8, 0.8]), f=const([1.0, 1.0, 1.0, 2.0]),
             groups=1),
        case("s = Shape(a)", "n = Slice(s, o, k)", "t = Concat<axis=0>(n, h)", 'y = Resize<mode="nearest">(a, , , t)',
             a=rows(4, 3, 3), o=const([0]), k=const([2]), h=const([6, 6]), passes=(1,)),
        case('y = Resize<mode="linear", keep_aspect_ratio_policy="not_larger">(a, , , t)', a=data(4, 6),
             t=const([4, 3]), groups=0),
    ],
    "GridSample": [
        case("y = GridSample(a, g)", a=data(2, 4, 5, 5), g=weight(2, 3, 3, 2, low=0.1, high=0.9), passes=(0, 1),
             groups=2),
        case('y = GridSample<mode="nearest", padding_mode="border">(a, g)', a=rows(4, 5, 5), g=rows(3, 3, 2),
             reads="square"),
    ],
    "Col2Im": [
        case("y = Col2Im(a, t, k)", a=data(2, 12, 4), t=const([3, 3]), k=const([2, 2]), passes=(0, 1), groups=2),
        case("y = Col2Im<pads=[1, 1, 1, 1]>(a, t, k)", a=rows(8, 16), t=const([3, 3]), k=const([2, 2]),
             reads="square"),
    ],
}  # fmt: skip
_TRUE, _COUNT = fed(True), fed(3, "int64")


def _if(then: str, other: str) -> str:
    return (
        f"y = If(c)<then_branch = t () => (float[n,4] r) {{ {then} }}, "
        f"else_branch = e () => (float[n,4] s) {{ {other} }}>"
    )


def _loop(body: str, extra: str = "", results: str = "y") -> str:
    return (
        f"{results} = Loop(m, , a)<body = g (int64 i, bool p, float[2,4] h) => (bool q, float[2,4] o{extra}) "
        f"{{ q = Identity(p) {body} }}>"
    )


_SCAN = (
    "{0} = Scan<num_scan_inputs=1{1}, body = g (float[2,4] h, float[2,4] x) => (float[2,4] o, float[2,4] z) "
    "{{ {2} }}>(a, b)"
)
_CONTROL: Cases = {
    "If": [
        case(_if("r = Relu(a)", "s = Mul(a, a)"), c=_TRUE, a=data(2, 4), passes=(0, 1), groups=2),
        case(_if("r = MatMul(a, w)", "s = MatMul(a, v)"), c=_TRUE, a=data(2, 3), w=weight(3, 4), v=weight(3, 4),
             passes=(0, 1), groups=3),
        case(_if("r = Sigmoid(a)", "s = Relu(a)"), c=_TRUE, a=data(2, 4), reads="square", groups=0),
        case(_if("r = MatMul(a, w) ", "s = MatMul(b, w)"), c=fed(False), a=data(2, 3), b=moved(2, 3), w=weight(3, 4),
             reads="square", groups=2),
        case(_if("k = Relu(a) r = MatMul(k, w)", "s = Identity(b)"), c=fed(False), a=rows(3), b=rows(4),
             w=weight(3, 4), passes=(1,), groups=2),
        case("y = If(c)<then_branch = t () => (float[2,4] r) { r = Identity(a) }, "
             "else_branch = e () => (float[2,3] s) { s = Identity(b) }>", c=_TRUE, a=data(2, 4), b=data(2, 3),
             groups=0),
        case(_if("w = Constant<value = float[4] {1.0, 2.0, 3.0, 4.0}>() r = Add(a, w)", "s = Relu(a)"), c=_TRUE,
             a=data(2, 4), reads="square", groups=1),
        case(_if("r = Identity(w)", "s = Identity(a)"), c=_TRUE, a=data(2, 4), w=weight(2, 4), passes=(0, 1),
             groups=2),
        case(_if("d = Not(c) r = If(d)<then_branch = f () => (float[2,4] u) { u = Mul(a, v) }, "
                 "else_branch = g () => (float[2,4] w) { w = Neg(b) }>", "s = Add(a, b)"), c=_TRUE, a=data(2, 4),
             b=data(4), v=weight(4), groups=0),
        case(_if("r = Add(a, b)", "s = Sub(a, b)"), c=_TRUE, a=data(2, 4), b=data(4), passes=(0, 1), groups=2),
    ],
    "Loop": [
        case(_loop("o = Mul(h, w)"), m=_COUNT, a=data(2, 4), w=weight(4), passes=(0, 1), groups=2),
        case(_loop("o = MatMul(h, w)"), m=_COUNT, a=data(2, 4), w=weight(4, 4), passes=(0, 1), groups=2),
        case(_loop("k = Add(b, w) o = Mul(h, k)"), m=_COUNT, a=data(2, 4), b=data(2, 4), w=weight(4), reads="square",
             groups=2),
        case(_loop("k = If(p)<then_branch = f () => (float[2,4] u) { u = MatMul(h, w) }, "
                   "else_branch = e () => (float[2,4] v) { v = Identity(h) }> o = Add(k, b)"), m=_COUNT, a=data(2, 4),
             w=weight(4, 4), b=weight(4), passes=(0, 1), groups=1),
        case(_loop("o = Sigmoid(h)"), m=_COUNT, a=data(2, 4), reads="square", groups=0),
        case(_loop("k = MatMul(h, w) l = Relu(k) o = MatMul(l, v)"), m=_COUNT, a=data(2, 4), w=weight(4, 5),
             v=weight(5, 4), passes=(0, 1), groups=3),
        case(_loop("o = Add(h, w) z = Mul(h, h)", ", float[2,4] z", "y, s"), m=_COUNT, a=data(2, 4), w=weight(4),
             results=("y", "s"), groups=0),
        case(_loop("o = Add(h, w) z = Mul(h, h)", ", float[2,4] z", "y, s"), m=const(3), a=data(2, 4), w=weight(4),
             results=("y", "s"), passes=(0, 1), groups=1),
        case(_loop("o = Add(h, w)"), m=_COUNT, a=data(2, 4), w=moved(4), reads="square", groups=0),
        case("y, s = Loop(m, , a, b)<body = g (int64 i, bool p, float[2,4] h, float[2,4] k) => "
             "(bool q, float[2,4] o, float[2,4] l) { q = Identity(p) o = Identity(k) l = Identity(h) }>", m=_COUNT,
             a=data(2, 4), b=moved(2, 4), results=("y", "s"), reads="square", groups=0),
        case("y = Loop(m, , x)<body = g (int64 i, bool p, float[2,3] h) => (bool q, float[2,3] o) { q = Identity(p) "
             "k = MatMul(h, w) o = MatMul(k, v) }>", m=_COUNT, x=fed(np.ones((2, 3), np.float32)), w=weight(3, 5),
             v=weight(5, 3), groups=1),
        case(_loop("t = Transpose(h) k = MatMul(h, t) o = MatMul(k, h)"), m=_COUNT, a=moved(2, 4), passes=(0, 1),
             groups=0),
    ],
    "Scan": [
        case(_SCAN.format("y, s", "", "o = Add(h, x) z = Mul(o, w)"), a=data(2, 4), b=data(3, 2, 4), w=weight(4),
             results=("y", "s"), passes=(0, 1), groups=2),
        case(_SCAN.format("y, s", ", scan_input_axes=[1], scan_output_axes=[-1]", "k = MatMul(h, w) o = Add(k, x) "
             "z = Tanh(o)"), a=data(2, 4), b=data(2, 3, 4), w=weight(4, 4), results=("y", "s"), passes=(0, 1),
             groups=2),
        case(_SCAN.format("y, s", ", scan_input_directions=[1]", "o = Mul(h, x) z = Sigmoid(o)"), a=data(2, 4),
             b=moved(3, 2, 4), results=("y", "s"), reads="square", groups=0),
    ],
}  # fmt: skip
LAYOUT: Cases = {**_LAYOUT, **_INDEXING, **_POOLING, **_CONTROL}
