"""Random signals with the statistics of natural ones: images, video and sound.

The power of natural images falls as 1/f^2 with the spatial frequency f, so the amplitude as 1/f (Field,
"Relations between the statistics of natural images and the response properties of cortical cells", 1987), and
their colour planes are nearly equal (Ruderman, Cronin, Chiao, "Statistics of cone responses to natural images",
1998). White noise has neither: convolutions trained on images answer it with activations of another size.

1/f noise has no edges. Those come from objects that hide each other: the dead leaves model, shapes of power-law
sizes thrown on top of each other (Lee, Mumford, Huang, "Occlusion models for natural images: a statistical study of a
scale-invariant dead leaves model", 2001), has the spectrum and the edges, and networks learn features of natural images
from it (Baradad et al., "Learning to see by looking at noise", 2021).

Measured as the inputs of reconstruction, ResNet-20 on CIFAR-10 cut by 50 %, 10,000 images: 1/f noise 37 %, dead leaves
without noise 64 %, with 0.15 of noise 71 %, with 0.3 65 %, with 0.6 58 %; ResNet-56 66.7 % with 1/f noise, 82.7 % with
dead leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_COLOUR_AXES = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float64)
"""Luminance, red against blue, green against magenta: the principal axes of natural colour, unnormalised."""
_COLOUR_DEVIATIONS = np.array([1.0, 0.26, 0.09])
"""Standard deviation along each colour axis, relative to luminance."""
_CHANNEL_CORRELATION = 0.5
"""Correlation between channels where there are not three of them (feature maps, many-band images)."""

_LEAF_COLOURS = np.array([[1.0, 1.0, 1.0], [1.2, 0.0, -1.2], [1.0, -1.6, 1.0]]) * _COLOUR_DEVIATIONS[:, None]
"""Red, green and blue of a leaf for luminance and the two opponents, each of deviation 1: as measured."""
_FEWEST_LEAVES, _MOST_LEAVES = 60, 100
"""Leaves in an image of 32 x 32, and at most in a larger one: 20 were worse, 150 no better."""
_SMALLEST_RADIUS = 1 / 16
"""Of a leaf, in parts of the side of the image; radii r have the density r^-3, which makes the picture scale invariant,
between this one and ten times as much."""
_LARGEST_GROWTH = 10.0
_MARGIN = 1 / 8
"""How far outside of the image leaves may have their centre, in parts of its side."""
_ELLIPSES = 0.6
"""Part of the leaves that are ellipses; the others are rectangles."""
_SHADE = 1.28
"""Deviation of the slope of the linear shade inside a leaf, in luminance by side of the image."""
_SPEED = 0.02
"""Deviation of a leaf's way from one frame of a video to the next, in parts of the side."""
_MOST_FRAMES = 16
"""Frames of a video, or slices of a volume, that are painted: with more, each is shown several times."""
_SUPERSAMPLED = 512 * 512
"""Images of up to this many pixels are painted at twice the size, then averaged."""
NOISE, NOISE_EXPONENT = 0.15, 0.7
"""Deviation, in parts of that of the leaves, and exponent of the noise on top of them."""


def pink_noise(
    generator: np.random.Generator, shape: tuple[int, ...], axes: tuple[int, ...], exponent: float = 1.0
) -> np.ndarray:
    """Gaussian noise whose amplitude spectrum falls as 1/f^exponent along some axes; float64, mean 0, std 1.

    Args:
        generator: source of randomness.
        shape: shape of the result.
        axes: axes that are space or time; the noise is independent along the others.
        exponent: 1 for natural images, 0.5 for 1/f sound, 0 for white noise.

    Example:
        >>> noise = pink_noise(np.random.default_rng(0), (1, 64, 64), (1, 2))
        >>> neighbours = np.corrcoef(noise[0, :, 1:].ravel(), noise[0, :, :-1].ravel())[0, 1]
        >>> bool(neighbours > 0.6)
        True
    """
    white = generator.standard_normal(shape)
    if not axes or white.size == 0:
        return white
    squared = np.zeros(tuple(shape[axis] for axis in axes))
    for position, axis in enumerate(axes):
        along = np.fft.fftfreq(shape[axis])
        squared = squared + np.square(along).reshape([-1 if i == position else 1 for i in range(len(axes))])
    frequency = np.sqrt(squared)
    positive = frequency[frequency > 0]
    frequency[frequency == 0] = positive.min() if positive.size else 1.0
    kept = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
    order = np.argsort(axes)
    filter_ = np.transpose(frequency**-exponent, order).reshape(kept)
    coloured = np.real(np.fft.ifftn(np.fft.fftn(white, axes=axes) * filter_, axes=axes))
    return _standardized(coloured)


