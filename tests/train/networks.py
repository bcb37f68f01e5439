"""Small graphs, data and an insertion of their own for the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import graphopt
from graphopt.ir.lifted import Insertion
from graphopt.ir.lower import Link

CONVNET = """<ir_version: 10, opset_import: ["": 21]> g (float[n,2,6,6] x) => (float[n,3] y) {
    wide = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    normal = BatchNormalization (wide, gamma, beta, mean, variance)
    hidden = Relu (normal)
    deep = Conv <strides = [2, 2]> (hidden, w2)
    pooled = GlobalAveragePool (deep)
    flat = Flatten (pooled)
    y = Gemm (flat, w3, b3)
}"""
SHAPES = {
    "w1": (4, 2, 3, 3),
    "b1": (4,),
    "gamma": (4,),
    "beta": (4,),
    "mean": (4,),
    "variance": (4,),
    "w2": (6, 4, 3, 3),
    "w3": (6, 3),
    "b3": (3,),
}


def graph(text: str, weights: dict[str, np.ndarray] | None = None) -> ir.Model:
    """A canonical model of ONNX text; `weights` become initializers."""
    declared = "".join(
        f"float[{','.join(map(str, array.shape))}] {name}, " for name, array in (weights or {}).items()
    ).rstrip(", ")
    model = ir.from_onnx_text(text.replace(") =>", f", {declared}) =>", 1) if declared else text)
    for value in [value for value in model.graph.inputs if value.name in (weights or {})]:
        assert weights is not None
        value.const_value = ir.tensor(weights[value.name or ""].astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return graphopt.load(model)


def convnet(seed: int = 0) -> ir.Model:
    """Two convolutions, BatchNormalization and a head; [n, 2, 6, 6] to [n, 3]."""
    generator = np.random.default_rng(seed)
    weights = {name: generator.standard_normal(shape) * 0.4 for name, shape in SHAPES.items()}
    weights["variance"] = np.abs(weights["variance"]) + 0.5
    weights["gamma"] = np.abs(weights["gamma"]) + 0.5
    return graph(CONVNET, weights)


def damaged(model: ir.Model, seed: int = 1, amount: float = 0.2) -> ir.Model:
    """The model with noise on its weights of two axes and more."""
    model, generator = model.clone(), np.random.default_rng(seed)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.ndim > 1:
            noise = generator.standard_normal(array.shape).astype(np.float32) * amount
            value.const_value = ir.tensor(array + noise, name=value.name)
    return model


def images(count: int = 4, batch: int = 16, seed: int = 2) -> list[np.ndarray]:
    """Batches for `convnet`, float32 [batch, 2, 6, 6]."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((batch, 2, 6, 6)).astype(np.float32) for _ in range(count)]


def weights_of(model: ir.Model) -> dict[str, np.ndarray]:
    """Every initializer as an array."""
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def assert_same(first: ir.Model, second: ir.Model) -> None:
    """Bit for bit the same weights."""
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


class _Gain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logarithm = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.zeros(()))

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        scaled = tensor * self.logarithm.exp()
        return scaled * (1 + self.noise * torch.rand(()))


class Gain(Insertion):
    """One positive factor behind each of some values; folds to a Mul. Remembers what the trainer did with it."""

    calls: list[tuple[int, int]] = []  # noqa: RUF012  (shared by the copies that are trained)

    def __init__(self, *values: str, penalty: float = 0.0, noise: float = 0.0) -> None:
        super().__init__()
        self.values, self.weight = values, penalty
        self.gains = torch.nn.ModuleList(_Gain() for _ in values)
        for gain in self.gains:
            gain.noise.fill_(noise)

    def insert(self, lifted: Any, path: str) -> None:
        for index, value in enumerate(self.values):
            lifted.place(value, f"{path}.gains.{index}")

    def advance(self, step: int, steps: int) -> None:
        self.calls.append((step, steps))

    def penalty(self) -> torch.Tensor | float:
        return self.weight * torch.stack([(gain.logarithm - 1).square() for gain in self.gains]).sum()

    def fold(self, folding: Any) -> None:
        for value, gain in zip(self.values, self.gains, strict=True):
            factor = folding.add_constant(f"{value}_gain", gain.logarithm.detach().exp().cpu().numpy())
            folding.insert_after(value, [Link("Mul", [factor])])


class Ranged(Gain):
    """A `Gain` that begins with the largest input that it was shown, and needs half of the steps to settle."""

    def prepare(self, lifted: Any, batches: Any) -> None:
        assert not lifted.training or lifted.insertions.training
        largest = max(float(batch[0].abs().max()) for batch in batches)
        for gain in self.gains:
            gain.logarithm = torch.nn.Parameter(torch.tensor(largest / 10))

    def settled(self, step: int, steps: int) -> bool:
        return step >= steps / 2
