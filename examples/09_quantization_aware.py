"""Chapter 9: training in the integers that will be deployed.

A small network learns handwritten digits and is quantized: to int8 without any data, which costs nothing, and to 4
bits, which costs a lot. `graphopt.fake_quantize` puts the quantizers of the same plan into the float graph, `recover`
trains weights and scales there for some seconds on unlabelled images, and what comes out is the graph that the pass
`quantize` writes, with better numbers in it. The recipes "int8-qat" and "int4-qat" do all of that in one call.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import graphopt
from graphopt.ir.session import open_session
from graphopt.passes import Context, Quantize
from graphopt.recipe import preset

TRAINING, TEST = slice(0, 1200), slice(1200, None)


def trained_network(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """[batch, 1, 8, 8] to logits [batch, 10], three residual blocks."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.outer = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.relu(x + self.outer(self.inner(x)))

    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    module = nn.Sequential(stem, Block(), Block(), Block(), head)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(6):
        for index in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(module(images[index]), labels[index]).backward()
            optimizer.step()
    return module.eval()


def main() -> None:
    """Quantize in three ways, and print accuracy, operators and the size of each file."""
    pixels, digits = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1
    module = trained_network(torch.from_numpy(images[TRAINING]), torch.from_numpy(digits[TRAINING]))
    model = graphopt.trace(module, (torch.from_numpy(images[:2]),), dynamic_shapes=({0: "batch"},))
    unlabelled = [images[TRAINING][start : start + 48] for start in range(0, 1200, 48)]

    exact = graphopt.optimize(model, recipe="exact", quiet=True).model
    int8, int4 = exact.clone(), exact.clone()
    Quantize().run(int8, Context())

    # Everything at 4 bits: the plan, what it makes untrained, and what it makes once it is trained.
    name = model.graph.inputs[0].name or ""
    plan = Quantize(bits=4).plan(exact, Context(calibration=[{name: batch} for batch in unlabelled]))
    Quantize().apply(int4, plan)
    graph, quantizers = graphopt.fake_quantize(exact, plan)
    settings: dict[str, Any] = {"steps": 200, "learning_rate": 3e-3}
    recovery = graphopt.recover(
        graph, unlabelled, teacher=model, insertions={"quantizers": quantizers}, quiet=True, **settings
    )

    # In one call, which leaves 8 bits to the first and the last layer, and keeps what is best in onnxruntime.
    recipe = preset("int4-qat").with_options("train-quantized", bits=4, **settings)
    result = graphopt.optimize(model, recipe=recipe, calibration=unlabelled, quiet=True)

    with tempfile.TemporaryDirectory() as folder:
        for label, one in (
            ("float", exact),
            ("int8 without data", int8),
            ("int4", int4),
            ("int4 trained", recovery.model),
            ("recipe int4-qat", result.model),
        ):
            (logits,) = open_session(one).run_feeds({name: images[TEST]})
            accuracy = float((logits.argmax(axis=1) == digits[TEST]).mean())
            size = graphopt.save(one, Path(folder) / "model.onnx").stat().st_size
            print(f"{label:18} {accuracy:.1%}  {size:6} bytes  {operators(one)}")
    print("the trained graph has the operators of the untrained one:", operators(int4) == operators(recovery.model))
    print(*(remark for remark in result.report.remarks if remark.what == "train quantized"), sep="\n")


def operators(model: ir.Model) -> str:
    """How many of each."""
    return " ".join(f"{name}:{count}" for name, count in sorted(Counter(node.op_type for node in model.graph).items()))


if __name__ == "__main__":
    main()
