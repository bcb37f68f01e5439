"""Synthetic inputs: made-up ones, moved by gradient until the network takes them for its training data.

What they are moved towards is what the network itself knows of its data: the statistics in its BatchNormalizations
(Yin et al., "Dreaming to distill", CVPR 2020; Cai et al., "ZeroQ", CVPR 2020) or, where those were folded away or
never were, confident answers of all classes. This module decides what there is to move and towards what, without
torch; the descent is in `graphopt.inputs.synthesis`, imported when it is needed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.batches import ProbeBatches, SampleCounter, free_batch, usual_samples
from graphopt.inputs.probes import InputSpec, image_axes, input_kind, model_inputs
from graphopt.ir.cost import cost
from graphopt.ir.propagate import propagate
from graphopt.ir.rewrite import constant_float64, is_op, rank
from graphopt.ir.statistics import BATCHNORM_STATISTICS

Report = Callable[[int, int, str], None]
"""`progress(done, total, text)`: what is shown while something takes long."""

_SMALLEST_DEVIATION = 0.05
"""Least deviation by which the statistics of a channel are judged, in parts of the layer's: dead channels have none."""


class UnavailableError(GraphoptError):
    """A source that has no inputs for this model; `what` is the reason."""


@dataclass(frozen=True)
class Synthesis:
    """How inputs are moved: Adam on the inputs in units of the start's standard deviation.

    The defaults are those that served reconstruction best with BatchNormalization statistics (ResNet-20 and 56 on
    CIFAR-10, half of the channels cut): more total variation, jitter, logarithms of the statistics, confidence beside
    them and larger batches gained nothing.

    The loss is the sum of the terms below, each times its weight; weights of 0 leave a term out.

    Attributes:
        steps: updates.
        least_steps: updates below which `work` takes samples instead; at most `steps`, more are no fault.
        learning_rate: of Adam (beta 0.9 and 0.999), per update in standard deviations of the start.
        final_rate: part of the learning rate that is left after the last step; it falls along half a cosine.
        statistic_weight: BatchNormalization: over all samples moved together, squared difference of the mean of each
            channel from the recorded one, and of the standard deviation, both in parts of the recorded standard
            deviation; mean over channels, then over layers.
        confidence_weight: cross entropy of the class logits with a class that is drawn for each sample, evenly over
            all classes; models without class logits have no such term.
        temperature: by which logits are divided before the cross entropy, > 0.
        diversity_weight: for models without class logits, mean squared correlation between the outputs of two samples.
        variation_weight: total variation: mean absolute difference of neighbours in space or time.
        mean_weight: mean squared change of the mean of each channel of each sample.
        conventions: mean and standard deviation of images as pipelines feed them, tried where none is stated and
            BatchNormalization statistics can judge: images of [0, 1], of [-1, 1] and of [0, 255]. Another start than
            the standardised one is taken where its statistic term is less than half as large.
        batch: how many samples are moved together at most, and share the statistics; at least one batch.
        memory: bytes of activations that may be held at once; fewer samples are moved together where it is less.
        work: multiply-accumulates of forward and backward runs in all; where it is less, fewer steps are made, then
            fewer samples.

    Example:
        >>> Synthesis(steps=100).learning_rate
        0.05
    """

    steps: int = 150
    least_steps: int = 45
    learning_rate: float = 0.05
    final_rate: float = 0.0
    statistic_weight: float = 10.0
    confidence_weight: float = 0.0
    temperature: float = 1.0
    diversity_weight: float = 0.0
    variation_weight: float = 0.05
    mean_weight: float = 0.0
    conventions: tuple[tuple[float, float], ...] = ((0.45, 0.25), (0.0, 0.5), (115.0, 60.0))
    batch: int = 256
    memory: int = 2 * 1024**3
    work: float = 1.8e13

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "conventions" and not (value >= 0 and (math.isfinite(value) or name == "work")):
                raise DataError(f"`{name}` of a synthesis is {value}, but must be at least 0", where=name)
        for name in ("learning_rate", "temperature", "batch", "memory", "work"):
            if not getattr(self, name) > 0:
                raise DataError(f"`{name}` of a synthesis is {getattr(self, name)}, but must be above 0", where=name)
        if not all(math.isfinite(mean) and math.isfinite(std) and std > 0 for mean, std in self.conventions):
            raise DataError("`conventions` of a synthesis holds no mean and deviation above 0", where="conventions")

    def within(self, work: float, samples: int) -> tuple[Synthesis, int]:
        """The settings and the number of samples that `self.work` allows, where a step of a sample costs `work`.

        Example:
            >>> settings, samples = Synthesis(work=6000.0).within(1.0, 50)
            >>> settings.steps, samples
            (120, 50)
            >>> settings, samples = Synthesis(work=600.0).within(1.0, 50)
            >>> settings.steps, samples
            (45, 13)
        """
        affordable = self.work / max(work, 1e-9)
        least = min(self.least_steps, self.steps)
        steps = int(min(max(affordable / samples, least), self.steps))
        return replace(self, steps=steps), max(1, int(min(samples, affordable / max(steps, 1))))


