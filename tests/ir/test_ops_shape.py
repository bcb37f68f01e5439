"""The shape column against real outputs: the node tests of the onnx wheel, and onnxruntime for its own ops."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from one_node import one_node_model, run_one_node, site_of
from onnx.backend.test.case.node import collect_testcases

from graphopt.ir.ops import default_table
from graphopt.ir.ops.families import MICROSOFT, broadcast
from graphopt.ir.ops.row import Site, UnknownShapeError

TABLE = default_table()

STANDARD_SHAPE_RULES = sorted(row.op_type for row in TABLE if row.domain == "" and row.shape is not None)


@pytest.fixture(scope="module")
def node_tests() -> dict[str, list[Any]]:
    """The one-node tests of the onnx wheel by operator."""
    by_operator: dict[str, list[Any]] = {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            if case.model is not None and len(case.model.graph.node) == 1:
                by_operator.setdefault(case.model.graph.node[0].op_type, []).append(case)
    return by_operator


@pytest.mark.parametrize("name", [name for name in STANDARD_SHAPE_RULES if name[:10] != "Simplified"])
def test_standard_shape_rules_equal_the_node_tests(name: str, node_tests: dict[str, list[Any]]) -> None:
    row = TABLE.row("", name, 28)
    assert row is not None
    assert row.shape is not None
    for case in node_tests[name]:
        feeds, expected = case.data_sets[0]
        names = [value.name for value in case.model.graph.input]
        fed = {key: np.asarray(array) for key, array in zip(names, feeds, strict=True)}
        node = case.model.graph.node[0]
        site = site_of(case.model, [fed.get(key) for key in node.input])
        shapes = dict(zip(node.output, row.shape(site), strict=False))
        for value, array in zip(case.model.graph.output, expected, strict=True):
            assert shapes[value.name] == np.shape(array), case.name


@pytest.mark.parametrize("name", ["OneHot", "Compress", "NonZero", "Range"])
def test_a_shape_that_waits_for_run_time_is_unknown(name: str) -> None:
    arrays = [np.ones(3, np.float32)] * 3
    site = site_of(one_node_model(name, arrays), arrays)
    blind = Site(site.node, site.inputs, site.outputs, (None, None, None))
    with pytest.raises(UnknownShapeError, match="run time"):
        TABLE.row("", name, 21).shape(blind)  # type: ignore[union-attr, misc]


F32 = np.float32


def f32(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, F32)


def u8(*shape: int) -> np.ndarray:
    return np.ones(shape, np.uint8)


def i8(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int8)


SCALE, ZERO = np.array(0.5, F32), np.array(0, np.uint8)
Q = (SCALE, ZERO)

CONTRIBUTED_CASES = {
    "FusedConv": (
        "FusedConv",
        [f32(1, 4, 7, 9), f32(6, 2, 3, 3)],
        1,
        {"group": 2, "strides": [2, 1], "pads": [1, 0, 1, 2], "dilations": [1, 2], "activation": "Relu"},
    ),
    "FusedConv-same": (
        "FusedConv",
        [f32(1, 4, 7, 9), f32(6, 4, 3, 3)],
        1,
        {"auto_pad": "SAME_UPPER", "strides": [2, 2], "activation": "Relu"},
    ),
    "FusedGemm": ("FusedGemm", [f32(5, 3), f32(4, 5)], 1, {"transA": 1, "transB": 1, "activation": "Relu"}),
    "Gelu": ("Gelu", [f32(2, 3)], 1, {}),
    "FastGelu": ("FastGelu", [f32(2, 3), f32(3)], 1, {}),
    "QuickGelu": ("QuickGelu", [f32(2, 3)], 1, {}),
    "BiasGelu": ("BiasGelu", [f32(2, 3, 4), f32(4)], 1, {}),
    "SkipLayerNormalization": ("SkipLayerNormalization", [f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8), f32(8)], 4, {}),
    "SkipSimplifiedLayerNormalization": (
        "SkipSimplifiedLayerNormalization",
        [f32(2, 3, 8), f32(2, 3, 8), f32(8)],
        4,
        {},
    ),
    "EmbedLayerNormalization": (
        "EmbedLayerNormalization",
        [np.zeros((2, 3), np.int32), np.zeros((2, 3), np.int32), f32(9, 8), f32(5, 8), f32(2, 8), f32(8), f32(8)],
        2,
        {},
    ),
    "MatMulNBits": (
        "MatMulNBits",
        [f32(2, 3, 32), u8(8, 2, 8), f32(8, 2)],
        1,
        {"K": 32, "N": 8, "bits": 4, "block_size": 16},
    ),
    "Attention": ("Attention", [f32(2, 5, 8), f32(8, 24), f32(24)], 1, {"num_heads": 2}),
    "Attention-past": (
        "Attention",
        [f32(2, 5, 8), f32(8, 24), f32(24), None, f32(2, 2, 2, 3, 4)],
        2,
        {"num_heads": 2, "unidirectional": 1},
    ),
    "MultiHeadAttention": ("MultiHeadAttention", [f32(2, 5, 8), f32(2, 7, 8), f32(2, 7, 12)], 1, {"num_heads": 2}),
    "MultiHeadAttention-past": (
        "MultiHeadAttention",
        [f32(2, 5, 8), f32(2, 7, 8), f32(2, 7, 8), None, None, None, f32(2, 2, 3, 4), f32(2, 2, 3, 4)],
        3,
        {"num_heads": 2},
    ),
    "GroupQueryAttention": (
        "GroupQueryAttention",
        [f32(2, 5, 32), f32(2, 5, 16), f32(2, 5, 16), None, None, np.array([4, 4], np.int32), np.array(5, np.int32)],
        3,
        {"num_heads": 4, "kv_num_heads": 2},
    ),
    "GroupQueryAttention-packed": (
        "GroupQueryAttention",
        [
            f32(2, 1, 64),
            None,
            None,
            f32(2, 2, 9, 8),
            f32(2, 2, 9, 8),
            np.array([4, 4], np.int32),
            np.array(5, np.int32),
        ],
        3,
        {"num_heads": 4, "kv_num_heads": 2},
    ),
    "RotaryEmbedding": (
        "RotaryEmbedding",
        [f32(2, 5, 16), np.array([0], np.int64), f32(9, 4), f32(9, 4)],
        1,
        {"num_heads": 2},
    ),
    "QLinearAdd": ("QLinearAdd", [u8(2, 3, 4), *Q, u8(3, 1), *Q, *Q], 1, {}),
    "QLinearMul": ("QLinearMul", [u8(2, 3, 4), *Q, u8(4), *Q, *Q], 1, {}),
    "QLinearConcat": ("QLinearConcat", [*Q, u8(2, 3, 4), *Q, u8(2, 5, 4), *Q], 1, {"axis": 1}),
    "QLinearGlobalAveragePool": ("QLinearGlobalAveragePool", [u8(2, 3, 5, 5), *Q, *Q], 1, {"channels_last": 0}),
    "QLinearGlobalAveragePool-last": ("QLinearGlobalAveragePool", [u8(2, 5, 5, 3), *Q, *Q], 1, {"channels_last": 1}),
    "QLinearAveragePool": (
        "QLinearAveragePool",
        [u8(2, 3, 8, 8), *Q, *Q],
        1,
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 0], "ceil_mode": 1},
    ),
    "QLinearLeakyRelu": ("QLinearLeakyRelu", [u8(2, 3), *Q, *Q], 1, {"alpha": 0.1}),
    "QLinearSigmoid": ("QLinearSigmoid", [u8(2, 3), *Q, *Q], 1, {}),
    "QLinearSoftmax": ("QLinearSoftmax", [u8(2, 3), *Q, *Q], 1, {"axis": -1, "opset": 13}),
    "QLinearConv": (
        "QLinearConv",
        [u8(1, 8, 8, 4), *Q, i8(6, 4, 3, 3), SCALE, np.array(0, np.int8), *Q],
        1,
        {"channels_last": 1, "strides": [2, 2]},
    ),
    "QGemm": ("QGemm", [u8(3, 5), *Q, i8(5, 4), SCALE, np.array(0, np.int8), None, *Q], 1, {}),
    "DynamicQuantizeMatMul": ("DynamicQuantizeMatMul", [f32(2, 3, 5), i8(5, 4), SCALE], 1, {}),
    "MatMulIntegerToFloat": ("MatMulIntegerToFloat", [u8(2, 3, 5), i8(5, 4), SCALE, SCALE], 1, {}),
    "Pad": ("Pad", [f32(2, 3), np.array([1, 0, 2, 4], np.int64)], 1, {}),
    "ExpandDims": ("ExpandDims", [f32(2, 3), np.array(-1, np.int32)], 1, {}),
    "GatherND": ("GatherND", [f32(4, 3, 2), np.zeros((5, 2), np.int64)], 1, {}),
    "Range": ("Range", [np.array(1, F32), np.array(9, F32), np.array(3, F32)], 1, {}),
    "MaxpoolWithMask": (
        "MaxpoolWithMask",
        [f32(1, 3, 8, 8), np.ones((1, 3, 8, 8), np.int32)],
        1,
        {"kernel_shape": [3, 3], "strides": [2, 2]},
    ),
    "QAttention": (
        "QAttention",
        [u8(2, 5, 8), i8(8, 24), f32(24), SCALE, SCALE, None, ZERO, np.array(0, np.int8)],
        1,
        {"num_heads": 2},
    ),
    "DynamicQuantizeLSTM": (
        "DynamicQuantizeLSTM",
        [
            f32(6, 2, 3),
            i8(1, 3, 16),
            i8(1, 4, 16),
            None,
            None,
            None,
            None,
            None,
            f32(1),
            np.zeros(1, np.int8),
            f32(1),
            np.zeros(1, np.int8),
        ],
        3,
        {"hidden_size": 4},
    ),
    **{
        f"FusedMatMul-{bits}": (
            "FusedMatMul",
            [
                f32(
                    *{"00": (2, 3, 4, 5), "01": (2, 3, 5, 4), "10": (4, 2, 3, 5), "11": (5, 2, 3, 4)}[bits[0] + bits[1]]
                ),
                f32(
                    *{"00": (2, 3, 5, 6), "01": (2, 3, 6, 5), "10": (5, 2, 3, 6), "11": (6, 2, 3, 5)}[bits[2] + bits[3]]
                ),
            ],
            1,
            dict(zip(("transBatchA", "transA", "transBatchB", "transB"), map(int, bits), strict=True)),
        )
        for bits in ("".join(chosen) for chosen in itertools.product("01", repeat=4))
    },
}


@pytest.mark.parametrize("name", CONTRIBUTED_CASES)
def test_contributed_shape_rules_equal_onnxruntime(name: str) -> None:
    op_type, arrays, outputs, attributes = CONTRIBUTED_CASES[name]
    model = one_node_model(op_type, arrays, outputs=outputs, domain=MICROSOFT, **attributes)
    expected = [array.shape for array in run_one_node(model, arrays)]
    row = TABLE.row(MICROSOFT, op_type, 1)
    assert row is not None
    assert row.shape is not None
    assert list(row.shape(site_of(model, arrays)))[:outputs] == expected


def test_broadcast() -> None:
    assert broadcast([(4, 1, 5), (3, 1), ()]) == (4, 3, 5)
    assert broadcast([(1,), (0,)]) == (0,)
    with pytest.raises(ValueError, match="do not broadcast"):
        broadcast([(2,), (3,)])
