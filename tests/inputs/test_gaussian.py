from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.inputs import gaussian, gaussian_moments
from graphopt.inputs.gaussian import mean_of_relu, natural_autocorrelation, pink_autocorrelation, propagate_moments
from graphopt.inputs.gaussian_moments import Moments, Second, correlation, independent
from graphopt.inputs.probes import InputSpec, probe_feeds
from graphopt.inputs.spectra import natural_images, pink_noise
from graphopt.ir.load import load
from graphopt.ir.session import open_session
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from tests.zoo.models import CORE, zoo_model

HEADER = '<ir_version: 10, opset_import: ["": 21]> '
WHITE = {"x": InputSpec(kind="gaussian")}


def build(graph: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(HEADER + graph)
    for name, array in weights.items():
        dtype = np.int64 if array.dtype.kind == "i" else np.float32
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(dtype), name))
    return load(proto)


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)


def runs(
    model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], found: Mapping[str, Moments]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of every value that has moments, by running the model."""
    copy = model.clone()
    shown = {value.name for value in copy.graph.outputs}
    for node in copy.graph:
        copy.graph.outputs.extend(v for v in node.outputs if v.name in found and v.name not in shown)
    session = open_session(copy)
    gathered: dict[str, list[np.ndarray]] = {value.name or "": [] for value in copy.graph.outputs}
    for each in feeds:
        for name, array in zip(gathered, session.run_feeds(each), strict=True):
            axis = found[name].axis if name in found else -1
            gathered[name].append(np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]))
    rows = {name: np.concatenate(arrays).astype(np.float64) for name, arrays in gathered.items() if name in found}
    return {name: (array.mean(axis=0), np.cov(array.T, bias=True).reshape((array.shape[1],) * 2))
            for name, array in rows.items()}  # fmt: skip


def errors(found: Moments, measured: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Largest error of a mean in mean standard deviations, and of the covariance in the Frobenius norm."""
    mean, covariance = measured
    assert found.covariance is not None
    deviation = np.sqrt(np.diag(covariance)).mean()
    apart = np.linalg.norm(found.covariance - covariance) / np.linalg.norm(covariance)
    return float(np.abs(found.mean - mean).max() / deviation), float(apart)


def gaussian_rows(count: int, width: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)}]


def test_linear_relu_linear_is_exact_within_the_error_of_the_samples() -> None:
    model = build(
        "g (float[n,6] x) => (float[n,5] y) { h = Gemm<transB=1>(x, a, b) r = Relu(h) y = Gemm<transB=1>(r, c) }",
        a=weight(8, 6), b=0.5 * weight(8), c=weight(5, 8),
    )  # fmt: skip
    found = propagate_moments(model)
    measured = runs(model, gaussian_rows(400_000, 6), found)
    for name in ("h", "r", "y"):
        mean, covariance = errors(found[name], measured[name])
        assert mean < 0.01, name
        assert covariance < 0.01, name


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ("y = Relu(h)", {}),
        ("y = LeakyRelu<alpha=0.2>(h)", {}),
        ("y = PRelu(h, slope)", {"slope": np.array([0.1, 0.3, -0.2, 0.9])}),
        ("y = Clip(h, low, high)", {"low": np.array(0.0), "high": np.array(1.0)}),
        ("y = Sigmoid(h)", {}),
        ("y = Tanh(h)", {}),
        ("y = HardSwish(h)", {}),
        ("y = Elu(h)", {}),
        ("y = Gelu(h)", {}),
        ("s = Sigmoid(h) y = Mul(h, s)", {}),
        ("d = Div(h, root) e = Erf(d) o = Add(e, one) t = Mul(h, o) y = Mul(t, half)",
         {"root": np.array(np.sqrt(2)), "one": np.array(1.0), "half": np.array(0.5)}),
        ("t = Add(h, three) c = Clip(t, zero, six) p = Mul(h, c) y = Div(p, six)",
         {"three": np.array(3.0), "zero": np.array(0.0), "six": np.array(6.0)}),
        ("r = Relu(h) s = Mul(r, scale) t = Add(s, shift) y = Relu(t)",
         {"scale": np.array([1.0, -2.0, 0.5, 1.0]), "shift": np.array([-0.5, 0.3, 0.1, 0.0])}),
        ("r = Relu(h) y = Sub(h, r)", {}),
    ],
)  # fmt: skip
def test_activations_of_correlated_channels(nodes: str, constants: dict[str, np.ndarray]) -> None:
    model = build(
        f"g (float[n,3] x) => (float[n,4] y) {{ h = Gemm<transB=1>(x, a, b) {nodes} }}",
        a=2 * weight(4, 3), b=weight(4), **constants,
    )  # fmt: skip
    found = propagate_moments(model)
    mean, covariance = errors(found["y"], runs(model, gaussian_rows(300_000, 3), found)["y"])
    assert mean < 0.012
    assert covariance < 0.012


