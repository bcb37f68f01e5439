"""Inputs made up for a model that came without data: as close to what it expects as its graph tells.

What an input is (image, sound, token ids, mask ...) is read off its type, its shape, the embedding table that
it indexes, and, last, its name. Whatever is guessed can be stated: see `InputSpec`.
"""

from __future__ import annotations

import ast
import itertools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.spectra import natural_images, pink_images, pink_noise
from graphopt.ir.dimensions import dimension_name
from graphopt.ir.session import open_session

KINDS = ("image", "audio", "gaussian", "tokens", "mask", "integer")
"""What an input may be said to hold."""

TEXTURES = ("leaves", "pink")
"""What images may show: shapes that hide each other (`graphopt.inputs.spectra.natural_images`), or 1/f noise alone."""

_COLOURS = (1, 3, 4)
_DARKEST, _BRIGHTEST = -2.2, 2.7
"""Standardised images end about here: 0 and 255 lie 2.1 below and 2.6 standard deviations above ImageNet's mean."""
_INTEGER_HIGH = 8
"""One above the largest integer given to an input of which nothing is known."""
_AUDIO_WORDS = ("audio", "wav", "waveform", "speech", "signal")
_IMAGE_WORDS = ("pixel", "image", "img", "picture")
"""Names of images, some of which hold a word of caches too: `pixel_values`."""
_CACHE_WORDS = ("past", "key", "value", "cache", "state", "hidden")
_KEEPS_INDICES = {
    "Cast",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Identity",
    "Transpose",
    "Flatten",
    "Slice",
    "Expand",
}


@dataclass(frozen=True)
class InputSpec:
    """What the user knows about one input. Everything left out is read off the graph.

    Each number is one for the whole input; channels cannot have their own.

    Attributes:
        kind: one of `KINDS`: "image", "audio", "gaussian" for floats, "tokens", "integer" for integers, "mask" for any.
        mean: mean of the values, floats only.
        std: standard deviation of the values, floats only.
        low: smallest value (inclusive).
        high: largest value (inclusive).

    Raises:
        DataError: the kind is unknown, a statement is no finite number, or the range is empty.

    Example:
        >>> InputSpec(kind="image", low=0, high=255, mean=120, std=60).kind
        'image'
    """

    kind: str | None = None
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise DataError(f"unknown kind of input {self.kind!r}", help=f"kinds are {', '.join(KINDS)}")
        for name in ("mean", "std", "low", "high"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, numbers.Real)):
                raise DataError(
                    f"`{name}` of an input is {number!r}, but must be one number",
                    help="state one number for the whole input, for instance the mean over its channels",
                )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise DataError(f"the range of an input is empty: low {self.low} > high {self.high}")
        if not np.isfinite([n for n in (self.mean, self.std, self.low, self.high) if n is not None]).all():
            raise DataError(f"what is stated of an input is not finite: {self}", help="leave out what is not known")
        if self.std is not None and self.std < 0:
            raise DataError(f"the standard deviation of an input is {self.std}, but must be at least 0")


def probe_feeds(
    model: ir.Model,
    *,
    sizes: Mapping[str, int] | None = None,
    count: int = 1,
    seed: int = 0,
    specs: Mapping[str, InputSpec] | None = None,
    texture: str = "leaves",
) -> list[dict[str, np.ndarray]]:
    """Make up inputs for a model.

    Args:
        model: the model; only its interface and embedding tables are read.
        sizes: number of elements of symbolic dimensions by name; what is missing comes from `symbolic_sizes`.
        count: how many sets of inputs.
        seed: the same seed gives the same inputs.
        specs: what is known of an input, by its name.
        texture: what images show, one of `TEXTURES`.

    Returns:
        One dict a set: each input's name to an array of its dtype and shape. Images are standardised over the images
        of their set, before mean, deviation and range that are stated count.

    Raises:
        DataError: `specs` names an input that the model does not have, an input is no dense tensor, or the texture is
            unknown.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[batch, 3, 32, 32] x) => (float[batch, 3, 32, 32] y) { y = Relu(x) }')
        >>> probe_feeds(model, sizes={"batch": 2})[0]["x"].shape
        (2, 3, 32, 32)
    """
    draws = probers(model, symbolic_sizes(model) | dict(sizes or {}), specs, texture)
    generators = np.random.default_rng(seed).spawn(count)
    return [{name: draw(generator) for name, draw in draws.items()} for generator in generators]


