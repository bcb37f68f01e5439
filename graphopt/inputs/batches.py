"""Made-up inputs in batches: how large they are, how many samples they hold, and the same ones at every iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, InvalidGraphError
from graphopt.inputs.probes import (
    InputSpec,
    dimension_role,
    evaluate_expression,
    image_axes,
    is_expression,
    model_inputs,
    probe_feeds,
    probers,
    runnable_sizes,
    symbolic_sizes,
)
from graphopt.ir.dimensions import dimension_name
from graphopt.ir.session import open_session

_BATCH_ELEMENTS = 32 * 3 * 64 * 64
"""Input elements in one batch of probes, within `_SMALLEST_BATCH` and `_LARGEST_BATCH`: 64 images of 3 x 32 x 32, 8 of
3 x 224 x 224."""
_SMALL_ELEMENTS = 3 * 64 * 64
"""Elements in one small sample, see `usual_samples`."""
_SMALLEST_BATCH = 8
_LARGEST_BATCH = 64
_KEPT_BYTES = 256 * 1024 * 1024
"""Probes of up to this size are kept in memory when they are iterated; larger ones are made again each time."""


class ProbeBatches:
    """Batches of made-up inputs, the same at every iteration; kept in memory up to 256 MiB, else made again.

    A batch is as large as its elements allow where the size of the batch is free (64 small images, 8 of 224 x 224),
    else what the model takes. What the batches hold is decided when this is made: the model may change afterwards.

    Attributes:
        samples: number of samples in all batches.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[batch, 3, 32, 32] x) => (float[batch, 3, 32, 32] y) { y = Relu(x) }')
        >>> [feeds["x"].shape[0] for feeds in ProbeBatches(model, symbolic_sizes(model), 100)]
        [64, 36]
    """

    def __init__(
        self,
        model: ir.Model,
        sizes: Mapping[str, int],
        samples: int,
        *,
        seed: int = 0,
        specs: Mapping[str, InputSpec] | None = None,
        batch: int | None = None,
        free: bool = True,
        texture: str = "leaves",
    ) -> None:
        """Decide what the batches hold.

        Args:
            model: the model; only its interface and embedding tables are read, and only now.
            sizes: number of elements of every symbolic dimension, see `symbolic_sizes`.
            samples: how many samples, at least 1; models of fixed batch get the next multiple of it.
            seed: the same seed gives the same inputs.
            specs: what is known of an input, by its name.
            batch: largest number of samples in a batch, where it is free.
            free: whether the model runs with any number of samples where the dimension is symbolic.
            texture: what images show, one of `graphopt.inputs.probes.TEXTURES`.

        Raises:
            DataError: as `probe_feeds`.
        """
        single = probers(model, resized(model, sizes, 1), specs, texture)
        if free and batch_dimensions(model):
            elements = max(sum(draw.size for draw in single.values()), 1)
            size = int(np.clip(_BATCH_ELEMENTS // elements, _SMALLEST_BATCH, _LARGEST_BATCH))
            size = max(1, min(size, samples, size if batch is None else batch))
            counts = [size] * (samples // size) + [samples % size] * (samples % size > 0)
            kinds = {count: probers(model, resized(model, sizes, count), specs, texture) for count in set(counts)}
            self._probers = [kinds[count] for count in counts]
            self.samples = samples
        else:
            fixed = probers(model, sizes, specs, texture)
            rows = SampleCounter(model)({name: draw.shape for name, draw in fixed.items()})
            self._probers = [fixed] * -(-samples // rows)
            self.samples = rows * len(self._probers)
        self._seed = seed
        self._keeps = sum(draw.nbytes for each in self._probers for draw in each.values()) <= _KEPT_BYTES
        self._kept: list[dict[str, np.ndarray]] = []
        self._further = self._draws()

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._probers)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches, from the first one; none is drawn before it is asked for, and small ones only once."""
        return self._remembered() if self._keeps else self._draws()

    def _remembered(self) -> Iterator[dict[str, np.ndarray]]:
        for number in range(len(self._probers)):
            if number == len(self._kept):
                self._kept.append(next(self._further))
            yield self._kept[number]

    def _draws(self) -> Iterator[dict[str, np.ndarray]]:
        generators = np.random.default_rng(self._seed).spawn(len(self._probers))
        for generator, draws in zip(generators, self._probers, strict=True):
            yield {name: draw(generator) for name, draw in draws.items()}


