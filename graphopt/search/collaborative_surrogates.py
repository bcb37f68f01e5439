"""What a layer's weight is worth to the loss: channels and rank-one terms are scored in one coin."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir
import scipy.linalg

from graphopt.criteria.contract import Knowledge
from graphopt.criteria.ends import end_of, shrunk, variance_at
from graphopt.criteria.members import Membership
from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.moments import SecondMoments
from graphopt.ir.pieces import Pieces
from graphopt.search.collaborative_influence import Influence
from graphopt.search.collaborative_layers import Layer
from graphopt.search.collaborative_states import CovarianceState, ElementwiseState, LayerState

if TYPE_CHECKING:
    import torch

_ROWS_A_COLUMN, _ROWS = 16, 8192
"""How many rows are looked at for each column, and beyond."""
_INFLUENCES = ("measured", "stream")
_TINY = 1e-30
_SILENT = 1e-34
"""Mean variance of a column below which squares in float32 are nothing but rounding: the input counts as constant."""
_ROUNDING = 1e-5
"""What is added to variances, relative to squared means: the differences of sums in float32 are not known better."""

States = Callable[[], LayerState]
"""Makes the state of a layer of which nothing is gone."""


class Surrogate(abc.ABC):
    """I(W~): how much the loss grows when a layer's weight W becomes W~; subclasses are frozen dataclasses.

    Class attributes:
        name: kebab-case, the key in `SURROGATES`.
        needs: "weights", "inputs" (`Knowledge.feeds`) or "gradients" (torch, and inputs or labelled data).
    """

    name: ClassVar[str]
    needs: ClassVar[str]

    @abc.abstractmethod
    def states(self, knowledge: Knowledge, layers: Sequence[Layer]) -> dict[str, States]:
        """What is needed to score the layers.

        Args:
            knowledge: the model and its inputs.
            layers: of the model.

        Returns:
            Name of a layer to a function that makes its state.

        Raises:
            DataError: inputs are needed and there are none, or they do not fit the model.
            GraphoptError: torch is needed and not installed.
        """


@dataclass(frozen=True)
class Magnitude(Surrogate):
    """I(W~) = sum (W~ - W)^2: CC with G = 1. A channel costs |W[:, j]|^2, a rank-one term s_r^2.

    Example:
        >>> Magnitude().needs
        'weights'
    """

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[str] = "weights"

    def states(self, knowledge: Knowledge, layers: Sequence[Layer]) -> dict[str, States]:
        """See `Surrogate`."""
        return {layer.name: _elementwise(layer, None) for layer in layers}


@dataclass(frozen=True)
class Gradient(Surrogate):
    """I(W~) = sum F (W~ - W)^2, F from gradients of the loss by each weight (Li et al. 2021, arXiv 2105.11228).

    With a loss and labels F = G^2, G = mean over batches of dL/dW in evaluation mode: the square of the first-order
    change of the loss, weight by weight, as CC has it.

    Without labels the loss is the divergence of the outputs from the model's own. There it is 0, its least value, so G
    is 0 and first order says nothing. To second order it is d'Hd / 2 with d = J vec(W~ - W); the diagonal of J'HJ, the
    Fisher information for "kl", is the mean of squared gradients of random projections z'y with E[z z'] = H
    (`graphopt.criteria.Taylor` has the maths), so F = mean (d(z'y)/dW)^2 / 2. Weights are taken as independent of each
    other, as CC does; the expected divergence is right for a change of a single weight.

    Args:
        loss: `loss(outputs, *labels)` returns one number; None needs no labels.
        data: with `loss`: batches as for `graphopt.recover`. Without, the inputs are `Knowledge.feeds`.
        divergence: without a loss: "mse" or "kl".
        projections: without a loss: backward passes a batch.

    Raises:
        GraphoptError: only one of loss and data is given, or an option is out of range.

    Example:
        >>> Gradient(divergence="kl").needs
        'gradients'
    """

    name: ClassVar[str] = "gradient"
    needs: ClassVar[str] = "gradients"
    loss: Callable[..., torch.Tensor] | None = None
    data: Iterable[Any] | None = field(default=None, compare=False, repr=False)
    divergence: str = "mse"
    projections: int = 8

    def __post_init__(self) -> None:
        if (self.loss is None) != (self.data is None):
            raise GraphoptError("`loss` and `data` come together", where=f"surrogate {self.name!r}")
        if self.divergence not in ("mse", "kl"):
            raise GraphoptError(f"there is no divergence {self.divergence!r}", help="use 'mse' or 'kl'")
        if self.projections < 1:
            raise GraphoptError(f"projections is {self.projections}", help="give a whole number from 1 on")

    def states(self, knowledge: Knowledge, layers: Sequence[Layer]) -> dict[str, States]:
        """See `Surrogate`. A weight that torch cannot differentiate by has F = 0: it is free to go."""
        if importlib.util.find_spec("torch") is None:
            raise GraphoptError(
                f"the surrogate {self.name!r} needs torch, which is not installed",
                help="pip install 'graphopt[torch]', or choose 'second-order'",
            )
        from graphopt.criteria.lifted_gradients import Gradients

        weights = {layer.name: layer.node.inputs[layer.rows.linear.weight_index] for layer in layers}
        gradients = Gradients(knowledge, [value for value in weights.values() if value is not None])
        labelled = self.loss is not None and self.data is not None
        if self.loss is not None and self.data is not None:
            source = gradients.of_loss(self.loss, self.data)
        else:
            source = gradients.of_output(_required(self, knowledge), self.divergence, self.projections, ())
        sums: dict[ir.Value, np.ndarray] = {}
        count = 0
        for step in source:
            count += 1
            for value, gradient in step.items():
                sums[value] = sums.get(value, 0.0) + (gradient if labelled else np.square(gradient))
        if not count:
            raise DataError("no inputs to take gradients on", help="pass at least one batch")
        found: dict[str, States] = {}
        for layer in layers:
            total = sums.get(weights[layer.name])  # pyright: ignore[reportArgumentType]
            stored = np.zeros(1) if total is None else total / count
            metric = np.square(stored) if labelled else stored / 2
            found[layer.name] = _elementwise(layer, _by_weight(layer, metric, total is not None))
        return found


def _by_weight(layer: Layer, metric: np.ndarray, known: bool) -> np.ndarray:
    """Squared derivatives by the stored weight as those by W = alpha times it, [N, C, T]."""
    if not known:
        return np.zeros((layer.outputs, layer.inputs, layer.taps))
    linear = layer.rows.linear
    alpha = linear.arranged(np.ones_like(metric))
    return layer.expanded(linear.arranged(metric) / np.where(alpha == 0, 1.0, alpha**3))  # arranged: times alpha


def _elementwise(layer: Layer, metric: np.ndarray | None) -> States:
    return lambda: ElementwiseState(layer.weight(), metric, layer.units(), layer.rankable)


@dataclass(frozen=True)
class SecondOrder(Surrogate):
    """I(W~) = w tr((W~ - W) C (W~ - W)^T) / P: the error of the layer's output. No labels, no gradients.

    C is the covariance of what the layer reads (means go into the bias) with a ridge, P the variance of what it makes,
    summed over channels, behind BatchNormalization and constant scales, and behind the addition of another branch where
    one follows at once, so that a branch that hardly moves its residual stream is worth little. w is what such
    an error does to the outputs of the model: 1 with "stream", and with "measured" found by damaging each layer once
    for channels and once for rank (`graphopt.search.collaborative_influence.Influence`); the two kinds of loss, which
    add up exactly, each have their own w then.

    W~ is always the best that is left of its channels and rank (`CovarianceState`): the surrogate is for compression
    with a reconstruction (`fold-reconstruction`) behind.

    Args:
        influence: "measured" or "stream".
        ridge: relative to the mean variance of a column.
        columns: up to so many columns (channels x kernel positions) are told apart; beyond, kernel positions are taken
            as uncorrelated and alike; with more channels than that, channels as well, and nothing is solved again.
        samples: inputs that influence is measured on.

    Raises:
        GraphoptError: an option is out of range.

    Example:
        >>> SecondOrder().influence
        'measured'
    """

    name: ClassVar[str] = "second-order"
    needs: ClassVar[str] = "inputs"
    influence: str = "measured"
    ridge: float = 1e-3
    columns: int = 2400
    samples: int = 32

    def __post_init__(self) -> None:
        if self.influence not in _INFLUENCES:
            raise GraphoptError(f"unknown influence {self.influence!r}", help=f"one of {', '.join(_INFLUENCES)}")
        if not 1e-9 <= self.ridge < np.inf or self.columns < 1 or self.samples < 1:
            raise GraphoptError("ridge is at least 1e-9, columns and samples at least 1")

    def states(self, knowledge: Knowledge, layers: Sequence[Layer]) -> dict[str, States]:
        """See `Surrogate`."""
        feeds = _required(self, knowledge)
        membership = Membership(knowledge)
        ends = {layer.name: end_of(layer.node, layer.rows.linear, membership) for layer in layers}
        pieces = Pieces(knowledge.model, feeds, threads=knowledge.threads)
        pieces.hold(value for layer in layers for value in (layer.rows.linear.data, ends[layer.name][0]))
        probe = Influence(knowledge, feeds, self.samples) if self.influence == "measured" else None
        found: dict[str, States] = {}
        for layer in layers:
            watched = [layer.rows.linear.data, ends[layer.name][0]]
            pieces.compute(watched)
            found[layer.name] = self._measured(layer, *ends[layer.name], pieces, knowledge.seed, probe)
            pieces.release(watched * 2)  # held once from the beginning and once by `compute`
        return found

    def _measured(
        self, layer: Layer, end: ir.Value, factor: np.ndarray, pieces: Pieces, seed: int, probe: Influence | None
    ) -> States:
        """The state of a layer whose input and end are known."""
        moments = _moments(layer, pieces, seed)
        covariance = self._covariance(layer, moments)
        weight = layer.weight() * factor[:, None, None]
        variance = variance_at(layer.rows, end, pieces)
        variance = _energy(weight, covariance) if variance is None else variance
        scale = np.sqrt(1 / variance) if variance > 0 else 0.0
        if probe is None or covariance.ndim == 1 or not scale:
            return self._state(layer, weight * scale, covariance)
        whole = self._state(layer, weight * scale, covariance, fold=False)
        state, again = whole(), whole()
        assert isinstance(state, CovarianceState)
        assert isinstance(again, CovarianceState)
        mean = (moments.inputs / max(moments.count, 1)).reshape(-1)
        units, terms = probe(layer, state, again, factor * scale, mean)
        return self._state(layer, weight * scale * np.sqrt(units), covariance, terms / max(units, _TINY))

    def _covariance(self, layer: Layer, moments: SecondMoments) -> np.ndarray:
        """Regular covariance [C T, C T], [C, C] or variances [C]."""
        channels, taps = layer.inputs, layer.taps
        blocks = shrunk(moments.input_covariance(), moments.count, _ROWS_A_COLUMN)
        if channels * taps > self.columns:
            split = blocks.reshape(len(blocks), channels // len(blocks), taps, channels // len(blocks), taps)
            blocks = np.einsum("gatbt->gab", split) / taps
        if channels > self.columns:
            return np.maximum(np.einsum("gaa->ga", blocks).reshape(-1), 0)
        covariance = np.asarray(scipy.linalg.block_diag(*blocks))
        variance = np.maximum(np.diagonal(covariance), 0)
        mean = float(variance.mean())
        rounding = _ROUNDING * float(np.square(moments.inputs / max(moments.count, 1)).mean())
        np.fill_diagonal(covariance, variance + rounding + (self.ridge * mean if mean > _SILENT else 1.0))
        return covariance

    def _state(
        self, layer: Layer, weight: np.ndarray, covariance: np.ndarray, price: float = 1.0, *, fold: bool = True
    ) -> States:
        """A state; `price` is what a unit of loss of rank counts, relative to one of channels."""
        units, outputs, channels = layer.units(), layer.outputs, layer.inputs
        if covariance.ndim == 1:
            metric = np.broadcast_to(covariance[None, :, None], weight.shape)
            return lambda: ElementwiseState(weight, metric, units, layer.rankable)
        apart = len(covariance) == channels * layer.taps
        arranged = weight.reshape(outputs, 1, -1) if apart else weight.swapaxes(1, 2)
        taps = layer.taps if apart else 1
        folds = fold and not layer.makes
        return lambda: CovarianceState(
            arranged, covariance, units, layer.rankable, taps=taps, fold=folds, term_price=price
        )


SURROGATES: dict[str, type[Surrogate]] = {kind.name: kind for kind in (SecondOrder, Gradient, Magnitude)}
"""Every surrogate by its name."""


def surrogate(name_or_surrogate: str | Surrogate) -> Surrogate:
    """A surrogate by name with its default options; a surrogate as it is.

    Raises:
        GraphoptError: there is none of that name.

    Example:
        >>> surrogate("magnitude")
        Magnitude()
    """
    if isinstance(name_or_surrogate, Surrogate):
        return name_or_surrogate
    if name_or_surrogate not in SURROGATES:
        raise GraphoptError(f"there is no surrogate {name_or_surrogate!r}", help=f"there are {', '.join(SURROGATES)}")
    return SURROGATES[name_or_surrogate]()


def _required(kind: Surrogate, knowledge: Knowledge) -> Iterable[Mapping[str, np.ndarray]]:
    if knowledge.feeds is None:
        raise DataError(
            f"the surrogate {kind.name!r} needs inputs, and there are none",
            help="pass calibration inputs (or let probes stand in), or choose 'magnitude'",
        )
    return knowledge.feeds


def _moments(layer: Layer, pieces: Pieces, seed: int) -> SecondMoments:
    """Second moments of the patches that a layer reads, of as many rows of each batch as its share."""
    rows, data = layer.rows, layer.rows.linear.data
    arrays = (np.asarray(pieces.array(data, batch), np.float32) for batch in range(pieces.batches))
    counts = [rows.count(pieces.array(data, batch)) for batch in range(pieces.batches)]
    share = (_ROWS_A_COLUMN * rows.columns + _ROWS) / max(sum(counts), 1)
    generator = np.random.default_rng(seed)
    moments = SecondMoments.empty(rows.groups, rows.columns, 1)
    for array, count in zip(arrays, counts, strict=True):
        chosen = None
        if share < 1:
            chosen = np.sort(generator.choice(count, max(1, int(count * share)), replace=False))
        patches = rows.patches(array, chosen)
        if not np.isfinite(patches).all():
            raise DataError(
                "an activation is NaN or infinite on these inputs",
                where=data.name,
                help="pass inputs of the range that the model was trained on",
            )
        moments.add(patches.astype(np.float32), np.zeros((patches.shape[1], rows.groups), np.float32))
    return moments


def _energy(weight: np.ndarray, covariance: np.ndarray) -> float:
    """tr(W C W^T) of a weight [N, C, T]; see `SecondOrder._covariance` for the forms of C."""
    if covariance.ndim == 1:
        return float((np.square(weight) * covariance[:, None]).sum())
    if len(covariance) == weight.shape[1] * weight.shape[2]:
        flat = weight.reshape(len(weight), -1)
    else:
        flat = weight.swapaxes(1, 2).reshape(-1, weight.shape[1])
    return float(np.einsum("nk,nk->", flat @ covariance, flat))
