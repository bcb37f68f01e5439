"""Kernels inside whole graphs: which nodes they compute, that their times add up, and noise."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError, GraphoptError
from graphopt.latency import kernels as subject
from graphopt.latency.attribution import Placed, attribute, mark, node_names
from graphopt.latency.calm import believed_level, inner_mean, undisturbed
from graphopt.latency.kernels import KernelProfile, profile_kernels

RANDOM = np.random.default_rng(0)
HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def graph(text: str, **weights: tuple[int, ...]) -> ir.Model:
    """A model from its text; weights by shape, random floats."""
    stated = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    head, _, body = text.partition("{")
    inputs, _, outputs = head.partition("=>")
    model = ir.from_onnx_text(f"{HEAD} g ({inputs.strip(' ()')}{', ' if stated else ''}{stated}) => {outputs} {{{body}")
    for name, shape in weights.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(np.abs(RANDOM.standard_normal(shape)).astype(np.float32), name=name)
        model.graph.register_initializer(value)
    return model


def profiled(model: ir.Model, **feeds: np.ndarray) -> KernelProfile:
    """A short profile, checked for what holds of every one."""
    (found,) = profile_kernels(model, feeds, seconds=0.02)
    assert sum(found.by_node().values()) == pytest.approx(sum(kernel.microseconds for kernel in found.kernels))
    assert {node for kernel in found.kernels for node in kernel.nodes} | set(found.without_kernel) == set(found.names)
    assert all(kernel.node in found.names for kernel in found.kernels)
    assert all(kernel.low <= kernel.high and kernel.microseconds >= 0 for kernel in found.kernels)
    return found


def owners(found: KernelProfile) -> dict[str, set[str]]:
    """The nodes of each kernel that computes any, by its main node."""
    return {kernel.nodes[0]: set(kernel.nodes) for kernel in found.kernels if kernel.nodes}


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_a_residual_network_with_batch_normalization_and_depthwise_convolution() -> None:
    norms = {f"{name}{number}": (16,) for number in (1, 2) for name in "sbmv"}
    model = graph(
        """(float[1,16,16,16] x) => (float[1,16] y) {
        [first] a = Conv <pads = [1,1,1,1]> (x, w1)  [first_norm] b = BatchNormalization (a, s1, b1, m1, v1)
        [first_relu] c = Relu (b)
        [depthwise] d = Conv <pads = [1,1,1,1], group = 16> (c, w2)
        [second_norm] e = BatchNormalization (d, s2, b2, m2, v2)
        [sum] f = Add (e, c)  [second_relu] g = Relu (f)  [last] h = Conv (g, w3)
        [mean] i = GlobalAveragePool (h)  [flat] y = Flatten (i) }""",
        w1=(16, 16, 3, 3),
        w2=(16, 1, 3, 3),
        w3=(16, 16, 1, 1),
        **norms,
    )
    found = profiled(model, x=normal(1, 16, 16, 16))
    assert owners(found)["first"] == {"first", "first_norm", "first_relu"}
    assert owners(found)["depthwise"] == {"depthwise", "second_norm", "sum", "second_relu"}
    assert "last" in owners(found)
    layouts = [kernel for kernel in found.kernels if not kernel.nodes]
    assert all(kernel.operator.startswith("Reorder") and kernel.serves for kernel in layouts)
    first = next(kernel for kernel in found.kernels if kernel.nodes[:1] == ("first",))
    assert (16, 16, 3, 3) in first.input_shapes
    assert first.output_shapes == ((1, 16, 16, 16),)
    assert first.provider == "CPUExecutionProvider"


def test_a_transformer_block() -> None:
    model = graph(
        """(float[1,8,32] x) => (float[1,8,32] y) {
        [query] q0 = MatMul (x, wq)  [query_bias] q = Add (q0, bq)  [key] k = MatMul (x, wk)
        [turn] t = Transpose <perm = [0,2,1]> (k)  [scores] s = MatMul (q, t)  [weights] p = Softmax (s)
        [mix] m = MatMul (p, x)  [sum] r = Add (m, x)  [norm] n = LayerNormalization (r, g, b)
        [up] u0 = MatMul (n, wu)  [up_bias] u = Add (u0, bu)  [gelu] a = Gelu (u)  [down] y = MatMul (a, wd) }""",
        wq=(32, 32), bq=(32,), wk=(32, 32), g=(32,), b=(32,), wu=(32, 64), bu=(64,), wd=(64, 32),
    )  # fmt: skip
    found = owners(profiled(model, x=normal(1, 8, 32)))
    assert {"turn", "scores"} <= found["scores"]
    assert {"sum", "norm"} == found["norm"]
    assert found["query"] == {"query", "query_bias"}
    assert {"key", "mix", "up", "gelu", "down"} <= set(found)


def test_integer_convolutions_own_their_quantizers() -> None:
    def quantized(value: str) -> str:
        return f"""[{value}_q] {value}q = QuantizeLinear ({value}, s, z)
            [{value}_d] {value}d = DequantizeLinear ({value}q, s, z)"""

    model = ir.from_onnx_text(
        f"""{HEAD} g (float[1,4,8,8] x) => (float[1,4,8,8] y)
        <float s = {{0.1}}, uint8 z = {{0}}, float ws = {{0.02}}, int8 wz = {{0}},
        int8[4,4,1,1] w = {{{",".join("1" * 16)}}}> {{
        {quantized("x")} [w_d] wd = DequantizeLinear (w, ws, wz) [w_d2] wd2 = DequantizeLinear (w, ws, wz)
        [first] a = Conv (xd, wd) [relu] b = Relu (a) {quantized("b")}
        [second] c = Conv (bd, wd2) {quantized("c")} [out] y = Neg (cd) }}"""
    )
    found = owners(profiled(model, x=normal(1, 4, 8, 8)))
    assert {"first", "w_d", "x_d", "relu", "b_q"} <= found["first"]
    assert {"second", "b_d", "w_d2", "c_q"} <= found["second"]


def branches() -> ir.Model:
    return ir.from_onnx_text(
        f"""{HEAD} g (float[8,64] x, bool take) => (float[8,64] y) {{
        [before] h = Exp (x)
        [choice] r = If (take) <
            then_branch = then () => (float[8,64] t) {{ [same] t0 = Sin (h) [other] t = Cos (t0) }},
            else_branch = else () => (float[8,64] e) {{ [same] e = Tanh (h) }}>
        [after] y = Neg (r) }}"""
    )


def test_time_in_a_branch_is_counted_once() -> None:
    found = profiled(branches(), x=normal(8, 64), take=np.array(True))
    assert node_names(branches()) == ("before", "choice", "same", "other", "choice/same", "after")
    inside = {kernel.node: kernel.calls for kernel in found.kernels if kernel.inside is not None}
    assert inside == {"same": 1, "other": 1, "choice/same": 0}
    assert found.by_node()["choice/same"] == 0
    events = [{"cat": "Node", "name": f"{name}_kernel_time", "dur": dur} for name, dur in (("in", 30), ("if", 50))]
    runs = [run for run, _ in subject._runs([*events, {"cat": "Session", "name": "model_run", "dur": 60}] * 3)]
    placed = [Placed("if", "If"), Placed("in", "Sin", holder="if")]
    times, calls = subject._times(placed, runs, subject.Overhead(2.0, 1.0))
    assert times[0].tolist() == [50.5 - 2 - 30.5 - 1, 30.5 - 2]
    assert calls.tolist() == [1, 1]


def test_a_kernel_that_hides_everything_computes_everything() -> None:
    marked = mark(branches())
    whole = [Placed("OpenVINO_Graph_0", "OpenVINO_Graph")]
    assert attribute(marked, whole, [(0, 0)] * 6) == []
    assert sorted(whole[0].nodes) == [0, 1, 2, 3, 4, 5]


def test_marks_do_not_meet_names_of_the_model() -> None:
    model = ir.from_onnx_text(f'{HEAD} g (float[2] "@n0@") => (float[2] y) {{ [a] y = Neg ("@n0@") }}')
    assert mark(model).mark == "@@"
    assert owners(profiled(model, **{"@n0@": normal(2)})) == {"a": {"a"}}


def test_models_in_turns_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = graph("(float[64,256] x) => (float[64,256] y) { [a] h = MatMul (x, w) [b] y = Softmax (h) }", w=(256, 256))
    wide = graph("(float[64,256] x) => (float[64,2048] y) { [a] h = MatMul (x, w) [b] y = Softmax (h) }", w=(256, 2048))
    before = [node.name for node in model.graph]
    narrow, more = profile_kernels(model, {"x": normal(64, 256)}, seconds=0.3, against=(wide,))
    assert narrow.rounds == more.rounds >= subject.LEAST_ROUNDS
    assert more.by_node()["a"] > 2 * narrow.by_node()["a"], "eight times the work"
    assert list(tmp_path.iterdir()) == []
    assert [node.name for node in model.graph] == before


def test_a_noisy_clock_is_noticed_and_a_steady_one_ends_early() -> None:
    model = graph("(float[2] x) => (float[2] y) { y = Neg (x) }")

    def clock(durations: Callable[[int], float]) -> Callable[[], float]:
        calls, now = itertools.count(), [0.0]

        def read() -> float:
            call = next(calls)
            now[0] += durations(call // 2) if call % 2 else 0.0
            return now[0]

        return read

    feeds = {"x": normal(2)}
    (steady,) = profile_kernels(model, feeds, seconds=30, clock=clock(lambda run: 1e-5))
    assert steady.rounds < 100
    assert not any("noisy" in note for note in steady.notes)
    (noisy,) = profile_kernels(model, feeds, seconds=0.01, clock=clock(lambda run: 1e-5 * (1 + run % 5)))
    assert any("the machine is noisy" in note for note in noisy.notes)


def test_calls_that_others_have_slowed_down_are_not_believed() -> None:
    true = np.array([10.0, 100.0, 1000.0])
    times = np.tile(true, (40, 1))
    slowed = RANDOM.random(times.shape) < np.array([0.05, 0.3, 0.65])
    times = np.where(slowed, times + 3000.0, times)
    level = believed_level(times, true.sum())
    assert level < 0.5
    assert [inner_mean(column, level) for column in times.T] == pytest.approx(true, rel=0.02)
    assert believed_level(np.tile(true, (40, 1)), true.sum()) == 0.5
    assert undisturbed(np.array([0.2, 0.3])).any()


def test_bad_input() -> None:
    model = graph("(float[2] x) => (float[2] y) { y = Neg (x) }")
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="time to measure"):
            profile_kernels(model, {"x": normal(2)}, seconds=seconds)
    with pytest.raises(DataError, match="onnxruntime cannot run"):
        profile_kernels(model, {"x": normal(3)}, seconds=0.1)
    with pytest.raises(GraphoptError, match="unknown target"):
        profile_kernels(model, {"x": normal(2)}, target="tpu")
