"""Pass legalize: what OpenVINO's provider does not take is written otherwise, with the same results to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from golden import docstring_blocks, parse

from graphopt.errors import InvalidGraphError
from graphopt.ir.session import open_session
from graphopt.ir.text import print_graph
from graphopt.passes import Context, Legalize
from graphopt.recipe import preset

_GUARDS = """<ir_version: 10, opset_import: ["": 21]>
g (float[4] x, float[4] z) => (float[4] y, bool[4] missing, float[4] w) {
  missing = IsNaN (x)
  y = Where (missing, z, x)
  other = IsNaN (z)
  w = Where (other, x, z)
}"""


def test_before_and_after_of_the_docstring() -> None:
    before, after = (parse(text) for text in docstring_blocks(Legalize))
    Legalize(target="openvino").run(before, Context())
    assert print_graph(before) == print_graph(after)


def test_results_are_those_of_is_nan() -> None:
    model = parse(_GUARDS)
    legal = model.clone()
    Legalize().run(legal, Context(target="openvino"))
    assert not any(node.op_type == "IsNaN" for node in legal.graph)
    assert [node.op_type for node in legal.graph].count("Not") == 1, "missing is an output"
    x = np.array([1, np.nan, -np.inf, np.nan], np.float32)
    z = np.array([np.nan, 2, 3, np.nan], np.float32)
    for expected, found in zip(*(open_session(one).run(None, {"x": x, "z": z}) for one in (model, legal)), strict=True):
        np.testing.assert_array_equal(expected, found)


def test_other_targets_are_left_alone() -> None:
    model = parse(_GUARDS)
    before = print_graph(model)
    context = Context(target="cpu")
    Legalize().run(model, context)
    assert print_graph(model) == before
    assert not context.remarks


def test_it_stands_before_what_times_the_graph() -> None:
    names = [single.name for single in preset("int8").passes]
    assert names.index("fuse-attention") < names.index("legalize") < names.index("quantize")


def test_what_openvino_refuses_is_said_without_its_call_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /x/backend.cc:136 ns::Backend(Graph&) "
        "[OpenVINO-EP] Exception while Reading network: Check 'false' failed at frontend.cpp:221:\n"
        "FrontEnd API failed with GeneralFailure:\n"
        "OpenVINO does not support the following ONNX operations: Attention\n\n"
    )

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("graphopt.ir.session.Session", refuse)
    with pytest.raises(InvalidGraphError) as caught:
        open_session(parse(_GUARDS))
    assert caught.value.what.endswith(
        "load the model: OpenVINO does not support the following ONNX operations: Attention"
    )


def test_sessions_of_openvino_leave_the_graph_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else onnxruntime moves quantizers and makes Gemms before the provider sees the graph."""
    monkeypatch.setattr("graphopt.ir.session.providers", lambda target, **_: ["CPUExecutionProvider"])
    key, found = "optimization.disable_specified_optimizers", {}
    for target in ("cpu", "openvino"):
        options = open_session(parse(_GUARDS), target=target).get_session_options()
        try:
            found[target] = options.get_session_config_entry(key)
        except RuntimeError:  # there is no such entry
            found[target] = ""
    assert found["cpu"] == ""
    assert found["openvino"].split(";")[0] == "QDQPropagationTransformer"


_RESIDUAL = """<ir_version: 10, opset_import: ["": 21]>
g (float[n,7,64] x, float[n,7,64] z, float[64] w_g, float[64] w_b) => (float[n,7,64] y) {
  s = Add (x, z)
  y = LayerNormalization <axis = -1> (s, w_g, w_b)
}"""


def test_onnxruntime_does_not_fuse_a_residual_sum_to_its_slow_kernel(tmp_path: Path) -> None:
    """A test of the claim, too: where onnxruntime no longer fuses the Add, the rule has no use."""
    model = parse(_RESIDUAL)
    legal = model.clone()
    Legalize().run(legal, Context(target="cpu"))
    fused: list[set[str]] = []
    for one in (model, legal):
        path = str(tmp_path / "optimized.onnx")
        open_session(one, optimized_model_path=path)
        fused.append({node.op_type for node in onnx.load(path).graph.node})
    assert fused == [{"SkipLayerNormalization"}, {"Sum", "LayerNormalization"}]
    x, z = np.random.default_rng(0).standard_normal((2, 3, 7, 64)).astype(np.float32)
    expected = open_session(model, optimized=False).run(None, {"x": x, "z": z})[0]
    np.testing.assert_array_equal(open_session(legal, optimized=False).run(None, {"x": x, "z": z})[0], expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [("float[n,7,64]", "float16[n,7,64]"), ("float[n,7,64]", "float[n,7,1,64]"), ("=> (", "=> (float[n,7,64] s, ")],
    ids=["float16", "four axes", "read by others"],
)
def test_sums_that_are_not_fused_stay(old: str, new: str) -> None:
    text = _RESIDUAL.replace(old, new)
    model = parse(text.replace("float[64]", "float16[64]") if new.startswith("float16") else text)
    before = print_graph(model)
    Legalize().run(model, Context(target="cpu"))
    assert print_graph(model) == before