def model_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller must feed: graph inputs that are not initializers too."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def symbolic_sizes(model: ir.Model) -> dict[str, int]:
    """A size for every named symbolic dimension of the inputs, by name and position.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[n, 3, h, w] x) => (float[n, 3, h, w] y) { y = Relu(x) }')
        >>> symbolic_sizes(model)
        {'n': 1, 'h': 224, 'w': 224}
    """
    return next(candidate_sizes(model))


def candidate_sizes(model: ir.Model) -> Iterator[dict[str, int]]:
    """Sizes of the symbolic dimensions worth trying in turn, for models that refuse the usual ones."""
    roles: dict[str, str] = {}
    for value in model_inputs(model):
        for axis in range(len(value.shape or ())):
            name = dimension_name(value, axis)
            if name and not is_expression(name):
                roles.setdefault(name, dimension_role(value, axis, name))
    expressions = [
        dimension.value
        for value in model_inputs(model)
        for dimension in value.shape or ()
        if not isinstance(dimension, int) and dimension.value and is_expression(dimension.value)
    ]
    for batch, side, length, samples in (
        (1, 224, 16, 16000),
        (2, 224, 16, 16000),
        (1, 256, 32, 32000),
        (1, 64, 8, 4096),
        (1, 32, 128, 1024),
        (1, 640, 1, 512),
        (1, 299, 64, 80000),
    ):
        table = {"batch": batch, "side": side, "length": length, "samples": samples, "channel": 3}
        sizes = {name: table[role] for name, role in roles.items()}
        for expression in expressions:
            sizes[expression] = evaluate_expression(expression, sizes)
        yield sizes


def runnable_sizes(model: ir.Model, specs: Mapping[str, InputSpec] | None = None) -> dict[str, int]:
    """The first of `candidate_sizes` with which onnxruntime runs the model on probes (made as `specs` say).

    Raises:
        DataError: none of them works; the message carries onnxruntime's reason for the first.
    """
    session = open_session(model, optimized=False)
    first: GraphoptError | None = None
    for sizes in candidate_sizes(model):
        try:
            session.run_feeds(probe_feeds(model, sizes=sizes, specs=specs)[0])
        except DataError as error:
            first = first or error
        else:
            return sizes
    raise DataError(
        f"no usual size of the dynamic dimensions runs: {first.what if first else '?'}",
        where=", ".join(f"{name}={size}" for name, size in symbolic_sizes(model).items()),
        help="pass example inputs (`args`, or calibration data)",
    )


def dimension_role(value: ir.Value, axis: int, name: str) -> str:
    """What a symbolic dimension counts: batch, channel, side, length or samples."""
    lowered, shape = name.lower(), value.shape or ()
    if any(word in lowered for word in ("seq", "len", "token", "time", "past", "frame")):
        return "length"
    if axis == 0 or "batch" in lowered:
        return "batch"
    if "height" in lowered or "width" in lowered:
        return "side"
    if not _is_float(value):
        return "length"
    if any(word in (value.name or "").lower() for word in _AUDIO_WORDS):
        return "samples"
    if len(shape) >= 4:
        last_is_colour = shape[len(shape) - 1] in _COLOURS
        is_channel = axis == (len(shape) - 1 if last_is_colour else 1)
        return "channel" if is_channel else "side"
    return "length"


def is_expression(name: str) -> bool:
    """Whether a symbolic dimension is computed from others, as the exporter writes it (`2*batch`)."""
    return not name.replace(".", "_").replace(":", "_").isidentifier() and any(sign in name for sign in "+-*/ ")


def evaluate_expression(expression: str, sizes: Mapping[str, int]) -> int:
    """Value of a dimension that the exporter wrote as a sum or product of others; 16 for anything else."""
    operations: dict[type[ast.operator], Callable[[int, int], int]] = {
        ast.Add: lambda a, b: a + b,
        ast.Sub: lambda a, b: a - b,
        ast.Mult: lambda a, b: a * b,
        ast.FloorDiv: lambda a, b: a // b,
    }

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return operations[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.Constant):
            return int(node.value)  # type: ignore[arg-type]
        raise KeyError(expression)

    try:
        return max(1, value(ast.parse(expression, mode="eval").body))
    except (SyntaxError, KeyError, ZeroDivisionError, TypeError, ValueError):
        return 16


