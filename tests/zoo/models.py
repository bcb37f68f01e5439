"""The zoo by name, and its cache: `zoo_model(name)` gives a canonical model, `NAMES` lists them all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "zoo"


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        build: makes the module.
        inputs: makes the example inputs.
        dynamic: `dynamic_shapes` of the export, None for a static graph.
    """

    build: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    dynamic: Any = None


def _entries() -> dict[str, Entry]:
    import torch
    from torch import nn

    from tests.zoo import convolutional as c
    from tests.zoo import sequential as s

    def image(side: int = 32, channels: int = 3) -> Callable[[], tuple[Any, ...]]:
        return lambda: (torch.randn(2, channels, side, side),)

    def tokens() -> tuple[Any, ...]:
        return (torch.randint(0, 100, (2, 12)),)

    batch = {0: "batch"}
    return {
        "resnet": Entry(c.ResNet, image(), (batch,)),
        "mobilenet-v2": Entry(lambda: c.MobileNet(nn.ReLU6(), False), image(), (batch,)),
        "mobilenet-v3": Entry(lambda: c.MobileNet(nn.Hardswish(), True), image()),
        "efficientnet": Entry(lambda: c.MobileNet(nn.SiLU(), True), image()),
        "convnext": Entry(c.ConvNeXt, image()),
        "densenet": Entry(c.DenseNet, image(), (batch,)),
        "inception": Entry(c.Inception, image()),
        "repvgg": Entry(c.RepVGG, image()),
        "unet": Entry(c.UNet, image(), ({0: "batch"},)),
        "pixel-shuffle": Entry(c.PixelShuffle, image(16), ({2: "height", 3: "width"},)),
        "channel-shuffle": Entry(c.ChannelShuffle, image(16, 4)),
        "conv-1d-3d": Entry(c.Conv1d3d, lambda: (torch.randn(2, 4, 32), torch.randn(2, 2, 4, 8, 8))),
        "vit": Entry(s.ViT, image(), (batch,)),
        "bert": Entry(s.Bert, tokens, ({0: "batch", 1: "sequence"},)),
        "llama": Entry(s.Llama, tokens, ({0: "batch", 1: "sequence"},)),
        "swin": Entry(s.Swin, image()),
        "recurrent": Entry(s.Recurrent, lambda: (torch.randn(2, 10, 8),), (batch,)),
        "mlp": Entry(s.Mlp, lambda: (torch.randn(4, 16),), (batch,)),
    }


NAMES = (
    "resnet", "mobilenet-v2", "mobilenet-v3", "efficientnet", "convnext", "densenet", "inception", "repvgg", "unet",
    "pixel-shuffle", "channel-shuffle", "conv-1d-3d", "vit", "bert", "llama", "swin", "recurrent", "mlp",
)  # fmt: skip
"""Every model of the zoo, known without importing torch."""


@cache
def _file(name: str) -> Path:
    """The exported model; the cache key is the source of the zoo and the version of torch."""
    import torch

    source = b"".join(file.read_bytes() for file in sorted(HERE.glob("*.py")))
    key = hashlib.sha256(source + torch.__version__.encode()).hexdigest()[:16]
    path = CACHE / key / f"{name}.onnx"
    if not path.exists():
        from graphopt.export.write import save
        from graphopt.ir.trace import trace

        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        entry = _entries()[name]
        module = entry.build()
        _fill_statistics(module)
        with_process = path.with_name(f"{name}.{os.getpid()}.onnx")
        save(trace(module.eval(), entry.inputs(), dynamic_shapes=entry.dynamic), with_process)
        os.replace(with_process, path)
    return path


def _fill_statistics(module: Any) -> None:
    """BatchNorm as after training: statistics, scales and shifts that are not 0 and 1."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    for part in module.modules():
        if isinstance(part, _BatchNorm):
            with torch.no_grad():
                part.running_mean.uniform_(-0.5, 0.5)
                part.running_var.uniform_(0.5, 1.5)
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-0.5, 0.5)


def zoo_model(name: str) -> ir.Model:
    """A fresh copy of the canonical graph, exported with BatchNormalization kept."""
    from graphopt.ir.load import load

    return load(_file(name))


def zoo_feeds(model: ir.Model, *, scale: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; dynamic dimensions have 2 elements (batch), 12 (sequence) or 16 (others), times `scale`."""
    rng = np.random.default_rng(seed)
    usual = {"batch": 2, "sequence": 12}
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else usual.get(str(size), 16) * scale for size in value.shape or ()]
        integer = value.dtype is not None and value.dtype.is_integer()
        feeds[value.name or ""] = (
            rng.integers(0, 100, shape) if integer else rng.standard_normal(shape).astype(np.float32)
        )
    return feeds
