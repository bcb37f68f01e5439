"""Pass pad-channels: integers stay what they were to the bit, and channels come in the multiples that kernels want."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import apply_exact, docstring_blocks, parse

from graphopt.ir.compare import within_exact
from graphopt.ir.session import open_session
from graphopt.ir.text import print_graph
from graphopt.passes import Context, Dequantize, PadChannels, Quantize
from graphopt.recipe import preset
from tests.passes.quantized_nets import feeds, weighted

SIDE = 16


def quantized(body: str, inputs: int, outputs: int, **weights: tuple[int, ...]) -> ir.Model:
    """A network on [n, inputs, 16, 16], static on integers."""
    signature = f"float[n,{inputs},{SIDE},{SIDE}] x => float[n,{outputs},{SIDE},{SIDE}] y"
    model = weighted(signature, body, **weights)
    Quantize(form="static", search=False).run(model, Context(calibration=feeds(8, (4, inputs, SIDE, SIDE))))
    return model


def padded(model: ir.Model, *, missed: int = 0) -> ir.Model:
    context = Context()
    result = model.clone()
    PadChannels().run(result, context)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    assert len(context.remarks) == missed
    return result


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def convolutions(model: ir.Model) -> list[tuple[int, ...]]:
    """Shapes of the stored weights."""
    return [
        node.inputs[1].producer().inputs[0].const_value.numpy().shape for node in model.graph if node.op_type == "Conv"
    ]


def test_before_and_after_of_the_docstring() -> None:
    before, after = docstring_blocks(PadChannels)
    model, _ = apply_exact(PadChannels(), parse(before))
    assert print_graph(model) == print_graph(parse(after, inputs={"x"}))


ONE = "y = Conv<pads=[1,1,1,1]>(x, a)"
CHAIN = "h = Conv<pads=[1,1,1,1]>(x, a) r = Relu(h) y = Conv<pads=[1,1,1,1]>(r, b)"
SEPARABLE = "h = Conv(x, a) r = Relu(h) d = Conv<group=24, pads=[1,1,1,1]>(r, k) s = Relu(d) y = Conv(s, b)"
FORK = "h = Conv(x, a) r = Relu(h) c = Conv(r, b) d = Conv<group=18, pads=[1,1,1,1]>(r, k) y = Add(c, d)"
RESIDUAL = "h = Conv<pads=[1,1,1,1]>(x, a) r = Relu(h) c = Conv<pads=[1,1,1,1]>(r, b) y = Add(c, r)"


@pytest.mark.parametrize(
    ("body", "inputs", "weights", "shapes", "moves"),
    [
        (ONE, 3, {"a": (16, 3, 3, 3)}, [(16, 4, 3, 3)], {"Pad": 1}),
        (ONE, 1, {"a": (1, 1, 3, 3)}, [(16, 4, 3, 3)], {"Pad": 1, "Slice": 1}),
        (ONE, 4, {"a": (18, 4, 3, 3)}, [(20, 4, 3, 3)], {"Slice": 1}),
        (CHAIN, 4, {"a": (62, 4, 3, 3), "b": (16, 62, 3, 3)}, [(64, 4, 3, 3), (16, 64, 3, 3)], {}),
        (CHAIN, 4, {"a": (8, 4, 3, 3), "b": (16, 8, 3, 3)}, [(16, 4, 3, 3), (16, 8, 3, 3)], {"Slice": 1}),
        (
            SEPARABLE,
            4,
            {"a": (24, 4, 1, 1), "k": (24, 1, 3, 3), "b": (16, 24, 1, 1)},
            [(32, 4, 1, 1), (32, 1, 3, 3), (16, 24, 1, 1)],
            {"Slice": 1},
        ),
        (RESIDUAL, 4, {"a": (18, 4, 3, 3), "b": (18, 18, 3, 3)}, [(20, 4, 3, 3), (20, 20, 3, 3)], {"Slice": 2}),
        (
            FORK,
            4,
            {"a": (18, 4, 1, 1), "b": (18, 18, 1, 1), "k": (18, 1, 3, 3)},
            [(20, 4, 1, 1), (20, 20, 1, 1), (32, 1, 3, 3)],
            {"Pad": 1, "Slice": 3},
        ),
        (ONE, 16, {"a": (32, 16, 3, 3)}, [(32, 16, 3, 3)], {}),
    ],
    ids=["image", "grey", "written", "chain", "too wide to read", "depthwise", "residual", "fork", "nothing to do"],
)
def test_integers_stay_and_widths_are_multiples(
    body: str, inputs: int, weights: dict[str, tuple[int, ...]], shapes: list[tuple[int, ...]], moves: dict[str, int]
) -> None:
    model = quantized(body, inputs, list(weights.values())[-1][0], **weights)
    result = padded(model)
    assert convolutions(result) == shapes
    assert operators(result) - operators(model) - Counter({"DequantizeLinear": 9}) == Counter(moves)
    assert result.graph.outputs[0].name == "y"
    data = feeds(3, (3, inputs, SIDE, SIDE))[2]
    expected = open_session(model).run_feeds(data)[0]
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(open_session(result).run_feeds(data)[0], expected)
    again = padded(result)
    assert print_graph(again) == print_graph(result)


def test_the_kernels_stay_integer_kernels(tmp_path: Path) -> None:
    model = quantized(SEPARABLE, 3, 5, a=(24, 3, 1, 1), k=(24, 1, 3, 3), b=(5, 24, 1, 1))
    path = str(tmp_path / "optimized.onnx")
    open_session(padded(model), optimized_model_path=path)
    left = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert left["QLinearConv"] == 3
    assert left["Conv"] == 0


def test_floats_come_back_equal() -> None:
    model = quantized(SEPARABLE, 3, 5, a=(24, 3, 1, 1), k=(24, 1, 3, 3), b=(5, 24, 1, 1))
    result = padded(model)
    for one in (model, result):
        Dequantize().run(one, Context())
        assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(one))
    data = feeds(1, (2, 3, SIDE, SIDE))[0]
    assert within_exact(open_session(model).run_feeds(data), open_session(result).run_feeds(data))


def test_a_weight_with_two_readers_stays_and_is_named() -> None:
    body = "h = Conv<pads=[1,1,1,1]>(x, a) r = Relu(h) y = Conv<pads=[1,1,1,1]>(r, a)"
    model = quantized(body, 18, 18, a=(18, 18, 3, 3))
    shared = next(node for node in model.graph if node.op_type == "Conv").inputs[1]
    for node in model.graph:
        if node.op_type == "Conv":
            node.replace_input_with(1, shared)
    assert convolutions(padded(model, missed=2)) == [(18, 18, 3, 3)] * 2


def test_activations_with_a_scale_for_each_channel_stay() -> None:
    model = quantized(ONE, 3, 16, a=(16, 3, 3, 3))
    source = next(node for node in model.graph if node.op_type == "Conv").inputs[0].producer()
    for node in (source.inputs[0].producer(), source):
        for index in (1, 2):
            array = np.repeat(node.inputs[index].const_value.numpy().reshape(1), 3)
            value = ir.Value(name=f"{node.name}_{index}", const_value=ir.tensor(array))
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape([3])
            model.graph.register_initializer(value)
            node.replace_input_with(index, value)
    assert convolutions(padded(model)) == [(16, 3, 3, 3)]


def test_small_maps_and_other_targets_are_left_alone() -> None:
    body = 'p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) h = Conv(p, a) y = Resize<mode="nearest">(h, , s)'
    model = weighted(f"float[n,18,{SIDE},{SIDE}] x => float[n,18,{SIDE // 2},{SIDE // 2}] h",
                     body.split(" y =")[0], a=(18, 18, 1, 1))  # fmt: skip
    Quantize(form="static", search=False).run(model, Context(calibration=feeds(8, (4, 18, SIDE, SIDE))))
    assert convolutions(padded(model)) == [(18, 18, 1, 1)]
    model = quantized(ONE, 3, 16, a=(16, 3, 3, 3))
    before = print_graph(model)
    PadChannels().run(model, Context(target="cuda"))
    assert print_graph(model) == before


def test_every_recipe_pads_what_it_has_quantized() -> None:
    for name in ("int8", "int8-datafree", "int8-qat", "prune-int8", "default"):
        names = [single.name for single in preset(name).passes]
        last = max(names.index(one) for one in names if one in ("quantize", "train-quantized", "fold-reconstruction"))
        assert last < names.index("pad-channels")
