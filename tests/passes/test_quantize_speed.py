"""The fastest form, asked of the machine; here the machine's answers are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.inputs.machine import processor
from graphopt.inputs.measurements import FILE_NAME, Measurements
from graphopt.ir.timing import Benchmark, Latency, Speed
from graphopt.passes import quantize_speed
from graphopt.passes.contract import Context
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_speed import FASTER, Fastest, Trial, kinds
from tests.passes.quantized_nets import weighted


def net() -> ir.Model:
    """Two equal blocks of a product, a depthwise product and a sum, and a larger product."""
    return weighted(
        "float[1,8,12,12] x => float[1,16,12,12] y",
        """p = Conv(x, a) q = Relu(p) r = Conv <group = 8, pads = [1,1,1,1]> (q, d) s = Add(r, q)
        t = Conv(s, b) u = Relu(t) v = Conv <group = 8, pads = [1,1,1,1]> (u, e) w = Add(v, u)
        y = Conv <pads = [1,1,1,1]> (w, c)""",
        a=(8, 8, 1, 1),
        d=(8, 1, 3, 3),
        b=(8, 8, 1, 1),
        e=(8, 1, 3, 3),
        c=(16, 8, 3, 3),
    )


Times = Callable[[Sequence[str]], float]


def operator(node: ir.Node) -> str:
    """Its type; "integer depthwise" for a depthwise product with an integer weight."""
    weight = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if node.attributes.get("group") is not None and weight is not None and weight.op_type == "DequantizeLinear":
        return "integer depthwise"
    return node.op_type


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Times], list[tuple[str, ...]]]:
    """Sets how long a graph takes, told by the operators of the session; returns the graphs that were timed."""
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    timed: list[tuple[str, ...]] = []

    def install(milliseconds: Times) -> list[tuple[str, ...]]:
        class Fake:
            def __init__(self, model: ir.Model) -> None:
                self.operators = tuple(operator(node) for node in model.graph)

            def run_feeds(self, feeds: Any) -> list[np.ndarray]:
                return []

        def interleave(sessions: Sequence[Fake], feeds: Any, **others: Any) -> Benchmark:
            timed.append(sessions[1].operators)
            first, second = (milliseconds(session.operators) for session in sessions)
            speed = first / second
            latencies = tuple(Latency(time, time, time) for time in (first, second))
            return Benchmark(("a", "b"), latencies, (Speed(1, 1, 1), Speed(speed, speed, speed)), 7, 1, "cpu")

        monkeypatch.setattr(quantize_speed, "open_session", lambda model, **others: Fake(model))
        monkeypatch.setattr(quantize_speed, "interleave", interleave)
        return timed

    return install


def test_kinds_are_equal_operators_and_what_stands_between_products() -> None:
    model = net()
    plan = Quantize(search=False).plan(model, Context())
    found = dict(kinds(model, plan, Context()))
    names = {one.node: one.op_type for one in plan.operators}
    by_size = {kind: sorted(names[node] for node in nodes) for kind, nodes in found.items()}
    assert by_size["everything between products"].count("Add") == 2
    assert by_size["depthwise Conv"] == ["Conv", "Conv"]
    assert by_size["Conv 8x8x1x1 of 1x8x12x12"] == ["Conv", "Conv"]
    assert by_size["Conv 16x8x3x3 of 1x16x12x12"] == ["Conv"]
    assert next(iter(found)) == "Conv 16x8x3x3 of 1x16x12x12", "the dearest comes first"


def test_what_is_slow_on_integers_goes_back_to_float_and_is_remembered(machine: Any) -> None:
    def milliseconds(operators: Sequence[str]) -> float:
        """Integers are faster, but for depthwise products."""
        return (4.0 if "QuantizeLinear" in operators else 10.0) + operators.count("integer depthwise")

    timed = machine(milliseconds)
    model, context = net(), Context()
    Quantize(measure=True, search=False).rewrite(model, context)
    assert timed, "nothing was timed"
    found = context.evidence["speed"]
    assert isinstance(found, Fastest)
    assert all(reason.startswith("float is faster here: 1.50x") for reason in found.kept_float.values())
    assert "integer depthwise" not in map(operator, model.graph)
    assert not found.remembered
    assert all(trial.speed > FASTER for trial in found.trials if trial.taken and "in float" in trial.what)
    count = len(timed)
    again, second = net(), Context()
    Quantize(measure=True, search=False).rewrite(again, second)
    assert len(timed) == count
    assert second.evidence["speed"].to_json() == found.to_json()
    assert [node.op_type for node in again.graph] == [node.op_type for node in model.graph]
    assert "earlier call" in second.evidence["speed"].summary()[0]


def test_the_plan_says_why(machine: Any) -> None:
    machine(lambda operators: 10.0 - 5.0 * ("QuantizeLinear" in operators) + operators.count("integer depthwise"))
    plan = Quantize(measure=True, search=False).plan(net(), Context())
    reasons = [one.reason for one in plan.operators if one.form == "float"]
    assert any("float is faster here" in reason for reason in reasons)
    assert QuantizePlan.from_json(plan.to_json()) == plan


def test_nothing_faster_leaves_the_plan_of_the_rules(machine: Any) -> None:
    machine(lambda operators: 10.0 - 0.1 * operators.count("QuantizeLinear"))
    measured = Quantize(measure=True, search=False).plan(net(), Context())
    assert measured == Quantize(search=False).plan(net(), Context())


def test_a_dynamic_form_is_taken_where_it_is_faster(machine: Any) -> None:
    model = weighted(
        "float[4,16] x => float[4,16] y", "h = MatMul(x, a) r = Relu(h) y = MatMul(r, b)", a=(16, 32), b=(32, 16)
    )
    machine(lambda operators: 3.0 if "QuantizeLinear" in operators else (5.0 if "MatMulInteger" in operators else 10.0))
    assert Quantize(measure=True, search=False).plan(model, Context()).static
    machine(lambda operators: 5.0 if "QuantizeLinear" in operators else (3.0 if "MatMulInteger" in operators else 10.0))
    Measurements()._database.path.unlink()
    assert not Quantize(measure=True, search=False).plan(model, Context()).static


def test_what_cannot_be_read_is_measured_anew(machine: Any, tmp_path: Path) -> None:
    timed = machine(lambda operators: 10.0 - 5.0 * ("QuantizeLinear" in operators))
    Quantize(measure=True, search=False).plan(net(), Context())
    count = len(timed)
    store = Measurements()
    with store._database.writing() as database:
        database.execute("UPDATE measurements SET value = '{}'")
    context = Context()
    Quantize(measure=True, search=False).plan(net(), context)
    assert len(timed) == 2 * count
    assert any("measured anew" in remark.why for remark in context.remarks)
    (tmp_path / FILE_NAME).write_bytes(b"no database at all" * 100)
    Quantize(measure=True, search=False).plan(net(), Context())
    assert len(timed) == 3 * count


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="other systems say it otherwise")
def test_the_key_knows_what_a_processor_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set[str]()
    for flags in ("fpu avx2", "fpu avx2 avx512_vnni"):
        text = f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
        monkeypatch.setattr(Path, "read_text", lambda path, text=text, **others: text)
        known.add(processor.__wrapped__())
    assert len(known) == 2


def test_a_model_that_made_up_inputs_do_not_suit_keeps_the_form_of_the_rules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: Any, **others: Any) -> None:
        raise DataError("onnxruntime cannot run the model on these inputs")

    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    expected = Quantize(search=False).plan(net(), Context())
    monkeypatch.setattr(quantize_speed, "probe_feeds", refuse)
    context = Context()
    assert Quantize(measure=True, search=False).plan(net(), context) == expected
    assert any(remark.what == "time the forms" and remark.kind == "missed" for remark in context.remarks)
    assert not (tmp_path / FILE_NAME).exists(), "nothing was measured, so nothing is remembered"


def test_json_round_trip() -> None:
    found = Fastest("static", {"a": "why"}, (Trial("form static over float", 1.5, False),), 1.5)
    again = Fastest.from_json(found.to_json())
    assert again.remembered
    assert again.to_json() == found.to_json()


def test_on_the_real_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    model, context = net(), Context()
    before = model.clone()
    Quantize(measure=True).rewrite(model, context)
    assert context.evidence["speed"].to_json()["trials"]
    assert before.graph.num_nodes() != model.graph.num_nodes()
