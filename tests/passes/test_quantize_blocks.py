"""Weights in blocks: how they are rounded and packed, and rounding that makes up for itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_blocks import Grid, block_scales, pack
from tests.passes.quantized_nets import WEIGHTS, quantized, relative, weighted


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_least_squares_is_never_worse_than_the_whole_range(bits: int, symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_t(3, (128, 50)).astype(np.float32)
    found = block_scales(weight, Grid(bits, symmetric, 32), np.dtype(np.float32))
    low, high = Grid(bits, symmetric, 32).limits
    assert low <= found.integers.min()
    assert found.integers.max() <= high
    blocks = weight.reshape(4, 32, 50)
    if symmetric:
        most, least = blocks.max(axis=1, keepdims=True), blocks.min(axis=1, keepdims=True)
        scale, zero = np.maximum(most / high, least / low), 0.0
    else:
        scale = (blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)) / high
        zero = np.rint(-blocks.min(axis=1, keepdims=True) / scale)
    plain = (np.clip(np.rint(blocks / scale) + zero, low, high) - zero) * scale
    ours = np.square(found.matrix().reshape(4, 32, 50) - blocks).sum(axis=1)
    assert (ours <= np.square(plain - blocks).sum(axis=1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_blocks(symmetric: bool) -> None:
    weight = np.zeros((64, 6), np.float32)
    weight[:, 1], weight[:, 2], weight[0, 3], weight[:, 4] = 0.7, -0.7, 1e-35, np.linspace(1, 2, 64)
    weight[:, 5] = -1e4
    found = block_scales(weight, Grid(4, symmetric, 32), np.dtype(np.float32))
    assert np.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    np.testing.assert_allclose(found.matrix()[:, [0, 1, 2, 3, 5]], weight[:, [0, 1, 2, 3, 5]], rtol=1e-6, atol=1e-30)
    assert np.isfinite(block_scales(weight.astype(np.float16), Grid(4, symmetric, 0), np.dtype(np.float16)).scale).all()


@pytest.mark.parametrize("storage", ["INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (1, 1)])
def test_packing_is_what_onnx_stores(storage: str, shape: tuple[int, int]) -> None:
    dtype = ir.DataType[storage]
    low = -(2 ** (dtype.bitwidth - 1)) if storage.startswith("I") else 0
    values = np.random.default_rng(0).integers(low, low + 2**dtype.bitwidth, shape)
    tensor = pack(values.astype(np.int8 if low else np.uint8), dtype)
    assert tensor.tobytes() == ir.Tensor(values.astype(dtype.numpy()), dtype=dtype).tobytes()
    np.testing.assert_array_equal(tensor.numpy().astype(int), values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 0])
def test_error_feedback_makes_up_for_rounding(block: int, symmetric: bool) -> None:
    model = weighted(
        "float[n,64] x => float[n,48] y", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", w=(64, 64), v=(64, 48)
    )
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((8, 64)) + 0.5
    data = [
        {"x": (generator.standard_normal((256, 8)) @ mixing + 0.1 * generator.standard_normal((256, 64))).astype("f")}
        for _ in range(4)
    ]
    options = Quantize(form="weights", weight_bits=3, block_size=block, symmetric=symmetric)
    expected = open_session(model, optimized=False).run_feeds(data[3])[0]
    errors = {}
    for rounding in ("nearest", "error-feedback"):
        context = Context(calibration=data[:3])
        result = quantized(model, replace(options, rounding=rounding), context)
        errors[rounding] = relative(open_session(result, optimized=False).run_feeds(data[3])[0], expected)
        again = quantized(model, replace(options, rounding=rounding), Context(calibration=data[:3]))
        assert ir.to_proto(again) == ir.to_proto(result)
    assert errors["error-feedback"] < 0.5 * errors["nearest"]
    assert "error feedback on calibration inputs" in " ".join(map(str, context.remarks))


def test_error_feedback_falls_back_where_inputs_are_not_finite() -> None:
    model = weighted("float[n,64] x => float[n,48] y", "l = Log(x) y = MatMul(l, w)", w=(64, 48))
    context = Context(calibration=[{"x": -np.ones((4, 64), np.float32)}])
    result = quantized(model, replace(WEIGHTS, rounding="error-feedback"), context)
    assert any("its inputs are not finite" in str(remark) for remark in context.remarks)
    assert ir.to_proto(result) == ir.to_proto(quantized(model, WEIGHTS))
