"""Groups, removal and masks on graphs written by hand, and everything that they refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import GraphoptError, InvalidGraphError, SelectionError
from graphopt.ir.channels import ChannelGroups
from graphopt.ir.ops import default_table
from graphopt.ir.ops.channels.elementwise import keeps_zero
from graphopt.ir.ops.families import same_shape
from graphopt.ir.ops.row import OpRow
from tests.laws.channel_law import TOLERANCE, cut_against_masked, difference, random_selection, run


def parse(text: str, *, opset: int = 21, domains: str = "") -> onnx.ModelProto:
    """The graph with float weights declared as `float[2,3] name` inputs of the initializer list filled at random."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}{domains}]> {text}')
    numbers = np.random.default_rng(0)
    for value in list(proto.graph.input):
        if value.name[0].isupper():
            shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
            array = numbers.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
            proto.graph.input.remove(value)
    return proto


def load(text: str, **options: object) -> ir.Model:
    return graphopt.load(parse(text, **options))  # type: ignore[arg-type]


def prunable(model: ir.Model) -> dict[str, int]:
    return {group.name: group.units for group in graphopt.channel_groups(model) if group.prunable}


TWO_LAYERS = """g (float[n,4] x, float[4,6] A, float[6] B, float[6,3] C) => (float[n,3] y) {
    a = MatMul(x, A) b = Add(a, B) c = Relu(b) y = MatMul(c, C) }"""


def test_units_own_rows_columns_and_biases() -> None:
    (group,) = (group for group in graphopt.channel_groups(load(TWO_LAYERS)) if group.prunable)
    assert (group.name, group.role, group.units, group.exact) == ("mlp hidden of A", "mlp hidden", 6, True)
    assert group.members == (("A", 1), ("B", 0), ("C", 0))
    slices = group.slices(2)
    assert {name: [(axis, indices.tolist()) for axis, indices in found] for name, found in slices.items()} == {
        "A": [(1, [2])],
        "B": [(0, [2])],
        "C": [(0, [2])],
    }
    assert all(indices.dtype == np.int64 for found in slices.values() for _, indices in found)
    assert group.parameters == 4 + 1 + 3


def test_removal_slices_and_leaves_the_model_alone() -> None:
    model = load(TWO_LAYERS)
    before = ir.to_proto(model).SerializeToString()
    cut = graphopt.remove_channels(model, {"mlp hidden of A": [0, 5]})
    assert ir.to_proto(model).SerializeToString() == before
    assert {name: list(value.shape or ()) for name, value in cut.graph.initializers.items()} == {
        "A": [4, 4],
        "B": [4],
        "C": [4, 3],
    }
    original = model.graph.initializers["A"].const_value
    assert original is not None
    assert np.array_equal(cut.graph.initializers["A"].const_value.numpy(), original.numpy()[:, 1:5])  # type: ignore[union-attr]
    assert [str(node.outputs[0].shape) for node in cut.graph] == ["[n,4]", "[n,4]", "[n,4]", "[n,3]"]


def test_masking_zeroes_what_removal_cuts() -> None:
    masked = graphopt.mask_channels(load(TWO_LAYERS), {"mlp hidden of A": [1]})
    a, b, c = (masked.graph.initializers[name].const_value.numpy() for name in "ABC")  # type: ignore[union-attr]
    assert not a[:, 1].any()
    assert b[1] == 0
    assert not c[1].any()
    assert a[:, 0].all()


