"""The transformer of `benchmarks.datafree`: a ViT learns handwritten digits, and loses heads and MLP units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import graphopt
from benchmarks.datafree_setting import IMAGES, QUICK_EFFORT, QUICK_IMAGES, Setting, sizes
from benchmarks.results import Row, progress, stopwatch
from benchmarks.training import accuracy
from graphopt.passes.contract import Context
from graphopt.passes.fold_reconstruction import FoldReconstruction
from graphopt.passes.prune_channels import PruneChannels

NAME = "ViT on digits"
WIDTH, HEADS, HIDDEN, DEPTH = 80, 10, 160, 4
TRAINING, BATCH, EPOCHS, QUICK_EPOCHS = 900, 60, 30, 3
"""Images to train on (the other 897 are the test), of a batch, and passes over them."""
RATIO = 0.3
COMPENSATIONS = (("prune only", None), ("least squares, probes", "probes"), ("least squares, synthetic", "synthetic"))
WITH_IMAGES = f"least squares, {IMAGES} images"


class Block(nn.Module):
    """Attention and MLP, each behind a normalisation and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.rise, self.fall = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, WIDTH] to the same."""
        y = self.before_attention(x)
        query, key, value = (
            part(y).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fall(functional.gelu(self.rise(self.before_mlp(x))))


class Transformer(nn.Module):
    """Images [batch, 1, 8, 8] in patches of 2 x 2, to logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.last, self.classes = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The logits."""
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.places
        return self.classes(self.last(self.blocks(tokens)).mean(1))


@dataclass(frozen=True)
class Digits:
    """Images float32 [N, 1, 8, 8] from -1 to 1, and labels int64 [N]."""

    training: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def digits() -> Digits:
    """Scikit-learn's 1797 digits, in two halves."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = images.reshape(-1, 1, 8, 8).astype(np.float32)[order] / 8 - 1
    labels = labels[order]
    return Digits((images[:TRAINING], labels[:TRAINING]), (images[TRAINING:], labels[TRAINING:]))


def trained(data: Digits, epochs: int) -> ir.Model:
    """The trained transformer with a dynamic batch."""
    torch.manual_seed(0)
    network = Transformer()
    images, labels = (torch.from_numpy(part) for part in data.training)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (TRAINING // BATCH))
    for _ in range(epochs):
        for chosen in torch.randperm(TRAINING).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return graphopt.trace(network.eval(), (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))


def transformer(setting: Setting) -> Iterator[Row]:
    """Heads and MLP units cut by L2, uniform: as it is, and made good from inputs of three kinds."""
    data = digits()
    progress(f"{NAME}: training")
    with stopwatch() as watch:
        model = trained(data, QUICK_EPOCHS if setting.quick else EPOCHS)
    whole = accuracy(model, data.test)
    shared: Row = {"section": "transformer", "model": NAME, "test_images": len(data.test[1])}
    yield {**shared, "variant": "float", "top1": whole, "lost": 0.0, "seconds": watch.seconds, **sizes(model)}
    name = model.graph.inputs[0].name or ""
    images = data.training[0][: QUICK_IMAGES if setting.quick else IMAGES]
    pictures = Context(calibration=[{name: images}], reference=model)
    free = Context(reference=model)
    plan = PruneChannels(ratio=RATIO, round_to=1).plan(model)
    for variant, source in (*COMPENSATIONS, (WITH_IMAGES, "calibration")):
        progress(f"{NAME}: {variant}")
        smaller = model.clone()
        with stopwatch() as watch:
            PruneChannels().apply(smaller, plan)
            if source is not None:
                rebuild = FoldReconstruction(source=source, **(QUICK_EFFORT if setting.quick else {}))
                rebuild.rewrite(smaller, pictures if source == "calibration" else free)
        top1 = accuracy(smaller, data.test)
        row: Row = {"variant": variant, "ratio": RATIO, "top1": top1, "lost": whole - top1, "seconds": watch.seconds}
        yield {**shared, **row, **sizes(smaller)}
