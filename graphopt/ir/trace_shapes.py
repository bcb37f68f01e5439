"""Dynamic axes of a traced module: what was asked for, what they are called, and inputs of other sizes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.errors import DataError

if TYPE_CHECKING:
    import torch

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_LARGEST = 2**31
"""Bounds above this are no bounds: torch writes "unbounded" as a very large integer."""


@dataclass(frozen=True)
class DynamicAxis:
    """One axis whose size is to stay open.

    Attributes:
        name: symbol in the ONNX interface, or None where the user named none.
        spec: what `torch.export` takes for this axis: a `Dim` or a hint.
        low: smallest size allowed.
        high: largest size allowed, None for unbounded.
        required: False for `Dim.AUTO`, which lets torch decide that the axis is static after all.
    """

    name: str | None
    spec: Any
    low: int
    high: int | None
    required: bool

    @property
    def derived(self) -> bool:
        """Whether the size is an expression of another one (`2 * Dim("n")`)."""
        return self.name is not None and not _IDENTIFIER.fullmatch(self.name)


def dynamic_axes(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    paths: Sequence[tuple[object, ...]],
    tensors: Sequence[torch.Tensor],
) -> list[dict[int, DynamicAxis]]:
    """The dynamic axes of each tensor input, from `dynamic_shapes` in any form that torch.export takes.

    Args:
        module: gives the order of the parameters where `dynamic_shapes` is a tuple.
        args: positional example inputs.
        kwargs: keyword example inputs.
        dynamic_shapes: dict by parameter name, tuple or list by position, `ShapesCollection`, or None.
        paths: where each tensor is: parameter name, then keys.
        tensors: the example inputs.

    Raises:
        DataError: `dynamic_shapes` does not have the structure of the arguments, or names an axis that is not
            there.
    """
    if hasattr(dynamic_shapes, "dynamic_shapes"):  # torch.export.ShapesCollection and AdditionalInputs
        dynamic_shapes = dynamic_shapes.dynamic_shapes(module, args, kwargs)
    if dynamic_shapes is None:
        return [{} for _ in tensors]
    arguments = list(_bound_arguments(module, args, kwargs, paths))
    if isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) != len(arguments):
            raise _misfit(f"it has {len(dynamic_shapes)} entries for {len(arguments)} arguments")
        dynamic_shapes = dict(zip(arguments, dynamic_shapes, strict=True))
    if not isinstance(dynamic_shapes, Mapping):
        raise _misfit(f"it is a {type(dynamic_shapes).__name__}")
    unknown = [str(name) for name in dynamic_shapes if name not in arguments]
    if unknown:
        raise _misfit(f"no argument is called {', '.join(unknown)}; arguments are {', '.join(arguments)}")
    return [
        _axes_of_tensor(_below(dynamic_shapes, path), path, tensor) for path, tensor in zip(paths, tensors, strict=True)
    ]


def name_symbols(
    model: ir.Model, axes: Sequence[Mapping[int, DynamicAxis]], tensors: Sequence[torch.Tensor]
) -> list[str]:
    """Give the open sizes of a model the user's names (`batch`, or `<input>_dim_<axis>`), in place.

    Returns:
        What became static against the user's wish, one sentence each; empty when all is well.
    """
    renamed: dict[str, str] = {}
    broken: list[str] = []
    for value, asked, tensor in zip(model.graph.inputs, axes, tensors, strict=True):
        for axis, wish in asked.items():
            symbol = _symbol(value, axis)
            if symbol is None:
                if wish.required:
                    broken.append(f"axis {axis} of input `{value.name}` came out as {tensor.shape[axis]}, not dynamic")
            elif _IDENTIFIER.fullmatch(symbol) and not wish.derived:
                default = f"{re.sub(r'[^0-9A-Za-z_]', '_', str(value.name))}_dim_{axis}"
                renamed.setdefault(symbol, wish.name or default)
    _rename(model, renamed)
    return broken


def open_sizes(model: ir.Model, tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    """Size of every named symbol of the interface in the example inputs."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(model.graph.inputs, tensors, strict=True):
        for axis, size in enumerate(tensor.shape):
            symbol = _symbol(value, axis)
            if symbol is not None and _IDENTIFIER.fullmatch(symbol):
                sizes.setdefault(symbol, int(size))
    return sizes


