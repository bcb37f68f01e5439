"""Activations of 16 bits: what cannot move in them stays float, what is left is nearly exact."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import GraphoptError
from graphopt.ir.check import check_structure
from graphopt.ir.compare import compare_runs
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.dequantize import Dequantize
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_plan import QuantizePlan
from tests.passes.quantized_nets import (
    GATED,
    INCEPTION,
    MOBILE,
    RESIDUAL,
    TRANSFORMER,
    UNET,
    canonical_constants,
    feeds,
    weighted,
)

Batches = list[dict[str, np.ndarray]]


def _error(model: ir.Model, result: ir.Model, data: Batches) -> float:
    sessions = open_session(model), open_session(result)
    runs = [[session.run_feeds(one) for one in data] for session in sessions]
    return compare_runs([value.name or "" for value in model.graph.outputs], *runs).rms_error


def _wide(model: ir.Model, data: Batches) -> tuple[ir.Model, Context]:
    context = Context(calibration=data)
    copy = model.clone()
    Quantize(activation_bits=16, search=False).rewrite(copy, context)
    check_structure(copy)
    return copy, context


@pytest.mark.parametrize(
    "model", [RESIDUAL, MOBILE, INCEPTION, UNET, GATED], ids=["residual", "mobile", "inception", "unet", "gated"]
)
def test_wide_activations_leave_the_error_of_the_weights(model: ir.Model) -> None:
    model, data = canonical_constants(model), feeds()
    wide, context = _wide(model, data)
    narrow = model.clone()
    Quantize(search=False).rewrite(narrow, Context(calibration=data))
    types = {node.outputs[0].dtype for node in wide.graph if node.op_type == "QuantizeLinear"}
    assert types == {ir.DataType.UINT16}
    assert _error(model, wide, data) < 0.8 * _error(model, narrow, data)
    assert any("16 bits" in remark.why for remark in context.remarks)


def test_what_has_no_kernel_of_16_bits_stays_float() -> None:
    model = weighted(
        "float[1,3,16,16] x => float[1,4,8,8] y",
        """a = Conv(x, w0) r = Relu(a) t = Transpose<perm=[0,1,3,2]>(r)
           m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t) y = Conv(m, w1)""",
        w0=(16, 3, 1, 1), w1=(4, 16, 1, 1),
    )  # fmt: skip
    model, data = canonical_constants(model), feeds()
    wide, _ = _wide(model, data)
    pool = next(node for node in wide.graph if node.op_type == "MaxPool")
    assert pool.inputs[0] is not None
    assert pool.inputs[0].dtype == ir.DataType.FLOAT
    assert _error(model, wide, data) < 0.02


def test_products_of_transformers_are_static_then() -> None:
    model, data = canonical_constants(TRANSFORMER), feeds(shape=(2, 6, 32))
    wide, _ = _wide(model, data)
    operators = {node.op_type for node in wide.graph}
    assert "QuantizeLinear" in operators
    assert not operators & {"DynamicQuantizeLinear", "MatMulInteger"}


def test_the_plan_is_data_and_can_be_undone() -> None:
    model, data = canonical_constants(RESIDUAL), feeds()
    single = Quantize(activation_bits=16, form="static", search=False)
    plan = single.plan(model, Context(calibration=data))
    assert {tensor.bits for tensor in plan.tensors if tensor.role == "activation"} == {16}
    assert {tensor.bits for tensor in plan.tensors if tensor.role == "weight"} <= {7, 8}
    again = QuantizePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert "uint16" in str(plan)
    written = model.clone()
    single.apply(written, again)
    Dequantize().rewrite(written, Context())
    assert not any(node.op_type == "QuantizeLinear" for node in written.graph)
    assert _error(model, written, data) < 0.02


@pytest.mark.parametrize("bits", [1, 9, 12, 17])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(GraphoptError, match="activation_bits"):
        Quantize(activation_bits=bits)


def test_a_form_without_wide_activations_is_refused() -> None:
    with pytest.raises(GraphoptError, match="16 bits have no form 'dynamic'"):
        Quantize(activation_bits=16, form="dynamic")
    assert Quantize(activation_bits=6).data_width == 6


@pytest.mark.parametrize("bits", [None, 16])
def test_no_clamp_is_left_on_integers_that_nobody_reads(bits: int | None) -> None:
    model = weighted(
        "float[1,3,16,16] x => float[1,16,16,16] y",
        "a = Conv(x, w0) b = Conv(x, w1) s = Add(a, b) r = Relu(s) y = Exp(r)",
        w0=(16, 3, 1, 1), w1=(16, 3, 1, 1),
    )  # fmt: skip
    model, data = canonical_constants(model), feeds()
    plan = Quantize(activation_bits=bits, search=False).plan(model, Context(calibration=data))
    forms = {operator.op_type: operator.form for operator in plan.operators}
    assert forms["Conv"] == "static"
    assert forms.get("Relu", "float") == forms.get("Add", "float") == "float"