def test_nothing_selected_changes_nothing() -> None:
    model = load(TWO_LAYERS)
    cut = graphopt.remove_channels(model, {"mlp hidden of A": []})
    assert ir.to_proto(cut).SerializeToString() == ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"mlp hidden": [0]}, "no channel group 'mlp hidden'"),
        ({"mlp hidden of A": [6]}, "there is no unit 6: the group has 6"),
        ({"mlp hidden of A": [-1]}, "there is no unit -1"),
        ({"mlp hidden of A": list(range(6))}, "nothing would be left: all 6 units"),
        ({"C": [0]}, "cannot be pruned: graph output 'y'"),
        ({"inputs of A": [0]}, "cannot be pruned: graph input 'x'"),
        ([0, 1], "a selection maps names of groups"),
    ],
)
@pytest.mark.parametrize("act", [graphopt.remove_channels, graphopt.mask_channels])
def test_selections_that_are_refused(
    act: Callable[[ir.Model, object], ir.Model], selection: object, message: str
) -> None:
    model = load(TWO_LAYERS)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(SelectionError, match=message):
        act(model, selection)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_selection_from_another_model_names_groups_that_are_there() -> None:
    with pytest.raises(SelectionError, match="for instance 'inputs of A', 'mlp hidden of A'"):
        graphopt.remove_channels(load(TWO_LAYERS), {"layer1.0.conv1": [0]})


def test_groups_that_share_an_axis_leave_something_on_it() -> None:
    """A slice sees 3 channels of one branch and 3 of the other: all of these may not go together."""
    model = load("""g (float[n,4,5] x, float[6,4,1] A, float[6,4,1] B, float[3,6,1] C, float[3,12,1] D)
        => (float[n,3,5] y) <int64[1] s = {3}, int64[1] e = {9}, int64[1] ax = {1}> {
        a = Conv(x, A) b = Conv(x, B) c = Concat<axis=1>(a, b) d = Slice(c, s, e, ax) f = Conv(d, C) k = Conv(c, D)
        y = Add(f, k) }""")
    groups = graphopt.channel_groups(model)
    halves = [group.name for group in groups if group.prunable and group.units == 3]
    inner = {name for name in halves if len(groups.named(name).members) == 3}
    with pytest.raises(SelectionError, match=r"nothing would be left"):
        graphopt.remove_channels(model, {name: [0, 1, 2] for name in inner})
    assert len(inner) == 2
    graphopt.remove_channels(model, {name: [0, 2] for name in inner})


GROUPED = """g (float[n,8,5] x, float[8,8,1] A, float[8,2,1] B, float[3,8,1] C) => (float[n,3,5] y) {
    a = Conv(x, A) b = Conv<group=4>(a, B) y = Conv(b, C) }"""


def test_a_grouped_convolution_loses_whole_groups_or_the_same_channel_of_each() -> None:
    model = load(GROUPED)
    assert sorted(prunable(model).values()) == [2, 2, 4]
    groups = graphopt.channel_groups(model)
    (whole,) = (group for group in groups if group.units == 4)
    cut = graphopt.remove_channels(model, {whole.name: [1]})
    (node,) = (node for node in cut.graph if "group" in node.attributes and node.attributes["group"].as_int() > 1)
    assert node.attributes["group"].as_int() == 3
    assert list(cut.graph.initializers["B"].shape or ()) == [6, 2, 1]


def test_heads_go_apart_from_their_width_and_the_scale_stays() -> None:
    """Scores are divided by the root of a width that the graph computes from a shape."""
    model = load("""g (float[n,5,8] x, float[8,12] Q, float[8,12] K, float[8,12] V, float[12,8] O) => (float[n,5,8] y)
        <int64[4] cut = {0, 0, 3, 4}, int64[3] joined = {0, 0, 12}, int64 three = {3}> {
        q0 = MatMul(x, Q) k0 = MatMul(x, K) v0 = MatMul(x, V)
        q1 = Reshape(q0, cut) k1 = Reshape(k0, cut) v1 = Reshape(v0, cut)
        q = Transpose<perm=[0,2,1,3]>(q1) k = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v1)
        s0 = MatMul(q, k) shape = Shape(q) d0 = Gather(shape, three) d1 = Cast<to=1>(d0) d = Sqrt(d1)
        s = Div(s0, d) p = Softmax(s) m = MatMul(p, v) m1 = Transpose<perm=[0,2,1,3]>(m) m2 = Reshape(m1, joined)
        y = MatMul(m2, O) }""")
    found = prunable(model)
    assert sorted(found.values()) == [3, 4, 4]
    assert {name.split(" of ")[0] for name in found} == {"heads", "head width", "value width"}
    groups = graphopt.channel_groups(model)
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}]
    error, moved = cut_against_masked(model, groups, {name: [1] for name in found}, feeds)
    assert error <= TOLERANCE < moved


