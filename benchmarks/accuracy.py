"""What quantization costs in accuracy: CIFAR ResNets on the 10,000 test images, with 256 unlabelled images and without.

    python -m benchmarks.accuracy               # needs ../shared/data

Weights and activations of 8 bits, of 6, and weights of 4 with activations of 8 (all in 8-bit integers, whose kernels
are the same). "W8A8" is the recipe `int8` with images, "W8A8 data-free" the recipe `int8-datafree`; the others are
these recipes with other widths and `fold-reconstruction` behind `quantize`. onnxruntime's own static quantization
(uint8 activations, int8 weights per channel; it knows no other widths of convolutions) gets the same images, drawn at
random from the training images.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import graphopt
from benchmarks import rivals
from benchmarks.contest import node_count, open_file
from benchmarks.models import DATA, cifar10, exported
from benchmarks.results import Column, Goal, Results, Row, progress, read_options, stopwatch
from graphopt.passes.fold_reconstruction import FoldReconstruction
from graphopt.recipe import Recipe, preset

MODELS = ("resnet20", "resnet56")
CALIBRATION_IMAGES, QUICK_TEST_IMAGES = 256, 1000
INPUT = "pixel_values"
FLOAT, ORT = "fp32", "ORT static U8S8"
WIDTHS: dict[str, tuple[int, int]] = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8)}
"""Bits of weights and activations."""
FREE = "data-free"
LIMITS: dict[str, float] = {
    "W8A8": 0.3,
    f"W8A8 {FREE}": 1.0,
    "W6A6": 1.5,
    f"W6A6 {FREE}": 3.0,
    "W4A8": 2.0,
}
"""Points of top-1 accuracy that a network may lose."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/accuracy.json`."""
    options = read_options("accuracy", __doc__, arguments, models=MODELS, quick_models=MODELS[:1])
    if not DATA.exists():
        sys.exit(f"the trained weights and the images are not here: {DATA}")
    results = Results(
        "accuracy",
        "top-1 accuracy of quantized networks on the CIFAR-10 test images, percent",
        options.command,
        options.complete,
    )
    images, labels = cifar10("test")
    if options.quick:
        chosen = np.random.default_rng(0).permutation(len(images))[:QUICK_TEST_IMAGES]
        images, labels = images[chosen], labels[chosen]
    training = cifar10("train")[0]
    calibration = training[np.random.default_rng(0).permutation(len(training))[:CALIBRATION_IMAGES]]
    del training
    for name in options.models:
        rows = measure(name, images, labels, [image[None] for image in calibration])
        results.rows += rows
        results.goals += _goals(name, rows)
    results.show_and_write(COLUMNS)


def measure(name: str, images: np.ndarray, labels: np.ndarray, calibration: list[np.ndarray]) -> list[Row]:
    """One row a way to quantize.

    Args:
        name: of the network.
        images: test images, float32 [N, 3, 32, 32].
        labels: int64 [N].
        calibration: images, float32 [1, 3, 32, 32] each.
    """
    source = exported(name)
    rows: list[Row] = []
    for variant, write in _variants(calibration).items():
        progress(f"{name}: {variant}")
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.onnx"
            with stopwatch() as watch:
                write(source, path)
            rows.append(
                {
                    "model": name,
                    "variant": variant,
                    "top1": 100 * accuracy(path, images, labels),
                    "test_images": len(images),
                    "nodes": node_count(path),
                    "tool_seconds": watch.seconds,
                }
            )
        rows[-1]["lost"] = rows[0]["top1"] - rows[-1]["top1"]
    return rows


def accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images whose largest logit is the label's."""
    session = open_file(path)

    def predict(image: np.ndarray) -> int:
        return int(np.argmax(np.asarray(session.run(None, {INPUT: image[None]})[0])))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        predicted = np.fromiter(pool.map(predict, images), np.int64, len(images))
    return float(np.mean(predicted == labels))


def _variants(calibration: list[np.ndarray]) -> dict[str, Callable[[Path, Path], object]]:
    """Writers of the models to compare, by name; the first is the reference."""
    variants: dict[str, Callable[[Path, Path], object]] = {
        FLOAT: lambda source, path: path.write_bytes(source.read_bytes())
    }
    for name in WIDTHS:
        variants[name] = lambda source, path, name=name: graphopt.optimize(
            source, recipe=_recipe("int8", name), calibration=calibration, quiet=True
        ).save(path)
        variants[f"{name} {FREE}"] = lambda source, path, name=name: graphopt.optimize(
            source, recipe=_recipe("int8-datafree", name), quiet=True
        ).save(path)
    variants[ORT] = lambda source, path: rivals.static_u8s8(source, path, [{INPUT: image} for image in calibration])
    return variants


def _recipe(name: str, width: str) -> Recipe:
    """A recipe of the house with other widths; no operator is returned to float or more bits, so that they hold."""
    weight_bits, bits = WIDTHS[width]
    recipe = preset(name).with_options("quantize", bits=bits, weight_bits=weight_bits, search=False)
    recipe = recipe.with_options("migrate-scales", bits=bits, weight_bits=weight_bits)
    if min(bits, weight_bits) == 8:
        return recipe
    last = [single.name for single in recipe.passes].index("quantize") + 1
    rebuild = FoldReconstruction(source="probes" if name == "int8-datafree" else "auto")
    return dataclasses.replace(recipe, passes=(*recipe.passes[:last], rebuild, *recipe.passes[last:]))


def _goals(name: str, rows: Sequence[Row]) -> list[Goal]:
    by_variant = {row["variant"]: row for row in rows}
    return [
        Goal(
            f"{name}: {variant} loses at most {limit} points",
            f"{by_variant[variant]['lost']:.2f} points ({by_variant[FLOAT]['top1']:.2f} to "
            f"{by_variant[variant]['top1']:.2f} % of {by_variant[variant]['test_images']} images)",
            by_variant[variant]["lost"] <= limit,
        )
        for variant, limit in LIMITS.items()
    ]


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("variant", lambda row: row["variant"]),
    ("top-1 %", lambda row: f"{row['top1']:.2f}"),
    ("lost", lambda row: f"{row['lost']:.2f}"),
    ("images", lambda row: str(row["test_images"])),
    ("nodes", lambda row: str(row["nodes"])),
    ("tool s", lambda row: f"{row['tool_seconds']:.1f}"),
)


if __name__ == "__main__":
    main()
