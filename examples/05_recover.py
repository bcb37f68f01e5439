"""Chapter 5: getting accuracy back without labels.

A small network learns handwritten digits, loses half of its channels, and with them its accuracy. `graphopt.recover`
trains the smaller graph for some seconds to say what the original said, on images whose labels nobody reads.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import graphopt

PROVIDERS = ["CPUExecutionProvider"]


def network() -> nn.Sequential:
    """[batch, 1, 8, 8] to logits [batch, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def main() -> None:
    """Train, prune, recover, and print the accuracy after each."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1)
    labels = torch.from_numpy(labels)
    training, test = slice(0, 1200), slice(1200, None)

    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(8):
        for index in torch.randperm(1200).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(module(images[index]), labels[index]).backward()
            optimizer.step()

    def accuracy(session: onnxruntime.InferenceSession) -> float:
        """Share of the test images that are classified right."""
        (logits,) = session.run(None, {session.get_inputs()[0].name: images[test].numpy()})
        return float((logits.argmax(axis=1) == labels[test].numpy()).mean())

    model = graphopt.trace(module.eval(), (images[:2],), dynamic_shapes=({0: "batch"},))
    groups = [group for group in graphopt.channel_groups(model) if group.prunable]
    smaller = graphopt.remove_channels(model, {group.name: range(group.units // 2) for group in groups})

    unlabelled = torch.utils.data.DataLoader(images[training], batch_size=50, shuffle=True)
    recovery = graphopt.recover(smaller, unlabelled, teacher=model, steps=200, quiet=True)
    for name, graph in (("original", model), ("half of the channels", smaller), ("recovered", recovery.model)):
        session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=PROVIDERS)
        print(f"{name:20} {accuracy(session):.1%}")
    print(recovery)


if __name__ == "__main__":
    main()