def other_sizes(
    model: ir.Model, axes: Sequence[Mapping[int, DynamicAxis]], sizes: Mapping[str, int]
) -> list[dict[str, int]]:
    """Sizes to try the model at besides those of the example: twice as large, else half as large, within
    bounds.

    Multiples are safe where a module asks for divisibility; other numbers are not.
    """
    low = dict.fromkeys(sizes, 1)
    high: dict[str, int | None] = dict.fromkeys(sizes)
    for value, asked in zip(model.graph.inputs, axes, strict=True):
        for axis, wish in asked.items():
            symbol = _symbol(value, axis)
            if symbol is not None and symbol in sizes and not wish.derived:
                low[symbol] = max(low[symbol], wish.low)
                known = high[symbol]
                high[symbol] = wish.high if known is None or (wish.high or known) < known else known

    def within(symbol: str, *choices: int) -> int:
        top = high[symbol]
        allowed = [size for size in choices if low[symbol] <= size and (top is None or size <= top)]
        return next((size for size in allowed if size != sizes[symbol]), sizes[symbol])

    doubled = {name: within(name, 2 * size, high[name] or 0, size // 2, low[name]) for name, size in sizes.items()}
    halved = {name: within(name, max(size // 2, 2), 2 * size) for name, size in sizes.items()}
    return [choice for choice in (doubled, halved) if choice != dict(sizes)]


def resized(model: ir.Model, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """The example inputs at other sizes of the model's symbols; derived sizes (`2*batch`) follow."""
    import sympy

    values = {sympy.Symbol(name, integer=True): size for name, size in sizes.items()}
    names = {str(symbol): symbol for symbol in values}
    result: list[torch.Tensor] = []
    for value, tensor in zip(model.graph.inputs, tensors, strict=True):
        shape = list(tensor.shape)
        for axis in range(len(shape)):
            symbol = _symbol(value, axis)
            if symbol is not None and symbol in sizes:
                shape[axis] = sizes[symbol]
            elif symbol is not None and re.fullmatch(r"[\w\s*+/()-]+", symbol):
                shape[axis] = int(sympy.parse_expr(symbol, local_dict=names).subs(values))
        result.append(tiled(tensor, shape))
    return result


def without_ones(
    tensors: Sequence[torch.Tensor], axes: Sequence[Mapping[int, DynamicAxis]]
) -> list[torch.Tensor] | None:
    """The example inputs with every dynamic axis of size 1 doubled, or None where there is nothing to do.

    torch.export takes a size of 1 for a broadcast and makes the axis static, whatever was asked for.
    """
    if any(wish.derived for asked in axes for wish in asked.values()):
        return None
    result: list[torch.Tensor] = []
    for tensor, asked in zip(tensors, axes, strict=True):
        shape = [
            2 if size == 1 and axis in asked and (asked[axis].high or 2) >= 2 else int(size)
            for axis, size in enumerate(tensor.shape)
        ]
        result.append(tiled(tensor, shape))
    changed = any(a.shape != b.shape for a, b in zip(result, tensors, strict=True))
    return result if changed else None


def tiled(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensor cut or repeated along its axes to `shape`: values, and so token ids, stay in range.

    Repeats of floating-point data are mirrored along the other axes, so that no two slices are equal and a
    model that mixes them up is found out.

    Example:
        >>> import torch
        >>> tiled(torch.tensor([[1.0, 2.0]]), [2, 2]).tolist(), tiled(torch.tensor([7, 8]), [3]).tolist()
        ([[1.0, 2.0], [2.0, 1.0]], [7, 8, 7])
    """
    import torch

    for axis, size in enumerate(shape):
        old = tensor.shape[axis]
        if size <= old:
            tensor = tensor.narrow(axis, 0, size)
            continue
        others = [other for other in range(tensor.ndim) if other != axis]
        mirrored = tensor.flip(others) if tensor.is_floating_point() and others else tensor
        pieces = [mirrored if repeat % 2 else tensor for repeat in range(-(-size // max(old, 1)))]
        tensor = torch.cat(pieces, dim=axis).narrow(axis, 0, size)
    return tensor.contiguous()


def _bound_arguments(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    paths: Sequence[tuple[object, ...]],
) -> dict[str, None]:
    """Names of the arguments that were given, in the order of torch.export: `*args` is one, `**kwargs`
    many."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return dict.fromkeys(str(path[0]) for path in paths)
    names: dict[str, None] = {}
    for name in bound:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            names.update(dict.fromkeys(bound[name]))
        else:
            names[name] = None
    return names


def _below(dynamic_shapes: Mapping[Any, Any], path: Sequence[object]) -> Any:
    """The part of `dynamic_shapes` that speaks of the tensor at `path`."""
    spec: Any = dynamic_shapes
    for key in path:
        if spec is None:
            return None
        try:
            spec = spec.get(key) if isinstance(spec, Mapping) else spec[key]
        except (TypeError, IndexError, KeyError) as error:
            raise _misfit(f"it has no entry for {'.'.join(map(str, path))}") from error
    return spec


def _axes_of_tensor(spec: Any, path: Sequence[object], tensor: torch.Tensor) -> dict[int, DynamicAxis]:
    name = ".".join(map(str, path))
    if spec is None:
        return {}
    if isinstance(spec, (tuple, list)):
        if len(spec) != tensor.ndim:
            raise _misfit(f"it has {len(spec)} axes for {name}, which has {tensor.ndim}")
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping):
        raise _misfit(f"its entry for {name} is a {type(spec).__name__}")
    axes: dict[int, DynamicAxis] = {}
    for axis, dimension in spec.items():
        if not isinstance(axis, int) or not 0 <= axis < tensor.ndim:
            raise _misfit(f"it names axis {axis} of {name}, which has {tensor.ndim} axes")
        wish = _wish(dimension, name)
        if wish is not None:
            axes[axis] = wish
    return axes


def _wish(dimension: Any, name: str) -> DynamicAxis | None:
    """One entry of `dynamic_shapes`; None where it asks for a static axis."""
    import torch

    if dimension is None or isinstance(dimension, int):
        return None
    if isinstance(dimension, str):
        return DynamicAxis(dimension, torch.export.Dim.DYNAMIC, 0, None, required=True)
    low, high = bound(getattr(dimension, "min", None)) or 0, bound(getattr(dimension, "max", None))
    if isinstance(dimension, torch.export.Dim):
        return DynamicAxis(dimension.__name__, dimension, low, high, required=True)
    kind = getattr(getattr(dimension, "type", None), "name", None)
    if kind in ("AUTO", "DYNAMIC"):
        return DynamicAxis(None, dimension, low, high, required=kind == "DYNAMIC")
    if kind == "STATIC":
        return None
    raise _misfit(f"its entry for {name} holds a {type(dimension).__name__}")


def bound(limit: Any) -> int | None:
    """A bound of torch as a number, None where there is none."""
    try:
        number = int(limit)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    return number if number < _LARGEST else None


def _symbol(value: ir.Value, axis: int) -> str | None:
    """The symbol or expression at one axis of a value, None where the size is a number."""
    if value.shape is None:
        return None
    size = value.shape[axis]
    if isinstance(size, int) or size.value is None or size.value.isdigit():
        return None
    return size.value


def _rename(model: ir.Model, renamed: Mapping[str, str]) -> None:
    """Rename symbols in the shape of every value of the main graph, inside expressions too."""

    def new(match: re.Match[str]) -> str:
        return renamed.get(match[0], match[0])

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.is_static():
            continue
        value.shape = ir.Shape(
            [
                size if isinstance(size, int) or size.value is None else _IDENTIFIER.sub(new, size.value)
                for size in value.shape
            ]
        )


def _misfit(detail: str) -> DataError:
    return DataError(
        f"dynamic_shapes does not fit the example inputs: {detail}",
        help="give it as torch.export takes it: a dict by parameter name, or a tuple by position, with "
        "{axis: torch.export.Dim(...)} for each tensor",
    )
