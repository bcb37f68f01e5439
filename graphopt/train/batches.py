"""Training batches from whatever iterable the user has: checked against the model, labels apart, again and again."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from graphopt.errors import BatchError, DataError, TrainingError
from graphopt.inputs.calibration import as_array
from graphopt.inputs.probes import model_inputs
from graphopt.ir.lifted import as_tensor
from graphopt.ir.ops.torch.dtypes import torch_dtype
from graphopt.train.randomness import random_state, set_random_state


@dataclass(frozen=True)
class Batch:
    """One item of the data.

    Attributes:
        feeds: the model's inputs by ONNX name, in the model's dtypes, on the device where they were given.
        labels: what a tuple had beyond the inputs.
        named_labels: what a dict had beyond the inputs.
    """

    feeds: dict[str, torch.Tensor]
    labels: tuple[Any, ...] = ()
    named_labels: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def labels_on(self, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the loss: arrays as tensors on the device, the rest as it is."""
        named = {name: _label(entry, device) for name, entry in self.named_labels.items()}
        return [_label(entry, device) for entry in self.labels], named


class Batches:
    """An endless stream of batches, that knows how far it is and can be brought there again.

    An item is an array or tensor for a model of one input; a tuple or list with one array an input, then labels; or a
    dict by input name, everything else in it being labels. When the data ends it is iterated anew.

    Attributes:
        position: batches read of the current pass.

    Example:
        >>> import numpy as np
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }')
        >>> batches = Batches(model, [(np.zeros((4, 2), np.float32), np.arange(4))], torch.device("cpu"))
        >>> batch = batches.read(0)
        >>> batch.feeds["x"].shape, batch.labels
        (torch.Size([4, 2]), (array([0, 1, 2, 3]),))
    """

    def __init__(self, model: ir.Model, source: Any, device: torch.device) -> None:
        """Wrap `source` for `model`; `device` is the one whose random numbers are kept for a second start.

        Raises:
            DataError: `source` is no iterable of items.
        """
        single = isinstance(source, (Mapping, str, bytes)) or hasattr(source, "__array__")
        if single or not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
            raise DataError(
                f"the data is one {type(source).__name__}, not an iterable of batches",
                where="data",
                help="pass a list of batches, for instance [x], or a torch.utils.data.DataLoader",
            )
        self._inputs = {value.name or "": value for value in model_inputs(model)}
        self._source: Iterable[Any] = source
        self._device = device
        self._iterator: Iterator[Any] | None = None
        self._pass_state: dict[str, Any] = {}
        self._ahead: deque[Any] = deque()
        self._any = False
        self.position = 0

    def read(self, step: int) -> Batch:
        """The next batch; `step` is for the messages.

        Raises:
            TrainingError: the data is empty, ran dry, or raised something.
            DataError: the batch does not fit the model.
        """
        item, fresh = self._next(step), False
        if item is _END:
            fresh = True
            self._start(step)
            item = self._next(step)
        if item is _END:
            raise self._ended(step)
        try:
            batch = self._fit(item, f"batch {self.position} of the data")
        except DataError as error:
            raise BatchError(error.what, where=f"{error.where}, step {step}", help=error.help) from error
        self._any = True
        self.position = 1 if fresh else self.position + 1
        return batch

    def peek(self, count: int) -> list[Batch]:
        """The first batches, at most `count`, before any is read; `read` returns them again.

        Raises:
            TrainingError: the data is empty, or raised something.
            DataError: a batch does not fit the model.
        """
        self._look_ahead(count, 0)
        if not self._ahead:
            raise self._ended(0)
        return [self._fit(item, f"batch {number} of the data") for number, item in enumerate(self._ahead)]

    def state(self) -> dict[str, Any]:
        """Where the stream is, for a checkpoint."""
        return {"position": self.position, "ahead": len(self._ahead), "random": self._pass_state}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Go to where the stream was: the pass is begun as it was then, and what was read of it is skipped.

        Raises:
            TrainingError: the data is shorter than it was, or raised something.
        """
        if not state["random"]:
            return
        set_random_state(state["random"], self._device)
        self._start(step)
        for position in range(state["position"]):
            if self._next(step) is _END:
                raise TrainingError(
                    f"the data ends after {position} batches, the checkpoint was written after {state['position']}",
                    where=f"step {step}",
                    help="to resume, pass the data from its beginning, the same as before",
                )
        self._look_ahead(state["ahead"], step)
        self._any, self.position = state["position"] > 0, state["position"]

    def _start(self, step: int) -> None:
        self._pass_state = random_state(self._device)
        self._iterator, self.position = None, 0
        with _blamed_on_data(step):
            self._iterator = iter(self._source)

    def _next(self, step: int) -> Any:
        return self._ahead.popleft() if self._ahead else self._fetch(step)

    def _look_ahead(self, count: int, step: int) -> None:
        for _ in range(count):
            item = self._fetch(step)
            if item is _END:
                break
            self._ahead.append(item)

    def _fetch(self, step: int) -> Any:
        if self._iterator is None:
            self._start(step)
        assert self._iterator is not None
        with _blamed_on_data(step):
            return next(self._iterator, _END)

    def _ended(self, step: int) -> TrainingError:
        if not self._any:
            return TrainingError("the data is empty", where="data", help="pass at least one batch")
        return TrainingError(
            f"the data ran dry after {step} steps: it is a one-pass iterator",
            where=f"step {step}",
            help="pass something that can be iterated again (a list, a DataLoader), or ask for fewer steps",
        )

    def _fit(self, item: Any, where: str) -> Batch:
        names = list(self._inputs)
        if isinstance(item, Mapping):
            missing = [name for name in names if name not in item]
            if missing:
                found = ", ".join(map(str, item)) or "none"
                raise DataError(
                    f"the batch lacks input {missing[0]!r}",
                    where=where,
                    help=f"the inputs are {', '.join(names)}; the batch has {found}",
                )
            named = {str(key): entry for key, entry in item.items() if key not in self._inputs}
            return Batch(self._feeds(item, where), named_labels=named)
        entries: list[Any] = list(item) if isinstance(item, (tuple, list)) else [item]
        if len(entries) < len(names):
            raise DataError(
                f"the batch has {len(entries)} entries, the model has {len(names)} inputs",
                where=where,
                help=f"give one array an input in this order, then labels: {', '.join(names)}",
            )
        feeds = self._feeds(dict(zip(names, entries, strict=False)), where)
        return Batch(feeds, tuple(entries[len(names) :]))

    def _feeds(self, named: Mapping[Any, Any], where: str) -> dict[str, torch.Tensor]:
        return {
            name: fit_tensor(named[name], value, f"{where}, input {name!r}") for name, value in self._inputs.items()
        }


def first_samples(model: ir.Model, feeds: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The first samples of a batch, at most `count`, where axis 0 is that of samples: one dynamic size in all inputs.

    Returns:
        The feeds, whole where the inputs do not share axis 0.
    """
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in feeds.values()}
    fixed = any(
        value.shape is None or not value.shape or isinstance(value.shape[0], int) for value in model_inputs(model)
    )
    if len(sizes) != 1 or fixed:
        return dict(feeds)
    return {name: tensor[:count] for name, tensor in feeds.items()}


