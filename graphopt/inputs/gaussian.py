"""Means and covariances of activations from the weights alone: Gaussian moments, carried through the graph.

Every value that a linear operator computes is taken for Gaussian (it is a sum of many terms), with the mean and the
covariance that follow from what it reads. Behind an activation, mean and covariance are those of a function of
correlated Gaussian numbers. Nothing is run and no gradient is taken; what BatchNormalization has recorded of the
training data overrides what was computed. Sources: Hinton, van Camp 1993 and Frey, Hinton 1999 (moments through
nonlinear units), Mehler 1866 (correlations); composed here. Images are taken to be those of
`graphopt.inputs.spectra.natural_images`.

Assumptions: the covariance of two channels at two positions is that at one position times an autocorrelation over
space that all channels share; different values that meet in Add, Mul or Concat are independent (a branch and its
shortcut are only nearly); the mean of a channel is the same at every position (zeros beyond borders are accounted
for on average).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import onnx_ir as ir
from scipy import ndimage

from graphopt.inputs.gaussian_layout import LAYOUT_RULES
from graphopt.inputs.gaussian_moments import Moments, Second, lag_grid, mean_of_relu
from graphopt.inputs.gaussian_rules import ARITHMETIC_RULES
from graphopt.inputs.gaussian_site import Rule, Site, restated
from graphopt.inputs.probes import InputSpec, check_specs, image_axes, input_kind, model_inputs, symbolic_sizes
from graphopt.inputs.spectra import NOISE, NOISE_EXPONENT, dead_leaves, natural_images
from graphopt.ir.inference import Inference
from graphopt.ir.ops.row import Shape
from graphopt.ir.propagate import propagate
from graphopt.ir.rewrite import DeclinedError, Rewriter, constant, is_op
from graphopt.ir.statistics import BATCHNORM_STATISTICS

__all__ = ["RULES", "Moments", "mean_of_relu", "propagate_moments"]

RULES: dict[str, Rule] = {**ARITHMETIC_RULES, **LAYOUT_RULES}
"""Rule by operator of the standard domain; what is not here gives unknown moments."""
_DRAWN_IMAGES, _DRAWN_SIDE, _DRAWN_FRAMES = 128, 64, 16
"""Images from which moments of images are taken, at most so many pixels square, and frames of a video among them."""
_SOUND_EXPONENT = 0.5


def propagate_moments(
    model: ir.Model,
    *,
    specs: Mapping[str, InputSpec] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Moments]:
    """Mean and covariance of the channels of every value, over samples and positions, without any run.

    Args:
        model: a canonical model; it is not changed, and must not change while the result is in use.
        specs: what is known of an input (kind, mean, std), by its name; guessed from the graph otherwise.
        sizes: elements of symbolic dimensions, by name; `symbolic_sizes` fills in the rest. They decide how much
            of a map its border is.

    Returns:
        Moments by name of the value, in the order of the graph. A value that is missing is unknown (attention
        probabilities, integers, operators without a rule), never guessed. Covariances are computed when they are
        first asked for, and kept; above `MOST_CHANNELS` (4096) channels there are only variances. The channel axis
        is axis 1 behind convolutions, the last one behind MatMul and LayerNormalization.

    Raises:
        DataError: `specs` names an input that the model does not have.

    Measured against runs (tests/inputs/test_gaussian.py): Linear-Relu-Linear on Gaussian inputs within the error of
    the samples, one convolution too, borders included; behind several convolutions without BatchNormalization the
    deviations are off by up to a third (channels share one autocorrelation, branches are independent). ResNet-20 with
    its BatchNormalization against 512 training images: means within 0.1 to 0.3 standard deviations (1/f probes: 0.3
    to 0.9), correlations off by 0.12 to 0.2 (root mean square, of 0.15 to 0.3).

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,2] y)
        ...     <float[2,2] w = {1,1,1,1}> { h = MatMul(x, w) y = Relu(h) }''')
        >>> found = propagate_moments(model)
        >>> found["h"].covariance.tolist(), found["y"].mean.round(4).tolist()
        ([[2.0, 2.0], [2.0, 2.0]], [0.5642, 0.5642])
    """
    check_specs(model, specs or {})
    model = with_stored_weights(model)
    facts = propagate(model, {**symbolic_sizes(model), **(sizes or {})})
    known: dict[ir.Value, Moments] = {}
    for value in model_inputs(model):
        moments = _input_moments(value, facts.shape(value), (specs or {}).get(value.name or "", InputSpec()))
        if moments is not None:
            known[value] = moments
    last_use = {value: node for node in model.graph for value in node.inputs if value is not None}
    for node in model.graph:
        for value, moments in _results(Site(model, node, facts, known)):
            known[value] = moments
        for value in {value for value in node.inputs if value in known and last_use[value] is node}:
            known[value].forget_profile()
    for value in node_outputs(model):
        if value in known:
            known[value].forget_profile()
    return {value.name or "": moments for value, moments in known.items()}


def with_stored_weights(model: ir.Model) -> ir.Model:
    """A copy in which what is computed from weights alone (a transposed or normalised weight) is a weight itself.

    Only float results of nodes with one result, and none larger than its operands, are computed.
    """
    copy = model.clone()
    rewriter, inference = Rewriter(copy), Inference(copy.opset_imports, copy.ir_version)
    for node in copy.graph:
        operands = [(index, constant(value)) for index, value in enumerate(node.inputs) if value is not None]
        arrays = [(index, array) for index, array in operands if array is not None]
        if not arrays or len(arrays) < len(operands) or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        found = inference.evaluate(node, arrays) if is_op(node, node.op_type) else None
        array = None if found is None else np.asarray(found[0])
        if array is None or array.dtype.kind != "f" or array.size > sum(each.size for _, each in arrays):
            continue
        name = f"{node.outputs[0].name}/stored"
        node.outputs[0].replace_all_uses_with(rewriter.initializer(copy.graph, name, ir.Tensor(array)))
    return copy


def node_outputs(model: ir.Model) -> Iterable[ir.Value]:
    """All results of nodes of the main graph."""
    return (value for node in model.graph for value in node.outputs)


def _results(site: Site) -> Iterable[tuple[ir.Value, Moments]]:
    """What is known of each result of a node, recorded statistics included."""
    rule = RULES.get(site.node.op_type) if is_op(site.node, site.node.op_type) else None
    try:
        found = rule(site) if rule is not None else None
    except DeclinedError:
        found = None
    several: list[Moments | None] = [found] if found is None or isinstance(found, Moments) else list(found)
    for index, value in enumerate(site.node.outputs):
        moments = several[index] if index < len(several) else None
        recorded = value.meta.get(BATCHNORM_STATISTICS)
        if recorded is not None:
            moments = restated(1, moments, *recorded)
        if moments is not None and _fits(moments, site.facts.shape(value)):
            yield value, moments


def _fits(moments: Moments, shape: Shape | None) -> bool:
    """Whether the moments are numbers, and those of this shape."""
    right = shape is not None and moments.axis < len(shape) and shape[moments.axis] == moments.channels
    return right and bool(np.isfinite(moments.mean).all())


# Inputs -----------------------------------------------------------------------------------------------------


def _input_moments(value: ir.Value, shape: Shape | None, spec: InputSpec) -> Moments | None:
    """What probes look like: images of shapes that hide each other, 1/f sound, white noise."""
    if shape is None or len(shape) < 2 or value.dtype is None or not value.dtype.is_floating_point():
        return None
    kind = spec.kind or input_kind(value, shape)
    if kind in ("mask", "tokens", "integer"):
        return None
    mean, std = _stated(spec)
    axes = image_axes(shape)
    if kind == "image" and axes is not None:
        channel, spatial = axes
        channels, sizes = shape[channel], [shape[axis] for axis in spatial]
        lags = natural_autocorrelation(tuple(sizes))
        covariance = _colours(channels) * std**2
    else:
        channel = _channel_axis(value, len(shape))
        channels, sizes = shape[channel], [size for axis, size in enumerate(shape) if axis not in (0, channel)]
        lags, covariance = None, np.eye(channels) * std**2
        if kind in ("image", "audio") and sizes:
            lags = pink_autocorrelation([1] * (len(sizes) - 1) + sizes[-1:], _SOUND_EXPONENT)
    if channel == 0:
        return None
    second = Second(covariance, np.diag(covariance).copy(), lags)
    return Moments(channel, np.full(channels, mean), lambda: second, (), second.variance)


def _stated(spec: InputSpec) -> tuple[float, float]:
    """Mean and standard deviation; from the range, where only that is known: its middle and a quarter."""
    mean, std = 0.0, 1.0
    if spec.low is not None and spec.high is not None:
        mean, std = (spec.low + spec.high) / 2, (spec.high - spec.low) / 4
    return (mean if spec.mean is None else spec.mean), (std if spec.std is None else spec.std)


def _channel_axis(value: ir.Value, rank: int) -> int:
    """Where the first operator that reads channels expects them: axis 1 of a Conv, the last one of a MatMul."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop(0)
        for use in current.uses():
            if is_op(use.node, "Conv", "ConvTranspose", "Gemm", "BatchNormalization", "InstanceNormalization"):
                return 1
            if is_op(use.node, "MatMul", "LayerNormalization", "RMSNormalization"):
                return rank - 1
            rearranges = is_op(use.node, "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
            if not rearranges and use.node.outputs and use.node.outputs[0] not in seen:
                seen.add(use.node.outputs[0])
                waiting.append(use.node.outputs[0])
    return rank - 1 if rank == 3 else 1


@lru_cache(maxsize=64)
def _colours(channels: int) -> np.ndarray:
    """Covariance of the channels of `natural_images`, mean variance 1: [C, C]."""
    drawn_channels = 3 if channels == 3 else min(channels, 4)
    shape = (_DRAWN_IMAGES, drawn_channels, 32, 32)
    drawn = natural_images(np.random.default_rng(0), shape, 1, (2, 3))
    covariance = np.cov(np.moveaxis(drawn, 1, 0).reshape(drawn_channels, -1), bias=True).reshape((drawn_channels,) * 2)
    if channels not in (1, 3):  # any two of them are alike
        trace, total = np.trace(covariance), covariance.sum()
        shared = (total - trace) / (trace * (drawn_channels - 1))
        return shared + (1 - shared) * np.eye(channels)
    return covariance / np.trace(covariance) * channels


@lru_cache(maxsize=64)
def natural_autocorrelation(sizes: tuple[int, ...]) -> np.ndarray:
    """Autocorrelation of `graphopt.inputs.spectra.natural_images`, estimated on some that are small.

    Their leaves are scale invariant: what is seen on a small image holds for a large one, lags in parts of the side.

    Args:
        sizes: extent along each axis: time, if any, then height and width.

    Returns:
        float64, one odd axis an axis, lag 0 in the middle, where it is 1.

    Example:
        >>> found = natural_autocorrelation((8, 8))
        >>> found.shape, float(found[7, 7]), bool(found[7, 7] > found[7, 8] > found[7, 10])
        ((15, 15), 1.0, True)
    """
    scale = min(1.0, _DRAWN_SIDE / math.sqrt(math.prod(sizes[-2:])))
    small = [min(size, _DRAWN_FRAMES) for size in sizes[:-2]] + [math.ceil(size * scale) for size in sizes[-2:]]
    images = max(_DRAWN_IMAGES // math.prod(small[:-2]), 48)
    axes = tuple(range(2, 2 + len(sizes)))
    leaves = dead_leaves(np.random.default_rng(0), (images, 1, *small), 1, axes)
    padded = [2 * size - 1 for size in small]
    power = np.square(np.abs(np.fft.rfftn(leaves, padded, axes))).sum(axis=(0, 1))
    summed = np.fft.fftshift(np.fft.irfftn(power, padded, tuple(range(len(small)))))
    pairs = math.prod(np.ix_(*(size - np.abs(np.arange(1 - size, size)) for size in small)))
    middle = tuple(size - 1 for size in small)
    known = summed / pairs
    parts = np.reshape([one / whole for one, whole in zip(small, sizes, strict=True)], (-1, *[1] * len(sizes)))
    places = lag_grid(sizes) * parts + np.reshape(middle, parts.shape)
    found = ndimage.map_coordinates(np.clip(known / known[middle], -1.0, 1.0), places, order=1, mode="nearest")
    found = (found + NOISE**2 * pink_autocorrelation(sizes, NOISE_EXPONENT)) / (1.0 + NOISE**2)
    found.setflags(write=False)  # it is kept, and shared by whoever asks
    return found


def pink_autocorrelation(sizes: Iterable[int], exponent: float) -> np.ndarray:
    """Autocorrelation of noise whose amplitude falls as 1/f^exponent: the transform of its power (Wiener, Khinchin).

    Args:
        sizes: extent along each axis.
        exponent: as of `graphopt.inputs.spectra.pink_noise`.

    Returns:
        float64, one odd axis an axis, lag 0 in the middle, where it is 1.

    Example:
        >>> pink_autocorrelation([8], 0.0).round(6).tolist()[6:9]
        [0.0, 1.0, 0.0]
    """
    extents = list(sizes)
    along = np.meshgrid(*(np.fft.fftfreq(size) for size in extents), indexing="ij")
    frequency = np.sqrt(sum((each**2 for each in along), np.zeros(extents)))
    positive = frequency[frequency > 0]
    frequency[frequency == 0] = positive.min() if positive.size else 1.0
    found = np.real(np.fft.ifftn(frequency ** (-2 * exponent)))
    grid = lag_grid(extents)
    wrapped = found[tuple(lag % size for lag, size in zip(grid, extents, strict=True))]
    return wrapped / found.flat[0]