def test_the_mean_of_relu_has_a_closed_form() -> None:
    mean, deviation = np.linspace(-3, 3, 13), np.linspace(0.1, 2, 13)
    root = Moments(1, mean, lambda: independent(deviation**2), (), deviation**2)
    _, values = root.profile()
    found = gaussian_moments.of_profile(1, root, np.maximum(values, 0))
    np.testing.assert_allclose(found.mean, mean_of_relu(mean, deviation), atol=1e-4)
    assert mean_of_relu(np.array([2.0, -2.0]), np.zeros(2)).tolist() == [2.0, 0.0]


def test_equal_and_opposite_channels_stay_so() -> None:
    rows = np.array([[1.0, 2.0], [1.0, 2.0], [-1.0, -2.0], [2.0, 4.0]])
    model = build("g (float[n,2] x) => (float[n,4] y) { h = Gemm<transB=1>(x, a) y = Relu(h) }", a=rows)
    covariance = propagate_moments(model)["y"].covariance
    assert covariance is not None
    np.testing.assert_allclose(covariance[1], covariance[0], rtol=1e-12)
    np.testing.assert_allclose(covariance[3], 2 * covariance[0], rtol=1e-9)
    power = covariance[0, 0] / (0.5 - 0.5 / np.pi)  # Var relu(N(0, s)) = s^2 (1/2 - 1/2pi)
    assert covariance[0, 2] == pytest.approx(-power * (1 / (2 * np.pi)), rel=0.02)  # both means are s / sqrt(2 pi)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ("Conv<pads=[1,1,1,1]>", (5, 4, 3, 3)),
        ("Conv<pads=[2,0,1,1], strides=[2,1], dilations=[1,2]>", (5, 4, 3, 3)),
        ("Conv<group=4, pads=[1,1,1,1]>", (8, 1, 3, 3)),
        ('Conv<group=2, auto_pad="SAME_UPPER", strides=[2,2]>', (6, 2, 3, 3)),
        ("ConvTranspose<strides=[2,2]>", (4, 5, 3, 3)),
        ("ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,1], group=2>", (4, 3, 3, 3)),
    ],
)
def test_one_convolution_of_white_noise_is_exact_with_its_borders(node: str, shape: tuple[int, ...]) -> None:
    model = build(f"g (float[n,4,6,6] x) => (float[n,m,p,q] y) {{ y = {node}(x, w) }}", w=weight(*shape))
    specs = {"x": InputSpec(kind="gaussian", mean=0.7, std=1.3)}
    found = propagate_moments(model, specs=specs)
    feeds = probe_feeds(model, sizes={"n": 20_000}, specs=specs)
    mean, covariance = errors(found["y"], runs(model, feeds, found)["y"])
    assert mean < 0.02
    assert covariance < 0.02


def test_a_convolution_of_natural_images() -> None:
    model = build(
        "g (float[n,3,32,32] x) => (float[n,m,p,q] y) { h = Conv<pads=[1,1,1,1]>(x, w) y = Relu(h) }",
        w=weight(8, 3, 3, 3),
    )
    found = propagate_moments(model)
    measured = runs(model, probe_feeds(model, sizes={"n": 64}, count=20), found)
    for name, most in (("h", 0.03), ("y", 0.08)):  # images of leaves are not Gaussian: what Relu leaves is off a little
        mean, covariance = errors(found[name], measured[name])
        assert mean < most
        assert covariance < 0.06