def pink_images(
    generator: np.random.Generator,
    shape: tuple[int, ...],
    channel_axis: int,
    spatial_axes: tuple[int, ...],
    exponent: float = 1.0,
) -> np.ndarray:
    """1/f noise whose channels are correlated as the colours of natural images; float64, mean 0, std 1.

    Three channels are mixed along luminance and two opponent colours, any other number shares one part.

    Args:
        generator: source of randomness.
        shape: shape of the result.
        channel_axis: axis of the channels.
        spatial_axes: axes of space and time.
        exponent: as of `pink_noise`.

    Example:
        >>> image = pink_images(np.random.default_rng(0), (2, 3, 32, 32), 1, (2, 3))
        >>> bool(np.corrcoef(image[:, 0].ravel(), image[:, 1].ravel())[0, 1] > 0.7)
        True
    """
    planes = np.moveaxis(pink_noise(generator, shape, spatial_axes, exponent), channel_axis, -1)
    channels = planes.shape[-1]
    if channels == 3:
        axes = _COLOUR_AXES / np.linalg.norm(_COLOUR_AXES, axis=1, keepdims=True)
        planes = planes @ (axes * _COLOUR_DEVIATIONS[:, None])
    elif channels > 1:
        one = tuple(1 if axis == channel_axis else size for axis, size in enumerate(shape))
        common = np.moveaxis(pink_noise(generator, one, spatial_axes, exponent), channel_axis, -1)
        planes = np.sqrt(_CHANNEL_CORRELATION) * common + np.sqrt(1 - _CHANNEL_CORRELATION) * planes
    return _standardized(np.moveaxis(planes, -1, channel_axis))


def natural_images(
    generator: np.random.Generator, shape: tuple[int, ...], channel_axis: int, spatial_axes: tuple[int, ...]
) -> np.ndarray:
    """Dead leaves with a little 1/f noise on top: objects that hide each other; float64, mean 0, std 1.

    All images are standardised together, so that some stay darker than others.

    Args:
        generator: source of randomness.
        shape: shape of the result.
        channel_axis: axis of the channels; three of them are red, green and blue.
        spatial_axes: axes of space, the last two, and of time, those before: the leaves of a video move.

    Example:
        >>> image = natural_images(np.random.default_rng(0), (2, 32, 48, 3), 3, (1, 2))
        >>> image.shape, bool(np.corrcoef(image[..., 0].ravel(), image[..., 2].ravel())[0, 1] > 0.7)
        ((2, 32, 48, 3), True)
    """
    if not spatial_axes or math.prod(shape) == 0:
        return pink_images(generator, shape, channel_axis, spatial_axes)
    leaves = dead_leaves(generator, shape, channel_axis, spatial_axes)
    noise = pink_images(generator, shape, channel_axis, spatial_axes, NOISE_EXPONENT)
    return _standardized(leaves + NOISE * noise)


