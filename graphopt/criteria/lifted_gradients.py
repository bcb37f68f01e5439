"""Gradients with respect to the weights of a graph, by the lift. torch is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphopt.criteria.contract import Knowledge
from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.calibration import fit_feeds
from graphopt.ir.lift import lift
from graphopt.ir.lifted import VALUE, LiftedModule, as_array, as_tensor
from graphopt.ir.ops.torch.sizes import HOST
from graphopt.ir.session import PlacedFeeds

_CONSTANT = 1e-6
"""An output whose variance is below this share of its mean square is taken for constant: the latter stands in."""


class Gradients:
    """The gradients of a number that depends on the outputs, with respect to some weights.

    Weights are initializers or values computed from initializers; those that torch cannot differentiate by (they live
    in a subgraph, or are read as numbers) are left out.
    """

    def __init__(self, knowledge: Knowledge, weights: Iterable[ir.Value]) -> None:
        """Lift the model, in at least float32.

        Raises:
            LiftError: an operator has no torch function.
        """
        self._model = knowledge.model
        module = lift(knowledge.model, table=knowledge.groups.analysis.table)
        if module.dtype.itemsize < 4:
            module.to(torch.float32)
        for path in module.interface.initializers.values():
            _require_gradient(module, path)
        tensors = _tensors(module)
        self._weights = [value for value in dict.fromkeys(weights) if value.name in tensors]
        self._module = module.with_outputs([value.name or "" for value in self._weights])
        self._module.eval()
        self._outputs = module.interface.outputs
        self._generator = torch.Generator().manual_seed(knowledge.seed)

    def of_loss(self, loss: Callable[..., torch.Tensor], data: Iterable[Any]) -> Iterator[dict[ir.Value, np.ndarray]]:
        """The gradients of a loss for each batch of inputs and labels: weight to float64 of its shape.

        Raises:
            DataError: a batch does not fit the model.
            GraphoptError: the loss raises, or is no number that depends on the outputs.
        """
        for number, item in enumerate(data):
            where = f"batch {number} of the data"
            feeds, labels, named = split_labels(item, self._module.interface.inputs, where)
            feeds = fit_feeds(self._model, {name: as_array(tensor) for name, tensor in feeds.items()}, where)
            outputs, weights = self._run(feeds, where)
            try:
                found = loss(outputs[0] if len(outputs) == 1 else tuple(outputs), *labels, **named)
            except Exception as error:
                given = ", ".join([*(type(label).__name__ for label in labels), *named]) or "no labels"
                raise GraphoptError(
                    f"the loss raised {type(error).__name__}: {error}",
                    where=where,
                    help=f"it is called as loss(outputs, *labels), here with {len(outputs)} outputs and {given}; what "
                    f"follows the {len(feeds)} inputs of a batch (inputs..., labels...) is labels",
                ) from error
            if not isinstance(found, torch.Tensor) or found.numel() != 1 or not found.requires_grad:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise GraphoptError(
                    "the loss returned no single number that depends on the outputs",
                    where=where,
                    help="return a scalar tensor computed from the outputs, without `detach` or `no_grad`",
                )
            yield self._gradients(found.reshape(()), weights, keep=False)

    def of_output(
        self, feeds: Iterable[Mapping[str, np.ndarray]], divergence: str, projections: int, outputs: Sequence[str]
    ) -> Iterator[dict[ir.Value, np.ndarray]]:
        """The gradients of random projections of the outputs; `graphopt.criteria.gradient.Taylor` has the maths.

        Raises:
            DataError: a batch does not fit the model, or an output is unknown.
            GraphoptError: no output that counts is a float that depends on the weights.
        """
        unknown = sorted(set(outputs) - set(self._outputs))
        if unknown:
            raise DataError(f"the model has no output {unknown[0]!r}", help=f"it has {', '.join(self._outputs)}")
        wanted = [index for index, name in enumerate(self._outputs) if not outputs or name in outputs]
        for number, batch in enumerate(feeds):
            where = batch.where if isinstance(batch, PlacedFeeds) else f"batch {number} of the inputs"
            results, weights = self._run(batch, where)
            chosen = [results[index] for index in wanted if results[index].requires_grad and results[index].numel()]
            if not chosen:
                raise GraphoptError(
                    "no output is a float that depends on the weights, so there is no gradient",
                    where=", ".join(self._outputs),
                    help="pass `loss` and `data`, or choose a criterion of weights or inputs",
                )
            for projection in range(projections):
                parts = [self._projection(result, divergence) for result in chosen]
                total = torch.stack(parts).sum() / len(parts) ** 0.5
                yield self._gradients(total, weights, keep=projection + 1 < projections)

    def _run(self, feeds: Mapping[str, Any], where: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The model's outputs, and the weights as they took part in them."""
        try:
            with torch.enable_grad():
                found = self._module(*self._module.tensors(feeds))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            shapes = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in feeds.items())
            raise DataError(
                f"torch cannot run the model on these inputs: {(str(error) or type(error).__name__).splitlines()[0]}",
                where=f"{where}, {shapes}",
                help="pass inputs of the model's own shapes and dtypes that fit together",
            ) from error
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        return found[: len(self._outputs)], found[len(self._outputs) :]

    def _gradients(
        self, number: torch.Tensor, weights: list[torch.Tensor], *, keep: bool
    ) -> dict[ir.Value, np.ndarray]:
        asked = [index for index, weight in enumerate(weights) if weight.requires_grad]
        chosen = [weights[index] for index in asked]
        found = torch.autograd.grad(number, chosen, retain_graph=keep, allow_unused=True) if chosen else ()
        gradients: dict[ir.Value, np.ndarray] = {}
        for index, gradient in zip(asked, found, strict=True):
            if gradient is None:  # pyright: ignore[reportUnnecessaryComparison]  (allow_unused)
                continue
            array = as_array(gradient).astype(np.float64)
            if not np.isfinite(array).all():
                raise GraphoptError(
                    "a gradient is NaN or infinite on these inputs",
                    where=self._weights[index].name,
                    help="choose a criterion of weights or inputs, or inputs of the range of the training data",
                )
            gradients[self._weights[index]] = array
        return gradients

    def _projection(self, result: torch.Tensor, divergence: str) -> torch.Tensor:
        """z'y with E[z z'] the curvature of the divergence from y at y."""
        result = result.to(torch.promote_types(result.dtype, torch.float32))
        if divergence == "kl":
            classes = result.shape[-1] if result.ndim > 1 else 1
            if classes < 2:
                raise GraphoptError(
                    f"'kl' needs classes on the last axis, and the shape of an output is {list(result.shape)}",
                    help="use divergence='mse', or name the outputs with classes in `outputs`",
                )
            logits = result.reshape(-1, classes)
            shares = logits.detach().softmax(dim=-1)
            drawn = torch.multinomial(shares, 1, generator=self._generator)
            direction = torch.nn.functional.one_hot(drawn[:, 0], classes).to(shares.dtype) - shares
            return (direction * logits).sum() / len(logits) ** 0.5
        signs = torch.randint(0, 2, result.shape, generator=self._generator).to(result.dtype) * 2 - 1
        fixed = result.detach()
        square, variance = fixed.square().mean(), fixed.var(correction=0)
        scale = torch.where(variance > _CONSTANT * square, variance, square)
        curvature = 2 / (result.numel() * torch.where(scale > 0, scale, 1.0))
        return (signs * result).sum() * curvature.sqrt()


