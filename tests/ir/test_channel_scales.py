"""What may be scaled: any positive factors leave the function as it is, and what cannot be scaled says why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.ir.channel_scales import FIXED, channel_scales
from graphopt.ir.compare import within_exact
from graphopt.ir.rewrite import DeclinedError
from graphopt.ir.scale_labels import ScaleLabels
from graphopt.ir.session import open_session
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from graphopt.passes import FoldConstants, MergeLinear
from graphopt.passes.contract import Context
from tests.zoo.models import zoo_feeds, zoo_model

HEAD = '<ir_version: 10, opset_import: ["": 23]>'


def built(text: str, **weights: tuple[int, ...]) -> ir.Model:
    """A canonical model from ONNX text; `weights` are random initializers of these shapes."""
    model = ir.from_onnx_text(f"{HEAD} {text}")
    generator = np.random.default_rng(5)
    for name, shape in weights.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(generator.standard_normal(shape).astype(np.float32), name=name)
        model.graph.register_initializer(value)
    return graphopt.load(ir.to_proto(model))


def rescaled(model: ir.Model, *, exact: bool = False) -> ir.Model:
    """A copy with random factors, powers of two where the result is to be the same bit by bit."""
    copy = model.clone()
    scales = channel_scales(copy)
    exponents = np.random.default_rng(1).uniform(-3, 3, scales.count)
    scales.apply(2.0 ** (np.rint(exponents) if exact else exponents))
    return copy


def check(model: ir.Model, variables: int) -> None:
    """The function stays, with `variables` degrees of freedom found, all of which change a weight."""
    assert channel_scales(model).count == variables
    random = np.random.default_rng(2)
    feeds = zoo_feeds(model, scale=1)
    feeds = {
        name: random.integers(0, 7, array.shape) if array.dtype.kind == "i" else array for name, array in feeds.items()
    }
    expected = open_session(model, optimized=False).run_feeds(feeds)
    found = open_session(rescaled(model), optimized=False).run_feeds(feeds)
    assert within_exact(expected, found)
    assert all(np.abs(array).max() > 1e-6 for array in expected)


CASES = {
    "relu": ("g (float[n,3] x, float[3,4] a, float[4] b, float[4,2] c) => (float[n,2] y)"
             "{ h = MatMul(x, a) i = Add(h, b) r = Relu(i) y = MatMul(r, c) }",
             {"a": (3, 4), "b": (4,), "c": (4, 2)}, 4),
    "gemm": ("g (float[n,3] x, float[4,3] a, float[4] b, float[4,2] c) => (float[n,2] y)"
             "{ h = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, a, b) r = LeakyRelu(h) y = Gemm(r, c) }",
             {"a": (4, 3), "b": (4,), "c": (4, 2)}, 4),
    "left matmul": ("g (float[n,3,5] x, float[4,3] a, float[2,4] b) => (float[n,2,5] y)"
                    "{ h = MatMul(a, x) r = Relu(h) y = MatMul(b, r) }", {"a": (4, 3), "b": (2, 4)}, 4),
    "depthwise": ("g (float[n,3,8,8] x, float[4,3,1,1] a, float[4,1,3,3] b, float[2,4,1,1] c) => (float[n,2,6,6] y)"
                  "{ h = Conv(x, a) i = Conv <group = 4> (h, b) r = Relu(i) y = Conv(r, c) }",
                  {"a": (4, 3, 1, 1), "b": (4, 1, 3, 3), "c": (2, 4, 1, 1)}, 8),
    "grouped transposed": ("g (float[n,4,5,5] x, float[4,4,1,1] s, float[4,3,2,2] a, float[2,6,1,1] c)"
                           "=> (float[n,2,10,10] y)"
                           "{ z = Conv(x, s) h = ConvTranspose <group = 2, strides = [2,2]> (z, a) y = Conv(h, c) }",
                           {"s": (4, 4, 1, 1), "a": (4, 3, 2, 2), "c": (2, 6, 1, 1)}, 10),
    "prelu": ("g (float[n,3,4,4] x, float[4,3,1,1] a, float[4,1,1] s, float[2,4,1,1] c) => (float[n,2,4,4] y)"
              "{ h = Conv(x, a) r = PRelu(h, s) y = Conv(r, c) }",
              {"a": (4, 3, 1, 1), "s": (4, 1, 1), "c": (2, 4, 1, 1)}, 4),
    "flattened image": ("g (float[n,3,4,4] x, float[4,3,1,1] a, float[64,2] c) => (float[n,2] y)"
                        "{ h = Conv(x, a) r = Relu(h) f = Flatten(r) y = Gemm(f, c) }",
                        {"a": (4, 3, 1, 1), "c": (64, 2)}, 4),
    "heads": ("g (float[n,5,6] x, float[6] g, float[6,6] q, float[6,6] k, float[6,6] v, float[6,6] o)"
              "=> (float[n,5,6] y) { m = LayerNormalization(x, g) a = MatMul(m, q) b = MatMul(m, k) c = MatMul(m, v)"
              "  t = Attention <q_num_heads = 2, kv_num_heads = 2> (a, b, c) y = MatMul(t, o) }",
              {"g": (6,), "q": (6, 6), "k": (6, 6), "v": (6, 6), "o": (6, 6)}, 12),
    "gate": ("g (float[n,4] x, float[4,6] a, float[4,6] b, float[6,4] c) => (float[n,4] y)"
             "{ g0 = MatMul(x, a) s = Sigmoid(g0) h = MatMul(x, b) p = Mul(h, s) y = MatMul(p, c) }",
             {"a": (4, 6), "b": (4, 6), "c": (6, 4)}, 6),
    "two products": ("g (float[n,4] x, float[4,6] a, float[4,6] b, float[6,4] c) => (float[n,4] y)"
                     "{ h = MatMul(x, a) i = MatMul(x, b) p = Mul(h, i) y = MatMul(p, c) }",
                     {"a": (4, 6), "b": (4, 6), "c": (6, 4)}, 6),
    "square": ("g (float[n,4] x, float[4,6] a, float[6,4] c) => (float[n,4] y)"
               "{ h = MatMul(x, a) p = Mul(h, h) y = MatMul(p, c) }", {"a": (4, 6), "c": (6, 4)}, 0),
    "tied weight": ("g (float[n,4] x, float[4,4] a, float[4,2] c) => (float[n,2] y)"
                    "{ h = MatMul(x, a) r = Relu(h) i = MatMul(r, a) s = Relu(i) y = MatMul(s, c) }",
                    {"a": (4, 4), "c": (4, 2)}, 0),
    "weight of constant data": ("g (float[n,4] x, float[5,4] k, float[4,3] e, float[3,4] a, float[4,2] c)"
                                "=> (float[n,2] y, float[5,2] z)"
                                "{ h = MatMul(x, e) g0 = MatMul(h, a) r = Relu(g0) y = MatMul(r, c) z = MatMul(k, c) }",
                                {"k": (5, 4), "e": (4, 3), "a": (3, 4), "c": (4, 2)}, 3),
    "siamese": ("g (float[n,4] x, float[n,4] z, float[4,3] a, float[3,2] c) => (float[n,2] y)"
                "{ h = MatMul(x, a) i = MatMul(z, a) d = Sub(h, i) e = Abs(d) y = MatMul(e, c) }",
                {"a": (4, 3), "c": (3, 2)}, 3),
    "depth to space": ("g (float[n,3,4,4] x, float[8,3,1,1] a, float[2,2,1,1] c) => (float[n,2,8,8] y)"
                       "{ h = Conv(x, a) d = DepthToSpace <blocksize = 2, mode = \"CRD\"> (h) y = Conv(d, c) }",
                       {"a": (8, 3, 1, 1), "c": (2, 2, 1, 1)}, 2),
    "table": ("g (int64[n,5] x, float[7,4] t, float[4,2] c) => (float[n,5,2] y)"
              "{ e = Gather(t, x) r = Relu(e) y = MatMul(r, c) }", {"t": (7, 4), "c": (4, 2)}, 4),
    "slices": ("g (float[n,3] x, float[3,6] a, float[4,2] c) => (float[n,2] y)"
               "<int64[1] s = {1}, int64[1] e = {5}, int64[1] ax = {1}>"
               "{ h = MatMul(x, a) r = Relu(h) t = Slice(r, s, e, ax) y = MatMul(t, c) }",
               {"a": (3, 6), "c": (4, 2)}, 6),
    "class token": ("g (float[1,5,3] x, float[3,4] a, float[1,1,4] k, float[4,2] c) => (float[1,6,2] y)"
                    "{ h = MatMul(x, a) t = Concat <axis = 1> (k, h) r = Relu(t) y = MatMul(r, c) }",
                    {"a": (3, 4), "k": (1, 1, 4), "c": (4, 2)}, 4),
    "constant channels": ("g (float[1,3,4,4] x, float[4,3,1,1] a, float[1,2,4,4] k, float[2,6,1,1] c)"
                          "=> (float[1,2,4,4] y) { h = Conv(x, a) t = Concat <axis = 1> (k, h) y = Conv(t, c) }",
                          {"a": (4, 3, 1, 1), "k": (1, 2, 4, 4), "c": (2, 6, 1, 1)}, 6),
    "bounded": ("g (float[n,3] x, float[3,4] a, float[4,2] c) => (float[n,2] y) <float six = {6}, float zero = {0}>"
                "{ h = MatMul(x, a) r = Clip(h, zero, six) y = MatMul(r, c) }", {"a": (3, 4), "c": (4, 2)}, 0),
    "captured": ("g (float[n,3] x, float[3,4] a, float[4,2] c, bool t) => (float[n,2] y)"
                 "{ h = MatMul(x, a) r = Relu(h) z = If (t) <then_branch = p () => (float[n,4] u) { u = Neg(r) },"
                 "  else_branch = q () => (float[n,4] v) { v = Relu(r) }> y = MatMul(z, c) }",
                 {"a": (3, 4), "c": (4, 2)}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_factors_leave_the_function(name: str) -> None:
    text, weights, variables = CASES[name]
    check(built(text, **weights), variables)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["resnet", "mobilenet-v3", "unet", "vit", "llama", "swin", "recurrent"])
def test_factors_leave_zoo_models(name: str) -> None:
    model = zoo_model(name)
    FoldConstants().rewrite(model, Context())
    feeds = zoo_feeds(model, scale=1)
    expected = open_session(model, optimized=False).run_feeds(feeds)
    assert within_exact(expected, open_session(rescaled(model), optimized=False).run_feeds(feeds))


def test_powers_of_two_change_no_bit() -> None:
    text, weights, _ = CASES["depthwise"]
    model = built(text, **weights)
    feeds = zoo_feeds(model, scale=1)
    expected = open_session(model, optimized=False).run_feeds(feeds)
    found = open_session(rescaled(model, exact=True), optimized=False).run_feeds(feeds)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_wrong_factors_would_be_noticed() -> None:
    """The oracle: one channel of one weight that is not scaled back shows in the outputs."""
    text, weights, _ = CASES["relu"]
    model = built(text, **weights)
    wrong = model.clone()
    array = wrong.graph.initializers["c"].const_value.numpy().copy()
    array[1] *= 1.01
    wrong.graph.initializers["c"].const_value = ir.tensor(array)
    feeds = zoo_feeds(model, scale=1)
    assert not within_exact(*(open_session(one, optimized=False).run_feeds(feeds) for one in (model, wrong)))


def test_it_says_what_is_fixed_and_why() -> None:
    text, weights, _ = CASES["bounded"]
    scales = channel_scales(built(text, **weights))
    first, last = scales.linears
    assert first.why_outs is not None
    assert first.why_outs[0] == "Clip has one bound for all channels"
    assert first.why_ins == ("it is a graph input", "x")
    assert last.why_outs == ("it is a graph output", "y")
    assert (first.outs == FIXED).all()


def test_weights_that_are_not_finite_stay() -> None:
    text, weights, _ = CASES["relu"]
    model = built(text, **weights)
    array = model.graph.initializers["a"].const_value.numpy().copy()
    array[0, 0] = np.inf
    model.graph.initializers["a"].const_value = ir.tensor(array)
    scales = channel_scales(model)
    assert scales.count == 0
    assert [why for _, why in scales.refused] == ["its weight is not finite"]


def test_an_empty_part_of_a_concatenation_keeps_what_is_beside_it() -> None:
    text = """g (float[n,3] x, float[n,0] none, float[3,4] a, float[4,2] c) => (float[n,2] y)
              { h = MatMul(x, a) k = Concat<axis=1>(h, none) y = MatMul(k, c) }"""
    scales = channel_scales(built(text, a=(3, 4), c=(4, 2)))
    assert scales.count == 0
    assert scales.linears[1].why_ins is not None


def test_factors_beyond_the_element_type_change_nothing() -> None:
    text, weights, _ = CASES["relu"]
    model = built(text, **weights)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    with pytest.raises(DeclinedError, match="finite"):
        channel_scales(model).apply(np.full(4, 1e39))
    assert all(value.const_value is before[name] for name, value in model.graph.initializers.items())


def test_what_batchnorm_knew_is_scaled_too() -> None:
    text, weights, _ = CASES["depthwise"]
    model = built(text, **weights)
    value = next(value for node in model.graph for value in node.outputs if value.name == "h")
    value.meta[BATCHNORM_STATISTICS] = (np.ones(4), 2 * np.ones(4))
    scales = channel_scales(model)
    scales.apply(2.0 ** np.arange(scales.count))
    mean, std = value.meta[BATCHNORM_STATISTICS]
    assert np.array_equal(2 * mean, std)
    assert np.array_equal(np.sort(mean), 2.0 ** np.arange(4))


def test_a_bias_for_all_channels_becomes_one_a_channel() -> None:
    text = CASES["relu"][0]
    model = built(text.replace("float[4] b", "float b"), a=(3, 4), b=(), c=(4, 2))
    check(model, 4)
    assert rescaled(model).graph.initializers["b"].const_value.numpy().shape == (4,)


@pytest.mark.parametrize(
    ("before", "after", "shape", "result"),
    [
        (["n", 4, 3, 3], ["n", 36], (1, 4, 1, 1), (1, 36)),
        (["n", 5, 6], ["n", 5, 2, 3], (1, 1, 6), (1, 1, 2, 3)),
        (["n", 4, 1, 1], ["n", 4], (1, 4, 1, 1), (1, 4)),
        ([2, "t", 6], ["2*t", 6], (1, 1, 6), (1, 6)),
        (["n", 4, 3], ["n", "unknown"], (1, 4, 1), (1, 1)),
        ([4, "t"], [None, None, 4], (4, 1), (1, 1, 1)),
    ],
)  # fmt: skip
def test_reshaping_labels(before: list, after: list, shape: tuple, result: tuple) -> None:
    labels = ScaleLabels()
    fresh = labels.fresh(shape)
    found = labels.reshaped(fresh, before, after)
    assert found.shape == result
    if max(result) == 1:  # what is not told apart shares one factor
        assert len(np.unique(labels.find(fresh))) == 1


def test_nothing_to_merge_is_broken_by_factors() -> None:
    """Scaled weights are ordinary weights: exact passes behind still work on them."""
    text, weights, _ = CASES["depthwise"]
    model = rescaled(built(text, **weights))
    feeds = zoo_feeds(model, scale=1)
    expected = open_session(model, optimized=False).run_feeds(feeds)
    MergeLinear().rewrite(model, Context())
    assert within_exact(expected, open_session(model).run_feeds(feeds))
