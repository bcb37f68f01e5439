"""Models as other people's tools wrote them: old opsets, missing shapes, sparse and broken weights, strings.

The reference is always the file as it came, run by onnxruntime with its optimisations off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.errors import InvalidGraphError, LoadError
from graphopt.ir.canonical import NOTES
from graphopt.ir.check import check_structure
from graphopt.ir.compare import within_exact
from graphopt.ir.session import open_session, session_options
from graphopt.passes import Context, FoldConstants
from graphopt.recipe import preset

FLOAT = TensorProto.FLOAT
node = helper.make_node


def tensor(name: str, shape: Sequence[int | str] | None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def constant(name: str, content: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(content, dtype), name)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
    *,
    opset: int,
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "old", list(inputs), list(outputs), list(weights))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    proto.ir_version = 8
    return proto


def as_it_came(proto: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = session_options(threads=1, optimized=False)
    return list(onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds))


def interface(proto: onnx.ModelProto) -> list[str]:
    return [f"{value.name} {value.type}" for value in (*proto.graph.input, *proto.graph.output)]


def assert_kept(proto: onnx.ModelProto, feeds: dict[str, Any]) -> ir.Model:
    """Same interface and outputs after loading, and after the exact passes."""
    expected = as_it_came(proto, feeds)
    model = graphopt.load(proto)
    assert model.opset_imports[""] >= 18
    assert interface(ir.to_proto(model)) == interface(proto)
    assert within_exact(expected, open_session(model, optimized=False).run(None, feeds))
    for single in preset("exact").passes:
        single.run(model, Context())
        check_structure(model)
        assert interface(ir.to_proto(model)) == interface(proto), single.name
    assert within_exact(expected, open_session(model).run(None, feeds))
    return model


def image(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("op_type", "opset", "scale"),
    [("Upsample", 9, 2.0), ("Upsample", 9, 1.5), ("Resize", 10, 2.0), ("Resize", 10, 1.5), ("Resize", 10, 0.6)],
)
def test_upsample_and_resize_keep_their_old_coordinates(op_type: str, opset: int, scale: float, mode: str) -> None:
    scales = constant("scales", [1, 1, scale, scale])
    proto = build(
        [node(op_type, ["x", "scales"], ["y"], mode=mode)],
        [tensor("x", [1, 1, 5, 7])],
        [tensor("y", [1, 1, "height", "width"])],
        [scales],
        opset=opset,
    )
    assert_kept(proto, image(1, 1, 5, 7))


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, None])
def test_softmax_family_flattens_around_its_axis(op_type: str, axis: int | None) -> None:
    attributes = {} if axis is None else {"axis": axis}
    proto = build(
        [node(op_type, ["x"], ["y"], **attributes)],
        [tensor("x", ["n", 3, 4])],
        [tensor("y", ["n", 3, 4])],
        opset=11,
    )
    assert_kept(proto, image(2, 3, 4))


def test_hardmax_in_a_branch() -> None:
    then = helper.make_graph([node("Hardmax", ["x"], ["t"])], "then", [], [tensor("t", None)])
    other = helper.make_graph([node("Neg", ["x"], ["e"])], "other", [], [tensor("e", None)])
    proto = build(
        [node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        [tensor("x", [2, 3, 4]), tensor("c", [], TensorProto.BOOL)],
        [tensor("y", [2, 3, 4])],
        opset=11,
    )
    for condition in (True, False):
        assert_kept(proto, {**image(2, 3, 4), "c": np.array(condition)})


def scan_8() -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Add", ["sum", "next"], ["new"]), node("Identity", ["new"], ["out"])],
        "body",
        [tensor("sum", [2]), tensor("next", [2])],
        [tensor("new", [2]), tensor("out", [2])],
    )
    return build(
        [node("Scan", ["", "s", "x"], ["y", "z"], num_scan_inputs=1, body=body)],
        [tensor("s", [1, 2]), tensor("x", [1, 3, 2])],
        [tensor("y", [1, 2]), tensor("z", [1, 3, 2])],
        opset=8,
    )


def dropout_mask() -> onnx.ModelProto:
    return build(
        [node("Dropout", ["x"], ["y", "mask"])],
        [tensor("x", [2, 3])],
        [tensor("y", [2, 3]), tensor("mask", [2, 3])],
        opset=9,
    )


@pytest.mark.parametrize(("make", "why"), [(scan_8, "Scan"), (dropout_mask, "mask of Dropout")])
def test_what_the_converters_would_change_is_refused(make: Callable[[], onnx.ModelProto], why: str) -> None:
    with pytest.raises(InvalidGraphError, match="cannot be lifted") as caught:
        graphopt.load(make())
    assert why in str(caught.value)


@pytest.mark.parametrize("opset", [9, 17])
def test_output_without_a_shape_is_read_and_stays_so(opset: int) -> None:
    proto = build(
        [node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"])],
        [tensor("x", ["n", 2, 4, 4])],
        [tensor("y", None)],
        [
            constant("w", np.random.default_rng(0).standard_normal((3, 2, 1, 1))),
            *(constant(name, [0.5, 2, 3]) for name in "sbmv"),
        ],
        opset=opset,
    )
    assert len(assert_kept(proto, image(1, 2, 4, 4)).graph) == 1


def test_anonymous_dimensions_stay_anonymous() -> None:
    weight = constant("w", np.ones((4, 3)))
    proto = build(
        [node("MatMul", ["x", "w"], ["y"])],
        [tensor("x", [None, None, 4])],  # type: ignore[list-item]
        [tensor("y", [None, None, 3])],  # type: ignore[list-item]
        [weight],
        opset=17,
    )
    assert_kept(proto, image(2, 3, 4))


@pytest.mark.parametrize("shape", [None, [None]])
def test_input_without_a_shape_behind_identity(shape: list[None] | None) -> None:
    proto = build([node("Identity", ["x"], ["y"])], [tensor("x", shape)], [tensor("y", [2])], opset=17)
    assert_kept(proto, image(2))


@pytest.mark.parametrize("indices", [[0, 4, 8], [[0, 0], [1, 1], [2, 2]]])
def test_sparse_weights_are_read(indices: list[Any]) -> None:
    proto = build([node("MatMul", ["x", "w"], ["y"])], [tensor("x", [2, 3])], [tensor("y", [2, 3])], opset=17)
    places = constant("w_places", indices, np.int64)
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(constant("w", [1.0, 2.0, 3.0]), places, [3, 3]))
    before = proto.SerializeToString()
    model = assert_kept(proto, image(2, 3))
    assert proto.SerializeToString() == before
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    assert np.array_equal(weight.numpy(), np.diag([1.0, 2.0, 3.0]))


def test_sparse_constant_is_read() -> None:
    sparse = helper.make_sparse_tensor(constant("v", [2.0]), constant("i", [1], np.int64), [3])
    nodes = [node("Constant", [], ["w"], sparse_value=sparse), node("Add", ["x", "w"], ["y"])]
    assert_kept(build(nodes, [tensor("x", [3])], [tensor("y", [3])], opset=13), image(3))


@pytest.mark.parametrize(("shape", "place"), [([1 << 20, 1 << 20], 0), ([-3, 3], 0), ([3, 3], 99)])
def test_broken_sparse_weight_is_refused(shape: list[int], place: int) -> None:
    proto = build([node("MatMul", ["x", "w"], ["y"])], [tensor("x", [2, 3])], [tensor("y", [2, 3])], opset=17)
    sparse = helper.make_sparse_tensor(constant("w", [1.0]), constant("i", [place], np.int64), [3, 3])
    sparse.dims[:] = shape
    proto.graph.sparse_initializer.append(sparse)
    with pytest.raises(LoadError, match="sparse weight 'w'"):
        graphopt.load(proto)


def strings() -> onnx.ModelProto:
    weight = helper.make_tensor("w", TensorProto.STRING, [1], [b"b"])
    return build(
        [
            node("Constant", [], ["k"], value_strings=[b"a", b"b"]),
            node("Equal", ["x", "k"], ["same"]),
            node("Cast", ["same"], ["y"], to=FLOAT),
            node("Identity", ["w"], ["z"]),
        ],
        [tensor("x", [2], TensorProto.STRING)],
        [tensor("y", [2]), tensor("z", [1], TensorProto.STRING)],
        [weight],
        opset=19,
    )


def test_strings_as_weights_inputs_and_outputs() -> None:
    proto = strings()
    model = graphopt.load(proto)
    for single in preset("exact").passes:
        single.run(model, Context())
        check_structure(model)
    result = open_session(model).run(None, {"x": np.array(["a", "x"], object)})
    assert [entry.tolist() for entry in result] == [[1.0, 0.0], ["b"]]


@pytest.mark.parametrize("words", [np.array(["a", "x"]), np.array(["a", "x"], object)])
def test_strings_are_taken_as_example_inputs(words: np.ndarray) -> None:
    result = graphopt.optimize(strings(), {"x": words}, recipe="exact", quiet=True)
    assert result.report.error.error == 0.0


@pytest.mark.parametrize(("entry", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, None), (1.0, None)])
def test_weights_that_are_not_finite_are_noted(entry: float, word: str | None) -> None:
    weight = constant("w", [1.0, entry])
    proto = build([node("Add", ["x", "w"], ["y"])], [tensor("x", [2])], [tensor("y", [2])], [weight], opset=17)
    notes = graphopt.load(proto).meta.get(NOTES, [])
    assert notes == ([f"weight 'w' holds {word}"] if word else [])


def test_split_to_sequence_of_a_scalar_is_left_alone() -> None:
    nodes = [
        node("SplitToSequence", ["x", "size"], ["parts"], axis=0),
        node("ConcatFromSequence", ["parts"], ["y"], axis=1),
    ]
    size = constant("size", 1, np.int64)
    proto = build(nodes, [tensor("x", [2, 3])], [tensor("y", [1, 6])], [size], opset=18)
    model = graphopt.load(proto)
    FoldConstants().run(model, Context())
    feeds = image(2, 3)
    assert within_exact(as_it_came(proto, feeds), open_session(model).run(None, feeds))


@pytest.mark.parametrize("name", ["", "old"])
def test_standard_domain_under_its_long_name(name: str) -> None:
    proto = build([node("Softmax", ["x"], ["y"], axis=1)], [tensor("x", [2, 3, 4])], [tensor("y", [2, 3, 4])], opset=11)
    proto.opset_import[0].domain = "ai.onnx"
    proto.graph.name = name
    assert_kept(proto, image(2, 3, 4))


def test_recursive_function_is_refused() -> None:
    call = node("Again", ["x"], ["y"], domain="own")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Again", ["x"], ["y"], [call], imports)
    proto = build([call], [tensor("x", [2])], [tensor("y", [2])], opset=17)
    proto.opset_import.append(imports[1])
    proto.functions.append(function)
    with pytest.raises(InvalidGraphError):
        graphopt.load(proto)


def test_scalar_inputs_are_made_up() -> None:
    proto = build([node("Add", ["x", "x"], ["y"])], [tensor("x", [])], [tensor("y", [])], opset=17)
    assert graphopt.optimize(proto, recipe="exact", quiet=True).report.error.error == 0.0