@dataclass(frozen=True)
class Prober:
    """How one input is made up: shape and type, and a function of the generator that gives the values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    values: Callable[[np.random.Generator], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return self.size * self.dtype.itemsize

    def __call__(self, generator: np.random.Generator) -> np.ndarray:
        """One array of the shape and type."""
        return np.asarray(self.values(generator)).astype(self.dtype)


def probers(
    model: ir.Model, sizes: Mapping[str, int], specs: Mapping[str, InputSpec] | None, texture: str = "leaves"
) -> dict[str, Prober]:
    """How each input is made up, by name; nothing is drawn yet, and the model is not read again.

    Raises:
        DataError: as `probe_feeds`.
    """
    stated = dict(specs or {})
    check_specs(model, stated)
    if texture not in TEXTURES:
        raise DataError(f"unknown texture of images {texture!r}", help=f"textures are {', '.join(TEXTURES)}")
    return {
        value.name or "": _prober(value, sizes, stated.get(value.name or "", InputSpec()), texture)
        for value in model_inputs(model)
    }


def check_specs(model: ir.Model, specs: Mapping[str, InputSpec]) -> None:
    """Raise `DataError` where what is stated is no `InputSpec`, of an input that the model does not have, or unfit."""
    values = {value.name or "?": value for value in model_inputs(model)}
    for name, spec in specs.items():
        if name not in values:
            raise DataError(f"the model has no input named {name!r}", help=f"its inputs are {', '.join(values)}")
        if not isinstance(spec, InputSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DataError(
                f"what is stated of input {name!r} is a {type(spec).__name__}", help="give a graphopt.InputSpec"
            )
        _check_kind(values[name], spec.kind)
        _check_range(values[name], spec)


def _check_kind(value: ir.Value, kind: str | None) -> None:
    """Raise `DataError` where an input of this type and shape cannot be of the kind."""
    if kind is None or value.dtype is None or value.shape is None:
        return
    fitting = ("image", "audio", "gaussian", "mask") if _is_float(value) else ("tokens", "integer", "mask")
    if value.dtype == ir.DataType.BOOL:
        fitting = ("mask",)
    # A symbolic dimension may be that of colours or that of a side: an image where any such reading is one.
    readings = itertools.product(*((size,) if isinstance(size, int) else (3, 224) for size in value.shape))
    if "image" in fitting and (len(value.shape) > 5 or not any(image_axes(reading) for reading in readings)):
        fitting = tuple(other for other in fitting if other != "image")
    if "audio" in fitting and not len(value.shape):
        fitting = tuple(other for other in fitting if other != "audio")
    if kind not in fitting:
        raise DataError(
            f"input {value.name!r} is said to be of kind {kind!r}, but is {value.dtype.numpy()} of shape {value.shape}",
            where=f"input {value.name!r}",
            help=f"kinds for it are {', '.join(fitting)}; or leave the kind out",
        )


def _check_range(value: ir.Value, spec: InputSpec) -> None:
    """Raise `DataError` where stated integers lie outside the table that the input indexes."""
    limit = None if _is_float(value) else _index_limit(value)
    if limit is None:
        return
    for name, number in (("low", spec.low), ("high", spec.high)):
        if number is not None and not -limit <= number < limit:
            raise DataError(
                f"`{name}` is {number}, but the table that the input indexes has {limit} rows",
                where=f"input {value.name!r}",
                help=f"state ids from 0 to {limit - 1}, or leave `{name}` out: the graph tells",
            )


def _prober(value: ir.Value, sizes: Mapping[str, int], spec: InputSpec, texture: str) -> Prober:
    is_tensor = value.type is None or isinstance(value.type, ir.TensorType)
    if value.dtype is None or value.shape is None or value.dtype == ir.DataType.STRING or not is_tensor:
        raise DataError(
            f"inputs cannot be made up for input {value.name!r}: {value.type}, {value.shape}",
            help="pass example inputs",
        )
    shape = _concrete(value, sizes)
    kind = spec.kind or input_kind(value, shape)
    dtype = value.dtype.numpy()
    if _is_float(value):
        return Prober(shape, dtype, partial(_float_probe, kind, shape, spec, texture))
    if dtype == np.bool_ or kind == "mask":
        return Prober(shape, dtype, lambda _: np.ones(shape))
    low, high = _integer_bounds(value, shape, kind)
    low = low if spec.low is None else int(spec.low)
    high = high if spec.high is None else int(spec.high) + 1
    return Prober(shape, dtype, partial(_integers, low, max(high, low + 1), shape))


def _integers(low: int, high: int, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    return np.asarray(generator.integers(low, high, shape, dtype=np.int64))


def _concrete(value: ir.Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape: list[int] = []
    for axis, dimension in enumerate(value.shape or ()):
        name = dimension_name(value, axis)
        if isinstance(dimension, int):
            shape.append(dimension)
        elif name is not None and name in sizes:
            shape.append(sizes[name])
        else:
            role = dimension_role(value, axis, dimension.value or "")
            shape.append({"batch": 1, "side": 224, "length": 16, "samples": 16000, "channel": 3}[role])
    return tuple(shape)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def input_kind(value: ir.Value, shape: tuple[int, ...]) -> str:
    """What an input holds, one of `KINDS`, by its type, its shape, the table that it indexes, and its name."""
    name = (value.name or "").lower()
    if "mask" in name:
        return "mask"
    if not _is_float(value):
        return "tokens" if _index_limit(value) is not None else "integer"
    if any(word in name for word in _AUDIO_WORDS) or (len(shape) == 3 and shape[1] <= 2 and shape[2] >= 256):
        return "audio"
    if any(word in name for word in _CACHE_WORDS) and not any(word in name for word in _IMAGE_WORDS):
        return "gaussian"
    first = dimension_name(value, 0) if value.shape else None
    if len(shape) == 3 and first is not None and dimension_role(value, 0, first) == "batch":
        return "gaussian"  # many points or steps of three numbers are no image
    return "image" if image_axes(shape) is not None else "gaussian"


def image_axes(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | None:
    """Channel axis and spatial axes where the shape is that of images, video or feature maps, else None."""
    rank = len(shape)
    if rank not in (3, 4, 5):
        return None
    first = rank - 3 if rank < 5 else 1
    if min(shape[-2:]) >= 4 and (rank > 3 or shape[0] in _COLOURS):
        return first, tuple(range(first + 1, rank))
    if shape[-1] in _COLOURS and min(shape[-3:-1]) >= 4:
        return rank - 1, tuple(range(first, rank - 1))
    return None


def _float_probe(
    kind: str, shape: tuple[int, ...], spec: InputSpec, texture: str, generator: np.random.Generator
) -> np.ndarray:
    if kind == "mask":
        return np.ones(shape)
    axes = image_axes(shape)
    if kind == "image" and axes is not None:
        images = natural_images if texture == "leaves" else pink_images
        unit = np.clip(images(generator, shape, *axes), _DARKEST, _BRIGHTEST)
    elif kind in ("image", "audio") and shape:
        unit = pink_noise(generator, shape, (len(shape) - 1,), exponent=0.5)
        unit = np.clip(unit, -4, 4)
    else:
        unit = generator.standard_normal(shape)
    mean, std = _moments(spec)
    low = -np.inf if spec.low is None else spec.low
    high = np.inf if spec.high is None else spec.high
    return np.clip(unit * std + mean, low, high)


def _moments(spec: InputSpec) -> tuple[float, float]:
    """Mean and standard deviation, from the stated range where only that is known: its middle and a quarter."""
    if spec.low is not None and spec.high is not None:
        mean, std = (spec.low + spec.high) / 2, (spec.high - spec.low) / 4
    else:
        mean, std = 0.0, 1.0
    return (mean if spec.mean is None else spec.mean), (std if spec.std is None else spec.std)


def _integer_bounds(value: ir.Value, shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """Smallest value and one above the largest for an integer input."""
    limit = _index_limit(value)
    if limit is not None:
        return 0, limit
    if value.dtype == ir.DataType.UINT8 and len(shape) >= 3:
        return 0, 256
    if int(np.prod(shape)) == 1 and kind != "tokens":
        return 1, 2
    return 0, _INTEGER_HIGH


def _index_limit(value: ir.Value) -> int | None:
    """Rows of the smallest constant table that the value indexes, directly or through casts and reshapes."""
    limits: list[int] = []
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        for use in current.uses():
            node, index = use.node, use.idx
            if node.op_type in ("Gather", "GatherElements") and index == 1:
                table = node.inputs[0]
                axis_attribute = node.attributes.get("axis")
                axis = 0 if axis_attribute is None else axis_attribute.as_int()
                size = None if table is None or table.shape is None else table.shape[axis]
                if isinstance(size, int):
                    limits.append(size)
            elif node.op_type in _KEEPS_INDICES and index == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])
    return min(limits, default=None)
