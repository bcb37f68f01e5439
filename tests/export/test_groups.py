"""Coverage of channel groups against counts by hand, what keeps the rest, and the text of the report."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

import graphopt
from graphopt.errors import DataError, LoadError
from graphopt.export.groups import GroupsReport, Obstacle, describe_groups
from graphopt.ir.channels import ChannelGroups
from graphopt.ir.cost import cost
from tests.zoo.models import zoo_model

HEAD = '<ir_version: 10, opset_import: ["": 23, "com.acme": 1]>'


def model_of(text: str) -> ir.Model:
    """A model from ONNX text; inputs whose name begins with w become weights."""
    model = ir.from_onnx_text(f"{HEAD} g {text}")
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs):
        if (value.name or "").startswith("w"):
            shape = tuple(int(size) for size in value.shape or ())
            value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return model


def text_of(report: GroupsReport, frozen: bool = False) -> str:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(report.frozen() if frozen else report)
    return captured.get()


def by_reason(report: GroupsReport) -> dict[str, Obstacle]:
    return {str(obstacle): obstacle for obstacle in report.obstacles}


def test_a_coordinate_that_can_go_makes_an_element_prunable() -> None:
    report = describe_groups(
        model_of("""(float[8,2] x, float[2,3] w1, float[5,4] w2) => (float[8,4] y) {
            h = MatMul (x, w1) joined = Concat <axis = 1> (x, h) y = MatMul (joined, w2) }""")
    )
    # Of w2 the rows of h can go, those of x cannot: 3 * 4 elements, each used by 8 samples. w1 can go as a whole.
    assert (report.parameters.total, report.parameters.prunable) == (2 * 3 + 5 * 4, 2 * 3 + 3 * 4)
    assert (report.macs.total, report.macs.prunable) == (8 * (2 * 3 + 5 * 4), 8 * (2 * 3 + 3 * 4))
    found = by_reason(report)
    assert (found["graph input 'x'"].parameters, found["graph input 'x'"].alone) == (2 * 4, 0)
    assert (found["graph output 'y'"].parameters, found["graph output 'y'"].alone) == (2 * 4, 0)
    assert found["graph output 'y'"].tensors == ("w2",)


def test_an_axis_that_occurs_twice_counts_twice() -> None:
    report = describe_groups(
        model_of("""(float[4,2] x, float[2,3] w1, float[5,2] w2) => (float[2] y) {
            h = MatMul (x, w1) joined = Concat <axis = 1> (x, h) turned = Transpose <perm = [1, 0]> (joined)
            gram = MatMul (turned, joined) mixed = MatMul (gram, w2)
            axes = Constant <value_ints = [0]> () y = ReduceSum <keepdims = 0> (mixed, axes) }""")
    )
    kept = dict(report.kept_macs)
    # 3 of 5 channels can go: 2 * 2 entries of the Gram matrix stay, sums over 4 tokens; then 2 * 2 times w2.
    assert sorted(kept.values()) == [2 * 2 * 2, 2 * 2 * 4]
    assert report.macs.total == 4 * 2 * 3 + 5 * 5 * 4 + 5 * 5 * 2
    assert report.macs.prunable == report.macs.total - 8 - 16


def test_groups_of_a_convolution_are_not_counted_twice() -> None:
    report = describe_groups(
        model_of("""(float[1,6,5,5] x, float[4,3,3,3] w1, float[7,4,1,1] w2) => (float[1,7,3,3] y) {
            h = Conv <group = 2> (x, w1) y = Conv (h, w2) }""")
    )
    # Filters of h are 2 groups, which the input keeps, times 2 within each group, which can go in both.
    assert report.macs.total == 4 * 9 * 27 + 7 * 9 * 4
    assert report.macs.prunable == report.macs.total
    halves = describe_groups(
        model_of("""(float[1,6,5,5] x, float[4,3,3,3] w1) => (float[1,4,3,3] y) { y = Conv <group = 2> (x, w1) }""")
    )
    assert halves.macs.prunable == 0


def test_attention_over_values_that_stay() -> None:
    report = describe_groups(
        model_of("""(float[1,5,6] v, float[6,8] w1, float[6,8] w2) => (float[1,5,6] y) {
            q = MatMul (v, w1) k = MatMul (v, w2)
            y = Attention <q_num_heads = 2, kv_num_heads = 2, scale = 0.5> (q, k, v) }""")
    )
    products = {name: macs for name, macs in report.kept_macs if name.startswith("Attention")}
    # 2 heads, 5 * 5 pairs: products of queries and keys of width 4 can go, sums of values of width 3 cannot.
    assert list(products.values()) == [2 * 25 * 3]
    assert report.macs.total == 2 * 5 * 6 * 8 + 2 * 25 * (4 + 3)
    assert report.macs.prunable == report.macs.total - 2 * 25 * 3


def test_attention_whose_heads_can_all_go() -> None:
    report = describe_groups(
        model_of("""(float[1,5,6] x, float[6,8] w1, float[6,8] w2, float[6,8] w3, float[8,6] w4) => (float[1,5,6] y) {
            q = MatMul (x, w1) k = MatMul (x, w2) v = MatMul (x, w3)
            a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) y = MatMul (a, w4) }""")
    )
    assert report.macs.prunable == report.macs.total
    assert report.parameters.share == 1


def test_a_recurrence_whose_state_stays() -> None:
    report = describe_groups(
        model_of("""(float[4,2,6] x, float[6,5] w0, float[1,12,5] w1, float[1,12,3] w2) => (float[4,1,2,3] y) {
            h = MatMul (x, w0) y = LSTM <hidden_size = 3> (h, w1, w2) }""")
    )
    # 4 steps of 2 samples: the 5 inputs of each of 12 gates can go, the 3 states cannot.
    assert report.macs.total == 8 * (6 * 5 + 12 * 5 + 12 * 3)
    assert report.macs.prunable == 8 * (6 * 5 + 12 * 5)
    assert report.parameters.prunable == 6 * 5 + 12 * 5


CUSTOM = """(float[1,3,4,4] x, float[4,3,1,1] w1, float[6,4,1,1] w2, float[2,6,1,1] w3) => (float[1,2,4,4] y)
    <float[1,4,4,4] b> {
    a = Conv (x, w1) [warp] b = com.acme.Warp (a) c = Conv (b, w2) y = Conv (c, w3) }"""


def test_what_a_custom_operator_keeps_and_what_not() -> None:
    report = describe_groups(model_of(CUSTOM))
    assert [(kind, node) for kind, node, _ in report.opaque] == [("com.acme::Warp", "warp")]
    assert report.unknown == ("com.acme::Warp",)
    warp = next(obstacle for obstacle in report.obstacles if obstacle.operator == "com.acme::Warp")
    # The inputs of w1 stay as well, but that is no news: without the operator all of w1 could go.
    assert (warp.channels, warp.parameters, warp.alone, warp.tensors) == (4 + 4, 12, 12, ("w1",))
    assert (report.parameters.total, report.parameters.prunable) == (12 + 24 + 12, 24 + 12)
    assert [group.units for group in report.groups if group.prunable] == [6]
    for text in (text_of(report), text_of(report, frozen=True)):
        assert "com.acme::Warp" in text
        assert report.opaque[0][2] in text


def test_the_text_names_groups_shares_and_reasons() -> None:
    report = describe_groups(zoo_model("max-unpool"))
    reasons = {kind: why for kind, _, why in report.opaque}
    text = text_of(report)
    for part in (
        "7 groups of channels, 1 prunable (20 units)",
        "parameters 4,320 of 5,184 prunable (83.3 %)",
        f"MaxUnpool: {reasons['MaxUnpool']} (node_7)",
        "W2",
        "6 groups cannot be pruned; --frozen lists them",
    ):
        assert part in text
    frozen = text_of(report, frozen=True)
    assert "graph input 'x'" in frozen
    assert "MaxPool node_2: " in frozen
    assert "W2" not in frozen.replace("inputs of W2", "")


def test_shares_are_rounded_down() -> None:
    assert "(99.9 %)" in text_of(describe_groups(zoo_model("resnet")))


@pytest.mark.parametrize(
    "name", ["vit", "resnet", "llama", "recurrent", "max-unpool", "quantized-conv", "if-weights", "scalars-only"]
)
def test_totals_are_those_of_the_cost_model(name: str) -> None:
    groups = graphopt.channel_groups(zoo_model(name))
    nodes = len(groups.analysis.model.graph)
    uses = {value.name: len(value.uses()) for value in groups.analysis.model.graph.initializers.values()}
    report = describe_groups(groups)
    expected = cost(groups.analysis.model, facts=groups.analysis.facts[0])
    assert (report.parameters.total, report.macs.total) == (expected.parameters, expected.macs)
    assert sum(work for _, work in report.kept_macs) == report.macs.total - report.macs.prunable
    kept = report.parameters.total - report.parameters.prunable
    assert sum(obstacle.alone for obstacle in report.obstacles) <= kept
    assert all(obstacle.alone <= obstacle.parameters <= kept for obstacle in report.obstacles)
    assert json.loads(json.dumps(report.to_json()))["parameters"]["total"] == expected.parameters
    assert len(groups.analysis.model.graph) == nodes
    assert uses == {value.name: len(value.uses()) for value in groups.analysis.model.graph.initializers.values()}


def test_inputs_bind_the_dynamic_dimensions() -> None:
    model = zoo_model("resnet")
    few = describe_groups(model, np.zeros((3, 3, 32, 32), np.float32))
    assert few.dynamic == {"batch": 3}
    assert few.macs.total * 8 == describe_groups(model).macs.total * 3
    with pytest.raises(DataError):
        describe_groups(model, np.zeros((3, 4, 32, 32), np.float32))


def test_groups_that_were_found_already_are_taken_as_they_are() -> None:
    groups = graphopt.channel_groups(zoo_model("quantized-conv"))
    assert isinstance(groups, ChannelGroups)
    assert describe_groups(groups).groups == tuple(groups)


def test_a_file_that_is_no_model_is_refused(tmp_path: object) -> None:
    with pytest.raises(LoadError):
        describe_groups(f"{tmp_path}/missing.onnx")
