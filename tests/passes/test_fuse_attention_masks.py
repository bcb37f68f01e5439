"""What fully masked rows mean before and after fuse-attention, with masks that have such rows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.ir.compare import within_exact
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.fuse_attention import FuseAttention

LOWEST = float(np.finfo(np.float32).min)


def _model(mask: str, *, guard: bool = False, mask_type: str = "float[1,1,5,5]") -> ir.Model:
    guarded = "n = IsNaN(p0) p = Where(n, zero, p0)" if guard else "p = Identity(p0)"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[2,5,8] q, float[2,5,8] k, float[2,5,8] v, {mask_type} mask) => (float[2,5,8] y)
        <int64[4] split = {{2,5,2,4}}, int64[3] join = {{2,5,8}}, float zero = {{0}}, float low = {{{LOWEST}}}>
        {{ q0 = Reshape(q, split) k0 = Reshape(k, split) v0 = Reshape(v, split)
          q1 = Transpose<perm=[0,2,1,3]>(q0) k1 = Transpose<perm=[0,2,3,1]>(k0) v1 = Transpose<perm=[0,2,1,3]>(v0)
          s = MatMul(q1, k1) {mask} p0 = Softmax<axis=-1>(t) {guarded}
          o = MatMul(p, v1) o1 = Transpose<perm=[0,2,1,3]>(o) y = Reshape(o1, join) }}"""
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    if not guard:
        (identity,) = [node for node in model.graph if node.op_type == "Identity"]
        identity.outputs[0].replace_all_uses_with(identity.inputs[0])
        model.graph.remove(identity, safe=True)
    return model


def _outputs(model: ir.Model, mask: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((2, 5, 8)).astype(np.float32) for name in "qkv"} | {"mask": mask}
    expected = open_session(model, optimized=False).run_feeds(feeds)
    context = Context()
    assert FuseAttention().run(model, context).modified, list(map(str, context.remarks))
    assert sum(node.op_type == "Attention" for node in model.graph) == 1
    return expected, open_session(model).run_feeds(feeds)


def _rows(masked: float) -> np.ndarray:
    """Row 2 fully masked, row 3 half."""
    mask = np.zeros((1, 1, 5, 5), dtype=np.float32)
    mask[..., 2, :] = masked
    mask[..., 3, :2] = masked
    return mask


@pytest.mark.parametrize("masked", [LOWEST, -1e9, -1e4])
def test_rows_masked_by_a_finite_number_stay_what_they_are(masked: float) -> None:
    expected, found = _outputs(_model("t = Add(s, mask)"), _rows(masked))
    assert within_exact(expected, found)


def test_rows_masked_by_infinity_were_nan_and_the_others_stay() -> None:
    expected, found = _outputs(_model("t = Add(s, mask)"), _rows(-np.inf))
    assert np.isnan(expected[0][:, 2]).all()
    assert np.isfinite(found[0]).all()
    others = [0, 1, 3, 4]
    assert within_exact([expected[0][:, others]], [found[0][:, others]])


def test_guarded_choice_of_the_lowest_float_keeps_the_mean() -> None:
    model = _model("m = Where(mask, zero, low) t = Add(s, m)", guard=True, mask_type="bool[1,1,5,5]")
    expected, found = _outputs(model, _rows(1.0) == 0)
    assert within_exact(expected, found)
    assert np.abs(found[0][:, 2]).max() > 0


def test_guarded_choice_of_infinity_keeps_zero() -> None:
    model = _model("m = Where(mask, zero, low) t = Add(s, m)", guard=True, mask_type="bool[1,1,5,5]")
    model.graph.initializers["low"].const_value = ir.tensor(np.asarray(-np.inf, dtype=np.float32), name="low")
    expected, found = _outputs(model, _rows(1.0) == 0)
    assert within_exact(expected, found)
    assert np.abs(found[0][:, 2]).max() == 0


@pytest.mark.parametrize("form", ["t = Where(mask, s, low)", "n = Not(mask) t = Where(n, low, s)"])
def test_scores_replaced_by_the_lowest_float(form: str) -> None:
    expected, found = _outputs(_model(form, mask_type="bool[5,5]"), _rows(1.0)[0, 0] == 0)
    assert within_exact(expected, found)


def test_one_mask_of_two_layers_is_prepared_once() -> None:
    layer = """
        q0{n} = Reshape({q}, split) q1{n} = Transpose<perm=[0,2,1,3]>(q0{n}) s{n} = MatMul(q1{n}, k1)
        t{n} = Add(s{n}, mask) p{n} = Softmax<axis=-1>(t{n}) o{n} = MatMul(p{n}, v1)
        r{n} = Transpose<perm=[0,2,1,3]>(o{n}) {y} = Reshape(r{n}, join)"""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[2,5,8] q, float[2,5,8] k, float[2,5,8] v, float[2,1,1,5] mask) => (float[2,5,8] y)
        <int64[4] split = {{2,5,2,4}}, int64[3] join = {{2,5,8}}>
        {{ k0 = Reshape(k, split) v0 = Reshape(v, split) k1 = Transpose<perm=[0,2,3,1]>(k0)
          v1 = Transpose<perm=[0,2,1,3]>(v0) {layer.format(n=1, q="q", y="h")} {layer.format(n=2, q="h", y="y")} }}"""
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    FuseAttention().run(model, Context())
    assert [node.op_type for node in model.graph] == ["Max", "Expand", "Attention", "Attention"]
