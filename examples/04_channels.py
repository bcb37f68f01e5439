"""Chapter 4: which channels are the same, and removing some of them exactly.

A residual block, attention with grouped queries and an MLP in one small network. Its groups are found from the graph
alone; a third of every exact group is removed, and the result equals the masked model up to rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import graphopt


class Network(nn.Module):
    """A convolutional stem with a residual block, then one transformer layer over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24)
        self.first, self.second = nn.Conv2d(24, 40, 3, padding=1, groups=4), nn.Conv2d(40, 24, 1)
        self.query, self.key, self.value = nn.Linear(24, 32), nn.Linear(24, 16), nn.Linear(24, 16)
        self.out, self.up, self.down = nn.Linear(32, 24), nn.Linear(24, 64), nn.Linear(64, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 3, 16, 16] to [batch, 10]."""
        x = F.relu(self.norm(self.stem(image)))
        x = x + self.second(F.relu(self.first(x)))
        x = x.flatten(2).transpose(1, 2)
        query = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        key, value = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.key, self.value))
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(dim=1))


def main() -> None:
    """Print the groups, remove a third of each, compare with the masked model."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 16, 16)
    model = graphopt.trace(Network().eval(), (image,), dynamic_shapes=({0: "batch"},))

    groups = graphopt.channel_groups(model)
    for group in groups:
        state = ("exact" if group.exact else group.inexact_reason) if group.prunable else f"must stay: {group.reason}"
        print(f"{group.units:4} x {group.parameters:5} parameters  {group.name:45} {state}")

    selection = {group.name: range(group.units // 3) for group in groups if group.prunable and group.exact}
    smaller = graphopt.remove_channels(model, selection, groups=groups)
    masked = graphopt.mask_channels(model, selection, groups=groups)
    for count in (2, 7):
        feeds = {"image": np.random.default_rng(count).standard_normal((count, 3, 16, 16)).astype(np.float32)}
        print(f"batch {count}: cut against masked {graphopt.compare(masked, smaller, feeds).error:.1e}", end=", ")
        print(f"masked against the network {graphopt.compare(model, masked, feeds).error:.1e}")
    before, after = (
        sum(weight.const_value.size for weight in graph.graph.initializers.values() if weight.const_value is not None)
        for graph in (model, smaller)
    )
    print(f"elements of weights: {before} -> {after}")


if __name__ == "__main__":
    main()