def test_a_size_that_is_decided_at_run_time_keeps_its_pruned_factor() -> None:
    """A mean over batch and channels, divided by a number of elements that the graph counts at run time."""
    model = load("""g (float[n,4,5] x, float[6,4,1] A, float[3,6,1] B) => (float[n,3,5] y, float m) {
        a = Conv(x, A) b = Relu(a) total = ReduceSum<keepdims=0>(b) count0 = Size(b) count = Cast<to=1>(count0)
        m = Div(total, count) y = Conv(b, B) }""")
    groups = graphopt.channel_groups(model)
    feeds = [{"x": np.random.default_rng(n).standard_normal((n, 4, 5)).astype(np.float32)} for n in (2, 3)]
    error, moved = cut_against_masked(model, groups, random_selection(groups, 0, 0.5), feeds)
    assert error <= TOLERANCE < moved


def test_run_time_products_of_a_pruned_size_are_scaled() -> None:
    model = load("""g (float[n,4,5] x, float[6,4,1] A, float[3,6,1] B) => (float[n,3,5] y)
        <int64[1] i0 = {0}, int64[1] six = {6}, int64[1] five = {5}> {
        a = Conv(x, A) shape = Shape(x) n0 = Gather(shape, i0) rows = Mul(n0, six) target = Concat<axis=0>(rows, five)
        flat = Reshape(a, target) relu = Relu(flat) back = Concat<axis=0>(n0, six, five) b = Reshape(relu, back)
        y = Conv(b, B) }""")
    groups = graphopt.channel_groups(model)
    assert [group.units for group in groups if group.prunable] == [6]
    feeds = [{"x": np.random.default_rng(n).standard_normal((n, 4, 5)).astype(np.float32)} for n in (1, 2, 5)]
    error, moved = cut_against_masked(model, groups, random_selection(groups, 0, 0.4), feeds)
    assert error <= TOLERANCE < moved


def test_weight_norm_is_masked_without_dividing_by_zero() -> None:
    model = load("""g (float[n,4] x, float[6,4] V, float[6,1] G, float[3,6] B) => (float[n,3] y) <int64[1] one = {1}> {
        norm = ReduceL2(V, one) unit = Div(V, norm) w = Mul(G, unit) t = Transpose(w) a = MatMul(x, t) u = Transpose(B)
        y = MatMul(a, u) }""")
    groups = graphopt.channel_groups(model)
    assert {value.name for value in groups.analysis.spared if value.name in "VGB"} == {"V"}
    (name,) = (group.name for group in groups if group.prunable and group.exact)
    feeds = [{"x": np.ones((2, 4), np.float32)}]
    assert cut_against_masked(model, groups, {name: [0, 3]}, feeds)[0] <= TOLERANCE


def test_a_division_by_what_is_masked_is_inexact() -> None:
    model = load("""g (float[n,4] x, float[4,6] A, float[6,3] B) => (float[n,3] y) {
        a = MatMul(x, A) r = Reciprocal(a) y = MatMul(r, B) }""")
    (group,) = (group for group in graphopt.channel_groups(model) if group.prunable)
    assert not group.exact
    assert "divides by what is 0" in (group.inexact_reason or "")


def test_a_filling_that_two_layers_share_does_not_tie_them() -> None:
    proto = parse("""g (float[n,4] x, float[4,6] A, float[6,6] B, float[6,3] C) => (float[n,3] y)
        <float[6] zeros = {0,0,0,0,0,0}> {
        a = MatMul(x, A) b = Add(a, zeros) c = Relu(b) d = MatMul(c, B) e = Add(d, zeros) f = Relu(e)
        y = MatMul(f, C) }""")
    assert sorted(prunable(graphopt.load(proto)).values()) == [6, 6]


