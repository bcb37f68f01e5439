"""What a model of the zoo is, and how it becomes a graph. Torch is imported when the first module is exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        build: makes the torch module, or the graph itself (`onnx.ModelProto`, `onnx_ir.Model`).
        inputs: makes the example inputs; `tuple` for what is a graph already.
        purpose: one line, the structure that the model is there for.
        dynamic: `dynamic_shapes` of the export, None for a static graph.
    """

    build: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    purpose: str
    dynamic: Any = None


def export(entry: Entry) -> ir.Model:
    """The canonical graph of an entry, with BatchNormalization kept and no two channels alike."""
    import torch

    from graphopt.ir.load import load
    from graphopt.ir.trace import trace

    torch.manual_seed(0)
    built = entry.build()
    if isinstance(built, (onnx.ModelProto, ir.Model)):
        return load(built)
    _strengthen(built)
    _fill_statistics(built)
    _spread_constants(built)
    return trace(built.eval(), entry.inputs(), dynamic_shapes=entry.dynamic)


def _strengthen(module: torch.nn.Module) -> None:
    """Convolutions that do not weaken the signal as fresh ones do: what comes in must still show at the end."""
    import torch
    from torch.nn.modules.conv import _ConvNd

    for part in module.modules():
        if isinstance(part, _ConvNd):
            with torch.no_grad():
                part.weight.mul_(2.0)


def _fill_statistics(module: torch.nn.Module) -> None:
    """BatchNorm as after training: statistics, scales and shifts that are not 0 and 1."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    for part in module.modules():
        if isinstance(part, _BatchNorm):
            with torch.no_grad():
                part.running_mean.uniform_(-0.5, 0.5)
                part.running_var.uniform_(0.5, 1.5)
                if part.affine:
                    part.weight.uniform_(0.5, 1.5)
                    part.bias.uniform_(-0.5, 0.5)


def _spread_constants(module: torch.nn.Module) -> None:
    """Parameters that start as one number (scales, slopes, biases) get a spread, or a mix-up would not show."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            first = parameter.flatten()[:1]
            if parameter.numel() > 1 and parameter.is_floating_point() and bool((parameter == first).all()):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.25, 0.25))
