"""The user's data, one sample at a time: checked against the model, named by input, iterable again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError
from graphopt.inputs.probes import dimension_role, is_expression, model_inputs
from graphopt.ir.dimensions import dimension_name
from graphopt.ir.session import PlacedFeeds

RECORDED_BYTES = 512 * 1024 * 1024
"""How much of a one-pass source (a generator) is kept in memory so that it can be read again."""


class Calibration:
    """Feeds made from whatever iterable the user has. Iterating it yields `dict[str, np.ndarray]`.

    An item is one set of inputs: an array (or anything with `.numpy()` or `__array__`, torch tensors included)
    for a model of one input, a tuple or list with one array an input in the order of the model's inputs, or a
    mapping from input name to array. What an item means is never guessed: a pair (x, y) from a labelled data set
    is refused with the way out, not cut.

    A source that can be iterated again (a list, a DataLoader) is streamed: nothing is kept. A one-pass source
    (a generator) is recorded while it is read, as far as it is read, up to `RECORDED_BYTES`.

    Attributes:
        samples: number of samples of the last complete pass: sizes of axis 0 summed over the items (1 for an
            item whose arrays have no axis 0); None before the first pass.
        notes: what had to be changed to fit, for instance a cast from float64 to float32; one line each.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }')
        >>> data = Calibration(model, [np.zeros((4, 2), np.float32), {"x": np.ones((3, 2), np.float32)}])
        >>> [feeds["x"].shape for feeds in data]
        [(4, 2), (3, 2)]
        >>> data.samples
        7
    """

    def __init__(self, model: ir.Model, source: Any, *, limit: int | None = None, name: str = "calibration") -> None:
        """Wrap `source` for `model`.

        Args:
            model: its inputs are what every item must fit.
            source: iterable of items.
            limit: read at most this many items.
            name: what to call the source in errors.

        Raises:
            DataError: `source` is not iterable, or is one array or mapping rather than an iterable of items.
        """
        if isinstance(source, (Mapping, str, bytes)) or _is_array(source):
            raise DataError(
                f"{name} is one {type(source).__name__}, not an iterable of inputs",
                help="pass a list with one entry for each set of inputs, for instance [x]",
            )
        if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
            raise DataError(f"{name} is not iterable: {type(source).__name__}", help="pass a list of inputs")
        self._inputs = tuple(model_inputs(model))
        self._source: Iterable[Any] = source
        self._limit = limit
        self._name = name
        self._one_pass = isinstance(source, Iterator)
        self._recorded: list[dict[str, np.ndarray]] = []
        self._recorded_bytes = 0
        self._rest: Iterator[dict[str, np.ndarray]] | None = None
        self.samples: int | None = None
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """One pass over the data.

        Raises:
            DataError: an item does not fit the model (which item and which input is said), there is no item, or a
                one-pass source is larger than what is recorded.
        """
        yield from self._replayed() if self._one_pass else self._stream()

    def _replayed(self) -> Iterator[dict[str, np.ndarray]]:
        """What has been recorded of a one-pass source, then what is still to come of it."""
        position = 0
        while position < len(self._recorded) or self._record():
            yield self._recorded[position]
            position += 1

    def _record(self) -> bool:
        """Read one more item of a one-pass source; False at its end."""
        if self._rest is None:
            self._rest = self._stream()
        feeds = next(self._rest, None)
        if feeds is None and self.samples is None:
            raise DataError(
                f"the {self._name} data is a one-pass iterator that has failed before", help="see that error"
            )
        if feeds is None:
            return False
        self._recorded_bytes += sum(array.nbytes for array in feeds.values())
        if self._recorded_bytes > RECORDED_BYTES:
            raise DataError(
                f"the {self._name} data is a one-pass iterator of more than {RECORDED_BYTES >> 20} MiB",
                help="pass something that can be iterated again: a list, a DataLoader, an object with __iter__",
            )
        self._recorded.append(feeds)
        return True

    def _stream(self) -> Iterator[dict[str, np.ndarray]]:
        samples = items = 0
        for index, item in enumerate(self._items()):
            where = f"{self._name} item {index}"
            feeds = PlacedFeeds(self.fit(item, where), where=where)
            samples += _rows(feeds)
            items += 1
            yield feeds
        if items == 0:
            raise DataError(
                f"the {self._name} data is empty",
                help="pass at least one set of inputs, or none at all (calibration=None) to go data-free",
            )
        self.samples = samples

    def _items(self) -> Iterator[Any]:
        for index, item in enumerate(self._source):
            if index == self._limit:
                return
            yield item

    def fit(self, item: Any, where: str) -> dict[str, np.ndarray]:
        """One item as feeds, every array checked against its input."""
        names = [value.name or "" for value in self._inputs]
        named: Mapping[str, Any]
        if isinstance(item, Mapping):
            named = item
            missing, unknown = [n for n in names if n not in item], [str(n) for n in item if n not in names]
            if missing or unknown:
                found = ", ".join(map(str, item)) or "none"
                problem = f"lacks input {missing[0]!r}" if missing else f"has an unknown input {unknown[0]!r}"
                raise DataError(
                    f"the item {problem}", where=where, help=f"the inputs are {', '.join(names)}; the item has {found}"
                )
        elif isinstance(item, (tuple, list)):
            if len(item) != len(names):
                raise DataError(
                    f"the item has {len(item)} entries, the model has {len(names)} inputs ({', '.join(names)})",
                    where=where,
                    help="give one array an input, without labels: for (x, y) pairs pass `[x for x, y in data]`",
                )
            named = dict(zip(names, item, strict=True))
        elif len(names) == 1:
            named = {names[0]: item}
        else:
            raise DataError(
                f"the item is one {type(item).__name__}, the model has {len(names)} inputs",
                where=where,
                help=f"give a tuple in this order, or a dict with these names: {', '.join(names)}",
            )
        return {value.name or "": self._array(named[value.name or ""], value, where) for value in self._inputs}

    def _array(self, given: Any, value: ir.Value, item: str) -> np.ndarray:
        where = f"{item}, input {value.name!r}"
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise DataError(f"the input is no tensor but {value.type}", where=where, help="graphopt feeds tensors only")
        array = as_array(given, where)
        if value.dtype is not None and array.dtype != value.dtype.numpy():
            array = self._cast(array, value, value.dtype.numpy(), where)
        shape = value.shape
        if shape is None:
            return array
        fits = array.ndim == len(shape) and all(
            not isinstance(expected, int) or expected == found
            for expected, found in zip(shape, array.shape, strict=False)
        )
        if not fits:
            added = array.ndim + 1 == len(shape)
            raise DataError(
                f"the shape is {list(array.shape)}, the model takes {shape}",
                where=where,
                help="add the batch axis: x[None]" if added else _other_batch(array.shape, shape),
            )
        for axis, size in enumerate(array.shape):
            name = dimension_name(value, axis)
            if size == 0 and name and not is_expression(name) and dimension_role(value, axis, name) == "batch":
                raise DataError(
                    f"there is no sample in it: the shape is {list(array.shape)}", where=where, help="leave it out"
                )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError("the array holds NaN or infinity", where=where, help="leave such items out")
        return array

    def _cast(self, array: np.ndarray, value: ir.Value, wanted: np.dtype[Any], where: str) -> np.ndarray:
        """The array in the model's dtype, where nothing but float precision is lost by it."""
        floats = value.dtype is not None and value.dtype.is_floating_point() and array.dtype.kind == "f"
        if floats or (np.can_cast(array.dtype, wanted, "safe") and array.dtype.kind == wanted.kind):
            note = f"input {value.name!r}: cast from {array.dtype} to {wanted}"
            if note not in self.notes:
                self.notes.append(note)
            return array.astype(wanted)
        if array.dtype.kind in "iu" and wanted.kind in "iu" and _integers_fit(array, wanted):
            return array.astype(wanted)
        raise DataError(
            f"the dtype is {array.dtype}, the model takes {wanted}",
            where=where,
            help=f"convert and scale it as the model expects, for instance x.astype(np.{wanted})",
        )


