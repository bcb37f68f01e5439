"""Axes followed through rearrangements, against numpy."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.canonical import canonicalize
from graphopt.ir.views import REPEATED, View, views


def _farthest(body: str, inputs: str, constants: str) -> list[list[tuple[int, ...]]]:
    """Origins of the atoms of y's axes, in terms of the graph's input."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => (float[a,b,c,d] y) <{constants}> {{ {body} }}'
    )
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    view = next(views(model.graph.outputs[0]))
    assert view.base is model.graph.inputs[0]
    return [[atom.origin for atom in axis] for axis in view.axes]


def test_two_spellings_of_transposed_heads_are_one() -> None:
    direct = _farthest(
        "a = Reshape(x, s) y = Transpose<perm=[0,2,3,1]>(a)", "float[2,5,12] x", "int64[4] s = {2,5,3,4}"
    )
    detour = _farthest(
        "a = Reshape(x, s) b = Transpose<perm=[0,2,1,3]>(a) c = Reshape(b, f) d = Transpose<perm=[0,2,1]>(c) "
        "y = Reshape(d, t)",
        "float[2,5,12] x",
        "int64[4] s = {2,5,3,4}, int64[3] f = {6,5,4}, int64[4] t = {2,3,4,5}",
    )
    assert direct == detour == [[(0,)], [(2, 0)], [(2, 1)], [(1,)]]


def test_symbolic_axes_are_carried() -> None:
    origins = _farthest(
        "a = Reshape(x, s) y = Transpose<perm=[0,2,1,3]>(a)", "float[N,S,12] x", "int64[4] s = {0,0,3,4}"
    )
    assert origins == [[(0,)], [(2, 0)], [(1,)], [(2, 1)]]


def test_expand_adds_a_repeating_atom() -> None:
    origins = _farthest(
        "a = Unsqueeze(x, two) b = Expand(a, e) y = Reshape(b, h)",
        "float[2,3,5,4] x",
        "int64[1] two = {2}, int64[5] e = {2,3,2,5,4}, int64[4] h = {2,6,5,4}",
    )
    assert origins[1][0] == (1,)
    assert origins[1][1][0] == REPEATED


def test_axes_cut_apart_and_joined_elsewhere_are_unknown() -> None:
    with pytest.raises(AssertionError):  # 6 x 4 -> 8 x 3 cuts through an atom: the chain ends before it
        _farthest("y = Reshape(x, s)", "float[6,4] x", "int64[2] s = {8,3}")


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(3)), st.integers(0, 2))
def test_atoms_are_where_numpy_puts_the_elements(first: list[int], second: list[int], joined: int) -> None:
    """Reshape to four axes, permute, join two, permute again: the atoms say the same as arange does."""
    shape = (2, 15, 14)
    split = (2, 3, 5, 14)
    array = np.arange(math.prod(shape)).reshape(split).transpose(first)
    sizes = list(array.shape)
    merged = (*sizes[:joined], sizes[joined] * sizes[joined + 1], *sizes[joined + 2 :])
    array = array.reshape(merged).transpose(second)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]> g (float[2,15,14] x)
        => (float[{",".join(map(str, array.shape))}] y)
        <int64[4] s = {{{",".join(map(str, split))}}}, int64[3] m = {{{",".join(map(str, merged))}}}>
        {{ a = Reshape(x, s) b = Transpose<perm={list(first)}>(a) c = Reshape(b, m)
           y = Transpose<perm={list(second)}>(c) }}"""
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    view = next(views(model.graph.outputs[0]))
    order = sorted((atom for axis in view.axes for atom in axis), key=lambda atom: atom.origin)
    flat = [atom for axis in view.axes for atom in axis]
    rebuilt = np.arange(math.prod(shape)).reshape([atom.size for atom in order])
    rebuilt = rebuilt.transpose([order.index(atom) for atom in flat]).reshape(array.shape)
    assert np.array_equal(rebuilt, array)


def _symbolic(body: str, inputs: str, constants: str) -> list[View]:
    """Views of y, the farthest first, in a canonical model (its dimensions have names)."""
    model = canonicalize(
        ir.from_onnx_text(
            f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => (float[?] out) <{constants}> '
            f"{{ {body} out = Relu(y) }}"
        )
    )
    (last,) = [node for node in model.graph if node.op_type == "Relu"]
    value = last.inputs[0]
    assert value is not None
    return list(views(value))


def test_symbolic_axes_are_joined_and_cut_again() -> None:
    view = _symbolic(
        "s = Shape(x) b = Reshape(x, flat) c = Reshape(b, s) y = Transpose<perm=[0,2,1,3]>(c)",
        "float[B,S,3,4] x",
        "int64[2] flat = {-1, 12}",
    )[0]
    assert view.base.name == "x"
    assert len(view.nodes) == 3
    assert [[atom.size for atom in axis] for axis in view.axes] == [["B"], [3], ["S"], [4]]


def test_a_cut_through_a_symbol_is_unknown() -> None:
    found = _symbolic(
        "a = Transpose<perm=[0,2,1,3]>(x) y = Reshape(a, flat)", "float[B,S,3,4] x", "int64[2] flat = {-1, 12}"
    )
    assert [view.base.name for view in found] == ["y"]  # three heads of S tokens are no B * S rows of 12


@pytest.mark.parametrize(
    "take",
    [
        "i = Constant<value = int64 {1}>() y = Gather<axis=0>(b, i)",
        "p, q, r = Split<axis=0>(b, ones) y = Squeeze(q, zero)",
        "q = Slice(b, one, two, zero) y = Squeeze(q, zero)",
    ],
)
def test_an_entry_of_a_packed_axis_is_noted(take: str) -> None:
    view = _symbolic(
        f"a = Reshape(x, s) b = Transpose<perm=[2,0,3,1,4]>(a) {take}",
        "float[B,S,24] x",
        "int64[5] s = {0,0,3,4,2}, int64[3] ones = {1,1,1}, "
        "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}",
    )[0]
    assert view.base.name == "x"
    assert view.part is not None
    assert (view.part.index, view.part.atom.origin, view.part.atom.size) == (1, (2, 0), 3)
    assert [[atom.origin for atom in axis] for axis in view.axes] == [[(0,)], [(2, 1, 0)], [(1,)], [(2, 1, 1)]]