def test_a_small_net_of_many_operators_is_near() -> None:
    """What the shared autocorrelation and the independence of branches cost: about a third after five layers."""
    model = build(
        """g (float[n,3,32,32] x) => (float[n,10] y) {
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) r1 = Relu(c1) c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w2)
        r2 = HardSwish(c2) d = Conv<group=16, pads=[1,1,1,1]>(r2, wd) rd = Relu(d)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(rd) c3 = Conv<pads=[1,1,1,1]>(p, w3) s = Add(c3, p)
        r3 = Relu(s) a = GlobalAveragePool(r3) f = Flatten(a) y = Gemm(f, w5) }""",
        w1=weight(16, 3, 3, 3), b1=0.3 * weight(16), w2=weight(16, 16, 3, 3), wd=weight(16, 1, 3, 3),
        w3=weight(16, 16, 3, 3), w5=weight(16, 10),
    )  # fmt: skip
    found = propagate_moments(model, sizes={"n": 1})
    measured = runs(model, probe_feeds(model, sizes={"n": 64}, count=10), found)
    for name in ("r1", "r2", "rd", "p", "r3"):
        mean, covariance = measured[name]
        deviation = np.sqrt(np.diag(covariance))
        ratio = np.sqrt(found[name].variance).sum() / deviation.sum()
        assert np.abs(found[name].mean - mean).mean() < 0.25 * deviation.mean(), name
        assert 0.7 < ratio < 1.35, name
    assert set(measured) == {node.outputs[0].name for node in model.graph}


def test_pooling_of_white_noise() -> None:
    model = build(
        """g (float[n,2,8,8] x) => (float[n,2,p,q] a, float[n,2,1,1] b, float[n,2] c, float[n,2,p,q] m) {
        a = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x) b = GlobalAveragePool(x)
        c = ReduceMean<keepdims=0>(x, axes) r = Relu(x) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) }""",
        axes=np.array([2, 3]),
    )
    found = propagate_moments(model, specs=WHITE)
    np.testing.assert_allclose(found["a"].variance, 1 / 4)
    np.testing.assert_allclose(found["b"].variance, 1 / 64)
    np.testing.assert_allclose(found["c"].variance, 1 / 64)
    assert (found["a"].axis, found["b"].axis, found["c"].axis) == (1, 1, 1)
    measured = runs(model, probe_feeds(model, sizes={"n": 20_000}, specs=WHITE), found)["m"]
    np.testing.assert_allclose(found["m"].mean, measured[0], rtol=0.02)
    np.testing.assert_allclose(np.sqrt(found["m"].variance), np.sqrt(np.diag(measured[1])), rtol=0.03)


def test_what_rearranges_axes_is_followed() -> None:
    model = build(
        """g (float[n,4,3,3] x) => (float[n,2,p,q] top, float[n,36] f, float[n,a,b,4] t, float[n,8,p,q] c,
        float[n,6,p,q] e, float[n,9,4] l, float[n,2,p,q] s) {
        h = Conv(x, w) top, rest = Split<axis=1>(h, halves) f = Flatten(h) t = Transpose<perm=[0,2,3,1]>(h)
        c = Concat<axis=1>(h, x) e = Pad(h, pads) r = Reshape(h, shape) l = Transpose<perm=[0,2,1]>(r)
        s = Slice(h, starts, ends, axes, steps) }""",
        w=weight(4, 4, 1, 1), halves=np.array([2, 2]), pads=np.array([0, 1, 0, 0, 0, 1, 0, 0]),
        shape=np.array([0, 4, 9]), starts=np.array([3]), ends=np.array([-100]), axes=np.array([1]),
        steps=np.array([-2]),
    )  # fmt: skip
    found = propagate_moments(model, specs={"x": InputSpec(kind="gaussian", mean=1.0)})
    feeds = probe_feeds(model, sizes={"n": 30_000}, specs={"x": InputSpec(kind="gaussian", mean=1.0)})
    measured = runs(model, feeds, found)
    assert {"top", "rest", "f", "t", "c", "e", "r", "l", "s"} <= set(measured)
    assert [found[name].axis for name in ("f", "t", "l", "e")] == [1, 3, 2, 1]
    for name, pair in measured.items():
        mean, covariance = errors(found[name], pair)
        assert mean < 0.03, name
        assert covariance < (0.06 if name != "c" else 1.0), name  # x and W x are taken for independent in c


