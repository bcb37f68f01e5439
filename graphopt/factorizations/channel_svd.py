"""Channel SVD: a k x k convolution as one with r filters, and a 1 x 1 convolution behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.factorizations.contract import Layer, walking_axes
from graphopt.factorizations.svd import Svd


@dataclass(frozen=True)
class ChannelSvd(Svd):
    """`Svd` of the filters as rows: W [M, C k k] = U_r (U_r^T W).

    The first layer keeps stride, padding, dilation and groups, the second mixes its r channels (Zhang, Zou, He, Sun
    2016, "Accelerating Very Deep Convolutional Networks for Classification and Detection"). Cheaper than the layer
    where r (C k k + M) < M C k k.

    Example:
        >>> import numpy as np
        >>> layer = Layer(np.ones((16, 8, 3, 3)), before=(8, 8), after=(8, 8))
        >>> [shape.weight_shape for shape in ChannelSvd().shapes(layer, (4,))]
        [(4, 8, 3, 3), (16, 4, 1, 1)]
    """

    name: ClassVar[str] = "channel-svd"

    def refusal(self, layer: Layer) -> str | None:
        """Where the kernel is 1 the form is called `svd`; a depthwise layer has no channels to leave out."""
        if not walking_axes(layer):
            return "its kernel is 1"
        return None if layer.outputs > layer.groups else "each group has one output"
