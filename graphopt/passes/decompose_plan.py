"""What a decomposition decided, as data: printable, JSON both ways, replayable on the same model (design.md D5)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.factorizations import FORMS, Rank
from graphopt.passes.prune_plan import check_digest, digest_of
from graphopt.search import Costs

_MOST_DECLINED = 12
"""Reasons that are printed, the most frequent first."""


@dataclass(frozen=True)
class LayerPlan:
    """One weight that is taken apart.

    Attributes:
        node: name of the operator, the first of those that read the weight.
        weight: name of the weight.
        form: name of the factorisation.
        rank: of it.
        error: expected squared error of the outputs over their variance; what the form was chosen by.
        macs: multiply-accumulates of the layer and of the chain, one sample.
        parameters: elements of the weight and of all weights of the chain.
        speed: how many times faster the chain was, measured; None where it was not.

    Raises:
        GraphoptError: there is no such form, or the rank is none.
    """

    node: str
    weight: str
    form: str
    rank: Rank
    error: float = 0.0
    macs: tuple[int, int] = (0, 0)
    parameters: tuple[int, int] = (0, 0)
    speed: float | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise GraphoptError(
                f"there is no factorisation {self.form!r}", where=self.node, help=f"there are {', '.join(FORMS)}"
            )
        if not self.rank or not all(type(one) is int and one >= 1 for one in self.rank):
            raise GraphoptError(
                f"{self.rank!r} is no rank",
                where=self.node,
                help="a rank is a tuple of whole numbers of at least 1: one, or two for tucker",
            )


@dataclass(frozen=True)
class DeclinedLayer:
    """One weight that stays as it is.

    Attributes:
        node: name of the operator.
        weight: name of the weight; empty where it has none.
        reason: why, one clause, with figures where something was measured.
    """

    node: str
    weight: str
    reason: str


@dataclass(frozen=True)
class DecomposePlan:
    """Every decision of one `Decompose.plan`: apply it with `Decompose.apply`, store it with `to_json`.

    Factors are not part of it: they follow from the weights and from the second moments of the inputs, which are made
    anew from the same source.

    Attributes:
        model: digest of the model that the plan is for; see `graphopt.passes.prune_plan.digest_of`.
        layers: the weights that are taken apart, in graph order.
        declined: the weights that stay.
        asked: what was asked for.
        source: where inputs came from and why; empty where none were used.
        compensation: whether biases make up for the mean error.
        before: costs of the model for one sample.
        after: costs of the model with the chains.
        notes: what the user should know; sentences.

    Example:
        >>> plan = DecomposePlan("", (LayerPlan("conv1", "w1", "channel-svd", (16,)),))
        >>> DecomposePlan.from_json(plan.to_json()) == plan
        True
    """

    model: str
    layers: tuple[LayerPlan, ...] = ()
    declined: tuple[DeclinedLayer, ...] = ()
    asked: str = ""
    source: str = ""
    compensation: bool = True
    before: Costs = field(default_factory=Costs)
    after: Costs = field(default_factory=Costs)
    notes: tuple[str, ...] = ()

    @classmethod
    def by_hand(
        cls, model: ir.Model, choices: Mapping[str, tuple[str, Rank | int]], *, compensation: bool = True
    ) -> DecomposePlan:
        """A plan that somebody else made.

        Args:
            model: the model that it is for.
            choices: name of an operator to form and rank.
            compensation: whether biases make up for the mean error.

        Returns:
            A plan without errors and costs; whether forms and ranks fit is checked when it is applied.

        Raises:
            GraphoptError: there is no such form, the rank is none, or no operator is called so.
        """
        weights = {node.name: node for node in model.graph}
        layers: list[LayerPlan] = []
        for name, (form, rank) in choices.items():
            if name not in weights:
                raise GraphoptError(f"no operator is called {name!r}", help="`graphopt inspect` lists the names")
            held = [value.name or "" for value in weights[name].inputs[:2] if value and value.is_initializer()]
            layers.append(LayerPlan(name, held[0] if held else "", form, (rank,) if isinstance(rank, int) else rank))
        return cls(digest_of(model), tuple(layers), asked="by hand", compensation=compensation)

    def check(self, model: ir.Model) -> None:
        """Raise `GraphoptError` unless this is the model that the plan was made for."""
        check_digest(self.model, model)

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` turns back into an equal plan."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecomposePlan:
        """The plan that `to_json` wrote, also after a round trip through text.

        Raises:
            GraphoptError: the data is no such plan.
        """
        try:
            unknown = set(data) - {entry.name for entry in fields(cls)}
            if unknown:
                raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
            values = {**data}
            values["layers"] = tuple(_layer(one) for one in data["layers"])
            values["declined"] = tuple(DeclinedLayer(**one) for one in data["declined"])
            values["before"], values["after"] = Costs(**data["before"]), Costs(**data["after"])
            values["notes"] = tuple(data["notes"])
            plan = cls(**values)
            texts = (plan.model, plan.asked, plan.source, *plan.notes)
            if not all(isinstance(text, str) for text in texts):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError("a text is something else")
            if len({layer.node for layer in plan.layers}) < len(plan.layers):
                raise ValueError("a layer occurs twice")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise GraphoptError(
                f"not a decomposition plan: {error}", help="pass what DecomposePlan.to_json wrote"
            ) from error
        return plan

    def __str__(self) -> str:
        lines = [f"decompose {self.asked}{' · biases take up the mean' if self.compensation else ''}"]
        lines += [f"inputs: {self.source}"] if self.source else []
        for name in ("macs", "params", "bytes"):
            first, then = self.before.get(name), self.after.get(name)
            lines.append(f"{name:<7}{first:>16,} -> {then:>16,}  {f'{then / first:.1%}' if first else '-'}")
        rows = [("layer", "form", "rank", "error", "MACs", "faster")]
        rows += [_row(layer) for layer in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
        lines += [f"note: {note}" for note in self.notes]
        reasons = Counter(one.reason for one in self.declined).most_common()
        first_of = {one.reason: one.node for one in reversed(self.declined)}
        for reason, count in reasons[:_MOST_DECLINED]:
            lines.append(f"stays: {first_of[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}")
        more = sum(count for _, count in reasons[_MOST_DECLINED:])
        lines += [f"stays: {more} more, for other reasons"] if more else []
        return "\n".join(lines)


def blockers(declined: Sequence[DeclinedLayer]) -> str:
    """The reasons for which layers stay, the most frequent first, each with its first layer."""
    reasons = Counter(one.reason for one in declined).most_common(_MOST_DECLINED)
    first = {one.reason: one.node for one in reversed(declined)}
    return "; ".join(
        f"{first[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}" for reason, count in reasons
    )


def _layer(data: Mapping[str, Any]) -> LayerPlan:
    values: dict[str, Any] = {**data, "rank": tuple(data["rank"])}
    for name in ("macs", "parameters"):
        first, then = data[name]
        values[name] = (int(first), int(then))
    values["error"] = float(data["error"])
    if not math.isfinite(values["error"]):
        raise ValueError(f"an error is {values['error']}")
    return LayerPlan(**values)


def _row(layer: LayerPlan) -> tuple[str, ...]:
    first, then = layer.macs
    share = f"{then / first:.2f}" if first else "-"
    speed = "-" if layer.speed is None else f"{layer.speed:.2f}x"
    return layer.node, layer.form, " ".join(map(str, layer.rank)), f"{layer.error:.3g}", share, speed
