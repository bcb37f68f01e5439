"""Who owns what, and what it does there: held against `ChannelGroup.slices` and against hand-made graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.criteria import Knowledge
from graphopt.criteria.members import Membership
from graphopt.criteria.ownership import Owned, Ownership
from graphopt.criteria.roles import Role
from graphopt.errors import GraphoptError
from graphopt.ir.channels import channel_groups
from tests.criteria.networks import CONVNET, RESIDUAL, SEPARABLE, convnet, graph
from tests.zoo.models import zoo_model


def roles(model: ir.Model, tensor: str, axis: int) -> dict[str, set[Role]]:
    """Roles by name of the initializer, or of the first initializer behind a computed weight."""
    groups = channel_groups(model)
    (group,) = [group for group in groups if (tensor, axis) in group.members]
    found: dict[str, set[Role]] = {}
    for member in Membership(Knowledge(model, groups)).members(group):
        value = member.value
        while value.producer() is not None:
            value = value.producer().inputs[0]
        found.setdefault(value.name, set()).add(member.role)
    return found


@pytest.mark.parametrize(
    "name", ["resnet", "mobilenet-v2", "channel-shuffle", "grouped-transpose", "vit", "hf-llama", "recurrent", "swin"]
)
def test_units_own_what_slices_says(name: str) -> None:
    for group in channel_groups(zoo_model(name)):
        ownership = Ownership(group)
        slices = [group.slices(unit) for unit in range(group.units)]
        for value, axis in group.origin.members:
            owned = ownership.owned(value, axis)
            assert owned.even
            for unit in range(group.units):
                (expected,) = [indices for along, indices in slices[unit][value.name] if along == axis]
                np.testing.assert_array_equal(owned.coordinates[owned.units == unit], expected)


def test_units_with_unequal_shares_are_padded() -> None:
    owned = Owned(np.array([0, 1, 2]), np.array([0, 0, 1]), 2)
    assert not owned.even
    assert owned.rows(np.array([[1.0], [2.0], [3.0]]))[..., 0].tolist() == [[1, 2], [3, 0]]


def test_roles_around_a_normalised_convolution() -> None:
    assert roles(graph(CONVNET, convnet()), "w", 0) == {
        "w": {Role.PRODUCER},
        "b": {Role.SHIFT},
        "gamma": {Role.SCALE},
        "beta": {Role.SHIFT},
        "mean": {Role.STATISTIC},
        "variance": {Role.STATISTIC},
        "u": {Role.CONSUMER},
    }


def test_roles_in_a_residual_stream() -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4, 4), "c": (4, 4), "s": (4,), "d": (4, 2)}
    model = graph(RESIDUAL, {name: rng.standard_normal(shape) for name, shape in shapes.items()})
    assert roles(model, "a", 1) == {
        "a": {Role.PRODUCER},
        "b": {Role.CONSUMER},
        "c": {Role.PRODUCER},
        "s": {Role.SCALE},
        "d": {Role.CONSUMER},
    }
    assert roles(model, "b", 1) == {"b": {Role.PRODUCER}, "c": {Role.CONSUMER}}


def test_a_depthwise_filter_makes_a_channel_of_itself() -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 3, 1, 1), "k": (5, 1, 3, 3), "b": (2, 5, 3, 3)}
    model = graph(SEPARABLE, {name: rng.standard_normal(shape) for name, shape in shapes.items()})
    assert roles(model, "a", 0) == {"a": {Role.PRODUCER}, "k": {Role.DEPTHWISE}, "b": {Role.CONSUMER}}


def test_a_square_weight_between_equal_channels_has_both_roles() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x) => (float[n,2] y) {
        stem = MatMul (x, a) turned = MatMul (stem, r) stream = Add (stem, turned) y = MatMul (stream, d) }"""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "r": (4, 4), "d": (4, 2)}
    model = graph(text, {name: rng.standard_normal(shape) for name, shape in shapes.items()})
    assert roles(model, "a", 1)["r"] == {Role.PRODUCER, Role.CONSUMER}


def test_roles_of_a_recurrence_and_of_what_reads_it() -> None:
    model = zoo_model("lstm-time-first")
    (group,) = [group for group in channel_groups(model) if group.prunable and group.role == "hidden units"]
    members = Membership(Knowledge(model, groups := channel_groups(model))).members(groups.named(group.name))
    by_operand = {(member.node.op_type, member.operand, member.axis): member for member in members if member.node}
    assert by_operand["LSTM", 1, 1].role is Role.PRODUCER
    assert by_operand["LSTM", 2, 1].role is Role.PRODUCER
    assert by_operand["LSTM", 2, 2].role is Role.CONSUMER
    assert by_operand["LSTM", 1, 1].owned.rows(np.zeros((4 * group.units, 1))).shape[1] == 4  # one row a gate
    assert any(member.role is Role.CONSUMER for key, member in by_operand.items() if key[0] != "LSTM")


def test_biases_of_a_recurrence_are_shifts() -> None:
    model = zoo_model("recurrent")
    groups = channel_groups(model)
    membership = Membership(Knowledge(model, groups))
    members = [member for group in groups for member in membership.members(group) if member.node]
    found = {member.role for member in members if member.node.op_type == "LSTM" and member.operand == 3}
    assert found == {Role.SHIFT}


def test_embeddings_make_a_stream_and_normalisations_scale_it() -> None:
    model = zoo_model("hf-bert")
    groups = channel_groups(model)
    (stream,) = [group for group in groups if group.role == "residual stream"]
    found = {(member.node.op_type, member.role) for member in Membership(Knowledge(model, groups)).members(stream)}
    assert ("Gather", Role.PRODUCER) in found
    assert ("LayerNormalization", Role.SCALE) in found
    assert ("LayerNormalization", Role.SHIFT) in found
    assert ("MatMul", Role.PRODUCER) in found
    assert ("MatMul", Role.CONSUMER) in found


