"""Parts that several files of the zoo build with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


def image(side: int = 32, channels: int = 3) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, channels, side, side),)


def tokens() -> tuple[Any, ...]:
    return (torch.randint(0, 100, (2, 12)),)
