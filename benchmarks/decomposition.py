"""What `decompose` costs in accuracy at a given share of the MACs, and what it takes to run.

    python -m benchmarks.decomposition

Trained CIFAR-10 networks, BatchNormalization folded, no training; top-1 on 2,000 test images. Chains are chosen by MACs
(`measure=False`), so that the table says what the forms lose, not what this machine likes. Second moments come from
nowhere, from probes, or from 256 unlabelled training images; `fold-reconstruction` behind has the same inputs. The last
row is the seconds of CPU time that planning and applying take on ResNet-50 with random weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

import graphopt
from benchmarks.datafree_setting import sizes, traced
from benchmarks.models import cifar10, exported
from benchmarks.results import Column, Goal, Results, Row, progress, read_options
from benchmarks.training import INPUT, accuracy
from graphopt.inputs.source import find_inputs
from graphopt.passes import Context, Decompose, FoldBatchnorm, FoldReconstruction

MODELS = ("resnet20", "resnet56", "resnet50")
QUICK_MODELS = ("resnet20",)
FORMS = ("channel-svd", "spatial-svd", "tucker", "cp", "auto")
SHARES = (0.8, 0.65, 0.5)
SUPPLIES = ("none", "probes", "images")
REBUILT = {"resnet20": FORMS, "resnet56": ("auto",)}
"""Forms behind which `fold-reconstruction` runs too: it takes most of the time."""
IMAGES, TEST_IMAGES, QUICK_TEST_IMAGES = 256, 2000, 300


@dataclass(frozen=True)
class Setting:
    """One trained network with its images.

    Attributes:
        model: BatchNormalization folded.
        test: images and labels.
        contexts: inputs by where they come from.
    """

    model: ir.Model
    test: tuple[np.ndarray, np.ndarray]
    contexts: dict[str, Context]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/decomposition.json`."""
    options = read_options("decomposition", __doc__, arguments, models=MODELS, quick_models=QUICK_MODELS)
    results = Results(
        "decomposition", "top-1 after decomposition, by form and inputs", options.command, options.complete
    )
    for name in options.models:
        rows = cost_of_a_run(name) if name == "resnet50" else accuracies(name, options.quick)
        for row in rows:
            results.rows.append(row)
            progress(" ".join(f"{key} {value}" for key, value in row.items()))
        results.goals += goals(name, results.rows)
    results.show_and_write(COLUMNS)


def goals(name: str, rows: Sequence[Row]) -> Iterator[Goal]:
    """Every share is met, and what the pass chooses in the metric of probes keeps more than a plain channel SVD."""
    own = [row for row in rows if row["model"] == name and "share" in row]
    over = [f"{row['form']} {row['left']:.3f} of {row['share']}" for row in own if row.get("left", 0.0) > row["share"]]
    yield Goal(f"{name}: what is left is within the share asked for", ", ".join(over) or "none is over", not over)
    top1 = {(row["form"], row["supply"], row["share"]): row["top1"] for row in own if "top1" in row}
    for share in SHARES:
        plain, chosen = top1.get(("channel-svd", "none", share)), top1.get(("auto", "probes", share))
        if plain is not None and chosen is not None:
            what = f"{name} at {share:.0%} of the MACs: auto on probes keeps more than a plain channel SVD"
            yield Goal(what, f"{chosen:.2f} and {plain:.2f} %", chosen > plain)


def accuracies(name: str, quick: bool) -> Iterator[Row]:
    """One row for each form, share and supply of inputs of a trained network."""
    setting = trained(name, quick)
    yield {"model": name, "form": "float", "top1": accuracy(setting.model, setting.test)}
    for form in FORMS[-1:] if quick else FORMS:
        for supply in SUPPLIES if name == "resnet20" and not quick else SUPPLIES[:2]:
            for share in SHARES[1:2] if quick else SHARES:
                yield {
                    "model": name,
                    "form": form,
                    "supply": supply,
                    "share": share,
                    **row(setting, form, supply, share, rebuilds=form in REBUILT[name]),
                }


def row(setting: Setting, form: str, supply: str, share: float, *, rebuilds: bool) -> Row:
    """One decomposition: what is left of the MACs, top-1 as it is and rebuilt."""
    context = setting.contexts["probes" if supply == "none" else supply]
    source = {"none": "none", "probes": "probes", "images": "calibration"}[supply]
    forms = form if form == "auto" else (form, "svd")
    model = setting.model.clone()
    start = time.process_time()
    try:
        Decompose(form=forms, macs=share, source=source, measure=False).rewrite(model, context)
    except graphopt.GraphoptError as error:
        return {"failure": error.what}
    seconds = time.process_time() - start
    left = sizes(model)["macs"] / sizes(setting.model)["macs"]
    found = {"left": left, "top1": accuracy(model, setting.test), "seconds": seconds}
    if not rebuilds:
        return found
    rebuild = FoldReconstruction(source="probes" if supply != "images" else "calibration", samples=IMAGES, refits=0)
    rebuild.rewrite(model, context)
    return {**found, "rebuilt": accuracy(model, setting.test)}


def trained(name: str, quick: bool) -> Setting:
    """A trained network, test images, and inputs of each kind."""
    model = traced(int(name.removeprefix("resnet")))
    FoldBatchnorm().rewrite(model, Context())
    images, labels = cifar10("test")
    chosen = np.random.default_rng(0).permutation(len(images))[: QUICK_TEST_IMAGES if quick else TEST_IMAGES]
    training = cifar10("train")[0]
    shown = training[np.random.default_rng(0).permutation(len(training))[:IMAGES]]
    batches = [{INPUT: shown[start : start + 64]} for start in range(0, len(shown), 64)]
    return Setting(
        model,
        (images[chosen], labels[chosen]),
        {"probes": Context(threads=1), "images": Context(threads=1, calibration=batches)},
    )


def cost_of_a_run(name: str) -> Iterator[Row]:
    """CPU seconds of a network of full size with random weights, on one thread."""
    model = graphopt.load(exported(name))
    FoldBatchnorm().rewrite(model, Context())
    found = list(find_inputs(model, "probes", samples=64).batches)
    whole = sizes(model)["macs"]
    for form in ("channel-svd", "auto"):
        copy = model.clone()
        start = time.process_time()
        forms = form if form == "auto" else (form, "svd")
        single = Decompose(form=forms, macs=0.7, source="calibration", samples=64, measure=False)
        single.rewrite(copy, Context(threads=1, calibration=found))
        seconds = time.process_time() - start
        yield {"model": name, "form": form, "supply": "64 probes", "share": 0.7,
               "left": sizes(copy)["macs"] / whole, "seconds": seconds}  # fmt: skip


def _number(key: str, digits: int) -> Column:
    return key, lambda row: f"{row[key]:.{digits}f}" if key in row else row.get("failure", "") if key == "top1" else ""


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("form", lambda row: row["form"]),
    ("inputs", lambda row: row.get("supply", "")),
    _number("share", 2),
    _number("left", 3),
    _number("top1", 2),
    _number("rebuilt", 2),
    _number("seconds", 1),
)

if __name__ == "__main__":
    main()