def batch_dimensions(model: ir.Model) -> frozenset[str]:
    """Names of the symbolic dimensions of the inputs that count samples.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[time, batch, 8] x) => (float[time, batch, 8] y) { y = Relu(x) }')
        >>> sorted(batch_dimensions(model))
        ['batch']
    """
    names = {
        name: dimension_role(value, axis, name)
        for value in model_inputs(model)
        for axis in range(len(value.shape or ()))
        if (name := dimension_name(value, axis)) and not is_expression(name)
    }
    return frozenset(name for name, role in names.items() if role == "batch")


def resized(model: ir.Model, sizes: Mapping[str, int], batch: int) -> dict[str, int]:
    """Sizes of the symbolic dimensions with another number of samples, dimensions computed from it included."""
    changed = {**sizes, **dict.fromkeys(batch_dimensions(model), batch)}
    for value in model_inputs(model):
        for axis in range(len(value.shape or ())):
            name = dimension_name(value, axis)
            if name and is_expression(name):
                changed[name] = evaluate_expression(name, changed)
    return changed


def usual_samples(
    model: ir.Model,
    sizes: Mapping[str, int] | None = None,
    specs: Mapping[str, InputSpec] | None = None,
    *,
    most: int = 512,
    least: int = 256,
) -> int:
    """How many samples are enough and not too many: `most` where they are small, in proportion fewer, down to `least`.

    Samples are small where all inputs of one hold up to 12,288 numbers (an image of 3 x 64 x 64) together.

    Raises:
        DataError: as `probe_feeds`.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[n, 3, side, side] x) => (float[n, 3, side, side] y) { y = Relu(x) }')
        >>> [usual_samples(model, {"n": 1, "side": side}) for side in (32, 80, 224)]
        [512, 327, 256]
    """
    draws = probers(model, resized(model, symbolic_sizes(model) | dict(sizes or {}), 1), specs)
    samples = SampleCounter(model)({name: draw.shape for name, draw in draws.items()})
    elements = max(sum(draw.size for draw in draws.values()) / samples, 1.0)
    return int(np.clip(most * _SMALL_ELEMENTS / elements, least, most))


class SampleCounter:
    """Counts the samples in sets of inputs of one model; the model is read once.

    The count is the size of the symbolic batch dimension where there is one, else that of axis 0 of the first input
    that has one and is not a single image.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[time, batch, 8] x) => (float[time, batch, 8] y) { y = Relu(x) }')
        >>> SampleCounter(model)({"x": (16, 5, 8)})
        5
    """

    def __init__(self, model: ir.Model) -> None:
        names, inputs = batch_dimensions(model), model_inputs(model)
        self._inputs = [value.name or "" for value in inputs]
        self._axes = [
            (value.name or "", axis)
            for value in inputs
            for axis in range(len(value.shape or ()))
            if dimension_name(value, axis) in names
        ]

    def __call__(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Number of samples in inputs of these shapes, at least 1."""
        for name, axis in self._axes:
            return max(1, shapes[name][axis])
        for name in self._inputs:
            axes = image_axes(shapes[name])
            if shapes[name] and (axes is None or 0 not in (axes[0], *axes[1])):
                return max(1, shapes[name][0])
        return 1


def free_batch(
    model: ir.Model,
    sizes: Mapping[str, int] | None = None,
    specs: Mapping[str, InputSpec] | None = None,
    threads: int = 1,
) -> tuple[dict[str, int], bool]:
    """Sizes with which onnxruntime runs the model, and whether the number of samples is free.

    Args:
        model: the model; it is not changed.
        sizes: number of elements of symbolic dimensions, where known; usual sizes else.
        specs: what is known of an input, by its name.
        threads: intra-op threads, 0 for onnxruntime's default.

    Returns:
        A size for every symbolic dimension, and True where a batch of another size runs too.

    Raises:
        DataError: inputs cannot be made up, or no usual size runs.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[batch, 6] x) => (float[1, 6] y) <int64[2] s = {1, 6}> { y = Reshape(x, s) }')
        >>> free_batch(model)
        ({'batch': 1}, False)
    """
    known = symbolic_sizes(model) | dict(sizes or {})
    if not known:
        return known, False
    try:
        session = open_session(model, optimized=False, threads=threads)
    except InvalidGraphError:  # nothing can be tried; what cannot run here may still be lifted
        return known, bool(batch_dimensions(model))

    def runs(tried: Mapping[str, int]) -> bool:
        feeds = probe_feeds(model, sizes=tried, specs=specs)[0]
        try:
            session.run_feeds(feeds)
        except DataError:
            return False
        return True

    if batch_dimensions(model) and runs(resized(model, known, 2)) and runs(resized(model, known, 3)):
        return known, True
    if runs(known):
        return known, False
    return runnable_sizes(model, specs), False