def test_equal_weights_that_are_shared_stay_tied() -> None:
    proto = parse("""g (float[n,6] x, float[6,6] A, float[6,3] B) => (float[n,3] y) {
        a = MatMul(x, A) b = Relu(a) c = MatMul(b, A) d = Relu(c) y = MatMul(d, B) }""")
    model = graphopt.load(proto)
    assert prunable(model) == {}, "A reads the input and its own result: nothing can go"


CUSTOM = """g (float[n,4] x, float[4,6] A, float[6,6] B, float[6,3] C) => (float[n,3] y) {
    a = MatMul(x, A) b = acme.Warp(a) c = MatMul(b, B) d = Relu(c) y = MatMul(d, C) }"""


def custom_model() -> ir.Model:
    proto = parse(CUSTOM, domains=', "acme": 1')
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, ["n", 6]))
    return graphopt.load(proto)


def test_an_unknown_operator_is_frozen_by_name_and_the_rest_works() -> None:
    groups = graphopt.channel_groups(custom_model())
    assert [group.units for group in groups if group.prunable] == [6]
    reasons = [group.reason for group in groups if not group.prunable]
    assert any("Warp" in (reason or "") and "does not know" in (reason or "") for reason in reasons)
    assert [node.op_type for node, _ in groups.analysis.opaque] == ["Warp"]


def test_a_row_of_the_user_lets_channels_pass() -> None:
    table = default_table().with_rows(
        [OpRow("Warp", domain="acme", cost=lambda site: 0, shape=same_shape, channels=keeps_zero)]
    )
    model = custom_model()
    groups = graphopt.channel_groups(model, table=table)
    assert sorted(group.units for group in groups if group.prunable) == [6, 6]
    cut = graphopt.remove_channels(model, random_selection(groups, 0, 0.5), groups=groups)
    assert [list(value.shape or ()) for value in cut.graph.initializers.values()] == [[4, 3], [3, 3], [3, 3]]


def test_a_graph_that_is_not_canonical_is_refused_with_the_way_out() -> None:
    raw = ir.from_proto(parse(TWO_LAYERS))
    for act in (graphopt.channel_groups, lambda model: graphopt.remove_channels(model, {})):
        with pytest.raises(InvalidGraphError, match=r"not in canonical form: a node has no name[\s\S]*graphopt\.load"):
            act(raw)
    with pytest.raises(GraphoptError, match="a str is no graph"):
        graphopt.channel_groups("model.onnx")  # type: ignore[arg-type]


def test_shapes_that_contradict_each_other_are_refused() -> None:
    model = load(TWO_LAYERS)
    model.graph.initializers["C"].const_value = ir.tensor(np.zeros((5, 3), np.float32))
    with pytest.raises(InvalidGraphError, match="contradict each other"):
        graphopt.channel_groups(model)


def test_a_group_refuses_units_that_it_does_not_have() -> None:
    group = graphopt.channel_groups(load(TWO_LAYERS))[0]
    with pytest.raises(SelectionError, match="units count from 0 to"):
        group.slices(99)


def test_weights_are_not_read() -> None:
    def refuse() -> ir.Tensor:
        raise AssertionError("a weight was read")

    model = load("""g (float[n,128] x, float[128,256] A, float[256,96] B) => (float[n,96] y) {
        a = MatMul(x, A) y = MatMul(a, B) }""")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.LazyTensor(
            refuse, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name
        )
    assert prunable(model) == {"inner width of A": 256}


def test_groups_are_a_list_with_names() -> None:
    groups = graphopt.channel_groups(load(TWO_LAYERS))
    assert isinstance(groups, list)
    assert isinstance(groups, ChannelGroups)
    assert groups.named("mlp hidden of A") in groups
    assert "6 units, exact" in repr(groups.named("mlp hidden of A"))
    assert groups.named("C").to_json()["reason"] == "graph output 'y'"


# What a hostile review found ------------------------------------------------------------------------------------


