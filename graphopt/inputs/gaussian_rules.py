"""How linear operators, normalisations and elementwise operators carry Gaussian moments: one small rule an operator.

A rule gives the moments of the node's first result (or of all of them), or None where they are not known. What has no
rule is unknown. Approximations are said where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from graphopt.inputs.gaussian_moments import Moments, Second, linear_moments, mixed_lags, of_profile
from graphopt.inputs.gaussian_site import Rule, Site, restated
from graphopt.inputs.gaussian_space import linear_taps, zoomed
from graphopt.ir.affine import batchnorm_affine
from graphopt.ir.inference import Inference
from graphopt.ir.linear import channel_axis, channel_vector, linear_at
from graphopt.ir.rewrite import DeclinedError, constant_float64, is_op

# Linear operators -------------------------------------------------------------------------------------------


def _linear(site: Site) -> Moments | None:
    linear, shape, result = linear_at(site.node), site.shape(), site.result_shape
    if linear is None or result is None:
        return None
    shape = site.facts.shape(linear.data)
    data = site.known.get(linear.data)
    if data is None or shape is None or data.axis != channel_axis(linear.in_axis, len(shape)):
        return None
    weight = linear.weight()
    weight = weight.reshape(linear.groups, linear.out_channels // linear.groups, weight.shape[1], -1)
    product = is_op(site.node, "MatMul")
    bias = np.zeros(linear.out_channels) if product else linear.bias()
    axis = channel_axis(linear.out_axis, len(result))
    taps = linear_taps(linear, shape, result)
    moments = linear_moments(axis, data, weight, bias, taps, keeps_space=not linear.kernel)
    if is_op(site.node, "ConvTranspose") and linear.kernel:
        scale = [1 / stride for stride in taps.strides]
        return moments.moved(axis, lambda _: zoomed(data.lags, scale, taps.sizes))
    return moments


def _batchnorm(site: Site) -> Moments | None:
    """Mean and deviation over the training data are recorded in it; the correlations stay."""
    scale, shift = batchnorm_affine(site.node)
    mean, variance = (constant_float64(value) for value in site.node.inputs[3:5])
    assert mean is not None
    assert variance is not None
    return restated(1, site.moments(), scale * mean + shift, scale * np.sqrt(variance.clip(min=0)))


def _instance_norm(site: Site) -> Moments | None:
    scale, bias = (constant_float64(value) for value in site.node.inputs[1:3])
    return None if scale is None or bias is None else restated(1, site.moments(), bias, scale)


def _group_norm(site: Site) -> Moments | None:
    """Mean 0 and variance 1 over a group of channels; between its channels as before, where that is known."""
    scale, bias, shape = *(constant_float64(value) for value in site.node.inputs[1:3]), site.shape()
    if scale is None or bias is None or shape is None or len(scale) != shape[1]:
        return None
    return _normalised(site, 1, site.attribute("num_groups", 1), scale, bias, centred=True)


def _layer_norm(site: Site) -> Moments | None:
    """Mean 0 and variance 1 over the channels of a position: exact in the mean over channels, not for each."""
    shape, scale = site.shape(), constant_float64(site.node.inputs[1])
    if (
        shape is None
        or scale is None
        or scale.ndim != 1
        or channel_axis(site.attribute("axis", -1), len(shape)) != (len(shape) - 1)
    ):
        return None
    given = constant_float64(site.node.inputs[2]) if len(site.node.inputs) > 2 else None
    bias = np.zeros_like(scale) if given is None else given
    centred = is_op(site.node, "LayerNormalization")
    return _normalised(site, len(shape) - 1, 1, scale, bias, centred=centred)


def _normalised(
    site: Site, axis: int, groups: int, scale: np.ndarray, bias: np.ndarray, *, centred: bool
) -> Moments | None:
    """(x - mean) / deviation within each group of channels, with the expected mean and variance in their place."""
    data, channels = site.moments(), len(scale)
    if data is None or data.axis != axis or data.channels != channels:
        return restated(axis, None, bias, scale) if centred else None
    size = channels // groups
    projection = np.eye(size) - (1.0 / size if centred else 0.0)
    by_group = data.mean.reshape(groups, size) @ projection
    known = data.covariance
    if known is None:
        variance = data.variance.reshape(groups, size)
    else:
        blocks = known.reshape(groups, size, groups, size)[np.arange(groups), :, np.arange(groups), :]
        variance = np.diagonal(projection @ blocks @ projection, axis1=1, axis2=2)
    power = (variance + by_group**2).mean(axis=1, keepdims=True)
    if not (power > 0).all():
        return restated(axis, None, bias, scale) if centred else None
    gain = (np.ones((1, size)) / np.sqrt(power)).reshape(-1) * scale
    mean = (by_group / np.sqrt(power)).reshape(-1) * scale + bias

    def second() -> Second:
        if known is None:
            return Second(None, variance.reshape(-1) * gain**2, data.lags)
        full = np.kron(np.eye(groups), projection) if groups > 1 else projection
        covariance = (full @ known @ full) * np.outer(gain, gain)
        return Second(covariance, np.diag(covariance), data.lags)

    return Moments(axis, mean, second, [data])


# Elementwise ------------------------------------------------------------------------------------------------


def _elementwise(site: Site) -> Moments | None:
    """Any function of the channels of one root, evaluated on its grid by the reference implementation of onnx."""
    computed = [moments for index in range(len(site.node.inputs)) if (moments := site.moments(index)) is not None]
    rank = None if site.result_shape is None else len(site.result_shape)
    if not computed or rank is None:
        return None
    axis, (root, values) = computed[0].axis, computed[0].profile()
    operands: list[tuple[int, np.ndarray]] = []
    for index, value in enumerate(site.node.inputs):
        moments = site.moments(index)
        if moments is not None:
            of_root, values = moments.profile()
            if of_root is not root or moments.axis != axis or len(site.shape(index) or ()) != rank:
                return None
            operands.append((index, values))
        elif value is not None:
            constant = site.constant(value)
            if constant is None:
                return None
            vector = constant.reshape(()) if constant.size == 1 else channel_vector(constant, axis, root.channels, rank)
            operands.append((index, vector))
    found = Inference(site.model.opset_imports, site.model.ir_version).evaluate(site.node, operands)
    if found is None or np.shape(found[0]) != np.shape(values) or not np.isfinite(found[0]).all():
        return None
    return of_profile(axis, root, np.asarray(found[0], np.float64))


def _add(site: Site) -> Moments | None:
    """Sums of different values: taken for independent, which a residual branch and its shortcut are only nearly."""
    left, right = site.moments(0), site.moments(1)
    if (left is None) != (right is None) and len(site.node.inputs) == 2:
        known, other = (left, site.node.inputs[1]) if left is not None else (right, site.node.inputs[0])
        assert known is not None
        return _elementwise_or(site, lambda: _add_varying(site, known, site.constant(other)))
    return _elementwise_or(site, lambda: _sum(site, [left, right], [1.0, -1.0 if site.node.op_type == "Sub" else 1.0]))


def _sum_of_many(site: Site) -> Moments | None:
    found = [site.moments(index) for index in range(len(site.node.inputs))]
    return _sum(site, found, [1.0] * len(found))


def _elementwise_or(site: Site, otherwise: Callable[[], Moments | None]) -> Moments | None:
    try:
        found = _elementwise(site)
    except DeclinedError:  # a constant that varies along another axis than the channels
        found = None
    return otherwise() if found is None else found


def _sum(site: Site, terms: Sequence[Moments | None], signs: Sequence[float]) -> Moments | None:
    known = [term for term in terms if term is not None]
    shapes = [site.shape(index) or () for index in range(len(terms))]
    places = {(len(shape), term.axis, term.channels) for shape, term in zip(shapes, known, strict=False)}
    if len(known) < len(terms) or len(places) != 1:
        return None
    spread = [shape != site.result_shape for shape in shapes]  # the same at every position
    mean = sum((sign * term.mean for sign, term in zip(signs, known, strict=True)), np.zeros(known[0].channels))

    def second() -> Second:
        seconds = [term.second for term in known]
        variance = sum((each.variance for each in seconds), np.zeros(len(mean)))
        covariances = [each.covariance for each in seconds if each.covariance is not None]
        covariance = sum(covariances[1:], covariances[0]) if len(covariances) == len(seconds) else None
        powers = [float(each.variance.sum()) for each in seconds]
        flat = np.ones((1,) * (len(shapes[0]) - 2))
        lags = [flat if same else each.lags for same, each in zip(spread, seconds, strict=True)]
        return Second(covariance, variance, mixed_lags(lags, powers))

    return Moments(known[0].axis, mean, second, known)


def _add_varying(site: Site, data: Moments, constant: np.ndarray | None) -> Moments | None:
    """A constant that differs between positions (an embedding of them): its moments over positions are added."""
    shape = site.result_shape
    if constant is None or shape is None or constant.ndim > len(shape) or site.node.op_type != "Add":
        return None
    table = constant.reshape((1,) * (len(shape) - constant.ndim) + constant.shape)
    if table.shape[data.axis] != data.channels:
        return None
    rows = np.moveaxis(table, data.axis, -1).reshape(-1, data.channels)

    def second() -> Second:
        before = data.second
        variance = before.variance + rows.var(axis=0)
        centred = rows - rows.mean(axis=0)
        covariance = None if before.covariance is None else before.covariance + centred.T @ centred / len(rows)
        return Second(covariance, variance, before.lags)

    return Moments(data.axis, data.mean + rows.mean(axis=0), second, [data])


def _multiply(site: Site) -> Moments | None:
    """Products of different values (a gate): taken for independent."""
    return _elementwise_or(site, lambda: _product(site, site.moments(0), site.moments(1)))


def _product(site: Site, left: Moments | None, right: Moments | None) -> Moments | None:
    if left is None or right is None or left.axis != right.axis or left.channels != right.channels:
        return None
    if len(site.shape(0) or ()) != len(site.shape(1) or ()):
        return None

    def second() -> Second:
        a, b, m, n = left.second, right.second, left.mean, right.mean
        variance = a.variance * b.variance + a.variance * n**2 + b.variance * m**2
        if a.covariance is None or b.covariance is None:
            return Second(None, variance, a.lags)
        covariance = a.covariance * b.covariance + a.covariance * np.outer(n, n) + b.covariance * np.outer(m, m)
        return Second(covariance, variance, a.lags)

    return Moments(left.axis, left.mean * right.mean, second, [left, right])


ELEMENTWISE = (
    "Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min",
    "Mish", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Shrink", "Sigmoid", "Softplus", "Softsign", "Sqrt",
    "Swish", "Tanh", "ThresholdedRelu", "Sin", "Cos", "Atan", "Sinh", "Cosh",
)  # fmt: skip
"""Operators that act on each element alone; any operand beside the data is one number, or one a channel."""

ARITHMETIC_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _linear),
    **dict.fromkeys(("Add", "Sub"), _add),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    "BatchNormalization": _batchnorm,
    "Div": _elementwise,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "Mul": _multiply,
    "Sum": _sum_of_many,
}
"""By operator of the standard domain."""
