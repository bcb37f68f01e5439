from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from graphopt.errors import GraphoptError, SelectionError
from graphopt.inputs.gaussian import mean_of_relu
from graphopt.ir.channels import channel_groups
from graphopt.ir.check import check_structure
from graphopt.ir.load import load
from graphopt.ir.removal import remove_channels
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.reconstruct_chain import quantized_rows
from graphopt.passes.reconstruct_closed import FORMS, ClosedForm, rebuild_closed
from graphopt.passes.reconstruct_forms import (
    Lbyl,
    MomentMatch,
    NeuronMerging,
    Ridge,
)
from tests.zoo.models import QUICK, zoo_feeds, zoo_model

HEADER = '<ir_version: 10, opset_import: ["": 21]> '
PLAIN = Ridge(alpha2=0.0)
RNG = np.random.default_rng
UNIT_COUNT = 12
PRUNED = [8, 9, 10, 11]


def build(graph: str, **weights: np.ndarray) -> ir.Model:
    """A model in double precision; whole numbers are sizes."""
    proto = onnx.parser.parse_model(HEADER + graph)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return load(proto)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """In double precision, by the reference evaluator of onnx: onnxruntime has no double convolution."""
    return np.asarray(ReferenceEvaluator(ir.to_proto(model)).run(None, dict(feeds))[0])


def rebuilt(
    model: ir.Model,
    selection: Mapping[str, Sequence[int]],
    form: str | ClosedForm = PLAIN,
    *,
    mean_correction: bool = False,
    context: Context | None = None,
    bits: int | None = None,
) -> ir.Model:
    groups = channel_groups(model)
    damaged = remove_channels(model, dict(selection), groups=groups)
    rebuild_closed(
        model, damaged, groups, selection, form=form, mean_correction=mean_correction, context=context or Context(),
        bits=bits,
    )  # fmt: skip
    check_structure(damaged)
    return damaged


def only_group(model: ir.Model, units: int = UNIT_COUNT) -> str:
    (group,) = [group for group in channel_groups(model) if group.prunable and group.units == units]
    return group.name