def test_batchnorm_statistics_override_what_was_computed() -> None:
    model = build(
        """g (float[n,3,8,8] x) => (float[n,4,8,8] y) {
        h = Conv<pads=[1,1,1,1]>(x, w) y = BatchNormalization<epsilon=0.0>(h, gamma, beta, mean, variance) }""",
        w=weight(4, 3, 3, 3), gamma=np.array([1.0, -2.0, 0.0, 0.5]), beta=np.array([0.0, 1.0, -1.0, 2.0]),
        mean=np.array([5.0, 5.0, 5.0, 5.0]), variance=np.array([9.0, 4.0, 1.0, 1.0]),
    )  # fmt: skip
    found = propagate_moments(model)
    np.testing.assert_allclose(found["y"].mean, [0, 1, -1, 2], atol=1e-6)
    np.testing.assert_allclose(found["y"].variance, [1, 4, 0, 0.25], atol=1e-6)
    before, after = found["h"].covariance, found["y"].covariance
    assert before is not None
    assert after is not None
    np.testing.assert_allclose(correlation(after)[0, 1], -correlation(before)[0, 1])  # gamma turned the sign
    assert after[2].tolist() == [0, 0, 0, 0]


def test_statistics_of_a_folded_batchnorm_count() -> None:
    model = build("g (float[n,3,8,8] x) => (float[n,2,6,6] y) { h = Conv(x, w) y = Relu(h) }", w=weight(2, 3, 3, 3))
    value = next(iter(model.graph)).outputs[0]
    value.meta[BATCHNORM_STATISTICS] = (np.array([1.0, -1.0]), np.array([2.0, 0.5]))
    found = propagate_moments(model)
    assert found["h"].mean.tolist() == [1.0, -1.0]
    np.testing.assert_allclose(found["y"].mean, mean_of_relu(np.array([1.0, -1.0]), np.array([2.0, 0.5])), atol=1e-4)


def test_a_layer_norm_of_known_moments() -> None:
    model = build(
        """g (float[n,5,16] x) => (float[n,5,16] y) {
        h = MatMul(x, w) y = LayerNormalization<axis=-1>(h, scale, bias) }""",
        w=weight(16, 16) * 3, scale=1 + weight(16), bias=weight(16, seed=1),
    )  # fmt: skip
    found = propagate_moments(model)
    feeds = [{"x": np.random.default_rng(0).standard_normal((20_000, 5, 16)).astype(np.float32)}]
    mean, covariance = errors(found["y"], runs(model, feeds, found)["y"])
    assert mean < 0.02
    assert covariance < 0.1


def test_unknown_is_missing_until_a_normalisation_restarts() -> None:
    model = build(
        """g (float[n,5,4] x) => (float[n,5,4] y) {
        s = Softmax(x) h = MatMul(s, w) y = LayerNormalization<axis=-1>(h, scale, bias) }""",
        w=weight(4, 4), scale=np.array([1.0, 2.0, 3.0, 4.0]), bias=np.array([0.5, 0.0, 0.0, 0.0]),
    )  # fmt: skip
    found = propagate_moments(model)
    assert set(found) == {"x", "y"}
    assert found["y"].mean.tolist() == [0.5, 0, 0, 0]
    assert found["y"].variance.tolist() == [1, 4, 9, 16]


def test_tokens_are_rows_of_their_table() -> None:
    table = weight(50, 6)
    model = build(
        "g (int64[n,7] ids) => (float[n,7,6] y) { e = Gather(table, ids) y = Add(e, places) }",
        table=table, places=weight(7, 6, seed=2),
    )  # fmt: skip
    found = propagate_moments(model)
    stored = table.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(found["e"].covariance, np.cov(stored.T, bias=True), atol=1e-9)
    assert found["y"].axis == 2
    np.testing.assert_allclose(found["y"].mean, stored.mean(axis=0) + weight(7, 6, seed=2).mean(axis=0), atol=1e-6)


