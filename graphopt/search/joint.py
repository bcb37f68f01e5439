"""Widths, ranks, integers and blocks in one problem: what each may be, what it costs together, and what it loses.

Everything is a choice of `graphopt.search.budget`: how many units of a group stay, whether a layer is dense or a chain
of two of a rank, whether an operator computes on integers, whether a block stays at all. What is lost is I of every
layer at every width and rank
(`graphopt.search.layer_forms`), so that channels and ranks of one layer are not counted twice; what it costs
is a table over the few choices that meet in one node, so that a layer that is cut from both sides, or stands in a
block that goes, costs what it really costs. A value that goes from floats to integers, or back, costs a conversion:
a table over those who make and read it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from graphopt.search.budget import Assignment, BudgetProblem, Choice, Term
from graphopt.search.collaborative_layers import Layer
from graphopt.search.contract import Candidate
from graphopt.search.integers import Border, IntegerForms
from graphopt.search.layer_forms import LayerForm, LayerForms, thinned

MOST_WIDTHS, MOST_RANKS = 16, 5
"""Widths of a group and ranks of each form of a layer that are looked at; of more, so many are spread over them."""
_MOST_MEETING = 2
"""Groups whose widths are looked at together in one node; where more meet, each is looked at with the others whole."""
_MOST_ENDS = 4
"""Operators that are looked at together for the conversion of one value; of more, each with the maker, for a share."""


@dataclass(frozen=True)
class Block:
    """A part that may go as a whole.

    Attributes:
        name: unique.
        nodes: names of the nodes that go with it.
        loss: what is lost with it, at least 0.
    """

    name: str
    nodes: frozenset[str]
    loss: float


class NodeCosts(Protocol):
    """What the nodes of a model cost."""

    @property
    def places(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the nodes that cost anything, each with the groups that its cost depends on."""
        ...

    @property
    def fixed(self) -> float:
        """What the model costs beyond its nodes."""
        ...

    def at(
        self, node: str, removed: Mapping[str, int], form: LayerForm | None = None, *, integer: bool = False
    ) -> float:
        """What a node costs with these units gone; with a form, as that chain; on floats or on integers."""
        ...

    def conversion(self, border: Border, removed: Mapping[str, int], *, to_integers: bool) -> float:
        """What it costs to convert a value to integers, or to floats, with these units gone."""
        ...


@dataclass(frozen=True)
class Taken:
    """A solution in the words of the model.

    Attributes:
        removed: number of units that go, by group, none of blocks that go.
        forms: of the layers that are taken apart, by node.
        dropped: names of the blocks that go.
        integers: names of the operators that compute on integers.
        assignment: what the solver said.
    """

    removed: Mapping[str, int]
    forms: Mapping[str, LayerForm]
    dropped: tuple[str, ...]
    integers: frozenset[str]
    assignment: Assignment