def split_labels(
    item: Any, inputs: Sequence[str], where: str
) -> tuple[dict[str, torch.Tensor], list[Any], dict[str, Any]]:
    """An item of labelled data as inputs by name, labels by position and labels by keyword.

    Args:
        item: an array for a model of one input; a tuple or list with one array an input, then labels; or a dict by
            input name, everything else in it being labels.
        inputs: names of the model's inputs, in order.
        where: for the message.

    Raises:
        DataError: an input is missing.

    Example:
        >>> feeds, labels, named = split_labels((np.ones((1, 2)), np.zeros(1)), ["x"], "batch 0")
        >>> list(feeds), labels, named
        (['x'], [tensor([0.], dtype=torch.float64)], {})
    """
    if isinstance(item, Mapping):
        given: dict[str, Any] = dict(item)
        missing = [name for name in inputs if name not in given]
        if missing:
            raise DataError(f"the input {missing[0]!r} is missing", where=where, help=f"inputs are {', '.join(inputs)}")
        named = {name: _label(entry) for name, entry in given.items() if name not in inputs}
        return {name: _tensor(given[name], where) for name in inputs}, [], named
    entries = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(entries) < len(inputs):
        raise DataError(
            f"there are {len(entries)} arrays, and the model has {len(inputs)} inputs",
            where=where,
            help=f"inputs come first, labels after them; inputs are {', '.join(inputs)}",
        )
    feeds = {name: _tensor(entry, where) for name, entry in zip(inputs, entries, strict=False)}
    return feeds, [_label(entry) for entry in entries[len(inputs) :]], {}


def _tensor(entry: Any, where: str) -> torch.Tensor:
    if not isinstance(entry, torch.Tensor) and not hasattr(entry, "__array__"):
        raise DataError(f"an input is a {type(entry).__name__}", where=where, help="pass arrays or tensors")
    return as_tensor(entry)


def _label(entry: Any) -> Any:
    """Arrays as tensors, the rest as it is."""
    return as_tensor(entry) if isinstance(entry, np.ndarray) and entry.dtype.kind in "fiub" else entry


def _require_gradient(module: LiftedModule, path: str) -> None:
    """Let a gradient be taken by a weight that training would leave alone."""
    parent, _, leaf = path.rpartition(".")
    tensor = getattr(module.get_submodule(parent), leaf)
    if tensor.is_floating_point() and tensor.dtype.itemsize >= 2:
        tensor.requires_grad_(True)


def _tensors(module: LiftedModule) -> set[str]:
    """The values of the lifted graph that are tensors, not sizes."""
    nodes = (node for node in module.graph.nodes if node.op != "call_module" and node.target not in HOST.values())
    return {str(node.meta[VALUE]) for node in nodes if VALUE in node.meta}