def grouped(operator: str, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A grouped convolution (4 groups) in front of a plain one, behind a plain one."""
    rng = np.random.default_rng(3)
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[n,2,5,5] x) => (float[n,3,m,k] y) {{
        wide = Conv (x, a) mixed = {operator} <group = 4> (wide, w) y = Conv (mixed, b) }}"""
    weights = {"a": (8, 2, 1, 1), "w": first, "b": second}
    arrays = {name: rng.standard_normal(shape) for name, shape in weights.items()}
    return graph(text, arrays), arrays


@pytest.mark.parametrize(
    ("operator", "shape", "made"), [("Conv", (12, 2, 3, 3), 12), ("ConvTranspose", (8, 3, 3, 3), 12)]
)
def test_grouped_convolutions_are_read_and_made_channel_by_channel(
    operator: str, shape: tuple[int, ...], made: int
) -> None:
    model, arrays = grouped(operator, shape, (3, made, 1, 1))
    weight = arrays["w"]
    into, out = np.zeros(8), np.zeros(made)
    for channel in range(8):  # by the definition of a grouped convolution
        block, inside = channel // 2, channel % 2
        taken = weight[3 * block : 3 * block + 3, inside] if operator == "Conv" else weight[channel]
        into[channel] = np.abs(taken).sum()
    for channel in range(made):
        block, inside = channel // 3, channel % 3
        taken = weight[channel] if operator == "Conv" else weight[2 * block : 2 * block + 2, inside]
        out[channel] = np.abs(taken).sum()
    groups = channel_groups(model)
    membership = Membership(Knowledge(model, groups))
    seen = set[Role]()
    for group in groups:
        for member in membership.members(group):
            if member.value.name != "w" or not group.prunable or member.role is Role.DEPTHWISE:
                continue
            expected = into if member.role is Role.CONSUMER else out
            place = "a" if member.role is Role.CONSUMER else "b"
            axis = 0 if place == "a" else 1
            for unit in range(group.units):
                owned = [indices for along, indices in group.slices(unit)[place] if along == axis]
                assert member.sums(np.abs(weight))[unit] == pytest.approx(expected[owned[0]].sum(), rel=1e-5)
            seen.add(member.role)
    assert seen == {Role.PRODUCER, Role.CONSUMER}


def test_what_stands_behind_a_producer() -> None:
    weights = convnet()
    model = graph(CONVNET, weights)
    groups = channel_groups(model)
    membership = Membership(Knowledge(model, groups))
    group = next(group for group in groups if ("w", 0) in group.members)
    (maker,) = membership.makers(group)
    behind = membership.following(maker)
    assert behind.normalization.op_type == "BatchNormalization"
    np.testing.assert_allclose(behind.factor, weights["gamma"] / np.sqrt(weights["variance"] + 1e-5), rtol=1e-6)
    assert [member.value.name for member in membership.biases(group, [maker])] == ["b"]


def test_the_bias_of_a_product_is_the_addition_behind_it() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,1] y) {
        p = MatMul (x, w) q = Add (p, b) r = Mul (q, s) t = Relu (r) y = MatMul (t, u) }"""
    rng = np.random.default_rng(0)
    shapes = {"w": (2, 3), "b": (3,), "s": (3,), "u": (3, 1)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = graph(text, arrays)
    groups = channel_groups(model)
    membership = Membership(Knowledge(model, groups))
    group = next(group for group in groups if ("w", 1) in group.members)
    (maker,) = membership.makers(group)
    np.testing.assert_allclose(membership.following(maker).factor, arrays["s"])
    assert [member.value.name for member in membership.biases(group, [maker])] == ["b"]


def test_computed_weights_are_seen_as_the_operator_sees_them() -> None:
    model = zoo_model("quantized-conv")  # behind DequantizeLinear
    groups = channel_groups(model)
    membership = Membership(Knowledge(model, groups))
    seen = 0
    for group in groups:
        for member in membership.members(group):
            producer = member.value.producer()
            if producer is not None and producer.op_type == "DequantizeLinear" and member.operand == 1:
                codes = producer.inputs[0].const_value.numpy().astype(np.float64)
                ratio = membership.weights.array(member.value)[codes != 0] / codes[codes != 0]
                assert (ratio > 0).all()  # the scale, since the zero point is 0
                seen += 1
    assert seen


def test_a_weight_that_is_not_a_number_is_refused() -> None:
    weights = convnet()
    weights["w"][0, 0, 0, 0] = 0
    model = graph(CONVNET, weights)
    broken = model.graph.initializers["w"]
    array = broken.const_value.numpy().copy()
    array[0, 0, 0, 0] = np.nan
    broken.const_value = ir.Tensor(array, name="w")
    groups = channel_groups(model)
    group = next(group for group in groups if ("w", 0) in group.members)
    with pytest.raises(GraphoptError, match="NaN or infinity"):
        graphopt.criteria.criterion("l2").scores(Knowledge(model, groups), [group])


def test_groups_of_another_model_are_refused() -> None:
    model = graph(CONVNET, convnet())
    with pytest.raises(GraphoptError, match="another model"):
        Knowledge(model, channel_groups(graph(CONVNET, convnet())))


def test_negative_seeds_are_refused() -> None:
    model = graph(CONVNET, convnet())
    with pytest.raises(GraphoptError, match="seed is -1"):
        Knowledge(model, channel_groups(model), seed=-1)
