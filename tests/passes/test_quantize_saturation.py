"""Weights keep to 7 bits where an int8 kernel of this machine adds in saturating 16 bits; other machines are faked."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.ir.session import open_session
from graphopt.passes import quantize as quantize_module
from graphopt.passes.contract import Context
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_saturation import SAFE_BITS, kernels_of, saturating_kernels
from tests.passes.quantized_nets import HEAD, MOBILE, canonical_constants, feeds, quantized, set_weight, tiny, weighted

DENSE = frozenset({"QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger"})
"""What saturates on a machine with AVX2 alone; nothing does on one with VNNI."""

CONV = weighted("float[n,8,6,6] x => float[n,8,6,6] y", "y = Conv<pads=[1,1,1,1]>(x, w)", w=(8, 8, 3, 3))
MULTIPLIED = weighted(
    "float[n,8,6,6] x => float[n,16,6,6] y", "a = Conv(x, v) y = Conv<group=8, pads=[1,1,1,1]>(a, w)",
    v=(8, 8, 1, 1), w=(16, 1, 3, 3),
)  # fmt: skip
DEPTHWISE = weighted(
    "float[n,8,6,6] x => float[n,8,6,6] y", "a = Conv(x, v) y = Conv<group=8, pads=[1,1,1,1]>(a, w)",
    v=(8, 8, 1, 1), w=(8, 1, 3, 3),
)  # fmt: skip
GEMM = weighted("float[n,32] x => float[n,8] y", "y = Gemm(x, w, b)", w=(32, 8), b=(8,))
MATMUL = weighted("float[n,4,32] x => float[n,4,8] y", "y = MatMul(x, w)", w=(32, 8))


def machine(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> None:
    """Let the pass believe that these kernels saturate."""
    monkeypatch.setattr(quantize_module, "saturating_kernels", lambda target: frozenset(kernels))


def bits_of_weights(plan: QuantizePlan) -> dict[str, int]:
    return {tensor.name: tensor.bits for tensor in plan.tensors if tensor.role == "weight"}


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("zero", [0, 128])
def test_matrix_products_against_exact_integers(rows: int, zero: int) -> None:
    """Pairs of large values, by hand: wrong at full range exactly where the measurement says so, right at 7 bits."""
    generator = np.random.default_rng(0)
    data = generator.integers(200, 256, (rows, 64)).astype(np.uint8)
    for largest, exact in ((127, "MatMulInteger" not in saturating_kernels()), (63, True)):
        weight = generator.integers(largest - 10, largest + 1, (64, 24)) * generator.choice([1, 1, -1], (64, 24))
        model = ir.from_onnx_text(f"{HEAD} g (uint8[r,64] x, int8[64,24] w) => (int32[r,24] y) <uint8 z = {{{zero}}}>"
                                  "{ y = MatMulInteger (x, w, z) }")  # fmt: skip
        stored = model.graph.inputs.pop(1)
        stored.const_value = ir.tensor(weight.astype(np.int8), name="w")
        model.graph.register_initializer(stored)
        found = open_session(model).run_feeds({"x": data})[0]
        assert np.array_equal(found, (data.astype(np.int64) - zero) @ weight) == exact


def test_safe_bits_are_safe() -> None:
    assert saturating_kernels("cpu", SAFE_BITS) == frozenset()
    assert 2 * 255 * (2 ** (SAFE_BITS - 1) - 1) < 2**15
    assert saturating_kernels() <= {*DENSE, "depthwise QLinearConv"}
    assert saturating_kernels() is saturating_kernels()  # measured once


@pytest.mark.parametrize(
    ("model", "shape", "form"),
    [
        (CONV, (1, 8, 6, 6), "static"),
        (MULTIPLIED, (1, 8, 6, 6), "static"),
        (DEPTHWISE, (1, 8, 6, 6), "static"),
        (GEMM, (5, 32), "static"),
        (GEMM, (1, 32), "dynamic"),
        (MATMUL, (2, 4, 32), "static"),
        (MATMUL, (2, 4, 32), "dynamic"),
    ],
    ids=["conv", "multiplied", "depthwise", "gemm", "gemm-dynamic", "matmul", "matmul-dynamic"],
)
def test_largest_weights_on_large_data(model: ir.Model, shape: tuple[int, ...], form: str) -> None:
    """Equal weights are exact in either range, so what is wrong is the kernel: never it in the ranges that are chosen.

    At full range the whole net is wrong where a kernel of it saturates, and right on a machine with VNNI.
    """
    model = model.clone()
    for name in [name for name in ("w", "v") if name in model.graph.initializers]:
        set_weight(model, name, np.ones(tuple(model.graph.initializers[name].shape), np.float32))
    if "v" in model.graph.initializers:  # one channel to one: the layer before the one that is tested stays exact
        set_weight(model, "v", np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1))
    data = [{"x": np.random.default_rng(1).uniform(0.9, 1.0, shape).astype(np.float32)}]
    expected = open_session(model, optimized=False).run_feeds(data[0])[0]
    wrong = {}
    for weight_range in ("auto", "full", "reduced"):
        options = Quantize(form=form, weight_range=weight_range)
        result = quantized(model, options, Context(calibration=data))
        found = open_session(result).run_feeds(data[0])[0]
        wrong[weight_range] = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert wrong["auto"] < 0.02
    assert wrong["reduced"] < 0.02
    tested = next(node for node in model.graph if node.inputs[1].name == "w")
    if kernels_of(tested, form) & saturating_kernels():
        assert wrong["full"] > 0.2
    else:
        assert wrong["full"] < 0.02


@pytest.mark.parametrize(
    ("weight_range", "saturating", "dense", "depthwise"),
    [("auto", DENSE, 7, 8), ("auto", (), 8, 8), ("full", DENSE, 8, 8), ("reduced", (), 7, 7)],
    ids=["auto-avx2", "auto-vnni", "full-avx2", "reduced-vnni"],
)
def test_range_follows_the_option_and_the_machine(
    weight_range: str, saturating: tuple[str, ...], dense: int, depthwise: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *saturating)
    model = canonical_constants(MOBILE)
    options = Quantize(weight_range=weight_range)
    plan = options.plan(model, Context(calibration=feeds()))
    assert bits_of_weights(plan) == {"w0": dense, "w1": dense, "w2": depthwise, "w3": dense, "v": dense}
    assert {tensor.bits for tensor in plan.tensors if tensor.role != "weight"} == {8}
    options.apply(model, plan)
    for name, bits in bits_of_weights(plan).items():
        stored = model.graph.initializers[f"{name}.quantized"].const_value.numpy()
        assert stored.dtype == np.int8
        assert np.abs(stored).max() == 2 ** (bits - 1) - 1


def test_a_plan_replays_alike_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, *DENSE)
    plan = Quantize().plan(tiny(), Context(calibration=feeds()))
    here, there = tiny(), tiny()
    Quantize().apply(here, plan)
    machine(monkeypatch)
    Quantize().apply(there, QuantizePlan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert ir.to_proto(here).SerializeToString() == ir.to_proto(there).SerializeToString()
    assert Quantize().plan(tiny(), Context(calibration=feeds())) != plan


@pytest.mark.parametrize(
    ("weight_range", "saturating", "said"),
    [
        ("auto", DENSE, "7 bits in 2 of 2 operators, saturation on this machine (measured): MatMulInteger, QGemm, QL"),
        ("auto", (), "8 bits, saturation on this machine (measured): none; x86 without VNNI needs weight_range='red"),
        ("full", DENSE, "QLinearConv, QLinearMatMul; sums may be wrong"),
        ("full", (), "8 bits as asked, saturation on this machine (measured): none"),
        ("reduced", (), "7 bits as asked, 2 operators"),
    ],
)
def test_the_report_says_which_range_and_why(
    weight_range: str, saturating: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *saturating)
    context = Context(calibration=feeds())
    Quantize(weight_range=weight_range).plan(tiny(), context)
    (note,) = [remark for remark in context.remarks if remark.why.startswith("weights have")]
    assert said in note.why


def test_narrow_bits_need_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(quantize_module, "saturating_kernels")
    for bits in (4, 7):
        plan = Quantize(bits=bits).plan(tiny(), Context(calibration=feeds()))
        assert set(bits_of_weights(plan).values()) == {bits}


def test_a_weight_that_a_saturating_kernel_shares_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, *DENSE)
    model = weighted(
        "float[n,1,8,8] x => float[n,8,8,8] y",
        "a = Conv<pads=[1,1,1,1]>(x, w) y = Conv<group=8, pads=[1,1,1,1]>(a, w)", w=(8, 1, 3, 3),
    )  # fmt: skip
    plan = Quantize().plan(model, Context(calibration=feeds(2, (1, 1, 8, 8))))
    assert bits_of_weights(plan) == {"w": 7}
    (tensor,) = [tensor for tensor in plan.tensors if tensor.role == "weight"]
    weight = model.graph.initializers["w"].const_value.numpy()
    assert np.array_equal(np.float32(tensor.scale), np.abs(weight).max(axis=(1, 2, 3)) / np.float32(63))
