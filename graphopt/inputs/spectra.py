"""Random signals with the second-order statistics of natural ones: images, video and sound.

The power of natural images falls as 1/f^2 with the spatial frequency f, so the amplitude as 1/f (Field,
"Relations between the statistics of natural images and the response properties of cortical cells", 1987), and
their colour planes are nearly equal (Ruderman, Cronin, Chiao, "Statistics of cone responses to natural images",
1998). White noise has neither: convolutions trained on images answer it with activations of another size.
"""

from __future__ import annotations

import numpy as np

_COLOUR_AXES = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float64)
"""Luminance, red against blue, green against magenta: the principal axes of natural colour, unnormalised."""
_COLOUR_DEVIATIONS = np.array([1.0, 0.26, 0.09])
"""Standard deviation along each colour axis, relative to luminance."""
_CHANNEL_CORRELATION = 0.5
"""Correlation between channels where there are not three of them (feature maps, many-band images)."""


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


def natural_images(
    generator: np.random.Generator, shape: tuple[int, ...], channel_axis: int, spatial_axes: tuple[int, ...]
) -> np.ndarray:
    """1/f noise whose channels are correlated as the colours of natural images; float64, mean 0, std 1.

    Three channels are mixed along luminance and two opponent colours, any other number shares one part.
    """
    planes = np.moveaxis(pink_noise(generator, shape, spatial_axes), channel_axis, -1)
    channels = planes.shape[-1]
    if channels == 3:
        axes = _COLOUR_AXES / np.linalg.norm(_COLOUR_AXES, axis=1, keepdims=True)
        planes = planes @ (axes * _COLOUR_DEVIATIONS[:, None])
    elif channels > 1:
        common = pink_noise(generator, shape, spatial_axes)
        common = np.moveaxis(common, channel_axis, -1)[..., :1]
        planes = np.sqrt(_CHANNEL_CORRELATION) * common + np.sqrt(1 - _CHANNEL_CORRELATION) * planes
    return _standardized(np.moveaxis(planes, -1, channel_axis))


def _standardized(array: np.ndarray) -> np.ndarray:
    deviation = float(array.std())
    return (array - array.mean()) / (deviation if deviation > 0 else 1.0)