def test_above_the_limit_only_variances_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(
        "g (float[n,3,6,6] x) => (float[n,4] y) { h = Conv(x, w) r = Relu(h) f = Flatten(r) y = Gemm(f, v) }",
        w=weight(8, 3, 3, 3), v=weight(128, 4),
    )  # fmt: skip
    exact = propagate_moments(model, specs=WHITE)
    for module in ("gaussian_moments", "gaussian_space"):
        monkeypatch.setattr(f"graphopt.inputs.{module}.MOST_CHANNELS", 64)
    found = propagate_moments(model, specs=WHITE)
    assert found["f"].covariance is None
    np.testing.assert_allclose(found["f"].variance, exact["f"].variance)
    assert found["y"].covariance is None or found["y"].covariance.shape == (4, 4)
    assert (found["y"].variance > 0).all()


def test_what_is_stated_of_an_input_counts() -> None:
    model = build("g (float[n,3,8,8] x) => (float[n,3,8,8] y) { y = Neg(x) }")
    found = propagate_moments(model, specs={"x": InputSpec(low=0, high=8)})
    np.testing.assert_allclose(found["y"].mean, -4)
    assert float(found["y"].variance.mean()) == pytest.approx(4.0)
    with pytest.raises(DataError, match="no input named 'z'"):
        propagate_moments(model, specs={"z": InputSpec()})


def test_the_autocorrelation_of_pink_noise() -> None:
    noise = pink_noise(np.random.default_rng(0), (400, 16, 16), (1, 2))
    expected = pink_autocorrelation([16, 16], 1.0)
    for down, right in ((0, 1), (1, 1), (3, 0), (2, 5)):
        found = (noise * np.roll(noise, (down, right), (1, 2))).mean() / (noise**2).mean()
        assert expected[15 + down, 15 + right] == pytest.approx(found, abs=0.03)


@pytest.mark.parametrize(("axes", "shape"), [((2, 3), (200, 1, 24, 40)), ((2, 3, 4), (100, 1, 4, 16, 24))])
def test_the_autocorrelation_of_natural_images(axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    images = natural_images(np.random.default_rng(7), shape, 1, axes)
    sizes = shape[2:]
    expected = natural_autocorrelation(sizes)
    for down, right in ((0, 1), (1, 1), (3, 0), (2, 5)):
        height, width = sizes[-2:]
        found = (images[..., down:, right:] * images[..., : height - down, : width - right]).mean()
        assert expected[..., height - 1 + down, width - 1 + right].flat[sizes[0] - 1 if len(sizes) == 3 else 0] == (
            pytest.approx(found, abs=0.08)
        )


def test_the_autocorrelation_of_a_large_image_is_that_of_a_small_one() -> None:
    images = natural_images(np.random.default_rng(7), (100, 1, 128, 128), 1, (2, 3))
    expected = natural_autocorrelation((128, 128))
    for lag in (1, 4, 16, 40):
        down, right = images[:, :, lag:] * images[:, :, :-lag], images[..., lag:] * images[..., :-lag]
        found = (down.mean() + right.mean()) / 2
        assert expected[48, 48 + lag] == pytest.approx(found, abs=0.06)


def test_a_very_deep_chain_needs_no_recursion() -> None:
    first = Moments(1, np.zeros(2), lambda: independent(np.ones(2)))
    last = first
    for _ in range(5000):
        before = last
        last = Moments(1, before.mean, lambda before=before: Second(None, before.variance + 1, None), [before])
    assert last.variance.tolist() == [5001.0, 5001.0]


@pytest.mark.torch
@pytest.mark.parametrize("name", CORE)
def test_moments_of_the_zoo_are_moments(name: str) -> None:
    model = zoo_model(name)
    found = propagate_moments(model)
    assert found or not any(value.dtype is not None and value.dtype.is_floating_point() for value in model.graph.inputs)
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    for value, moments in found.items():
        shape = shapes.get(value)
        if shape is not None and isinstance(shape[moments.axis], int):
            assert shape[moments.axis] == moments.channels, value
        assert np.isfinite(moments.mean).all(), value
        assert (moments.variance >= 0).all(), value
        if moments.covariance is not None and moments.channels < 200:
            spectrum = np.linalg.eigvalsh(moments.covariance)
            assert spectrum[0] >= -1e-6 * max(spectrum[-1], 1e-12), value


def test_the_rules_name_operators_that_exist() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert set(gaussian.RULES) - known <= {"RMSNormalization", "Swish"}  # newer than some versions of onnx
