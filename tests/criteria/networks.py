"""Small graphs whose scores can be worked out by hand, for the tests of criteria."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

import graphopt
from graphopt.criteria import Criterion, Knowledge, criterion
from graphopt.ir.channels import ChannelGroup, channel_groups

CONVNET = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3,8,8] x) => (float[n,4] y) {
    made = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    normal = BatchNormalization (made, gamma, beta, mean, variance)
    hidden = Relu (normal)
    read = Conv (hidden, u)
    pooled = GlobalAveragePool (read)
    flat = Flatten (pooled)
    y = Gemm (flat, v, c)
}"""
"""Conv, BatchNormalization, Relu, Conv, pool, Gemm: the channels of `w` are a group of their own."""
RESIDUAL = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x) => (float[n,2] y) {
    stem = MatMul (x, a)
    hidden = MatMul (stem, b)
    active = Relu (hidden)
    branch = MatMul (active, c)
    stream = Add (stem, branch)
    scaled = Mul (stream, s)
    y = MatMul (scaled, d)
}"""
"""A residual stream that `a` and `c` make, and `b` and, scaled by `s`, `d` read."""
SEPARABLE = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3,6,6] x) => (float[n,2,4,4] y) {
    wide = Conv (x, a)
    active = Relu (wide)
    alone = Conv <group = 5, pads = [1, 1, 1, 1]> (active, k)
    again = Relu (alone)
    y = Conv <pads = [0, 0, 0, 0], kernel_shape = [3, 3]> (again, b)
}"""
"""Pointwise, depthwise, full convolution."""


def graph(text: str, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """A canonical model of ONNX text; `weights` become initializers."""
    declared: list[str] = []
    for name, array in weights.items():
        numbers = ", ".join(map(repr, array.astype(float).ravel().tolist()))
        declared.append(f"float[{','.join(map(str, array.shape))}] {name} = {{{numbers}}}")
    head, _, body = text.partition("{")
    return graphopt.load(ir.from_onnx_text(f"{head}<{', '.join(declared)}> {{{body}"))


def convnet(seed: int = 0, filters: int = 6) -> dict[str, np.ndarray]:
    """Weights for `CONVNET`."""
    rng = np.random.default_rng(seed)
    shapes = {
        "w": (filters, 3, 3, 3), "b": (filters,), "gamma": (filters,), "beta": (filters,), "mean": (filters,),
        "variance": (filters,), "u": (5, filters, 3, 3), "v": (5, 4), "c": (4,),
    }  # fmt: skip
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights["variance"] = rng.uniform(0.5, 2.0, filters).astype(np.float32)
    return weights


def images(count: int = 3, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Batches of two inputs for `CONVNET`."""
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def group_with(model: ir.Model, tensor: str, axis: int) -> ChannelGroup:
    """The group that owns coordinates of an axis of an initializer."""
    (found,) = [group for group in channel_groups(model) if (tensor, axis) in group.members]
    return found


def score(
    name: str | Criterion,
    model: ir.Model,
    tensor: str,
    axis: int,
    feeds: list[dict[str, np.ndarray]] | None = None,
    **options: object,
) -> np.ndarray:
    """The scores of the group that owns coordinates of an axis of an initializer."""
    groups = channel_groups(model)
    (group,) = [group for group in groups if (tensor, axis) in group.members]
    return criterion(name, **options).scores(Knowledge(model, groups, feeds), [group])[group.name]
