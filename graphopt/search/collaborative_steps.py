"""The multi-step heuristic of CC: channels and rank-one terms in one ranking, the cheapest few at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.search.collaborative_layers import Layer
from graphopt.search.collaborative_states import LayerState
from graphopt.search.collaborative_surrogates import States
from graphopt.search.contract import Candidate

KINDS = ("units", "terms")
"""What may go: units of groups, rank-one terms of layers."""


@dataclass(frozen=True, eq=False)
class Item:
    """What is decided together: a group with all layers that read it, or a layer that reads none.

    A unit of a group goes from all its readers at once, so its score is the sum over them; a rank-one term belongs to
    one reader. All of them are in one ranking. A layer that reads no candidate (a residual stream that stays
    whole) is an item of its own, and loses rank only; one that reads several candidates is a part of several items, and
    loses channels only.

    Attributes:
        name: of the group, or of the layer.
        candidate: the group; None where there is none.
        layers: the readers of the group, or the layer.
    """

    name: str
    candidate: Candidate | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Step:
    """Where a descent is.

    Attributes:
        units: how many units are gone.
        ranks: name of each layer that may be decomposed to its rank.
        loss: the sum of I over the layers of the item.
    """

    units: int
    ranks: Mapping[str, int]
    loss: float


@dataclass(frozen=True, eq=False)
class Descent:
    """All steps of an item, from nothing gone to all that may go.

    Attributes:
        item: the item.
        order: the units in the order in which they went, then the others by their score; int64 [units].
        steps: the first has nothing gone.
    """

    item: Item
    order: np.ndarray
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Stride:
    """How a descent goes.

    Attributes:
        gamma: what the look-ahead counts, at least 0.
        share: of the units and terms of an item that go in one step, at least one; in (0, 1].
        kinds: some of `KINDS`.

    Raises:
        GraphoptError: a number is out of range, or there is no such kind.

    Example:
        >>> Stride().gamma
        0.9
    """

    gamma: float = 0.9
    share: float = 0.01
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        if not (self.gamma >= 0 and math.isfinite(self.gamma)) or not 0 < self.share <= 1:
            raise GraphoptError(f"gamma is {self.gamma} and share {self.share}: at least 0, and in (0, 1]")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise GraphoptError(f"kinds are {self.kinds!r}", help=f"some of {', '.join(KINDS)}")


def find_items(layers: Sequence[Layer], candidates: Sequence[Candidate]) -> list[Item]:
    """The items of a model: candidates that some layer reads in their order, then layers that read none."""
    items = [
        Item(candidate.name, candidate, tuple(layer for layer in layers if _reads(layer, candidate.name)))
        for candidate in candidates
    ]
    alone = [Item(layer.name, None, (layer,)) for layer in layers if not layer.reads]
    return [item for item in items if item.layers] + alone


def descend(item: Item, states: Mapping[str, States], stride: Stride) -> Descent:
    """Take out the cheapest units and terms, a few at a time, until nothing more may go.

    The score of u is I(W_u) + gamma E_next(u), minus what doing nothing scores, so that layers of one item compare.

    Args:
        item: the item.
        states: of its layers, by name.
        stride: see there.
    """
    run = _Run(item, states, stride)
    steps = [run.step()]
    while run.advance():
        steps.append(run.step())
    return Descent(item, run.order(), tuple(steps))


def _reads(layer: Layer, name: str) -> bool:
    return any(read == name for read, _ in layer.reads)


class _Run:
    """One descent."""

    def __init__(self, item: Item, states: Mapping[str, States], stride: Stride) -> None:
        self.item, self.stride = item, stride
        self.states: list[LayerState] = [states[layer.name]() for layer in item.layers]
        self.units = 0 if item.candidate is None or "units" not in stride.kinds else item.candidate.units
        self.most = 0 if item.candidate is None else item.candidate.most
        self.first = [self._first(layer) for layer in item.layers]
        total = self.units + sum(state.rank for state in self._cut())
        self.packet = max(1, int(stride.share * total))
        self.gone: list[int] = []
        self.scores = np.zeros(self.units)

    def step(self) -> Step:
        """Where it is."""
        ranks = {
            layer.name: state.rank for layer, state in zip(self.item.layers, self.states, strict=True) if layer.rankable
        }
        return Step(len(self.gone), ranks, sum(state.loss for state in self.states))

    def order(self) -> np.ndarray:
        """The units that went, then the others."""
        if self.item.candidate is None:
            return np.zeros(0, np.int64)
        if "units" not in self.stride.kinds:
            return self.item.candidate.order
        left = np.setdiff1d(np.arange(self.units), self.gone)
        return np.array([*self.gone, *left[np.argsort(self.scores[left], kind="stable")]], np.int64)

    def advance(self) -> bool:
        """One step; False where nothing may go."""
        gamma = self.stride.gamma
        resting = [state.resting_score(gamma) for state in self.states]
        may = min(self.packet, self.most - len(self.gone)) if self.units else 0
        units, terms = self._unit_scores(resting), self._term_scores(resting)
        entries = [(score, -1, unit) for unit, score in enumerate(units.tolist()) if np.isfinite(score)]
        if units.size:
            self.scores = np.where(np.isfinite(units), units, self.scores)
        for number, scores in enumerate(terms):
            entries.extend((score, number, term) for term, score in enumerate(scores.tolist()))
        entries.sort(key=lambda entry: entry[0])
        out: list[int] = []
        cut: list[list[int]] = [[] for _ in self.states]
        for _, number, index in entries:
            if len(out) + sum(map(len, cut)) >= self.packet:
                break
            if number < 0 and len(out) < may:
                out.append(index)
            elif number >= 0 and len(cut[number]) < len(terms[number]) - 1:
                cut[number].append(index)
        if not out and not any(cut):
            return False
        for number, state in enumerate(self.states):
            first = self.first[number]
            gone = np.array([first + unit for unit in out], np.int64)
            state.remove(gone, np.array(cut[number], np.int64))
        self.gone += out
        return True

    def _unit_scores(self, resting: Sequence[float]) -> np.ndarray:
        """The sum over readers, float64 [units]."""
        total = np.zeros(self.units)
        for first, state, rest in zip(self.first, self.states, resting, strict=True):
            if self.units:
                total = total + state.unit_scores(self.stride.gamma)[first : first + self.units] - rest
        return total

    def _term_scores(self, resting: Sequence[float]) -> list[np.ndarray]:
        cut = set(map(id, self._cut()))
        return [
            state.term_scores(self.stride.gamma) - rest if id(state) in cut else np.zeros(0)
            for state, rest in zip(self.states, resting, strict=True)
        ]

    def _cut(self) -> list[LayerState]:
        """States of the layers that may lose rank."""
        return list(self.states) if "terms" in self.stride.kinds else []

    def _first(self, layer: Layer) -> int:
        """Where the units of the candidate begin among those of a layer."""
        name, first = self.item.name, 0
        for read, owned in layer.reads:
            if read == name:
                return first
            first += owned.count
        return 0
