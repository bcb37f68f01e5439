from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from graphopt.ir.cost import cost, storage_bytes
from graphopt.ir.ops import default_table
from graphopt.ir.ops.families import no_macs, unary
from graphopt.ir.ops.row import OpRow

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def parsed(
    signature: str, body: str, domains: str = "", opset: int = 21, **weights: np.ndarray | ir.Tensor
) -> ir.Model:
    """A model from ONNX text; `weights` become initializers (their names are used in `body`)."""
    header = f'<ir_version: 10, opset_import: ["": {opset}{domains}]>'
    model = ir.from_onnx_text(f"{header} g {signature} {{ {body} }}")
    for node in model.graph.all_nodes():
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in weights:
                node.replace_input_with(index, _initializer(model.graph, value.name, weights[value.name]))
    return common_passes.ShapeInferencePass()(model).model


def _initializer(graph: ir.Graph, name: str, weight: np.ndarray | ir.Tensor) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(weight) if isinstance(weight, np.ndarray) else weight
        graph.initializers.add(
            ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def test_one_convolution_by_hand() -> None:
    model = parsed(
        "(float[1,4,8,8] x) => (float[1,6,8,8] y)",
        "c = Conv <group=2, pads=[1,1,1,1]> (x, w, b) y = Relu (c)",
        w=zeros(6, 2, 3, 3),
        b=zeros(6),
    )
    found = cost(model)
    convolution, activation = found.nodes
    assert convolution.macs == 6 * 64 * 2 * 9
    assert convolution.parameters == 6 * 2 * 9 + 6
    assert convolution.weight_bytes == 4 * convolution.parameters
    assert convolution.bytes_read == 4 * (256 + 108 + 6)
    assert convolution.bytes_written == 4 * 384
    assert (activation.macs, activation.bytes_read, activation.bytes_written) == (0, 1536, 1536)
    assert (convolution.runs, convolution.operator, convolution.known) == (1, "Conv", True)
    assert found.macs == convolution.macs
    assert found.bytes_read == convolution.bytes_read + 1536
    assert found.unknown == found.assumed == ()


def test_symbolic_dimensions_are_bound() -> None:
    model = parsed("(float[n,t,6] x) => (float[n,t,4] y)", "y = MatMul (x, w)", w=zeros(6, 4))
    assert cost(model, {"n": 3, "t": 5}).macs == 3 * 5 * 6 * 4
    assert cost(model, {"n": 1, "t": 1}).macs == 24


def test_a_shared_weight_is_counted_once_but_read_twice() -> None:
    model = parsed("(float[2,4] x) => (float[2,4] y)", "h = MatMul (x, w) y = MatMul (h, w)", w=zeros(4, 4))
    found = cost(model)
    assert (found.parameters, found.weight_bytes) == (16, 64)
    assert [entry.parameters for entry in found.nodes] == [16, 0]
    assert [entry.bytes_read for entry in found.nodes] == [32 + 64, 32 + 64]
    assert found.macs == 2 * 32


def test_a_value_read_twice_by_one_node_is_moved_once() -> None:
    model = parsed("(float[2,4] x) => (float[2,4] y)", "y = Mul (x, x)")
    assert cost(model).nodes[0].bytes_read == 32


def test_shape_constants_and_indices_are_no_parameters() -> None:
    model = parsed(
        "(float[2,4] x) => (float[1,4] y)",
        "r = Reshape (x, s) g = Gather <axis=1> (r, i) y = Clip (g, low)",
        s=np.array([1, 8]),
        i=np.arange(4),
        low=zeros(),
    )
    found = cost(model)
    assert found.parameters == 1  # the bound of Clip is a float that the network holds
    assert found.weight_bytes == 8 * 2 + 8 * 4 + 4


def test_a_gather_reads_what_it_writes_and_not_the_whole_table() -> None:
    model = parsed("(int64[2,3] i) => (float[2,3,8] y)", "y = Gather (table, i)", table=zeros(1000, 8))
    entry = cost(model).nodes[0]
    assert entry.bytes_read == 2 * 3 * 8 * 4 + 6 * 8
    assert entry.bytes_written == 2 * 3 * 8 * 4
    assert entry.parameters == 8000


def test_a_quantized_model_has_the_parameters_of_the_float_one() -> None:
    model = parsed(
        "(float[1,4,8,8] x) => (float[1,6,6,6] y)",
        "xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z) "
        "wd = DequantizeLinear <axis=0> (w, ws, wz) bd = DequantizeLinear <axis=0> (b, bs) "
        "y = Conv (xd, wd, bd)",
        s=np.array(0.1, np.float32),
        z=np.array(7, np.uint8),
        w=zeros(6, 4, 3, 3, dtype=np.int8),
        ws=zeros(6),
        wz=zeros(6, dtype=np.int8),
        b=zeros(6, dtype=np.int32),
        bs=zeros(6),
    )
    found = cost(model)
    assert found.parameters == 6 * 4 * 9 + 6
    assert found.weight_bytes == 216 + 6 * 4 + 6 * 4 + 6 + 6 * 4 + 4 + 1
    assert found.macs == 6 * 36 * 36
    assert found.unknown == ()


def test_qoperator_weights_are_parameters() -> None:
    model = parsed(
        "(uint8[1,4,8,8] x) => (uint8[1,6,6,6] y)",
        "y = QLinearConv (x, s, z, w, ws, wz, s, z, b)",
        s=np.array(0.1, np.float32),
        z=np.array(7, np.uint8),
        w=zeros(6, 4, 3, 3, dtype=np.int8),
        ws=zeros(6),
        wz=zeros(6, dtype=np.int8),
        b=zeros(6, dtype=np.int32),
    )
    assert cost(model).parameters == 216 + 6
    assert cost(model).macs == 6 * 36 * 36


def test_packed_weights_count_by_number_and_by_byte() -> None:
    model = parsed(
        "(float[3,32] x) => (float[3,8] y)",
        "y = com.microsoft.MatMulNBits <K=32, N=8, bits=4, block_size=16> (x, w, s)",
        ', "com.microsoft": 1',
        w=zeros(8, 2, 8, dtype=np.uint8),
        s=zeros(8, 2),
    )
    found = cost(model)
    assert found.parameters == 32 * 8
    assert found.weight_bytes == 128 + 64
    assert found.macs == 3 * 32 * 8


def test_four_bit_weights_take_half_a_byte() -> None:
    codes = np.zeros((3, 5), np.int8)
    model = parsed(
        "(float[2,3] x) => (float[2,5] y)",
        "d = DequantizeLinear (w, s) y = MatMul (x, d)",
        w=ir.tensor(codes, dtype=ir.DataType.INT4),
        s=np.array(0.1, np.float32),
    )
    found = cost(model)
    assert found.parameters == 15
    assert found.nodes[0].weight_bytes == 8 + 4


@pytest.mark.parametrize(
    ("count", "dtype", "expected"),
    [(3, "INT4", 2), (4, "UINT4", 2), (5, "INT2", 2), (3, "FLOAT4E2M1", 2), (3, "FLOAT8E4M3FN", 3),
     (3, "BFLOAT16", 6), (3, "BOOL", 3), (3, "COMPLEX128", 48), (0, "FLOAT", 0), (3, "STRING", 0)],
)  # fmt: skip
def test_storage_bytes(count: int, dtype: str, expected: int) -> None:
    assert storage_bytes(count, ir.DataType[dtype]) == expected


# ---- what is not known ----


def test_an_operator_without_a_row_counts_nothing_and_is_listed() -> None:
    model = parsed(
        "(float[2,4] x) => (float[2,4] y)",
        "h = com.acme.Warp (x, w) y = Relu (x)",
        ', "com.acme": 1',
        w=zeros(4, 4),
    )
    found = cost(model)
    assert found.macs == 0
    assert found.parameters == 16
    assert [entry.operator for entry in found.unknown] == ["com.acme::Warp"]
    assert found.unknown[0].unknown == "the op table has no row for com.acme::Warp"
    rows = default_table().with_rows([OpRow("Warp", domain="com.acme", cost=lambda site: 5)])
    assert cost(model, table=rows).macs == 5


def test_a_row_without_a_cost_is_listed() -> None:
    model = parsed("(float[2,3,3] x) => (float[2] y)", "y = Det (x)")
    found = cost(model)
    assert found.unknown[0].unknown == "the op table does not know the MACs of Det"
    assert found.bytes_read == 72


def test_an_unknown_shape_is_listed() -> None:
    model = parsed(
        "(float[2,4] x) => (float[m,4] y)",
        "i = NonZero (x) t = Transpose (i) f = Cast <to=1> (t) y = MatMul (f, w)",
        w=zeros(2, 4),
    )
    unknown = cost(model).unknown
    assert "MatMul" in [entry.operator for entry in unknown]
    assert all("is unknown" in str(entry.unknown) for entry in unknown)


# ---- subgraphs ----

BRANCHES = (
    "y = If (c) <then_branch = small () => (float[2,4] a) { a = MatMul (x, w) }, "
    "else_branch = large () => (float[2,4] b) { h = MatMul (x, v) b = MatMul (h, u) }>"
)


def test_the_larger_branch_of_an_if_counts_and_both_keep_their_weights() -> None:
    model = parsed("(bool c, float[2,4] x) => (float[2,4] y)", BRANCHES, w=zeros(4, 4), v=zeros(4, 8), u=zeros(8, 4))
    found = cost(model)
    assert found.macs == 2 * 4 * 8 + 2 * 8 * 4
    assert found.parameters == 16 + 32 + 32
    assert [(entry.operator, entry.runs) for entry in found.nodes] == [
        ("If", 1), ("MatMul", 0), ("MatMul", 1), ("MatMul", 1)
    ]  # fmt: skip
    assert found.nodes[0].bytes_read == found.nodes[1].bytes_read == 0


LOOP = (
    "y = Loop (m, t, x) <body = b (int64 i, bool go, float[2,4] state) => (bool again, float[2,4] next) "
    "{ again = Identity (go) next = MatMul (state, w) }>"
)


def test_a_loop_runs_as_often_as_its_constant_says() -> None:
    model = parsed("(float[2,4] x) => (float[2,4] y)", LOOP, w=zeros(4, 4), m=np.array(7), t=np.array(True))
    found = cost(model)
    assert found.macs == 7 * 32
    assert found.parameters == 16
    assert found.assumed == ()
    assert [entry.runs for entry in found.nodes] == [1, 7, 7]


def test_a_loop_of_unknown_length_counts_once_and_is_listed() -> None:
    model = parsed("(float[2,4] x, int64 m) => (float[2,4] y)", LOOP, w=zeros(4, 4), t=np.array(True))
    found = cost(model)
    assert found.macs == 32
    assert [node.op_type for node in found.assumed] == ["Loop"]


def test_a_loop_whose_condition_is_false_never_runs() -> None:
    model = parsed("(float[2,4] x, int64 m) => (float[2,4] y)", LOOP, w=zeros(4, 4), t=np.array(False))
    assert cost(model).macs == 0


def test_a_scan_runs_along_its_scanned_axis() -> None:
    model = parsed(
        "(float[2,4] s, float[9,2,4] x) => (float[2,4] last, float[9,2,4] all)",
        "last, all = Scan <num_scan_inputs=1, body = b (float[2,4] state, float[2,4] step) "
        "=> (float[2,4] next, float[2,4] out) "
        "{ h = Add (state, step) next = MatMul (h, w) out = Identity (next) }> (s, x)",
        w=zeros(4, 4),
    )
    assert cost(model).macs == 9 * 32


# ---- whole networks ----


def test_by_op_sums_to_the_totals_with_the_most_macs_first() -> None:
    model = parsed(
        "(float[2,4] x) => (float[2,4] y)",
        "a = Relu (x) b = MatMul (a, w) c = Relu (b) d = MatMul (c, w) y = Gemm (d, v, k)",
        w=zeros(4, 4),
        v=zeros(4, 4),
        k=zeros(4),
    )
    found = cost(model)
    sums = found.by_op()
    assert [(item.operator, item.nodes, item.macs) for item in sums] == [
        ("MatMul", 2, 64), ("Gemm", 1, 32), ("Relu", 2, 0)
    ]  # fmt: skip
    for figure in ("macs", "parameters", "weight_bytes", "bytes_read", "bytes_written"):
        assert sum(getattr(item, figure) for item in sums) == getattr(found, figure)


# The MACs that are published for ResNet-50 (stride in the 3x3 convolutions) and VGG-19.
@pytest.mark.parametrize(("name", "macs"), [("light_resnet50", 4_089_184_256), ("light_vgg19", 19_632_062_464)])
def test_light_models_equal_a_count_from_shapes_alone(name: str, macs: int) -> None:
    proto = onnx.shape_inference.infer_shapes(onnx.load(LIGHT / f"{name}.onnx"), data_prop=True)
    found = cost(ir.from_proto(proto))
    assert found.unknown == ()
    assert found.macs == _count_from_proto(proto) == macs


def _count_from_proto(proto: onnx.ModelProto) -> int:
    """Convolutions and products by the definition, from the shapes that onnx alone infers."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    }
    total = 0
    for node in proto.graph.node:
        if node.op_type == "Conv":
            filters = shapes[node.input[1]]
            total += math.prod(shapes[node.output[0]]) * math.prod(filters[1:])
        elif node.op_type == "Gemm":
            total += math.prod(shapes[node.output[0]]) * shapes[node.input[0]][1]
    return total


def test_a_table_given_is_the_table_used() -> None:
    model = parsed("(float[2,4] x) => (float[2,4] y)", "y = Relu (x)")
    loud = default_table().with_rows([OpRow("Relu", cost=lambda site: 1000)])
    assert cost(model, table=loud).macs == 1000
    assert cost(model).macs == 0
    assert unary("Relu")[0].cost is no_macs
