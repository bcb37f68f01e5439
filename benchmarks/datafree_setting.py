"""What all sections of `benchmarks.datafree` share: networks, images, sources of inputs, and how a cut is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch

import graphopt
from benchmarks.kept import kept
from benchmarks.models import cifar10, cifar_resnet
from benchmarks.results import Options, Row, stopwatch
from benchmarks.training import INPUT, accuracy
from graphopt.inputs.source import Probes, find_inputs
from graphopt.inputs.store import model_digest
from graphopt.ir.cost import cost
from graphopt.ir.dimensions import symbolic_dimensions
from graphopt.passes.contract import Context
from graphopt.passes.fold_batchnorm import FoldBatchnorm
from graphopt.passes.fold_reconstruction import FoldReconstruction
from graphopt.passes.prune_channels import PruneChannels
from graphopt.passes.prune_plan import PrunePlan
from graphopt.recipe import preset

IMAGES, QUICK_IMAGES = 512, 16
"""Unlabelled training images; in a quick run all inputs are so few."""
QUICK_EFFORT: Mapping[str, int] = {"samples": QUICK_IMAGES, "hinges": 1, "refits": 0}
"""Options of every reconstruction in a quick run."""
QUICK_TEST_IMAGES = 500
BATCH = 64
FREE, PINK, PICTURES = "free", "pink", "images"
"""Where inputs come from: nowhere, 1/f noise, the training images."""


@dataclass(frozen=True)
class Variant:
    """One way to make up for what was cut.

    Attributes:
        name: what the tables call it.
        rebuild: the pass, None where nothing is made up for.
        supply: where its inputs come from, one of FREE, PINK, PICTURES.
    """

    name: str
    rebuild: FoldReconstruction | None = None
    supply: str = FREE


PRUNE_ONLY = Variant("prune only")
LEAVES = Variant("least squares, probes", FoldReconstruction(source="probes"))
NOISE = Variant("least squares, 1/f probes", FoldReconstruction(source="calibration"), PINK)
BEST_FREE = Variant("least squares, synthetic", FoldReconstruction(source="synthetic"))
"""The default without data."""
WITH_IMAGES = Variant(f"least squares, {IMAGES} images", FoldReconstruction(source="calibration"), PICTURES)
CLOSED = tuple(
    Variant(f"{name}{' + mean' if mean else ''}", FoldReconstruction(form=form, mean_correction=mean))
    for name, form, means in (
        ("neuron merging", "neuron-merging", (False,)),
        ("LBYL", "lbyl", (False,)),
        ("ridge", "ridge", (False, True)),
        ("moments", "moments", (True,)),
    )
    for mean in means
)
"""Forms of the weights and the statistics alone: as published, and the ridge with the mean corrected."""
FORMS = (PRUNE_ONLY, *CLOSED, BEST_FREE, WITH_IMAGES)
FOLDED_FORMS = (PRUNE_ONLY, NOISE, LEAVES, BEST_FREE, WITH_IMAGES)
"""Without statistics there is nothing that the closed forms could read."""


@dataclass
class Net:
    """One trained network. Its inputs are made once, and are the same for all that asks for them.

    Attributes:
        name: "ResNet-20".
        model: canonical, nobody changes it.
        effort: options of reconstructions that are not the default.
        images: unlabelled training images, float32 [N, 3, 32, 32].
        test: images and labels that accuracy is measured on.
    """

    name: str
    model: ir.Model = field(repr=False)
    effort: Mapping[str, int]
    images: np.ndarray = field(repr=False)
    test: tuple[np.ndarray, np.ndarray] = field(repr=False)
    _contexts: dict[str, Context] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def top1(self) -> float:
        """Of the float network, percent."""
        return accuracy(self.model, self.test)

    def context(self, supply: str) -> Context:
        """What passes may know: the same object, and so the same inputs, for everybody who asks."""
        if supply not in self._contexts:
            calibration: Sequence[Mapping[str, np.ndarray]] | None = None
            if supply == PINK:
                made = find_inputs(
                    self.model, Probes(texture="pink"), samples=self.effort.get("samples", IMAGES), threads=0
                )
                calibration = list(made.batches)
            elif supply == PICTURES:
                calibration = [
                    {INPUT: self.images[start : start + BATCH]} for start in range(0, len(self.images), BATCH)
                ]
            self._contexts[supply] = Context(calibration=calibration, reference=self.model)
        return self._contexts[supply]

    def cut(self, plan: PrunePlan) -> ir.Model:
        """A copy without the units of the plan, nothing made up for."""
        model = self.model.clone()
        PruneChannels().apply(model, replace(plan, compensation="none"))
        return model

    def rebuilt(self, damaged: ir.Model, variant: Variant) -> tuple[ir.Model, Row]:
        """A copy made good, and top-1, points lost and seconds of it."""
        model = damaged.clone()
        with stopwatch() as watch:
            if variant.rebuild is not None:
                replace(variant.rebuild, **self.effort).rewrite(model, self.context(variant.supply))
        return model, {**self.measured(model), "seconds": watch.seconds}

    def row(self, damaged: ir.Model, variant: Variant) -> Row:
        """What `rebuilt` says of a variant, from the cache where this very code has said it of this very graph before.

        So a run that was stopped goes on where it was.
        """
        graphs = model_digest(damaged), model_digest(self.model)
        parts = (*graphs, self.name, variant, dict(self.effort), len(self.images), len(self.test[1]))
        return kept("datafree", parts, lambda: self.rebuilt(damaged, variant)[1])

    def measured(self, model: ir.Model) -> Row:
        """Top-1 on the test images in percent, and the points below the float network."""
        top1 = accuracy(model, self.test)
        return {"model": self.name, "top1": top1, "lost": self.top1 - top1, "test_images": len(self.test[1])}

    def float_row(self, section: str) -> Row:
        """The row that the others of a section are held against."""
        return {"section": section, "variant": "float", **self.measured(self.model), **sizes(self.model)}


@dataclass
class Setting:
    """Everything that sections need, made when it is first asked for.

    Attributes:
        options: of the command line.
    """

    options: Options

    @property
    def quick(self) -> bool:
        """Whether it is only to be seen that everything works."""
        return self.options.quick

    @property
    def depths(self) -> tuple[int, ...]:
        """Of the networks."""
        return (20,) if self.quick else (20, 56)

    @cached_property
    def training(self) -> np.ndarray:
        """All training images, float32 [50000, 3, 32, 32]; their labels are not even kept."""
        return cifar10("train")[0]

    @cached_property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Test images and labels."""
        images, labels = cifar10("test")
        if not self.quick:
            return images, labels
        chosen = np.random.default_rng(0).permutation(len(images))[:QUICK_TEST_IMAGES]
        return images[chosen], labels[chosen]

    @cached_property
    def images(self) -> np.ndarray:
        """The unlabelled training images that "images" stands for."""
        count = QUICK_IMAGES if self.quick else IMAGES
        return self.training[np.random.default_rng(0).permutation(len(self.training))[:count]]

    @cached_property
    def nets(self) -> tuple[Net, ...]:
        """The trained networks as traced, with BatchNormalization."""
        return tuple(self._net(f"ResNet-{depth}", traced(depth)) for depth in self.depths)

    @cached_property
    def folded(self) -> tuple[Net, ...]:
        """The same networks as they come from most files: BatchNormalization folded, and nothing known of it."""
        return tuple(self._net(net.name, without_statistics(net.model)) for net in self.nets)

    def _net(self, name: str, model: ir.Model) -> Net:
        return Net(name, model, QUICK_EFFORT if self.quick else {}, self.images, self.test)

    def ratios(self, *full: float) -> Iterator[float]:
        """Those given; the second and the last in a quick run."""
        yield from ((full[1], full[-1]) if self.quick and len(full) > 2 else full)


def traced(depth: int) -> ir.Model:
    """A trained CIFAR ResNet with a dynamic batch."""
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return graphopt.trace(cifar_resnet(depth), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def without_statistics(model: ir.Model) -> ir.Model:
    """A copy with BatchNormalization folded, written to a file and read again, so that nothing else is remembered."""
    folded = model.clone()
    FoldBatchnorm().rewrite(folded, Context())
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "folded.onnx"
        graphopt.save(folded, path)
        return graphopt.load(path)


def exact_passes(model: ir.Model, context: Context) -> None:
    """The recipe `exact` without the guard, whose timing would make the graph depend on how busy the machine is."""
    for single in preset("exact").passes:
        if single.name != "merge-initializers":
            single.rewrite(model, context)


def sizes(model: ir.Model) -> Row:
    """Parameters, and multiply-accumulates of one input."""
    counted = cost(model, dict.fromkeys(symbolic_dimensions(model), 1))
    return {"parameters": counted.parameters, "macs": counted.macs}