@dataclass(frozen=True, eq=False)
class JointProblem:
    """All that may be decided about a model.

    Attributes:
        candidates: groups that may lose units.
        forms: of the layers, and what is lost.
        costs: what nodes cost.
        blocks: that may go; no two share a node.
        low_rank: whether layers may be taken apart.
        integers: operators that may compute on integers.
    """

    candidates: tuple[Candidate, ...]
    forms: LayerForms
    costs: NodeCosts
    blocks: tuple[Block, ...] = ()
    low_rank: bool = True
    integers: IntegerForms = field(default_factory=IntegerForms)
    _block_of: dict[str, str] = field(init=False, repr=False, default_factory=dict[str, str])
    _kept: dict[str, tuple[int, ...]] = field(init=False, repr=False, default_factory=dict[str, "tuple[int, ...]"])
    _forms: dict[str, tuple[LayerForm, ...]] = field(
        init=False, repr=False, default_factory=dict[str, "tuple[LayerForm, ...]"]
    )
    _layers: dict[str, Layer] = field(init=False, repr=False, default_factory=dict[str, Layer])

    def __post_init__(self) -> None:
        self._block_of.update({node: block.name for block in self.blocks for node in block.nodes})
        self._layers.update({layer.name: layer for layer in self.forms.layers})
        for candidate in self.candidates:
            self._kept[candidate.name] = _thinned([int(kept) for kept in candidate.choices[::-1]], MOST_WIDTHS)
        for name, forms in self.forms.of.items() if self.low_rank else ():
            saving = [form for form in forms if self._saves(name, form)]
            if saving:
                self._forms[name] = thinned(saving, MOST_RANKS)

    def _saves(self, node: str, form: LayerForm) -> bool:
        """Whether a chain costs less than the whole layer, on floats or on integers."""
        kinds = (False, True) if node in self.integers.losses else (False,)
        return node in self.costs.places and any(self._pays(node, {}, form, integer=integer) for integer in kinds)

    def _pays(self, node: str, removed: Mapping[str, int], form: LayerForm, *, integer: bool) -> bool:
        """Whether there is such a chain at these widths, and it costs less: the layer as it is loses no more."""
        costs = [self.costs.at(node, removed, one, integer=integer) for one in (form, None)]
        return self.forms.fits(node, removed, form) and costs[0] < costs[1]

    def within(self, budget: float) -> BudgetProblem:
        """The problem with a budget in the unit of the costs."""
        choices = [
            *(Choice(_width(name), tuple(map(str, kept))) for name, kept in self._kept.items()),
            *(Choice(_form(node), ("dense", *map(str, forms))) for node, forms in self._forms.items()),
            *(Choice(_block(block.name), ("keep", "drop")) for block in self.blocks),
            *(Choice(_numbers(node), ("float", "int8")) for node in self.integers.losses),
        ]
        return BudgetProblem(tuple(choices), tuple(self._terms()), budget)

    def taken(self, assignment: Assignment) -> Taken:
        """What a solution takes."""
        options = assignment.options
        dropped = tuple(block.name for block in self.blocks if options[_block(block.name)])
        gone = {_block(name) for name in dropped}
        inside = {name for name in self._kept if self._gate(self._around(name)) in gone}
        units = {candidate.name: candidate.units for candidate in self.candidates}
        removed = {
            name: units[name] - kept[options[_width(name)]]
            for name, kept in self._kept.items()
            if options[_width(name)] and name not in inside
        }
        chains = {
            node: forms[options[_form(node)] - 1]
            for node, forms in self._forms.items()
            if options[_form(node)] and self._block_of.get(node) not in dropped
        }
        integers = frozenset(
            node for node in self.integers.losses if options[_numbers(node)] and self._block_of.get(node) not in dropped
        )
        chains = {
            node: form for node, form in chains.items() if self._pays(node, removed, form, integer=node in integers)
        }
        return Taken(removed, chains, dropped, integers, assignment)

    def _around(self, group: str) -> list[str]:
        """Names of the nodes whose cost depends on a group."""
        return [node for node, groups in self.costs.places.items() if group in groups]

    def _gate(self, nodes: Sequence[str]) -> str | None:
        """The block that all these nodes are in, None where there is none."""
        blocks = {self._block_of.get(node) for node in nodes}
        (block,) = blocks if len(blocks) == 1 else (None,)
        return None if block is None else _block(block)

    def _terms(self) -> Iterator[Term]:
        """One table for each set of choices that meet in some node, and one for each block."""
        yield Term("beyond the nodes", (), np.array(self.costs.fixed), np.zeros(()))
        for block in self.blocks:
            values = np.array([0.0, -block.loss])
            yield Term(f"loss of {_block(block.name)}", (_block(block.name),), np.zeros(2), values)
        found: dict[tuple[tuple[str, ...], str | None], tuple[np.ndarray, np.ndarray]] = {}
        for node in dict.fromkeys([*self.costs.places, *self._layers, *self.integers.losses]):
            for choices, cost, value in self._tables(node):
                key = choices, self._gate([node])
                before = found.get(key, (0.0, 0.0))
                found[key] = (before[0] + cost, before[1] + value)
        for border in self.integers.borders:
            for choices, cost in self._conversions(border):
                gate = self._gate(border.ends)
                before = found.get((choices, gate), (0.0, 0.0))
                found[choices, gate] = (before[0] + cost, before[1] + np.zeros(cost.shape))
        for (choices, gate), (cost, value) in found.items():
            where = ", ".join(choices) or "what stays"
            yield Term(f"{where}{f' in {gate}' if gate else ''}", choices, cost, value, gate)

    def _tables(self, node: str) -> Iterator[tuple[tuple[str, ...], np.ndarray, np.ndarray]]:
        """What a node costs and is worth, as tables that add up."""
        layer = self._layers.get(node)
        around = set(self.costs.places.get(node, ()))
        if layer is not None:
            around |= {name for name, _ in (*layer.reads, *layer.makes)}
        groups = [name for name in self._kept if name in around]
        if len(groups) <= _MOST_MEETING:
            yield self._table(node, groups)
            return
        choices, whole, worth = self._table(node, [])
        yield choices, whole, worth
        for name in groups:
            choices, cost, value = self._table(node, [name])
            yield choices, cost - whole, value - worth

    def _table(self, node: str, groups: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        forms = (None, *self._forms.get(node, ()))
        kinds = (False, True) if node in self.integers.losses else (False,)
        rounding = np.array([0.0, self.integers.losses.get(node, 0.0)])[: len(kinds)]
        links = np.array([1 if form is None else 2 for form in forms])  # each layer of a chain rounds
        shape = tuple(len(self._kept[name]) for name in groups)
        cost, value = np.zeros((*shape, len(forms), len(kinds))), np.zeros((*shape, len(forms), len(kinds)))
        layer = self._layers.get(node)
        for place, removed in self._widths(groups):
            fitting = [form if form and self.forms.fits(node, removed, form) else None for form in forms]
            if node in self.costs.places:
                cost[place] = [
                    [self.costs.at(node, removed, form, integer=integer) for integer in kinds] for form in fitting
                ]
            if layer is not None:
                value[place] = [[-self.forms.loss(layer, removed, form)] for form in fitting]
            value[place] -= np.outer(links, rounding)
        names = list(map(_width, groups))
        names += [_form(node)] if len(forms) > 1 else []
        names += [_numbers(node)] if len(kinds) > 1 else []
        fixed = tuple(axis for axis, options in ((-2, forms), (-1, kinds)) if len(options) == 1)
        return tuple(names), cost.squeeze(fixed), value.squeeze(fixed)

    def _widths(self, groups: Sequence[str]) -> Iterator[tuple[tuple[int, ...], dict[str, int]]]:
        """Each combination of the widths of some groups: its place in a table, and the units that are gone."""
        units = {candidate.name: candidate.units for candidate in self.candidates}
        kept = [self._kept[name] for name in groups]
        places = np.ndindex(tuple(map(len, kept)))
        for place, counts in zip(places, itertools.product(*kept), strict=True):
            yield place, {name: units[name] - count for name, count in zip(groups, counts, strict=True)}

    def _conversions(self, border: Border) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        """What the conversions of a value cost, as tables that add up."""
        ends = [end for end in border.ends if end in self.integers.losses]
        if len(ends) <= _MOST_ENDS:
            yield self._converted(border, ends, 1.0)
            return
        makers = [] if border.maker is None else [border.maker]
        others = [end for end in ends if end not in makers]
        for end in others:
            yield self._converted(replace(border, readers=(end,)), [*makers, end], 1 / len(others))

    def _converted(self, border: Border, ends: Sequence[str], share: float) -> tuple[tuple[str, ...], np.ndarray]:
        whole = self.costs.conversion(border, {}, to_integers=True)
        smallest = {candidate.name: candidate.units - self._kept[candidate.name][-1] for candidate in self.candidates}
        groups = [
            name
            for name in self._kept
            if name in self.costs.places.get(border.node, ())
            and self.costs.conversion(border, {name: smallest[name]}, to_integers=True) != whole
        ][:_MOST_MEETING]
        cost = np.zeros((*(len(self._kept[name]) for name in groups), *(2 for _ in ends)))
        for place, removed in self._widths(groups):
            prices = [self.costs.conversion(border, removed, to_integers=way) for way in (False, True)]
            for kinds in np.ndindex(cost.shape[len(groups) :]):
                chosen = [end for end, integer in zip(ends, kinds, strict=True) if integer]
                cost[(*place, *kinds)] = share * sum(prices[way] for way in border.conversions(chosen))
        return (*map(_width, groups), *map(_numbers, ends)), cost


def _thinned(values: Sequence[int], most: int) -> tuple[int, ...]:
    """As many of the values as may be, the first and the last among them."""
    if len(values) <= most:
        return tuple(values)
    return tuple(values[index] for index in np.unique(np.linspace(0, len(values) - 1, most).round().astype(int)))


def _width(group: str) -> str:
    return f"width of {group}"


def _form(node: str) -> str:
    return f"form of {node}"


def _numbers(node: str) -> str:
    return f"numbers of {node}"


def _block(name: str) -> str:
    return f"block {name}"