def fit_feeds(model: ir.Model, item: Any, where: str = "example inputs") -> dict[str, np.ndarray]:
    """One set of inputs as arrays by input name, checked against the model.

    Args:
        model: its inputs are what the item must fit.
        item: as an item of `Calibration`.
        where: what to call it in errors.

    Raises:
        DataError: names, number, dtypes or shapes do not fit; the message says which input.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu (x) }')
        >>> fit_feeds(model, np.zeros((3, 2), np.float32))["x"].shape
        (3, 2)
    """
    return Calibration(model, ()).fit(item, where)


def as_array(given: Any, where: str = "input") -> np.ndarray:
    """A NumPy array of anything array-like: torch tensors on any device too, without importing torch.

    Raises:
        DataError: it is not array-like, or holds objects.
    """
    entries: list[Any] = list(given) if isinstance(given, (tuple, list)) else []
    if any(hasattr(entry, "shape") for entry in entries):
        raise DataError(
            f"not an array but a {type(given).__name__} of {len(entries)} arrays",
            where=where,
            help="give one array an input, without labels: for ((a, b), y) items pass `[x for x, y in data]`",
        )
    if not isinstance(given, np.ndarray):
        for step in ("detach", "cpu"):
            if hasattr(given, step) and hasattr(given, "numpy"):
                given = getattr(given, step)()
        try:
            given = given.numpy() if hasattr(given, "numpy") else np.asarray(given)  # pyright: ignore
        except (TypeError, ValueError) as error:
            raise DataError(f"not an array: {error}", where=where, help="give NumPy arrays or tensors") from error
    array = np.asarray(given)
    if array.dtype.kind in "US" or (array.dtype == object and all(map(_is_text, array.flat))):
        return array.astype(object)  # as onnxruntime takes strings
    if array.dtype == object:
        objects = f"an array of objects, {list(array.shape)}" if array.ndim else repr(array.item())[:80]
        raise DataError(
            f"not an array of numbers but {objects}",
            where=where,
            help="give NumPy arrays or torch tensors of one dtype",
        )
    return array


def _other_batch(given: Sequence[int], shape: ir.Shape) -> str:
    """The way out where a shape does not fit; a model of fixed batch is the usual case."""
    batch = shape[0] if len(shape) else None
    rest = len(given) == len(shape) and all(
        not isinstance(size, int) or size == found for size, found in list(zip(shape, given, strict=True))[1:]
    )
    if rest and isinstance(batch, int):
        return f"the model takes batches of {batch}: give such, or export it with a dynamic batch (`dynamic_shapes`)"
    return "give arrays of the model's own shape"


def _is_text(entry: Any) -> bool:
    return isinstance(entry, (str, bytes))


def _is_array(source: Any) -> bool:
    return hasattr(source, "__array__") or (hasattr(source, "numpy") and hasattr(source, "shape"))


def _integers_fit(array: np.ndarray, wanted: np.dtype[Any]) -> bool:
    limits = np.iinfo(wanted)
    return array.size == 0 or bool(array.min() >= limits.min and array.max() <= limits.max)


def _rows(feeds: Mapping[str, np.ndarray]) -> int:
    """Number of samples in one set of inputs: the size of axis 0 of the first array that has one."""
    sizes: Sequence[int] = [array.shape[0] for array in feeds.values() if array.ndim]
    return sizes[0] if sizes else 1
