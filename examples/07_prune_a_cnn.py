"""Chapter 7: pruning a convolutional network without data, then with a handful of images.

A small residual network learns handwritten digits. `prune-channels` plans what goes, and the plan can be read, stored
and checked before anything happens: half of the channels inside the blocks. With them goes much of the accuracy, until
the layers behind are solved again, on inputs that are made up from what the network knows, or on 64 images whose labels
nobody reads.
"""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.passes import PruneChannels
from graphopt.passes.prune_plan import PrunePlan
from graphopt.recipe import preset


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; what lies between them is 32 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.second, self.last = nn.Conv2d(32, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 16, height, width] to the same."""
        return functional.relu(x + self.last(self.second(functional.relu(self.norm(self.first(x))))))


def network() -> nn.Sequential:
    """[batch, 1, 8, 8] to logits [batch, 10]."""
    stem = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, Block(), nn.MaxPool2d(2), Block(), nn.Flatten(), nn.Linear(256, 10))


def main() -> None:
    """Train, plan, prune without and with compensation, and print the accuracy of each."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1)
    labels = torch.from_numpy(labels)
    test = slice(1200, None)

    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(6):
        for index in torch.randperm(1200).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(module(images[index]), labels[index]).backward()
            optimizer.step()

    def accuracy(session: onnxruntime.InferenceSession) -> float:
        """Share of the test images that are classified right."""
        (logits,) = session.run(None, {session.get_inputs()[0].name: images[test].numpy()})
        return float((logits.argmax(axis=1) == labels[test].numpy()).mean())

    model = graphopt.trace(module.eval(), (images[:2],), dynamic_shapes=({0: "batch"},))

    plan = PruneChannels(ratio=0.5).plan(model)
    print(plan)
    stored = PrunePlan.from_json(json.loads(json.dumps(plan.to_json())))
    smaller = stored.pruned(model)
    cut = graphopt.compare(stored.masked(model), smaller, images[:7].numpy())
    print(f"cut against masked: {cut.error:.1e}\n")
    session = onnxruntime.InferenceSession(ir.to_proto(smaller).SerializeToString(), providers=["CPUExecutionProvider"])
    print(f"prune only  accuracy {accuracy(session):.1%}")

    half = preset("prune").with_options("prune-channels", ratio=0.5)
    handful = [images[index : index + 16].numpy() for index in range(0, 64, 16)]
    for name, calibration in (("data-free", None), ("64 images", handful)):
        result = graphopt.optimize(
            model,
            images[:16].numpy(),
            recipe=half,
            calibration=calibration,
            evaluate=accuracy,
            max_drop=1.0,
            quiet=True,
        )
        before, after = result.report.metric or (0.0, 0.0)
        print(f"{name:10}  accuracy {before:.1%} -> {after:.1%}")
    print()
    print(result.report)
    print(graphopt.diff(result.original, result.model))


if __name__ == "__main__":
    main()
