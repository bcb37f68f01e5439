"""The guard: what breaks structure, numbers, speed or the metric is rolled back with the reason and figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graphopt.errors import DataError, InvalidGraphError, RecipeError
from graphopt.ir.session import open_session
from graphopt.optimize import Result, optimize
from graphopt.passes import Context, Pass, PruneChannels, Semantics
from graphopt.pipeline import measure_metric


def model(size: int = 64) -> ir.Model:
    """y = Relu(x w): small, with one weight."""
    text = (
        f'<ir_version: 10, opset_import: ["": 21]> g (float[1,{size}] x, float[{size},{size}] w) => (float[1,{size}] y)'
        " { p = MatMul (x, w) y = Relu (p) }"
    )
    parsed = ir.from_onnx_text(text)
    weight = parsed.graph.inputs.pop(1)
    rng = np.random.default_rng(0)
    weight.const_value = ir.tensor(rng.standard_normal((size, size), dtype=np.float32), name="w")
    parsed.graph.register_initializer(weight)
    return parsed


def scale_weight(factor: float) -> Callable[[ir.Model], None]:
    def rewrite(graph_model: ir.Model) -> None:
        weight = graph_model.graph.initializers["w"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name="w")

    return rewrite


def add_work(graph_model: ir.Model) -> None:
    """Forty more products with the identity: the same function, much slower."""
    graph = graph_model.graph
    size = graph.initializers["w"].shape[0]
    identity = ir.Value(name="identity", const_value=ir.tensor(np.eye(size, dtype=np.float32), name="identity"))
    graph.register_initializer(identity)
    relu = graph[len(list(graph)) - 1]
    value = relu.inputs[0]
    for _ in range(40):
        node = ir.node("MatMul", [value, identity])
        graph.insert_before(relu, node)
        value = node.outputs[0]
    relu.replace_input_with(0, value)


def break_types(graph_model: ir.Model) -> None:
    relu = graph_model.graph[1]
    relu.attributes["nonsense"] = ir.AttrInt64("nonsense", 1)


def raise_bug(graph_model: ir.Model) -> None:
    raise KeyError("oops")


@dataclass(frozen=True)
class Do(Pass):
    """Whatever a test wants a pass to do."""

    name: ClassVar[str] = "do"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    what: Callable[[ir.Model], Any] = field(default=lambda graph_model: None)

    def rewrite(self, model: ir.Model, context: Context) -> None:
        self.what(model)


@dataclass(frozen=True)
class DoLossy(Do):
    name: ClassVar[str] = "do-lossy"
    semantics: ClassVar[Semantics] = Semantics.LOSSY


def step(result: Result) -> Any:
    return result.report.steps[-1]


def test_an_exact_pass_that_changes_the_function_is_rolled_back() -> None:
    original = model()
    result = optimize(original, recipe=[Do(scale_weight(1.01))], quiet=True)
    assert step(result).status == "rolled back"
    assert "output y moved by 1.0e-02, more than rounding" in step(result).reason
    kept = result.model.graph.initializers["w"].const_value.numpy()
    assert np.array_equal(kept, original.graph.initializers["w"].const_value.numpy())


def test_an_invalid_graph_is_rolled_back() -> None:
    result = optimize(model(), recipe=[Do(break_types)], quiet=True)
    assert step(result).status == "rolled back"
    assert "nonsense" in step(result).reason
    result.session().run(None, {"x": np.zeros((1, 64), np.float32)})


def test_a_slower_graph_is_rolled_back_with_both_figures() -> None:
    result = optimize(model(256), recipe=[Do(add_work)], quiet=True)
    assert step(result).status == "rolled back"
    assert "slower" in step(result).reason
    assert step(result).reason.count("ms") == 2


def test_a_pass_that_raises_is_rolled_back_named_and_counts_as_missed() -> None:
    result = optimize(model(), recipe=[Do(raise_bug), "eliminate-identity"], quiet=True)
    failed = result.report.steps[2]
    assert failed.status == "rolled back"
    assert "KeyError" in failed.reason
    assert result.report.missed
    assert result.report.steps[3].status == "unchanged"


def test_a_lossy_pass_within_the_tolerance_is_kept() -> None:
    result = optimize(model(), recipe=[DoLossy(scale_weight(1.01))], tolerance=0.02, quiet=True)
    assert step(result).status == "applied"
    assert not result.report.missed
    assert result.report.error is not None
    assert result.report.error.error == pytest.approx(0.01, rel=0.01)


def test_a_lossy_pass_beyond_the_tolerance_is_rolled_back_and_missed() -> None:
    result = optimize(model(), recipe=[DoLossy(scale_weight(1.5))], tolerance=0.02, quiet=True)
    assert step(result).status == "rolled back"
    assert "tolerance 0.02" in step(result).reason
    assert result.report.missed
    assert result.report.error is not None
    assert result.report.error.error < 1e-4


def metric_of_sum(session: onnxruntime.InferenceSession) -> float:
    return float(session.run(None, {"x": np.ones((1, 64), np.float32)})[0].sum())


@pytest.mark.parametrize(("factor", "status"), [(0.999, "applied"), (0.5, "rolled back"), (1.5, "applied")])
def test_the_metric_decides_where_there_is_one(factor: float, status: str) -> None:
    result = optimize(model(), recipe=[DoLossy(scale_weight(factor))], evaluate=metric_of_sum, quiet=True)
    assert step(result).status == status
    assert step(result).metric == pytest.approx(result.report.steps[0].metric * factor, rel=1e-3)
    if status == "rolled back":
        assert "metric fell by" in step(result).reason


def test_max_drop_is_in_the_metrics_own_unit() -> None:
    start = metric_of_sum(optimize(model(), recipe="exact", quiet=True).session())
    result = optimize(
        model(), recipe=[DoLossy(scale_weight(0.9))], evaluate=metric_of_sum, max_drop=0.11 * start, quiet=True
    )
    assert step(result).status == "applied"


def test_unchanged_is_measured_not_claimed() -> None:
    result = optimize(model(), recipe=[Do()], quiet=True)
    assert step(result).status == "unchanged"
    assert result.report.weights[0].status == "declined"


def test_weights_are_listed_with_what_changed_them() -> None:
    result = optimize(model(), recipe=[DoLossy(scale_weight(1.0001))], tolerance=0.1, quiet=True)
    assert [(weight.name, weight.status, weight.by) for weight in result.report.weights] == [
        ("w", "changed", ("do-lossy",))
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "high"])
def test_evaluate_must_return_a_finite_number(value: Any) -> None:
    session = optimize(model(), recipe="exact", quiet=True).session()
    with pytest.raises(DataError, match="`evaluate` returned"):
        measure_metric(lambda session: value, session)


def test_evaluate_that_raises_names_the_error() -> None:
    def broken(session: onnxruntime.InferenceSession) -> float:
        raise ZeroDivisionError("no samples")

    with pytest.raises(DataError, match="`evaluate` raised ZeroDivisionError: no samples"):
        optimize(model(), recipe="exact", evaluate=broken, quiet=True)


def test_the_report_reads_and_round_trips() -> None:
    import json

    result = optimize(model(), recipe=[Do(scale_weight(2)), "eliminate-identity"], quiet=True)
    text = str(result.report)
    assert "rolled back" in text
    assert "total:" in text
    document = json.loads(json.dumps(result.report.to_json(), allow_nan=False))
    assert [entry["name"] for entry in document["steps"]] == ["(input)", "(canonical)", "do", "eliminate-identity"]
    assert document["steps"][2]["macs"] == 64 * 64


def test_slower_is_no_missed_target_even_with_a_budget() -> None:
    @dataclass(frozen=True)
    class Slow(DoLossy):
        name: ClassVar[str] = "slow"

    result = optimize(model(256), recipe=[Slow(add_work)], tolerance=0.5, quiet=True)
    assert step(result).cause == "speed"
    assert not result.report.missed


@pytest.mark.parametrize("given", [True, False])
def test_slower_is_a_missed_target_where_a_pass_was_told_how_much(given: bool) -> None:
    @dataclass(frozen=True)
    class Told(DoLossy):
        name: ClassVar[str] = "told"
        is_target_given: ClassVar[bool] = given

    result = optimize(model(256), recipe=[Do(), Told(add_work)], tolerance=0.5, quiet=True)
    assert step(result).cause == "speed"
    assert [line.startswith("told was rolled back: slower") for line in result.report.missed] == [True] * given
    assert PruneChannels(macs=0.5).is_target_given
    assert not PruneChannels().is_target_given


def test_a_wrong_exact_pass_is_a_missed_target() -> None:
    result = optimize(model(), recipe=[Do(break_types)], quiet=True)
    assert step(result).cause == "defect"
    assert result.report.missed


def test_a_pass_without_a_name_is_refused() -> None:
    @dataclass(frozen=True)
    class Nameless(Pass):
        semantics: ClassVar[Semantics] = Semantics.EXACT

        def rewrite(self, model: ir.Model, context: Context) -> None:
            pass

    with pytest.raises(RecipeError, match="Nameless has no name"):
        optimize(model(), recipe=[Nameless()], quiet=True)


def test_the_report_says_what_was_timed() -> None:
    result = optimize(model(), recipe="exact", quiet=True)
    assert result.report.inputs == {"x": "float32[1, 64]"}
    assert "timed on x float32[1, 64]" in str(result.report)


def test_a_ruined_result_that_nobody_judges_is_told() -> None:
    """Without a budget a lossy pass may do what it is asked for; the report says that nobody has looked at it."""
    told = "measure the accuracy before you deploy"
    for factor, options, expected in ((0.5, {}, True), (0.9, {}, False), (0.5, {"tolerance": 0.9}, False)):
        notes = optimize(model(), recipe=[DoLossy(scale_weight(factor))], quiet=True, **options).report.notes
        assert any(told in note for note in notes) is expected, (factor, options)


@pytest.mark.parametrize("refused", ["Identity", "Relu"])
def test_an_input_that_the_target_cannot_load_may_become_one_that_it_can(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO refuses AveragePool with a window larger than the image, until a pass writes it as GlobalAveragePool."""
    opened: list[tuple[str, list[str]]] = []

    def open_unless(graph: ir.Model, *, target: str = "cpu", **options: Any) -> Any:
        operators = [node.op_type for node in graph.graph]
        if target == "openvino" and refused in operators:
            raise InvalidGraphError(f"no {refused} here")
        opened.append((target, operators))
        return open_session(graph, **options)

    monkeypatch.setattr("graphopt.pipeline.open_session", open_unless)
    strange = model()
    relu = strange.graph[1]
    same = ir.node("Identity", [relu.inputs[0]])
    strange.graph.insert_before(relu, same)
    relu.replace_input_with(0, same.outputs[0])

    def run() -> Result:
        return optimize(strange, recipe=["eliminate-identity"], target="openvino", quiet=True)

    if refused == "Relu":
        with pytest.raises(InvalidGraphError, match="no Relu here"):
            run()
        return
    result = run()
    told = "the input does not load on openvino, the result is compared with it on cpu: no Identity here"
    assert told in result.report.notes
    assert ("openvino", ["MatMul", "Relu"]) in opened
    assert result.report.final is not None


def test_what_makes_an_input_load_is_kept_though_the_cpu_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result must load on the target: neither a slow rescue nor a slow result gives way to what does not."""

    def open_unless(graph: ir.Model, *, target: str = "cpu", **options: Any) -> Any:
        nodes = list(graph.graph)
        if target == "openvino" and len(nodes) < 10:
            raise InvalidGraphError("too short")
        return open_session(graph, **options)

    monkeypatch.setattr("graphopt.pipeline.open_session", open_unless)
    result = optimize(model(256), recipe=[Do(add_work)], target="openvino", quiet=True)
    assert step(result).status == "applied"
    assert len(list(result.model.graph)) > 10
    assert result.report.final is not None
    assert result.report.final.is_slower(), "else this shows nothing"
