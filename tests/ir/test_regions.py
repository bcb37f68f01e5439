"""Regions: exactly those of graphs made by hand; a dropped branch equals the branch multiplied by 0 on real ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import GraphoptError
from graphopt.ir.check import check_structure
from graphopt.ir.regions import Region, drop_region, drop_regions, regions
from tests.laws.channel_law import TOLERANCE, difference, run
from tests.zoo.graphs import model as graph
from tests.zoo.models import zoo_feeds, zoo_model

RESIDUAL = """
g (float[n,8,6,6] x, float[8,8,3,3] W1, float[8,8,3,3] W2, float[12,8,3,3] W3, float[12,12,3,3] W4, float[12,8,1,1] W5)
  => (float[n,12,3,3] y) {
  a = Conv <pads = [1,1,1,1]> (x, W1)
  b = Relu (a)
  c = Conv <pads = [1,1,1,1]> (b, W2)
  s = Add (c, x)
  t = Relu (s)
  d = Conv <pads = [1,1,1,1], strides = [2,2]> (t, W3)
  e = Relu (d)
  f = Conv <pads = [1,1,1,1]> (e, W4)
  p = Conv <strides = [2,2]> (t, W5)
  u = Add (f, p)
  y = Relu (u)
}
"""


def found(text: str) -> dict[tuple[str, str, str], Region]:
    return {(region.kind, region.entry, region.exit): region for region in regions(canonical(text))}


def canonical(text: str) -> ir.Model:
    return graphopt.load(graph(text))


def silenced(model: ir.Model, region: Region) -> ir.Model:
    """The model with the branch multiplied by 0."""
    clone = model.clone()
    values = {output.name: output for node in clone.graph for output in node.outputs}
    branch, join = values[region.exit], values[region.replaced].producer()
    zero = ir.Value(name="no", type=branch.type, const_value=ir.tensor(np.zeros((), branch.dtype.numpy()), name="no"))
    clone.graph.register_initializer(zero)
    silent = ir.node("Mul", [branch, zero], outputs=[ir.Value(name="silent", type=branch.type, shape=branch.shape)])
    clone.graph.insert_before(join, silent)
    join.replace_input_with(list(join.inputs).index(branch), silent.outputs[0])
    return clone


def test_residual_blocks_by_hand() -> None:
    by = found(RESIDUAL)
    assert set(by) == {
        ("block", "x", "s"), ("residual branch", "x", "c"), ("chain", "x", "b"), ("chain", "b", "c"),
        ("block", "t", "u"), ("residual branch", "t", "f"), ("chain", "t", "e"), ("chain", "e", "f"),
        ("chain", "t", "p"),
    }  # fmt: skip
    first, second = by["residual branch", "x", "c"], by["residual branch", "t", "f"]
    assert (first.by, first.replaced, first.replacement, len(first.nodes)) == ("identity", "s", "x", 3)
    assert (second.by, second.replaced, second.replacement, len(second.nodes)) == ("projection", "u", "p", 3)
    assert by["chain", "x", "b"].by == "identity"
    assert by["chain", "x", "b"].parent == first.name
    assert first.parent == by["block", "x", "s"].name
    assert by["block", "x", "s"].reason == "dropping the residual branch to c does the same"
    assert by["block", "t", "u"].reason.startswith("t is f32[n,8,6,6], what it would stand for, u, is f32[n,12,3,3]")


def test_dropping_by_hand() -> None:
    model = canonical(RESIDUAL)
    by = {region.exit: region for region in regions(model) if region.kind == "residual branch"}
    cut = drop_region(model, by["c"])
    assert [node.op_type for node in cut.graph] == ["Relu", "Conv", "Relu", "Conv", "Conv", "Add", "Relu"]
    assert set(cut.graph.initializers) == {"W3", "W4", "W5"}
    both = drop_regions(model, [by["f"], by["c"]])
    assert [(node.op_type, node.outputs[0].name) for node in both.graph] == [
        ("Relu", "t"),
        ("Conv", "p"),
        ("Relu", "y"),
    ]
    assert len(model.graph) == 11
    assert drop_region(cut, by["f"]).graph.num_nodes() == 3
    with pytest.raises(GraphoptError, match="no value 's'"):
        drop_region(cut, by["c"])
    with pytest.raises(GraphoptError, match="cannot go: dropping the residual branch to c"):
        drop_region(model, next(region for region in regions(model) if region.kind == "block"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (  # something inside is an output
            "g (float[n,4] x, float[4,4] W1, float[4,4] W2) => (float[n,4] y, float[n,4] a)"
            "{ h = Relu (x) a = MatMul (h, W1) b = MatMul (a, W2) s = Add (h, b) y = Relu (s) }",
            "a inside is also an output of the graph",
        ),
        (  # something inside is read outside
            "g (float[n,4] x, float[4,4] W1, float[4,4] W2) => (float[n,4] y)"
            "{ h = Relu (x) a = MatMul (h, W1) b = MatMul (a, W2) s = Add (b, h) y = Mul (s, a) }",
            "a inside is also read by Mul",
        ),
        (  # the shortcut is spread over the sum
            "g (float[n,1] x, float[1,4] W1) => (float[n,4] y)"
            "{ h = Relu (x) a = MatMul (h, W1) s = Add (a, h) y = Relu (s) }",
            "h is f32[n,1], what it would stand for, s, is f32[n,4]",
        ),
        (  # nothing would be left
            "g (float[n,4] x, float[4,4] W1) => (float[n,4] y) { a = MatMul (x, W1) y = Add (x, a) }",
            "y is an output of the graph, and x an input: a copy would be left",
        ),
        (  # two branches
            "g (float[n,4] x, float[4,4] W1, float[4,4] W2) => (float[n,4] y)"
            "{ a = MatMul (x, W1) b = MatMul (x, W2) s = Add (a, b) y = Relu (s) }",
            "both sides of the sum have as many layers (1): neither is the shortcut of the other",
        ),
    ],
)
def test_branches_that_cannot_go_say_why(text: str, reason: str) -> None:
    branches = [region for region in regions(canonical(text)) if region.kind == "residual branch"]
    assert len(branches) == 1
    assert not branches[0].replaceable
    assert branches[0].reason.startswith(reason)


def test_sums_that_are_no_residual_blocks() -> None:
    """Concatenation is no sum; and no shortcut leads around the scores of attention to the sum with their mask."""
    for name in ("densenet", "unet"):
        assert not [region for region in regions(zoo_model(name)) if region.kind == "residual branch"]


def test_bodies_are_not_looked_into_and_say_so() -> None:
    region = next(region for region in regions(zoo_model("if-captures")) if region.kind == "subgraph")
    assert "the bodies of If" in region.reason


def test_squeeze_excite_inside_an_inverted_residual() -> None:
    model = zoo_model("mobilenet-v3")
    branches = [region for region in regions(model) if region.kind == "residual branch"]
    gates = [region for region in regions(model) if region.kind == "block" and region.replaceable]
    assert [gate.parent for gate in gates] == [branch.name for branch in branches] == ["body.2", "body.3"]
    assert len({branch.signature for branch in branches}) == len({gate.signature for gate in gates}) == 1
    check_structure(drop_regions(model, [*gates, branches[0]]))


def test_signatures_see_structure_and_not_names_or_weights() -> None:
    pieces = found(RESIDUAL)
    assert pieces["chain", "b", "c"].signature != pieces["chain", "x", "b"].signature
    other = RESIDUAL.replace("W1", "W9").replace(" a", " z").replace("(a)", "(z)")
    assert found(other)["residual branch", "x", "c"].signature == pieces["residual branch", "x", "c"].signature
    dilated = RESIDUAL.replace("<pads = [1,1,1,1]> (x", "<pads = [2,2,2,2], dilations = [2,2]> (x")
    assert found(dilated)["residual branch", "x", "c"].signature != pieces["residual branch", "x", "c"].signature


QUICK = [
    ("resnet", 2, 1), ("mobilenet-v2", 2, 0), ("vit", 4, 0), ("bert", 2, 0), ("llama", 2, 0), ("quantized-conv", 1, 0),
    ("two-outputs", 1, 0), ("cached-attention", 1, 0),
]  # fmt: skip
SLOW = [
    ("resnet-bottleneck", 2, 2), ("hf-bert", 4, 0), ("hf-llama", 4, 0), ("t5", 10, 0), ("swin", 2, 0),
    ("convnext", 1, 0), ("yolo-c2f", 6, 0), ("hf-mamba", 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "identity", "projection"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_dropped_branch_is_the_branch_times_zero(name: str, identity: int, projection: int) -> None:
    model = zoo_model(name)
    branches = [region for region in regions(model) if region.kind == "residual branch" and region.replaceable]
    assert [branch.by for branch in branches].count("identity") == identity
    assert [branch.by for branch in branches].count("projection") == projection
    feeds = zoo_feeds(model)
    before = run(model, feeds)
    for branch in (branches[0], branches[-1]):
        cut = run(drop_region(model, branch), feeds)
        assert difference(run(silenced(model, branch), feeds), cut) <= TOLERANCE < difference(before, cut)
    nothing = drop_regions(model, branches)
    run(nothing, feeds, optimized=True)
    assert not [region for region in regions(nothing) if region.kind == "residual branch" and region.replaceable]
    assert [value.name for value in nothing.graph.outputs] == [value.name for value in model.graph.outputs]
    assert [value.name for value in nothing.graph.inputs] == [value.name for value in model.graph.inputs]