def feeds_for(*sizes: int, shape: tuple[int, ...] = (3, 5)) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(n).standard_normal((n, *shape)).astype(np.float32)} for n in sizes]


def holds(model: ir.Model, feeds: list[dict[str, np.ndarray]], share: float = 0.4) -> ChannelGroups:
    """Cut equals masked for all exact groups at once; returns the groups."""
    groups = graphopt.channel_groups(model)
    error, _ = cut_against_masked(model, groups, random_selection(groups, 0, share), feeds, optimized=False)
    assert error <= TOLERANCE
    return groups


def test_a_class_that_covers_a_whole_axis_stays() -> None:
    """One channel is picked four times, then the four are cut in two: what is left of the axis is that channel."""
    model = load("""g (float[n,3,5] x, float[8,3,1] A, float[3,4,1] C, float[3,8,1] D) => (float[n,3,5] y)
        <int64[4] same = {0,0,0,0}, int64[4] two = {0,2,2,5}, int64[3] four = {0,4,5}> {
        a = Conv(x, A) b = Gather<axis=1>(a, same) c = Reshape(b, two) r = Relu(c) d = Reshape(r, four) e = Conv(d, C)
        f = Conv(a, D) y = Add(e, f) }""")
    groups = holds(model, feeds_for(2))
    assert sum(group.units for group in groups if group.prunable) == 7


def test_an_axis_times_itself_is_cut_once() -> None:
    model = load("""g (float[n,3] x, float[3,8] A, float[2,1,1,1] W, float[64,3] C) => (float[n,3] y)
        <int64[1] one = {1}, int64[1] two = {2}, int64[2] flat = {0,64}, int64[5] cut = {0,2,4,2,4}> {
        a = MatMul(x, A) p = Unsqueeze(a, one) q = Unsqueeze(a, two) o = Mul(p, q) f = Reshape(o, flat)
        g = Reshape(f, cut) h = Mul(g, W) k = Reshape(h, flat) y = MatMul(k, C) }""")
    groups = holds(model, feeds_for(2, 3, shape=(3,)))
    assert sorted(group.units for group in groups if group.prunable) == [2, 4]


@pytest.mark.parametrize(
    "body",
    [
        "z = Shape(a)",
        "s = Size(a) z = Cast<to=1>(s)",
        """s = Size(a) ff = Cast<to=1>(s) t = Cast<to=9>(ff)
        z = If(t) <then_branch = one () => (float p) { p = Cast<to=1>(s) }, else_branch = two () => (float q)
        { q0 = Cast<to=1>(s) q = Neg(q0) }>""",
    ],
)
def test_a_size_that_leaves_a_graph_keeps_its_channels(body: str) -> None:
    kind = "int64[2] z" if "Shape" in body else "float z"
    model = load(f"""g (float[n,3] x, float[3,8] A, float[8,3] C) => (float[n,3] y, {kind}) {{
        a = MatMul(x, A) r = Relu(a) y = MatMul(r, C) {body} }}""")
    (reason,) = (group.reason for group in graphopt.channel_groups(model) if group.units == 8)
    assert "its size becomes" in (reason or "")


def test_one_pinned_symbol_does_not_pin_the_others() -> None:
    """A table of 8 positions refuses every other length, and the batch must still be known to vary."""
    model = load("""g (float[n,t,4] x, float[8,4] P, float[4,12] A, float[12,4] B) => (float[n,t,4] y)
        <int64[1] zero = {0}, int64[1] three = {3}, int64[2] rest = {8,4}, int64[3] back = {-1,8,12}> {
        e = Add(x, P) h = MatMul(e, A) shape = Shape(x) n0 = Gather(shape, zero) rows = Mul(n0, three)
        target = Concat<axis=0>(rows, rest) v = Reshape(h, target) r = Relu(v) w = Reshape(r, back)
        y = MatMul(w, B) }""")
    groups = graphopt.channel_groups(model)
    assert len({sizes["n"] for sizes in groups.analysis.sizes}) > 1
    cut = graphopt.remove_channels(model, random_selection(groups, 0, 0.3, inexact=True), groups=groups)
    for feed in feeds_for(1, 2, 5, shape=(8, 4)):
        assert run(cut, feed)[0].shape == feed["x"].shape