def batchnorm(name: str, channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = RNG(seed)
    return {
        f"{name}_gamma": rng.uniform(0.5, 2, channels),
        f"{name}_beta": rng.normal(0, 1, channels),
        f"{name}_mean": rng.normal(0, 1, channels),
        f"{name}_var": rng.uniform(0.5, 2, channels),
    }


def duplicate(weight: np.ndarray, norm: dict[str, np.ndarray], name: str) -> None:
    """Channels 8 to 11 become multiples of 0, 3, 3, 5 behind BatchNormalizations of their own parameters.

    What is recorded fits the filters: a filter that is q times as large has q times the mean and deviation.
    """
    for unit, like, times in zip(PRUNED, (0, 3, 3, 5), (2.0, 0.5, 1.0, 3.0), strict=True):
        larger = float(unit) / 7
        weight[unit] = larger * weight[like]
        norm[f"{name}_mean"][unit] = larger * norm[f"{name}_mean"][like]
        norm[f"{name}_var"][unit] = larger**2 * norm[f"{name}_var"][like]
        norm[f"{name}_gamma"][unit] = times * norm[f"{name}_gamma"][like]
        norm[f"{name}_beta"][unit] = times * norm[f"{name}_beta"][like]


def conv_net(
    *, duplicates: bool = True, behind: str = "y = Conv<pads=[1,1,1,1]>(r, u)", **extra: np.ndarray
) -> ir.Model:
    rng, norm = RNG(1), batchnorm("n", UNIT_COUNT)
    result = "a,b" if "Flatten" in behind else "a,b,c,d"
    weight = rng.normal(0, 1, (UNIT_COUNT, 3, 3, 3))
    if duplicates:
        duplicate(weight, norm, "n")
    extra.setdefault("u", rng.normal(0, 1, (5, UNIT_COUNT, 3, 3)))
    return build(
        f"""g (double[n,3,6,6] x) => (double[{result}] y) {{ h = Conv(x, w)
        m = BatchNormalization<epsilon=0.0>(h, n_gamma, n_beta, n_mean, n_var) r = Relu(m) {behind} }}""",
        w=weight, **norm, **extra,
    )  # fmt: skip


def image(seed: int = 0, count: int = 2) -> dict[str, np.ndarray]:
    return {"x": RNG(seed).normal(0, 1, (count, 3, 6, 6))}


# Graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Ridge(alpha2=0.0), Ridge(0.7, 0.0), Lbyl(lambda2=0.0), NeuronMerging()])
def test_duplicates_behind_batchnorm_are_exact(form: ClosedForm) -> None:
    model = conv_net()
    selection = {only_group(model): PRUNED}
    reference, feeds = run(model, image()), image()
    damaged = rebuilt(model, selection, form)
    np.testing.assert_allclose(run(damaged, feeds), reference, atol=1e-9)
    plain = run(remove_channels(model, dict(selection)), feeds)
    assert np.abs(plain - reference).max() > 1
    near = run(rebuilt(model, selection, Ridge()), feeds)
    assert 1e-6 < np.abs(near - reference).max() < np.abs(plain - reference).max() / 3


def test_duplicates_are_exact_with_mean_correction_too() -> None:
    model = conv_net(behind="y = Conv(r, u, e)", e=RNG(2).normal(0, 1, 5))
    damaged = rebuilt(model, {only_group(model): PRUNED}, mean_correction=True)
    np.testing.assert_allclose(run(damaged, image()), run(model, image()), atol=1e-9)


def test_the_moments_of_duplicates_are_exact() -> None:
    model = conv_net()
    damaged = rebuilt(model, {only_group(model): PRUNED}, MomentMatch(shrinkage=1e-9), mean_correction=True)
    np.testing.assert_allclose(run(damaged, image()), run(model, image()), atol=1e-4)


@pytest.mark.parametrize(
    ("behind", "weights"),
    [
        ("p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(r) f = Flatten(p) y = Gemm(f, v)",
         {"v": RNG(5).normal(0, 1, (4 * UNIT_COUNT, 5))}),
        ("p = GlobalAveragePool(r) s = Flatten(p) y = Gemm<transB=1>(s, v, e)",
         {"v": RNG(5).normal(0, 1, (5, UNIT_COUNT)), "e": RNG(6).normal(0, 1, 5)}),
        ("t = Transpose<perm=[0,2,3,1]>(r) y = MatMul(t, v)", {"v": RNG(5).normal(0, 1, (UNIT_COUNT, 5))}),
        ("c = Concat<axis=1>(x1, r) y = Conv(c, v)", {"v": RNG(5).normal(0, 1, (5, UNIT_COUNT + 2, 2, 2))}),
        ("y = ConvTranspose<strides=[2,2]>(r, v)", {"v": RNG(5).normal(0, 1, (UNIT_COUNT, 5, 3, 3))}),
        ("q = BatchNormalization(r, q_gamma, q_beta, q_mean, q_var) y = Conv(q, v)",
         {"v": RNG(5).normal(0, 1, (5, UNIT_COUNT, 2, 2)), **batchnorm("q", UNIT_COUNT, 8)}),
        ("p = Mul(r, k) a = Conv(p, v) b = Conv(r, u2) y = Add(a, b)",
         {"v": RNG(5).normal(0, 1, (5, UNIT_COUNT, 2, 2)), "u2": RNG(6).normal(0, 1, (5, UNIT_COUNT, 2, 2)),
          "k": RNG(7).normal(0, 1, (UNIT_COUNT, 1, 1))}),
    ],
    ids=["flatten", "global", "transpose", "concat", "transposed-conv", "second-batchnorm", "two-consumers"],
)  # fmt: skip
def test_duplicates_are_exact_through_what_lies_between(behind: str, weights: dict[str, np.ndarray]) -> None:
    prefix = "h1 = Conv(x, w1) x1 = Relu(h1) " if "x1" in behind else ""
    if prefix:
        weights = {**weights, "w1": RNG(9).normal(0, 1, (2, 3, 3, 3))}
    model = conv_net(behind=prefix + behind, u=np.zeros(1), **weights)
    context = Context()
    damaged = rebuilt(model, {only_group(model): PRUNED}, context=context)
    assert context.remarks == []
    np.testing.assert_allclose(run(damaged, image()), run(model, image()), atol=1e-8)


def gemm_chain() -> ir.Model:
    rng = RNG(11)
    a, b, c = rng.normal(0, 1, (UNIT_COUNT, 10)), rng.normal(0, 1, UNIT_COUNT), rng.normal(0, 1, (9, UNIT_COUNT))
    a[8:], b[8:] = 2 * a[:4], 2 * b[:4]
    d = rng.normal(0, 1, 9)
    c[7:], d[7:] = 0.5 * c[:2], 0.5 * d[:2]
    return build(
        """g (double[n,10] x) => (double[n,m] y) { h = Gemm<transB=1>(x, a, b) r = Relu(h)
        t = Transpose<perm=[1,0]>(c) k = MatMul(r, t) l = Add(k, d) s = LeakyRelu(l) y = MatMul(s, e) }""",
        a=a, b=b, c=c, d=d, e=rng.normal(0, 1, (9, 3)),
    )  # fmt: skip


def test_a_chain_is_walked_in_order() -> None:
    """The second layer's filters are compared after the first layer's channels were folded into them."""
    model = gemm_chain()
    selection = {only_group(model): PRUNED, only_group(model, 9): [7, 8]}
    feeds = {"x": RNG(0).normal(0, 1, (20, 10))}
    reference = run(model, feeds)
    context = Context()
    damaged = rebuilt(model, selection, context=context)
    assert context.remarks == []
    np.testing.assert_allclose(run(damaged, feeds), reference, atol=1e-9)
    assert np.abs(run(remove_channels(model, dict(selection)), feeds) - reference).max() > 1
    assert len(list(damaged.graph)) <= len(list(model.graph))


def test_a_residual_stream_uses_all_its_producers() -> None:
    rng = RNG(21)
    stem, first, second = (rng.normal(0, 1, (UNIT_COUNT, width, 3, 3)) for width in (3, 6, 6))
    for weight in (stem, first, second):
        weight[8:] = 1.5 * weight[:4]
    model = build(
        """g (double[n,3,6,6] x) => (double[n,m,p,q] y) { s = Conv<pads=[1,1,1,1]>(x, stem) t = Relu(s)
        a = Conv(t, a1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, first) d = Add(c, t) e = Relu(d)
        i = Conv(e, a2) j = Relu(i) k = Conv<pads=[1,1,1,1]>(j, second) l = Add(k, e) m = Relu(l) y = Conv(m, out) }""",
        stem=stem, first=first, second=second, a1=rng.normal(0, 1, (6, UNIT_COUNT, 1, 1)),
        a2=rng.normal(0, 1, (6, UNIT_COUNT, 1, 1)), out=rng.normal(0, 1, (4, UNIT_COUNT, 1, 1)),
    )  # fmt: skip
    context = Context()
    damaged = rebuilt(model, {only_group(model): PRUNED}, context=context)
    assert context.remarks == []
    np.testing.assert_allclose(run(damaged, image()), run(model, image()), rtol=1e-9, atol=1e-7)


def test_an_infinite_ridge_is_plain_pruning() -> None:
    model = conv_net(duplicates=False)
    selection = {only_group(model): PRUNED}
    damaged = rebuilt(model, selection, Ridge(alpha2=np.inf))
    np.testing.assert_allclose(
        run(damaged, image()), run(remove_channels(model, dict(selection)), image()), rtol=1e-12, atol=1e-12
    )


def test_nothing_removed_changes_nothing() -> None:
    model = conv_net()
    damaged = rebuilt(model, {})
    np.testing.assert_array_equal(run(damaged, image()), run(model, image()))
    rounded = rebuilt(model, {}, Ridge(), bits=32)
    np.testing.assert_allclose(run(rounded, image()), run(model, image()), atol=1e-5)


def test_channels_are_rebuilt_from_rounded_ones() -> None:
    """What the consumer reads is nearer to the original once the producer is rounded."""
    model = conv_net(duplicates=False, behind="y = Conv(r, u)")
    group = only_group(model)
    reference, errors = run(model, image()), {}
    for label, form in (("plain", Ridge(alpha2=np.inf)), ("rebuilt", Ridge(alpha2=1e-3))):
        damaged = rebuilt(model, {group: [9]}, form, bits=3)
        held = damaged.graph.initializers["w"]
        assert held.const_value is not None
        held.const_value = ir.tensor(quantized_rows(held.const_value.numpy(), 3))
        errors[label] = float(((run(damaged, image()) - reference) ** 2).mean())
    assert errors["rebuilt"] < errors["plain"]
    with pytest.raises(GraphoptError, match="1 bits"):
        rebuilt(model, {group: [9]}, bits=1)


def test_the_mean_correction_is_unbiased_on_gaussian_inputs() -> None:
    """Inputs for which the pre-activations are Gaussian with the moments that BatchNormalization states."""
    rng = RNG(31)
    weight = rng.normal(0, 1, (UNIT_COUNT, 6))
    norm = batchnorm("n", UNIT_COUNT)
    norm["n_mean"], norm["n_var"] = np.zeros(UNIT_COUNT), (weight**2).sum(axis=1)
    model = build(
        """g (double[n,6] x) => (double[n,m] y) { h = Gemm<transB=1>(x, w)
        b = BatchNormalization(h, n_gamma, n_beta, n_mean, n_var) r = Relu(b) y = Gemm<transB=1>(r, u) }""",
        w=weight, u=rng.normal(0, 1, (4, UNIT_COUNT)), **norm,
    )  # fmt: skip
    feeds = {"x": rng.normal(0, 1, (60_000, 6))}
    reference = run(model, feeds)
    group = only_group(model)
    for form in ("ridge", "neuron-merging", "lbyl", "moments", Ridge(alpha2=np.inf)):
        apart = {
            correction: run(rebuilt(model, {group: PRUNED}, form, mean_correction=correction), feeds) - reference
            for correction in (False, True)
        }
        noise = 4 * apart[True].std(axis=0) / np.sqrt(len(reference))
        assert (np.abs(apart[True].mean(axis=0)) < noise + 1e-3).all(), form
        assert (np.abs(apart[False].mean(axis=0)) > noise).any(), form


def test_moments_beat_pruning_on_gaussian_inputs() -> None:
    """The least-squares metric is the right one: the error is no larger than that of any other form."""
    rng = RNG(41)
    model = build(
        "g (double[n,6] x) => (double[n,m] y) { h = Gemm<transB=1>(x, w, b) r = Relu(h) y = Gemm<transB=1>(r, u) }",
        w=rng.normal(0, 1, (UNIT_COUNT, 6)), b=rng.normal(0, 1, UNIT_COUNT), u=rng.normal(0, 1, (4, UNIT_COUNT)),
    )  # fmt: skip
    feeds = {"x": rng.normal(0, 1, (20_000, 6))}
    reference, group = run(model, feeds), only_group(model)
    errors = {
        name: float(((run(rebuilt(model, {group: PRUNED}, name, mean_correction=True), feeds) - reference) ** 2).mean())
        for name in FORMS
    }
    assert errors["moments"] == min(errors.values())


def test_the_mean_that_is_added_is_that_of_the_activation() -> None:
    """One channel removed, nothing to combine: the bias takes E relu(N(beta, gamma^2)) up."""
    gamma, beta = np.array([2.0, 0.5, 1.0]), np.array([1.0, -1.0, 0.3])
    model = build(
        """g (double[n,2] x) => (double[n,1] y) { h = Gemm<transB=1>(x, w)
        b = BatchNormalization<epsilon=0.0>(h, gamma, beta, mean, var) r = Relu(b) y = Gemm(r, u) }""",
        w=np.eye(3, 2) + 1, u=np.array([[1.0], [1.0], [3.0]]), gamma=gamma, beta=beta, mean=np.zeros(3),
        var=np.ones(3),
    )  # fmt: skip
    damaged = rebuilt(model, {only_group(model, 3): [2]}, Ridge(alpha2=np.inf), mean_correction=True)
    feeds = {"x": RNG(0).normal(0, 1, (3, 2))}
    plain = run(remove_channels(model, {only_group(model, 3): [2]}), feeds)
    added = 3 * mean_of_relu(beta[2:], gamma[2:])[0]
    np.testing.assert_allclose(run(damaged, feeds) - plain, added, atol=1e-4)


def test_depthwise_convolutions_are_skipped_with_a_remark() -> None:
    rng = RNG(51)
    model = build(
        """g (double[n,3,6,6] x) => (double[n,m,p,q] y) { a = Conv(x, w) b = Relu(a) c = Conv<group=12>(b, d)
        e = Relu(c) y = Conv(e, u) }""",
        w=rng.normal(0, 1, (UNIT_COUNT, 3, 1, 1)), d=rng.normal(0, 1, (UNIT_COUNT, 1, 3, 3)),
        u=rng.normal(0, 1, (4, UNIT_COUNT, 1, 1)),
    )  # fmt: skip
    selection, context = {only_group(model): PRUNED}, Context()
    damaged = rebuilt(model, selection, "ridge", mean_correction=True, context=context)
    assert [(remark.kind, "depthwise" in remark.why) for remark in context.remarks] == [("missed", True)] * 2
    expected = run(remove_channels(model, dict(selection)), image())
    np.testing.assert_allclose(run(damaged, image()), expected, atol=1e-12)
    context = Context()  # moments do not ask what lies between
    damaged = rebuilt(model, selection, "moments", mean_correction=True, context=context)
    assert len(context.remarks) == 1
    assert np.abs(run(damaged, image()) - expected).max() > 1e-3


def test_grouped_convolutions_mix_within_their_groups() -> None:
    rng = RNG(61)
    weight = rng.normal(0, 1, (8, 3, 1, 1))
    weight[[3, 7]] = 2 * weight[[0, 4]]
    model = build(
        """g (double[n,3,6,6] x) => (double[n,m,p,q] y) { a = Conv(x, w) b = Relu(a)
        c = Conv<group=2>(b, d) e = Relu(c) y = Conv(e, u) }""",
        w=weight, d=rng.normal(0, 1, (6, 4, 3, 3)), u=rng.normal(0, 1, (4, 6, 1, 1)),
    )  # fmt: skip
    groups = [group for group in channel_groups(model) if group.prunable]
    reference = run(model, image())
    for group in groups:
        if group.units == 4:
            damaged = rebuilt(model, {group.name: [3]})
            np.testing.assert_allclose(run(damaged, image()), reference, atol=1e-9)
    for group in groups:
        rebuilt(model, {group.name: [group.units - 1]}, "ridge", mean_correction=True)
    assert any(group.units == 4 for group in groups)


def test_dead_channels_and_gamma_of_zero() -> None:
    rng, norm = RNG(71), batchnorm("n", UNIT_COUNT)
    norm["n_gamma"][[2, 9]] = 0.0
    norm["n_beta"][[2, 9]] = [0.7, 1.3]
    weight = rng.normal(0, 1, (UNIT_COUNT, 3, 3, 3))
    weight[[4, 10]] = norm["n_mean"][[4, 10]] = norm["n_var"][[4, 10]] = 0.0
    model = build(
        """g (double[n,3,6,6] x) => (double[n,5,4,4] y) { h = Conv(x, w)
        m = BatchNormalization(h, n_gamma, n_beta, n_mean, n_var) r = Relu(m) y = Conv(r, u) }""",
        w=weight, u=rng.normal(0, 1, (5, UNIT_COUNT, 1, 1)), **norm,
    )  # fmt: skip
    group, reference = only_group(model), run(model, image())
    for name in FORMS:
        damaged = rebuilt(model, {group: [9, 10]}, name, mean_correction=True)
        np.testing.assert_allclose(run(damaged, image()), reference, atol=1e-3 if name == "moments" else 1e-6)
    for form in (Ridge(alpha2=0.0), Lbyl(lambda2=0.0), MomentMatch(shrinkage=0.0)):
        assert np.isfinite(run(rebuilt(model, {group: [0, 9, 10]}, form, mean_correction=True), image())).all()


def test_what_cannot_be_followed_is_said() -> None:
    rng = RNG(81)
    model = build(
        """g (double[n,5,4] x) => (double[n,5,m] y) { h = MatMul(x, w) s = Softmax<axis=1>(h) y = MatMul(s, u) }""",
        w=rng.normal(0, 1, (4, UNIT_COUNT)), u=rng.normal(0, 1, (UNIT_COUNT, 3)),
    )  # fmt: skip
    context = Context()
    selection = {only_group(model): PRUNED}
    rebuilt(model, selection, "ridge", mean_correction=True, context=context)
    assert "Softmax is not understood" in str(context.remarks[0])
    context = Context()
    rebuilt(model, selection, "moments", context=context)
    assert "covariance of its channels is unknown" in str(context.remarks[0])
    with pytest.raises(SelectionError):
        rebuild_closed(model, model.clone(), channel_groups(model), {"nothing": [0]}, context=Context())


def test_a_shared_weight_is_left_alone() -> None:
    rng = RNG(91)
    model = build(
        """g (double[n,4] x) => (double[n,4] y) { h = MatMul(x, w) r = Relu(h) a = MatMul(r, u) b = MatMul(x, v)
        s = Relu(b) t = MatMul(s, u) y = Add(a, t) }""",
        w=rng.normal(0, 1, (4, UNIT_COUNT)), v=rng.normal(0, 1, (4, UNIT_COUNT)), u=rng.normal(0, 1, (UNIT_COUNT, 4)),
    )  # fmt: skip
    context = Context()
    damaged = rebuilt(model, {only_group(model): PRUNED}, context=context)
    assert "another node reads the same weight" in str(context.remarks[0])
    assert "u" in damaged.graph.initializers


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for index, name in enumerate(QUICK) if index % 4 == 0])
def test_models_of_the_zoo_stay_valid(name: str) -> None:
    """Whatever the structure: the result runs, is finite, and differs from the damaged model by the fold alone."""
    model = zoo_model(name)
    groups = channel_groups(model)
    selection = {group.name: list(range(0, group.units, 3)) for group in groups if group.prunable and group.units > 3}
    try:
        damaged = remove_channels(model, dict(selection), groups=groups)
    except SelectionError:
        pytest.skip("the groups share an axis")
    shapes = {name: tuple(value.shape or ()) for name, value in damaged.graph.initializers.items()}
    rebuild_closed(model, damaged, groups, selection, form="ridge", context=Context())
    check_structure(damaged)
    for result in open_session(damaged).run_feeds(zoo_feeds(model)):
        assert np.isfinite(result).all() or result.dtype.kind not in "f"
    grown = {name for name, value in damaged.graph.initializers.items() if name not in shapes}
    assert all(len(damaged.graph.initializers[name].shape or ()) <= 2 for name in grown)
