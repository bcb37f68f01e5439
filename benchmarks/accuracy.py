"""What int8 costs in accuracy: CIFAR ResNets on the 10,000 test images, with 256 calibration images and without data.

    python -m benchmarks.accuracy               # needs ../shared/data

onnxruntime's own static quantization (uint8 activations, int8 weights per channel) gets the same 256 images, drawn
at random from the training images.
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
from graphopt.passes.quantize import Quantize
from graphopt.recipe import Recipe, preset

MODELS = ("resnet20", "resnet56")
CALIBRATION_IMAGES, QUICK_TEST_IMAGES = 256, 1000
INPUT = "pixel_values"
FLOAT, DATA_FREE, ORT = "fp32", "int8 data-free", "ORT static U8S8"
RANGES = ("minmax", "percentile", "entropy")
DEFAULT = f"int8 {RANGES[0]}"
LIMITS = {DEFAULT: 0.5, DATA_FREE: 1.5}
"""Points of top-1 accuracy that ResNet-20 may lose."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/accuracy.json`."""
    options = read_options("accuracy", __doc__, arguments, models=MODELS, quick_models=MODELS[:1])
    if not DATA.exists():
        sys.exit(f"the trained weights and the images are not here: {DATA}")
    results = Results(
        "accuracy",
        "top-1 accuracy of int8 on the CIFAR-10 test images, percent",
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
        if name == "resnet20":
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
        FLOAT: lambda source, path: path.write_bytes(source.read_bytes()),
        DATA_FREE: lambda source, path: graphopt.optimize(source, recipe="int8", quiet=True).save(path),
    }
    for ranges in RANGES:
        variants[f"int8 {ranges}"] = lambda source, path, ranges=ranges: graphopt.optimize(
            source, recipe=_int8(ranges), calibration=calibration, quiet=True
        ).save(path)
    variants[ORT] = lambda source, path: rivals.static_u8s8(source, path, [{INPUT: image} for image in calibration])
    return variants


def _int8(ranges: str) -> Recipe:
    """The recipe `int8`, its ranges taken that way."""
    recipe = preset("int8")
    passes = tuple(
        dataclasses.replace(single, ranges=ranges) if isinstance(single, Quantize) else single
        for single in recipe.passes
    )
    return dataclasses.replace(recipe, passes=passes)


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