def test_pieces_that_do_not_nest_at_run_time_are_frozen() -> None:
    model = load("""g (float[n,3,4] x, float[4,8] A, float[4,8] B, float[8,3] C) => (float[n,3,3] y, float[n,24] z)
        <int64[2] flat = {0,-1}> {
        a = MatMul(x, A) b0 = MatMul(x, B) b = Transpose<perm=[0,2,1]>(b0) p = Reshape(a, flat) q = Reshape(b, flat)
        z = Add(p, q) y = MatMul(a, C) }""")
    assert not any(group.prunable for group in graphopt.channel_groups(model))


def test_slices_with_bounds_of_32_bits_keep_them() -> None:
    model = load("""g (float[n,3,5] x, float[8,3,1] A, float[3,3,1] C) => (float[n,3,5] y)
        <int32[1] s = {1}, int32[1] e = {7}, int32[1] axis = {1}, int32[1] step = {2}> {
        a = Conv(x, A) b = Slice(a, s, e, axis, step) r = Relu(b) y = Conv(r, C) }""")
    groups = graphopt.channel_groups(model)
    name = next(group.name for group in groups if group.prunable and ("C", 1) in group.members)
    for units in ([0], [1], [0, 2]):
        assert cut_against_masked(model, groups, {name: units}, feeds_for(2))[0] <= TOLERANCE


def test_groups_of_another_model_are_refused() -> None:
    model = load(TWO_LAYERS)
    groups = graphopt.channel_groups(model)
    for act in (graphopt.remove_channels, graphopt.mask_channels):
        with pytest.raises(SelectionError, match="groups are those of another model"):
            act(model.clone(), {"mlp hidden of A": [0]}, groups=groups)


@pytest.mark.parametrize("units", [np.array([0, 0, 1, 0, 0, 1], bool), [True, False], [1.7], None, ["a"]])
def test_masks_and_fractions_are_no_units(units: object) -> None:
    with pytest.raises(SelectionError, match="lists indices of units"):
        graphopt.remove_channels(load(TWO_LAYERS), {"mlp hidden of A": units})  # type: ignore[dict-item]


def test_the_oracle_sees_what_it_must() -> None:
    a = np.array([[1.0, -2.0, 3.0]], np.float32)
    assert difference([a], [a.copy()]) == 0
    for other in (2 * a, a * [[1, -1, 1]], a[:, [1, 0, 2]], np.where(a > 2, np.nan, a), a.astype(np.float64), a[:, :2]):
        assert difference([a], [other]) > TOLERANCE


def test_units_are_named_in_the_same_order_whatever_the_order_of_initializers() -> None:
    text = """g (float[n,3] x, float[3,8] A, float[8,3] C) => (float[n,3] y)
        <int64[3] cut = {0,2,4}, int64[2] flat = {0,8}> {
        a = MatMul(x, A) h = Reshape(a, cut) r = Relu(h) f = Reshape(r, flat) y = MatMul(f, C) }"""
    expected = [(group.name, group.units) for group in graphopt.channel_groups(load(text))]
    proto = parse(text)
    swapped = list(proto.graph.initializer)[::-1]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(swapped)
    assert [(group.name, group.units) for group in graphopt.channel_groups(graphopt.load(proto))] == expected


# What a newcomer found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, None, ("mlp hidden of A",)])
def test_groups_are_selected_by_name_or_as_they_are(key: object) -> None:
    model = load(TWO_LAYERS)
    groups = graphopt.channel_groups(model)
    with pytest.raises(SelectionError, match="given by its name"):
        graphopt.remove_channels(model, {key: [0]}, groups=groups)  # type: ignore[dict-item]
    cut = graphopt.remove_channels(model, {groups.named("mlp hidden of A"): [0]}, groups=groups)
    assert list(cut.graph.initializers["B"].shape or ()) == [5]
    with pytest.raises(SelectionError, match="a list is not what channel_groups returns"):
        graphopt.remove_channels(model, {}, groups=list(groups))  # type: ignore[arg-type]


