"""Channels and ranks decided together: Collaborative Compression on coupled groups, beside the two one by one."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.criteria.contract import Knowledge
from graphopt.errors import GraphoptError, TargetMissedError
from graphopt.search.collaborative_layers import Costing, LayerCost, find_layers
from graphopt.search.collaborative_rates import GlobalRates
from graphopt.search.collaborative_steps import Descent, Stride, descend, find_items
from graphopt.search.collaborative_surrogates import States, Surrogate, surrogate
from graphopt.search.collaborative_tables import Choice, Tables, TableSearch
from graphopt.search.contract import Candidate
from graphopt.search.costs import CostModel
from graphopt.search.rounding import check_round_to

MODES = ("joint", "prune", "decompose", "sequence")
"""Channels and ranks together; one of them alone; channels for half of the saving, then ranks for the other half."""
SEARCHES = ("tables", "rates")
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Collaboration:
    """What goes where.

    Attributes:
        selection: name of a group to the units that go, ascending; groups that lose none are left out.
        ranks: name of a node to the rank that it is decomposed to; the others stay one layer.
        rates: name of a node to the share of its cost that is saved, of all layers that were looked at.
        loss: the sum of I that is predicted.
        before: cost of the model.
        after: cost that is predicted.
        mode, search, surrogate: how it was found.
    """

    selection: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, int]
    rates: Mapping[str, float]
    loss: float
    before: float
    after: float
    mode: str = "joint"
    search: str = "tables"
    surrogate: str = ""

    @property
    def share(self) -> float:
        """What is left of the cost."""
        return self.after / self.before if self.before else 1.0

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Collaboration:
        """What `to_json` wrote.

        Raises:
            GraphoptError: the text is something else.

        Example:
            >>> found = Collaboration({"a": (1, 2)}, {"b": 3}, {"b": 0.5}, 0.1, 10.0, 5.0)
            >>> Collaboration.from_json(found.to_json()) == found
            True
        """
        try:
            data: dict[str, Any] = json.loads(text)
            data["selection"] = {name: tuple(map(int, units)) for name, units in data["selection"].items()}
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GraphoptError(f"this is no collaboration: {error}", help="pass what `to_json` returned") from error

    def __str__(self) -> str:
        head = (
            f"{self.mode} ({self.search}, {self.surrogate}): {self.share:.3f} of the cost, "
            f"{sum(map(len, self.selection.values()))} units of {len(self.selection)} groups, "
            f"{len(self.ranks)} layers decomposed, I = {self.loss:.3g}"
        )
        width = max(map(len, self.rates), default=0)
        rows = [
            f"  {name:{width}}  {rate:6.1%}{f'  rank {self.ranks[name]}' if name in self.ranks else ''}"
            for name, rate in self.rates.items()
        ]
        groups = [f"  - {len(units)} units of {name}" for name, units in self.selection.items()]
        return "\n".join([head, *groups, *rows])


@dataclass(frozen=True)
class Collaborative:
    """Joint channel pruning and low-rank decomposition (CC; Li et al. 2021, arXiv 2105.11228), on coupled channels.

    CC decides for each convolution alone which input channels and which rank-one terms go, in one ranking. Channels
    that are coupled go everywhere at once, so the ranking is over a group and all layers that read it
    (`graphopt.search.collaborative_steps.Item`); what the layers that make the group save is counted too. Layers that
    read a stream that stays whole only lose rank.

    How much each of them saves is decided by one of two searches. "rates" is CC's: the steps of its heuristic as curves
    of the loss by the rate, exponentials fitted to them, rates in closed form, and each ranking followed as far as its
    rate says, with the low-rank part dropped where the channels alone save as much. "tables" takes from the heuristic
    only the order of the channels: I of every layer at every width and rank that kernels like is in closed form, and
    the sum of I is minimised within the budget by coordinate descent at a price of cost. Widths and ranks come out
    rounded; no curve is fitted, and a layer between two groups is counted once.

    Top-1 on 2,000 images, ResNet-20 (87.95 before) at half of the MACs, inside of blocks, 256 images for everything,
    least-squares rebuild behind, "tables": joint 83.25, sequence 83.45, prune 79.55, decompose 73.65. Joint and
    sequence are not told apart by so few images (a standard error is 0.8 points), though the predicted loss of joint
    is less.

    Args:
        surrogate: name in `SURROGATES`, or a surrogate.
        mode: one of `MODES`.
        search: one of `SEARCHES`.
        stride: the multi-step heuristic.
        limit: largest rate of "rates".
        round_to: ranks are multiples of this; None for what kernels like. Widths have the steps of their candidates.

    Raises:
        GraphoptError: an option is out of range.

    Example:
        >>> Collaborative(surrogate="magnitude").mode
        'joint'
    """

    surrogate: str | Surrogate = "second-order"
    mode: str = "joint"
    search: str = "tables"
    stride: Stride = field(default_factory=Stride)
    limit: float = 0.95
    round_to: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("search", self.search, SEARCHES)):
            if value not in known:
                raise GraphoptError(f"unknown {name} {value!r}", help=f"one of {', '.join(known)}")
        surrogate(self.surrogate)
        check_round_to(self.round_to)
        if not 0 < self.limit < 1:
            raise GraphoptError(f"limit is {self.limit}, it must be between 0 and 1")


class Collaborator:
    """The layers of one model with everything that was measured of them, for as many targets and modes as are wanted.

    Args:
        knowledge: the model, and inputs where the surrogate needs them.
        candidates: groups that may lose units, with their steps; their scores are not read.
        costs: of the same model.
        kind: the surrogate.
        layer_cost: of one layer, for instance from a table of latencies; None for MACs.
        fixed: with `layer_cost`: cost of everything that is no layer.
        dense: names of operators that are not to be decomposed.
        may_be_empty: whether a model without a layer to prune or to decompose is no error.

    Raises:
        GraphoptError: there is nothing to prune and nothing to decompose.
        DataError: the surrogate needs inputs and there are none.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        candidates: Sequence[Candidate],
        costs: CostModel,
        kind: str | Surrogate = "second-order",
        *,
        layer_cost: LayerCost | None = None,
        fixed: float = 0.0,
        dense: Container[str] = (),
        may_be_empty: bool = False,
    ) -> None:
        self.candidates, self.surrogate = tuple(candidates), surrogate(kind)
        self.layers = find_layers(knowledge, candidates, costs, dense)
        if not self.layers and not may_be_empty:
            raise GraphoptError(
                "there is no layer to prune or to decompose: no Conv, Gemm or MatMul of the main graph has channels "
                "that may go, or a weight of its own that may be taken apart",
                where="model",
                help="run fold-constants before, where weights are computed of constants, and dequantize, where the "
                "model is quantized; let more go (keep, skip)",
            )
        self.costing = Costing(self.layers, costs, layer_cost, fixed)
        self.states: dict[str, States] = self.surrogate.states(knowledge, self.layers)
        self._descents: dict[Stride, list[Descent]] = {}
        self._tables: dict[tuple[Stride, int | None], Tables] = {}

    def solve(self, share: float, how: Collaborative | None = None) -> Collaboration:
        """Find what goes.

        Args:
            share: of the cost that is to be left, in (0, 1].
            how: mode, search and their options; its surrogate is that of this object.

        Raises:
            GraphoptError: the share is out of range.
            TargetMissedError: more is left with all gone that may go.
        """
        how = how or Collaborative()
        if not 0 < share <= 1:
            raise GraphoptError(f"a share of {share}", help="give a number above 0 and at most 1")
        tables = self.tables(how)
        whole = self.costing.total({}, {})
        choice = self._chosen(how, tables, whole, share)
        after = self.costing.total(choice.removed, choice.ranks)
        if after > share * whole * (1 + _TOLERANCE):
            raise TargetMissedError(
                f"{share:.3f} of the cost was asked for, and {after / whole:.3f} is left with all gone that may go",
                where=how.mode,
                help="ask for less, let more groups go, round to smaller steps, or use mode 'joint'",
            )
        return self._result(how, tables, choice, whole, after)

    def descents(self, stride: Stride) -> list[Descent]:
        """The steps of the heuristic for all items; kept."""
        if stride not in self._descents:
            items = find_items(self.layers, self.candidates)
            self._descents[stride] = [descend(item, self.states, stride) for item in items]
        return self._descents[stride]

    def tables(self, how: Collaborative) -> Tables:
        """I at all widths and ranks, with the channels in the order of the heuristic; kept."""
        stride = self._stride(how)
        key = (stride, how.round_to)
        if key not in self._tables:
            orders = {candidate.name: candidate.order for candidate in self.candidates}
            if "units" in stride.kinds:
                orders |= {one.item.name: one.order for one in self.descents(stride) if one.item.candidate is not None}
            self._tables[key] = Tables(self.layers, self.candidates, orders, self.states, how.round_to)
        return self._tables[key]

    def _stride(self, how: Collaborative) -> Stride:
        alone = how.mode in ("prune", "sequence") or (how.mode == "joint" and how.search == "tables")
        kinds = ("units",) if alone else ("terms",) if how.mode == "decompose" else how.stride.kinds
        return Stride(how.stride.gamma, how.stride.share, kinds)

    def _chosen(self, how: Collaborative, tables: Tables, whole: float, share: float) -> Choice:
        budget = share * whole
        if how.search == "rates" and how.mode != "sequence":
            return GlobalRates(self.descents(self._stride(how)), self.costing, how.limit).solve(budget, tables)
        if how.mode == "decompose":
            return TableSearch(tables, self.costing, fixed=dict.fromkeys(tables.widths, 0)).solve(budget)
        if how.mode == "prune":
            return TableSearch(tables, self.costing, low_rank=False).solve(budget)
        if how.mode == "sequence":
            return self._in_sequence(how, tables, whole, share)
        search = TableSearch(tables, self.costing)
        apart = [TableSearch(tables, self.costing, low_rank=False).solve(budget)]
        apart.append(self._in_sequence(how, tables, whole, share))
        return search.solve(budget, apart)

    def _in_sequence(self, how: Collaborative, tables: Tables, whole: float, share: float) -> Choice:
        """Channels for half of the saving, then ranks."""
        half = (1 + share) / 2 * whole
        if how.search == "rates":
            first = GlobalRates(self.descents(self._stride(how)), self.costing, how.limit).solve(half, tables)
        else:
            first = TableSearch(tables, self.costing, low_rank=False).solve(half)
        return TableSearch(tables, self.costing, fixed=first.removed).solve(share * whole)

    def _result(self, how: Collaborative, tables: Tables, choice: Choice, whole: float, after: float) -> Collaboration:
        selection = {
            name: tuple(sorted(map(int, tables.orders[name][:count])))
            for name, count in choice.removed.items()
            if count
        }
        rates: dict[str, float] = {}
        for layer in self.layers:
            before = self.costing.layer(layer, {})
            left = self.costing.layer(layer, choice.removed, choice.ranks.get(layer.name))
            rates[layer.name] = 1 - left / before if before else 0.0
        return Collaboration(
            selection,
            dict(choice.ranks),
            rates,
            tables.loss(choice),
            whole,
            after,
            how.mode,
            how.search,
            str(self.surrogate),
        )
