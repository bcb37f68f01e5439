"""The cost column against the number of terms that onnxruntime really adds, and against counts by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import one_node_model, run_one_node, site_of

import graphopt
from graphopt.ir.cost import cost
from graphopt.ir.ops import default_table
from graphopt.ir.ops.families import MICROSOFT
from graphopt.ir.ops.row import Site, UnknownShapeError

TABLE = default_table()
F32 = np.float32


def f32(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, F32)


def macs(site: Site) -> int:
    row = TABLE.row(site.node.domain, site.node.op_type, 21 if site.node.domain == "" else 1)
    assert row is not None
    assert row.cost is not None
    return row.cost(site)


def counted_terms(op_type: str, shapes: list[tuple[int, ...]], **attributes: object) -> tuple[int, int]:
    """MACs by the table, and by onnxruntime: the sum of the outputs of a contraction of ones."""
    domain = attributes.pop("domain", "")
    dtypes: list[type] = attributes.pop("dtypes", [np.float32] * len(shapes))  # type: ignore[assignment]
    arrays = [np.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    model = one_node_model(op_type, arrays, domain=domain, **attributes)  # type: ignore[arg-type]
    results = run_one_node(model, arrays)
    return macs(site_of(model, arrays, results)), int(results[0].sum())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_convolution_macs_equal_the_terms_of_the_sum(data: st.DataObject) -> None:
    small = st.integers(1, 3)
    rank, group = data.draw(st.integers(1, 3)), data.draw(small)
    kernel = [data.draw(small) for _ in range(rank)]
    strides, dilations = [data.draw(small) for _ in range(rank)], [data.draw(small) for _ in range(rank)]
    spatial = [(size - 1) * step + data.draw(small) for size, step in zip(kernel, dilations, strict=True)]
    channels, filters = group * data.draw(small), group * data.draw(small)
    shapes = [(2, channels, *spatial), (filters, channels // group, *kernel)]
    counted, summed = counted_terms("Conv", shapes, strides=strides, dilations=dilations, group=group)
    assert counted == summed


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_transposed_convolution_macs_equal_the_terms_of_the_sum(data: st.DataObject) -> None:
    small = st.integers(1, 3)
    rank, group = data.draw(st.integers(1, 2)), data.draw(small)
    channels, filters = group * data.draw(small), data.draw(small)
    kernel, spatial = ([data.draw(small) for _ in range(rank)] for _ in range(2))
    strides = [data.draw(small) for _ in range(rank)]
    shapes = [(2, channels, *spatial), (channels, filters, *kernel)]
    counted, summed = counted_terms("ConvTranspose", shapes, strides=strides, group=group)
    assert counted == summed


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 5)), ((4,), (4,)), ((4,), (2, 4, 5)), ((2, 3, 4), (4,)), ((2, 1, 3, 4), (7, 4, 5))],
)
def test_matmul_macs_equal_the_terms_of_the_sum(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    counted, summed = counted_terms("MatMul", [left, right])
    assert counted == summed > 0


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bqd,bkd->bqk", [(2, 3, 5), (2, 4, 5)]),
        ("...ij,...jk->...ik", [(6, 1, 2, 3), (6, 5, 3, 4)]),
        ("ij,jk", [(2, 3), (3, 4)]),
        ("bhwc,hkc->bhwk", [(2, 3, 4, 5), (3, 6, 5)]),
        ("i,j->ij", [(3,), (4,)]),
        ("ij,kl->i", [(2, 3), (4, 5)]),
    ],
)
def test_einsum_macs_equal_the_terms_of_the_sum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    counted, summed = counted_terms("Einsum", shapes, equation=equation)
    assert counted == summed > 0


def test_einsum_of_three_operands_contracts_from_the_left_and_of_one_is_free() -> None:
    shapes = [(2, 3), (3, 4), (4, 5)]
    counted, _ = counted_terms("Einsum", shapes, equation="ij,jk,kl->il")
    assert counted == 2 * 3 * 4 + 2 * 4 * 5
    assert counted_terms("Einsum", [(3, 4)], equation="ij->ji")[0] == 0


@pytest.mark.parametrize(
    ("op_type", "shapes", "more"),
    [
        ("Gemm", [(3, 4), (4, 5)], {}),
        ("Gemm", [(4, 3), (5, 4)], {"transA": 1, "transB": 1}),
        ("MatMulInteger", [(2, 3, 4), (4, 5)], {"dtypes": [np.uint8, np.int8]}),
        ("ConvInteger", [(1, 4, 5, 5), (6, 2, 3, 3)], {"dtypes": [np.uint8, np.uint8], "group": 2}),
        ("FusedConv", [(1, 4, 5, 5), (6, 2, 3, 3)], {"domain": MICROSOFT, "group": 2}),
        ("FusedGemm", [(4, 3), (4, 5)], {"domain": MICROSOFT, "transA": 1, "activation": "Relu"}),
        ("FusedMatMul", [(4, 2, 3), (2, 4, 5)], {"domain": MICROSOFT, "transA": 1, "transBatchA": 1}),
    ],
)  # fmt: skip
def test_product_macs_equal_the_terms_of_the_sum(
    op_type: str, shapes: list[tuple[int, ...]], more: dict[str, object]
) -> None:
    counted, summed = counted_terms(op_type, shapes, **more)
    assert counted == summed > 0


def site_from_shapes(
    op_type: str, shapes: list[tuple[int, ...] | None], output: tuple[int, ...] = (), **attributes: object
) -> Site:
    """A node with these operand shapes; `attributes` may hold the domain."""
    arrays = [None if shape is None else np.empty(shape, F32) for shape in shapes]
    model = one_node_model(op_type, arrays, **attributes)  # type: ignore[arg-type]
    return site_of(model, arrays, [np.empty(output)])


PAIR: list[tuple[int, ...]] = [(), ()]
HAND_COMPUTED = [
    # output 1x6x3x3, 2x3x3 weights a filter
    ("QLinearConv", [(1, 4, 5, 5), *PAIR, (6, 2, 3, 3), *PAIR, *PAIR], (1, 6, 3, 3), {"group": 2}, 54 * 18),
    ("DeformConv", [(1, 4, 5, 5), (6, 4, 3, 3), (1, 18, 3, 3)], (1, 6, 3, 3), {}, 54 * 36),
    # padding is counted: 5x5 outputs, each of 3x3 taps
    ("Conv", [(1, 1, 5, 5), (1, 1, 3, 3)], (1, 1, 5, 5), {"pads": [1, 1, 1, 1]}, 25 * 9),
    ("QLinearMatMul", [(2, 3, 4), *PAIR, (4, 5), *PAIR, *PAIR], (2, 3, 5), {}, 2 * 3 * 5 * 4),
    ("QGemm", [(4, 3), *PAIR, (4, 5), *PAIR, None, *PAIR], (3, 5), {"domain": MICROSOFT, "transA": 1}, 60),
    ("MatMulNBits", [(2, 3, 32), (8, 2, 8), (8, 2)], (2, 3, 8), {"domain": MICROSOFT, "K": 32, "N": 8}, 6 * 32 * 8),
    # time 6, batch 2; one direction has 4 gates x hidden 5 x (input 3 + hidden 5)
    ("LSTM", [(6, 2, 3), (2, 20, 3), (2, 20, 5)], (), {"hidden_size": 5, "direction": "bidirectional"}, 12 * 2 * 160),
    ("GRU", [(6, 2, 3), (1, 15, 3), (1, 15, 5)], (), {"hidden_size": 5}, 12 * 15 * 8),
    ("RNN", [(6, 2, 3), (1, 5, 3), (1, 5, 5)], (), {"hidden_size": 5}, 12 * 5 * 8),
    # batch 2, 4 query heads on 2 key heads, 5 queries, 7 keys, key width 8, value width 6
    ("Attention", [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)], (), {}, 2 * 4 * 5 * 7 * (8 + 6)),
    ("Attention", [(2, 5, 32), (2, 7, 16), (2, 7, 12)], (), {"q_num_heads": 4, "kv_num_heads": 2}, 2 * 4 * 5 * 7 * 14),
    # 3 keys from the past
    (
        "Attention",
        [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), None, (2, 2, 3, 8), (2, 2, 3, 6)],
        (),
        {},
        2 * 4 * 5 * 10 * 14,
    ),
    # 10 tokens to Q, K, V of width 8, then 2 heads x 5 x 5 x (4 + 4) for each of 2 sequences
    ("Attention", [(2, 5, 8), (8, 24), (24,)], (), {"domain": MICROSOFT, "num_heads": 2}, 10 * 192 + 2 * 2 * 25 * 8),
    ("MultiHeadAttention", [(2, 5, 8), (2, 7, 8), (2, 7, 12)], (), {"domain": MICROSOFT, "num_heads": 2}, 4 * 35 * 10),
    ("MultiHeadAttention", [(2, 5, 2, 3, 4)], (), {"domain": MICROSOFT, "num_heads": 2}, 4 * 25 * 8),
    ("MultiHeadAttention", [(2, 5, 8), (2, 7, 2, 2, 4)], (), {"domain": MICROSOFT, "num_heads": 2}, 4 * 35 * 8),
    (
        "MultiHeadAttention",
        [(2, 5, 8), (2, 2, 7, 4), (2, 2, 7, 4)],
        (),
        {"domain": MICROSOFT, "num_heads": 2},
        4 * 35 * 8,
    ),
    ("AffineGrid", [(2, 2, 3), (4,)], (2, 4, 5, 2), {}, 80 * 3),
    # 6 tokens, state 4 x 4; delta rules read each key head's state once more
    (
        "LinearAttention",
        [(2, 3, 16), (2, 3, 8), (2, 3, 8)],
        (),
        {"q_num_heads": 4, "kv_num_heads": 2, "update_rule": "linear"},
        6 * 16 * 6,
    ),
    ("LinearAttention", [(2, 3, 16), (2, 3, 8), (2, 3, 8)], (), {"q_num_heads": 4, "kv_num_heads": 2}, 6 * 16 * 8),
    ("CausalConvWithState", [(2, 4, 9), (4, 1, 3)], (2, 4, 9), {}, 72 * 3),
    ("Softmax", [(2, 3)], (2, 3), {}, 0),
    ("Resize", [(1, 1, 4, 4)], (1, 1, 8, 8), {}, 0),
]


@pytest.mark.parametrize(
    ("op_type", "shapes", "output", "attributes", "expected"),
    HAND_COMPUTED,
    ids=[f"{case[0]}-{number}" for number, case in enumerate(HAND_COMPUTED)],
)
def test_macs_equal_the_count_by_hand(
    op_type: str,
    shapes: list[tuple[int, ...] | None],
    output: tuple[int, ...],
    attributes: dict[str, object],
    expected: int,
) -> None:
    assert macs(site_from_shapes(op_type, shapes, output, **attributes)) == expected


def test_grouped_query_attention_counts_the_keys_that_are_filled() -> None:
    arrays = [f32(2, 1, 64), None, None, f32(2, 2, 9, 8), f32(2, 2, 9, 8), np.zeros(2, np.int32), np.array(5)]
    model = one_node_model("GroupQueryAttention", arrays, domain=MICROSOFT, num_heads=4, kv_num_heads=2)
    site = site_of(model, arrays)
    assert macs(site) == 2 * 4 * 1 * 5 * 16
    blind = Site(site.node, site.inputs, site.outputs, (None,) * 7)
    assert macs(blind) == 2 * 4 * 1 * 10 * 16


def test_a_missing_shape_is_an_unknown_cost_not_a_guess() -> None:
    arrays = [f32(2, 3), f32(3, 4)]
    site = site_of(one_node_model("MatMul", arrays), arrays)
    with pytest.raises(UnknownShapeError, match="output 0 of MatMul"):
        macs(site)


def test_attention_that_does_not_say_its_heads_is_unknown() -> None:
    """Such a node is not valid; the file is still read, so that it can be looked at."""
    text = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        g (float[1,4,8] x, float[8,24] w, float[24] b) => (float[1,4,8] y) { y = com.microsoft.Attention (x, w, b) }"""
    found = cost(graphopt.load(ir.from_onnx_text(text)))
    assert [entry.known for entry in found.nodes] == [False]
    assert "num_heads is missing" in (found.nodes[0].unknown or "")