def dead_leaves(
    generator: np.random.Generator, shape: tuple[int, ...], channel_axis: int, spatial_axes: tuple[int, ...]
) -> np.ndarray:
    """Images of the dead leaves model without noise; see `natural_images`, whose arguments these are.

    Example:
        >>> image = dead_leaves(np.random.default_rng(0), (1, 1, 64, 64), 1, (2, 3))
        >>> steps = np.abs(np.diff(image, axis=3))  # flat inside of leaves, edges between them
        >>> bool(np.median(steps) < steps.mean() / 3)
        True
    """
    others = tuple(axis for axis in range(len(shape)) if axis != channel_axis and axis not in spatial_axes)
    order = (*others, channel_axis, *spatial_axes)
    images, channels = math.prod(shape[axis] for axis in others), shape[channel_axis]
    *times, height, width = (1, *(shape[axis] for axis in spatial_axes))
    frames = math.prod(times)
    painted = min(frames, _MOST_FRAMES)
    result = np.empty((images, channels, painted, height, width), np.float32)
    for image in result:
        leaves = _thrown(generator, channels, height, width)
        for frame in range(painted):
            image[:, frame] = _painted(leaves, frame, height, width)
    shown = result[:, :, np.arange(frames) * painted // frames].reshape([shape[axis] for axis in order])
    return _standardized(np.transpose(shown, np.argsort(order)).astype(np.float64))


@dataclass(frozen=True)
class _Leaves:
    """What lies in one picture, the lowest first; lengths in pixels, x before y.

    Attributes:
        centre: [leaves, 2].
        speed: [leaves, 2], pixels a frame.
        radius: [leaves, 2], half the extents along the leaf's own two axes.
        angle: [leaves], of the first of them.
        elliptic: [leaves], whether it is an ellipse or a rectangle.
        colour: [leaves, channels].
        slope: [leaves, 2], luminance by pixel.
    """

    centre: np.ndarray
    speed: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    elliptic: np.ndarray
    colour: np.ndarray
    slope: np.ndarray


def _thrown(generator: np.random.Generator, channels: int, height: int, width: int) -> _Leaves:
    """Random leaves; the first one is the ground, which fills the picture."""
    side = math.sqrt(height * width)
    count = 1 + int(np.clip(_FEWEST_LEAVES * (side / 32) ** 0.25, _FEWEST_LEAVES, _MOST_LEAVES))
    extent = np.array([width, height], np.float64)
    growth = np.minimum((generator.random(count) + 1e-3) ** -0.5, _LARGEST_GROWTH)
    radius = side * _SMALLEST_RADIUS * growth
    aspect = generator.uniform(0.4, 1.0, count)
    centre = generator.uniform(-_MARGIN * side, extent + _MARGIN * side, (count, 2))
    centre[0] = extent / 2
    if channels == 3:
        colour = generator.standard_normal((count, 3)) @ _LEAF_COLOURS
    else:
        common, own = generator.standard_normal((count, 1)), generator.standard_normal((count, channels))
        colour = np.sqrt(_CHANNEL_CORRELATION) * common + np.sqrt(1 - _CHANNEL_CORRELATION) * own
    return _Leaves(
        centre,
        generator.standard_normal((count, 2)) * _SPEED * side,
        np.stack([radius, radius * aspect], axis=1),
        generator.uniform(0.0, np.pi, count),
        generator.random(count) < _ELLIPSES,
        colour,
        generator.standard_normal((count, 2)) * _SHADE / side,
    )


def _painted(leaves: _Leaves, frame: int, height: int, width: int) -> np.ndarray:
    """The picture, float32 [channels, height, width]: which leaf is seen in each pixel, then its colour and shade."""
    finer = 2 if height * width <= _SUPERSAMPLED else 1
    centre = leaves.centre + frame * leaves.speed
    x, y = ((np.arange(finer * size, dtype=np.float32) + 0.5) / finer for size in (width, height))
    seen = np.zeros((y.size, x.size), np.uint8)
    reach = np.hypot(leaves.radius[:, 0], leaves.radius[:, 1])
    least = np.floor((centre - reach[:, None]) * finer).clip(0).astype(int)
    most = np.ceil((centre + reach[:, None]) * finer).clip(0).astype(int)
    cosine, sine = np.cos(leaves.angle), np.sin(leaves.angle)
    along = np.stack([cosine, sine], axis=1) / leaves.radius[:, :1]
    across = np.stack([-sine, cosine], axis=1) / leaves.radius[:, 1:]
    for leaf in range(1, len(centre)):
        columns, rows = (slice(least[leaf, axis], most[leaf, axis]) for axis in (0, 1))
        right, down = x[columns] - centre[leaf, 0], (y[rows] - centre[leaf, 1])[:, None]
        first = right * along[leaf, 0] + down * along[leaf, 1]
        second = right * across[leaf, 0] + down * across[leaf, 1]
        if leaves.elliptic[leaf]:
            inside = np.square(first) + np.square(second) <= 1
        else:
            inside = np.maximum(np.abs(first), np.abs(second)) <= 1
        np.copyto(seen[rows, columns], leaf, where=inside)
    slope = leaves.slope.astype(np.float32)
    level = -(leaves.slope * centre).sum(axis=1).astype(np.float32)
    shade = slope[seen, 0] * x + slope[seen, 1] * y[:, None] + level[seen]
    picture = leaves.colour.T.astype(np.float32)[:, seen] + shade
    return picture.reshape(-1, height, finer, width, finer).mean(axis=(2, 4))


def _standardized(array: np.ndarray) -> np.ndarray:
    if array.size == 0:
        return array
    deviation = float(array.std())
    return (array - array.mean()) / (deviation if deviation > 0 else 1.0)