@dataclass(frozen=True)
class Statistic:
    """What one layer saw in training.

    Attributes:
        value: name of the value, in the main graph.
        mean: float64 [channels], channels on axis 1.
        std: float64 [channels], > 0: dead channels get a small part of the layer's deviation.
    """

    value: str
    mean: np.ndarray = field(repr=False)
    std: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Movable:
    """An input that the gradient moves.

    Attributes:
        name: of the input.
        channel_axis: axis of channels, None where there is none.
        axes: axes of space or time.
        low: smallest value, -inf where none was stated.
        high: largest value, inf where none was stated.
        rangeless: whether it is an image of which neither range nor moments were stated.
    """

    name: str
    channel_axis: int | None
    axes: tuple[int, ...]
    low: float
    high: float
    rangeless: bool = False


@dataclass(frozen=True)
class Aim:
    """What the inputs of one model are moved towards.

    Attributes:
        statistics: of the layers, empty where none are known.
        logits: name of the value [batch, classes] that holds class logits, None where there is none.
        classes: number of classes, 0 without logits.
    """

    statistics: tuple[Statistic, ...]
    logits: str | None
    classes: int


@dataclass(frozen=True)
class Synthetic:
    """Inputs made by gradient through the lift; an `InputSource`.

    Attributes:
        matched: how, where BatchNormalization statistics are known.
        confident: how, where none are.
        texture: what images show before they move, one of `graphopt.inputs.probes.TEXTURES`.
        device: torch's device; the CPU is used where it is not there. It is no part of what is compared.

    Confident inputs move little on purpose: between 20 and 100 steps reconstruction is as good, longer runs harm it.

    Example:
        >>> Synthetic().matched.steps, Synthetic().confident.steps
        (150, 40)
    """

    name: ClassVar[str] = "synthetic"
    stored: ClassVar[bool] = True

    matched: Synthesis = Synthesis()
    confident: Synthesis = Synthesis(
        steps=40,
        least_steps=20,
        learning_rate=0.02,
        final_rate=1.0,
        statistic_weight=0.0,
        confidence_weight=1.0,
        diversity_weight=1.0,
        variation_weight=2.0,
        mean_weight=0.1,
    )
    texture: str = "leaves"
    device: str = field(default="cpu", compare=False, repr=False)

    def settings(self, aim: Aim) -> Synthesis:
        """The settings for what is aimed at."""
        return self.matched if aim.statistics else self.confident

    def describe(self, model: ir.Model) -> str:
        """One clause: what the inputs were moved towards."""
        aim = find_aim(model)
        if aim.statistics:
            return f"moved towards the statistics of {len(aim.statistics)} BatchNormalization layers"
        if aim.logits is not None:
            return (
                f"no BatchNormalization statistics are known: moved towards confident answers of {aim.classes} classes"
            )
        return "neither BatchNormalization statistics nor class logits are known: moved towards unlike outputs"

    def feeds(
        self,
        model: ir.Model,
        *,
        specs: Mapping[str, InputSpec] | None = None,
        sizes: Mapping[str, int] | None = None,
        samples: int | None = None,
        threads: int = 1,
        seed: int = 0,
        progress: Report | None = None,
    ) -> list[dict[str, np.ndarray]]:
        """Make inputs.

        Args:
            model: canonical; it is not changed.
            specs: what is known of an input, by its name; a stated range is kept.
            sizes: number of elements of symbolic dimensions, as in the example inputs.
            samples: how many samples, `usual_samples` (512 small ones, 256 large ones) where None; fewer where
                `Synthesis.work` would be exceeded with the least steps.
            threads: of torch, 0 for its own default.
            seed: the same seed gives the same inputs on the same machine.
            progress: called after each step.

        Returns:
            Batches by input name, as `ProbeBatches` sizes them. Inputs that are no floats, and masks, stay probes.

        Raises:
            UnavailableError: torch is not installed, the model cannot be lifted, has no float input, or its loss has
                no gradient with respect to it.
            DataError: `specs` do not fit, no usual size of the dynamic dimensions runs, or the texture is unknown.
        """
        descent = _descent()
        movables = find_movables(model, dict(specs or {}))
        if not movables:
            raise UnavailableError("the model has no float input that a gradient could move")
        aim = find_aim(model)
        settings = self.settings(aim)
        bound, free = free_batch(model, sizes, specs, threads)
        macs, activations = _cost_of_a_sample(model, bound)
        wanted = usual_samples(model, bound, specs) if samples is None else samples
        settings, affordable = settings.within(3.0 * max(macs, 1.0), wanted)  # a run forward, and two backward
        together = int(max(1, min(settings.batch, settings.memory // max(activations, 1.0))))
        start = ProbeBatches(
            model, bound, affordable, seed=seed, specs=specs, batch=together, free=free, texture=self.texture
        )
        return descent.synthesize(
            model, start, movables, aim, settings, together=together, threads=threads, seed=seed, device=self.device,
            progress=progress,
        )  # fmt: skip


def _descent() -> ModuleType:
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise UnavailableError("torch is not installed", help="pip install 'graphopt[torch]'") from error
    return importlib.import_module("graphopt.inputs.synthesis")


def find_movables(model: ir.Model, specs: Mapping[str, InputSpec] | None = None) -> tuple[Movable, ...]:
    """The inputs that a gradient can move: floats that are no masks and hold more than one number.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[n, 3, 8, 8] x, int64[n] t) => (float[n, 3, 8, 8] y) { y = Relu(x) }')
        >>> find_movables(model)
        (Movable(name='x', channel_axis=1, axes=(2, 3), low=-inf, high=inf, rangeless=True),)
    """
    movables: list[Movable] = []
    for value in model_inputs(model):
        spec = (specs or {}).get(value.name or "", InputSpec())
        if value.dtype is None or value.shape is None or not value.dtype.is_floating_point():
            continue
        # Symbolic dimensions count as large: only small static ones tell channels from space.
        shape = tuple(size if isinstance(size, int) else 64 for size in value.shape)
        kind = spec.kind or input_kind(value, shape)
        if kind == "mask" or not shape or math.prod(shape) <= 1:
            continue
        axes = image_axes(shape) if kind == "image" else None
        channel, along = axes if axes is not None else (None, (len(shape) - 1,) if kind in ("audio", "image") else ())
        low = -math.inf if spec.low is None else spec.low
        high = math.inf if spec.high is None else spec.high
        rangeless = axes is not None and (spec.mean, spec.std, spec.low, spec.high) == (None,) * 4
        movables.append(Movable(value.name or "", channel, along, low, high, rangeless))
    return tuple(movables)


def find_aim(model: ir.Model) -> Aim:
    """What the graph tells of its training data. Only the main graph is looked at."""
    found: dict[str, Statistic] = {}
    for node in model.graph:
        if is_op(node, "BatchNormalization"):
            training = node.attributes.get("training_mode")
            data, mean, variance = node.inputs[0], constant_float64(node.inputs[3]), constant_float64(node.inputs[4])
            if data is None or mean is None or variance is None or (training is not None and training.as_int()):
                continue
            _add(found, data, mean, np.sqrt(np.maximum(variance, 0.0)))
        for value in node.outputs:
            statistics = value.meta.get(BATCHNORM_STATISTICS)
            if statistics is not None and not is_op(node, "BatchNormalization"):
                _add(found, value, *statistics)
    logits, classes = _class_logits(model)
    return Aim(tuple(found.values()), logits, classes)


def _add(found: dict[str, Statistic], value: ir.Value, mean: np.ndarray, std: np.ndarray) -> None:
    of_rank = rank(value)
    scale = float(np.sqrt(np.mean(np.square(std)))) if std.size else 0.0
    usable = std.size > 0 and mean.shape == std.shape and np.isfinite(mean).all() and np.isfinite(std).all()
    if value.name and usable and scale > 0 and (of_rank is None or of_rank >= 2):
        found[value.name] = Statistic(value.name, mean, np.maximum(std, _SMALLEST_DEVIATION * scale))


def _class_logits(model: ir.Model) -> tuple[str | None, int]:
    """The first output that is a float [batch, classes], preferably behind a Softmax, and what goes into that."""
    plain: tuple[str | None, int] = (None, 0)
    for output in model.graph.outputs:
        shape = output.shape
        if output.dtype is None or not output.dtype.is_floating_point() or shape is None or len(shape) != 2:
            continue
        classes = shape[1]
        if not isinstance(classes, int) or classes < 2 or not output.name:
            continue
        value, behind = output, False
        node = value.producer()
        while node is not None and is_op(node, "Softmax", "LogSoftmax", "Identity", "Cast"):
            if is_op(node, "Softmax", "LogSoftmax"):
                axis = node.attributes.get("axis")
                if axis is not None and axis.as_int() not in (1, -1):
                    break
                behind = True
            data = node.inputs[0]
            if data is None or data.dtype is None or not data.dtype.is_floating_point() or not data.name:
                break
            value, node = data, data.producer()
        if behind:
            return value.name, classes
        if plain[0] is None:
            plain = (value.name, classes)
    return plain


def _cost_of_a_sample(model: ir.Model, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Multiply-accumulates of one sample, and bytes that a run forward and backward holds of it."""
    facts = propagate(model, sizes)
    shapes = {value.name or "": facts.shapes.get(value, ()) for value in model_inputs(model)}
    count = SampleCounter(model)(shapes)
    held = sum(math.prod(facts.shapes.get(value, ())) for node in model.graph for value in node.outputs)
    return cost(model, facts=facts).macs / count, 2 * 4 * held / count
