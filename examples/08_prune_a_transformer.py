"""Chapter 8: pruning heads and MLPs of a transformer.

A small vision transformer reads handwritten digits as 16 patches. Heads go whole, with their rows of all projections,
and so do hidden units of the MLPs; the residual stream stays. What is left can make up for much of what went: the same
units are removed without compensation, then with it, on inputs that are made up from what is stated of them, and on
unlabelled images, which are worth more here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.passes import PruneChannels
from graphopt.recipe import preset

PROVIDERS = ["CPUExecutionProvider"]
WIDTH, HEADS = 32, 8
STATED = {"image": graphopt.InputSpec(kind="image", mean=-0.4, std=0.75, low=-1, high=1)}
"""What is known of the images without having one: there is no BatchNormalization that would tell."""


class Layer(nn.Module):
    """Attention over the patches, then an MLP, each beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, patches, WIDTH] to the same."""
        y = self.before_attention(x)
        parts = (part(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.out(functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class Transformer(nn.Module):
    """Patches of 2 x 2 pixels, two layers, the mean of all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(16, WIDTH))
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 1, 8, 8] to logits [batch, 10]."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(x)).mean(dim=1))


def main() -> None:
    """Train, prune with and without compensation, and print the accuracy of each."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1)
    labels = torch.from_numpy(labels)
    test = slice(1200, None)

    module = Transformer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(20):
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
    smaller = ir.to_proto(plan.pruned(model)).SerializeToString()
    print(plan)
    print()
    print(f"no compensation  accuracy {accuracy(onnxruntime.InferenceSession(smaller, providers=PROVIDERS)):.1%}")

    half = preset("prune").with_options("prune-channels", ratio=0.5)
    unlabelled = [images[index : index + 50].numpy() for index in range(0, 500, 50)]
    for name, calibration in (("data-free", None), ("500 images", unlabelled)):
        result = graphopt.optimize(
            model,
            images[:16].numpy(),
            recipe=half,
            calibration=calibration,
            inputs=STATED,
            evaluate=accuracy,
            max_drop=1.0,
            quiet=True,
        )
        before, after = result.report.metric or (0.0, 0.0)
        print(f"{name:15}  accuracy {before:.1%} -> {after:.1%}")
    print()
    print(result.report)
    print(graphopt.diff(result.original, result.model))


if __name__ == "__main__":
    main()