def fit_tensor(given: Any, value: ir.Value, where: str) -> torch.Tensor:
    """An array or tensor as a tensor in the dtype of an input.

    Floats are cast to the float type of the input, integers to its integer type where they fit in it.

    Raises:
        DataError: shape or dtype do not fit, or a float is not finite.
    """
    tensor = given.detach() if isinstance(given, torch.Tensor) else as_tensor(as_array(given, where))
    wanted = torch_dtype(int(value.dtype)) if value.dtype is not None else tensor.dtype
    if tensor.dtype != wanted:
        floats = tensor.is_floating_point() and wanted.is_floating_point
        integers = _is_integer(tensor.dtype) and _is_integer(wanted) and _integers_fit(tensor, wanted)
        if not floats and not integers:
            raise DataError(
                f"the dtype is {_plain(tensor.dtype)}, the model takes {_plain(wanted)}",
                where=where,
                help=f"convert and scale it as the model expects, for instance x.to({wanted})",
            )
        tensor = tensor.to(wanted)
    shape = value.shape
    if shape is not None:
        fits = tensor.ndim == len(shape) and all(
            not isinstance(expected, int) or expected == found
            for expected, found in zip(shape, tensor.shape, strict=False)
        )
        if not fits:
            added = tensor.ndim + 1 == len(shape)
            raise DataError(
                f"the shape is {list(tensor.shape)}, the model takes {shape}",
                where=where,
                help="add the batch axis: x[None]" if added else "give batches of the model's own shape",
            )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise DataError("the array holds NaN or infinity", where=where, help="leave such batches out")
    return tensor


@contextmanager
def _blamed_on_data(step: int) -> Generator[None, None, None]:
    """What the user's data raises becomes a `TrainingError` that says at which step."""
    try:
        yield
    except Exception as error:
        raise TrainingError(
            f"the data raised {type(error).__name__}: {error}",
            where=f"step {step}",
            help="mend it and go on with the same call and resume=True, where a `checkpoint` was named",
        ) from error


_END = object()
"""What `next` returns at the end of a pass."""


def _label(entry: Any, device: torch.device) -> Any:
    if isinstance(entry, torch.Tensor):
        return entry.to(device)
    return as_tensor(entry).to(device) if hasattr(entry, "__array__") else entry


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _integers_fit(tensor: torch.Tensor, wanted: torch.dtype) -> bool:
    limits = torch.iinfo(wanted)
    return tensor.numel() == 0 or (int(tensor.min()) >= limits.min and int(tensor.max()) <= limits.max)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
