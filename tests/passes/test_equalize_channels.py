"""Cross-layer equalisation: the same function to the last bit, balanced ranges, and nothing to do twice."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import GraphoptError
from graphopt.ir.channel_scales import channel_scales
from graphopt.ir.fingerprint import fingerprint
from graphopt.ir.origin import remember_origin
from graphopt.ir.session import open_session
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from graphopt.passes import Context, EqualizeChannels, Quantize
from graphopt.passes.equalize_channels import equalized
from tests.passes.quantized_nets import MOBILE, RESIDUAL, UNET, canonical_constants, feeds, set_weight, weighted


def unbalanced(seed: int = 0) -> ir.Model:
    """Depthwise separable blocks whose channels differ by up to 2^10, as in MobileNets."""
    model = weighted(
        "float[n,3,16,16] x => float[n,4,14,14] y",
        "a = Conv(x, w0, b0) r = Relu(a) d = Conv<group=16>(r, w1) s = Relu(d) y = Conv(s, w2)",
        w0=(16, 3, 1, 1), b0=(16,), w1=(16, 1, 3, 3), w2=(4, 16, 1, 1),
    )  # fmt: skip
    scales = channel_scales(model)
    scales.apply(2.0 ** np.rint(np.random.default_rng(seed).uniform(-5, 5, scales.count)))
    return model


def outputs(model: ir.Model) -> list[np.ndarray]:
    session = open_session(model, optimized=False)
    return [session.run_feeds(one)[0] for one in feeds()]


def rms(model: ir.Model, other: ir.Model) -> float:
    pairs = list(zip(outputs(model), outputs(other), strict=True))
    return float(np.sqrt(sum(np.mean((a - b) ** 2) for a, b in pairs) / sum(np.mean(a**2) for a, _ in pairs)))


@pytest.mark.parametrize("model", [RESIDUAL, MOBILE, UNET], ids=["residual", "mobile", "unet"])
def test_no_bit_changes_and_the_second_run_does_nothing(model: ir.Model) -> None:
    changed = canonical_constants(model.clone())
    expected = outputs(changed)
    EqualizeChannels().rewrite(changed, Context())
    assert all(np.array_equal(a, b) for a, b in zip(expected, outputs(changed), strict=True))
    again = fingerprint(changed)
    EqualizeChannels().rewrite(changed, Context())
    assert fingerprint(changed) == again


def test_ranges_meet_within_a_factor_of_two() -> None:
    model = unbalanced()
    EqualizeChannels(balance="weights").rewrite(model, Context())
    first, depthwise, last = (one.magnitudes() for one in channel_scales(model).linears)
    for made, read in ((first.max(axis=1), depthwise[:, 0]), (depthwise[:, 0], last.max(axis=0))):
        assert np.abs(np.log2(made / read)).max() <= 1.0 + 1e-6


def test_what_quantization_ruins_it_saves() -> None:
    model = unbalanced()
    context = Context(calibration=feeds())
    plain, equal = model.clone(), model.clone()
    EqualizeChannels().rewrite(equal, context)
    for one in (plain, equal):
        Quantize(search=False).rewrite(one, context)
    assert rms(model, plain) > 0.1
    assert rms(model, equal) < 0.03


def test_statistics_of_batchnorm_count_as_ranges() -> None:
    model = unbalanced()
    value = next(value for node in model.graph for value in node.outputs if value.name == "a")
    value.meta[BATCHNORM_STATISTICS] = (np.zeros(16), 2.0 ** np.arange(16))
    EqualizeChannels().rewrite(model, Context())
    depthwise = channel_scales(model).linears[1].magnitudes()[:, 0]
    reach = 4 * value.meta[BATCHNORM_STATISTICS][1]
    ratio = np.log2(reach / depthwise)
    floor = ratio > ratio.max() - 8
    assert floor.sum() >= 8
    assert np.ptp(ratio[floor]) <= 2.0 + 1e-6


def test_dead_channels_and_one_sided_ones_stay() -> None:
    model = weighted(
        "float[n,3] x => float[n,2] y", "h = MatMul(x, a) r = Relu(h) y = MatMul(r, b)", a=(3, 4), b=(4, 2)
    )
    a, b = (np.array(model.graph.initializers[name].const_value.numpy()) for name in ("a", "b"))
    a[:, 0], b[1], a[:, 2] = 0.0, 0.0, 1e-30
    set_weight(model, "a", a)
    set_weight(model, "b", b)
    factors = equalized(channel_scales(model))
    assert np.isfinite(factors).all()
    assert (factors[:2] == 1).all()
    assert factors[2] <= 2.0**110  # the smallest weights of float32 must not become the largest
    EqualizeChannels().rewrite(model, Context())
    assert np.isfinite(model.graph.initializers["a"].const_value.numpy()).all()


def test_a_damaged_graph_is_left_alone() -> None:
    model = unbalanced()
    remember_origin(model)
    before, context = fingerprint(model), Context()
    EqualizeChannels().rewrite(model, context)
    assert fingerprint(model) == before
    assert "damaged" in context.remarks[-1].why


def test_half_precision_does_not_overflow() -> None:
    model = unbalanced()
    for value in [*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs]:
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    context = Context()
    EqualizeChannels().rewrite(model, context)
    assert all(np.isfinite(value.const_value.numpy()).all() for value in model.graph.initializers.values())


def test_bad_options() -> None:
    with pytest.raises(GraphoptError, match="unknown balance 'biases'"):
        EqualizeChannels(balance="biases")