@pytest.mark.parametrize(("sizes", "message"), [({"m": 4}, "no dynamic dimension 'm'"), ({"n": 0}, "whole numbers")])
def test_sizes_are_checked(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        graphopt.channel_groups(load(TWO_LAYERS), sizes=sizes)


def test_sizes_that_a_network_for_images_needs_are_tried() -> None:
    """Five halvings and a join with what was doubled again: 8 pixels are too few, 64 are not."""
    down = " ".join(f"p{i} = MaxPool<kernel_shape=[2,2], strides=[2,2]>(p{i - 1})" for i in range(1, 6))
    model = load(f"""g (float[n,3,h,w] x, float[8,3,1,1] A, float[4,16,1,1] B) => (float[n,4,a,b] y)
        <float[4] s = {{1,1,2,2}}> {{ p0 = Conv(x, A) {down} u = Resize<mode="nearest">(p5, , s)
        v = Concat<axis=1>(u, p4)
        y = Conv(v, B) }}""")
    groups = graphopt.channel_groups(model)
    assert groups.analysis.sizes[0]["h"] == 64
    assert [group.units for group in groups if group.prunable] == [8]


def test_a_batch_of_minus_one_is_dynamic() -> None:
    proto = parse(TWO_LAYERS)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    model = graphopt.load(proto)
    cut = graphopt.remove_channels(model, {"mlp hidden of A": [1]})
    assert run(cut, {"x": np.ones((3, 4), np.float32)})[0].shape == (3, 3)


def test_branches_whose_axes_the_lifting_of_the_opset_writes() -> None:
    text = """g (float[n,4] x, float[4,6] A, float[6,3] C, bool c) => (float[n,3] y, float[k] z) {
        a = MatMul(x, A) r = Relu(a) y = MatMul(r, C)
        z = If(c)<then_branch = one () => (float[p] t) { t = ReduceMean<axes=[1], keepdims=0>(y) },
                  else_branch = two () => (float[q] e) { e = ReduceMean<axes=[1], keepdims=0>(y) }> }"""
    groups = holds(load(text, opset=17), [{"x": np.ones((2, 4), np.float32), "c": np.array(True)}])
    assert [group.units for group in groups if group.prunable] == [6]


def test_what_lies_behind_an_unknown_shape_needs_no_repair() -> None:
    model = load("""g (float[n,3] x, float[3,4] A, float[4,4] B, bool c) => (int64 w)
        <int64 i = {0}, int64[1] last = {-1}> {
        h = MatMul(x, A) r = Relu(h) y = MatMul(r, B)
        q = If(c)<then_branch = t () => (float[k,4] o) { o = Relu(y) },
                  else_branch = e () => (float[k,4,1] u) { u = Unsqueeze(y, last) }>
        s = Shape(q) w = Gather(s, i) }""")
    holds(model, [{"x": np.ones((2, 3), np.float32), "c": np.array(True)}])


def test_contradictions_that_onnx_does_not_see_are_refused() -> None:
    wrong = load(
        "g (float[n,3,5] x, float[8,3,1] A, float[4,8,1] C) => (float[n,4,5] y) { a = Conv(x, A) y = Conv(a, C) }"
    )
    wrong.graph.initializers["C"].const_value = ir.tensor(np.zeros((4, 7, 1), np.float32))
    with pytest.raises(InvalidGraphError, match=r"axes of 8 and 7 elements meet[\s\S]*Conv"):
        graphopt.channel_groups(wrong)
    declared = load(TWO_LAYERS)
    declared.graph.outputs[0].shape = ir.Shape(["n", 5])
    with pytest.raises(InvalidGraphError, match="output 'y' is declared as"):
        graphopt.channel_groups(declared)


def test_a_report_is_text() -> None:
    assert "parameters 48 of 48 prunable" in str(graphopt.describe_groups(load(TWO_LAYERS)))
