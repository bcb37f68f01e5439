"""The criterion of two domains: which channels say the same of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.criteria.contract import Criterion, Knowledge, check_combination, combined, required_feeds
from graphopt.criteria.members import Membership
from graphopt.criteria.observation import by_channel, differing_shapes, living_values, stream
from graphopt.errors import DataError
from graphopt.inputs.calibration import Calibration
from graphopt.ir.channels import ChannelGroup


@dataclass(frozen=True)
class DomainSimilarity(Criterion):
    """How alike the mean feature maps of a channel are on two domains (DSS; Sun 2023, "Pruning for Better Domain
    Generalizability"): the most domain-dependent channels go first.

    The activations of a channel are averaged over the inputs of `Knowledge.feeds` and over those of `shifted`; the
    score is (1 + cosine of the two maps) / 2, and 0 for channels that are dead on either. Maps are compared position
    by position, so positions must mean the same in all inputs. Of a single position the cosine is only the sign; there
    it is multiplied by the smaller of the two means over the larger one.
    The inputs of the second domain are looked at: that is adaptation with unlabelled data of the target. Where it
    looks is said at `ActivationMean`. Comparable between groups.

    Args:
        combine: how several values that carry the channels become one score: "mean", "max", "sum" or "norm".
        shifted: inputs of the second domain, as calibration: an iterable of arrays, tuples or dicts by input name,
            iterable more than once.

    Raises:
        DataError: `shifted` or `Knowledge.feeds` is missing, an item does not fit the model, or the shapes of
            activations differ between batches.

    Example:
        >>> DomainSimilarity(shifted=[{"x": np.zeros((1, 2), np.float32)}]).name
        'domain-similarity'
    """

    name: ClassVar[str] = "domain-similarity"
    needs: ClassVar[str] = "inputs"
    combine: str = "mean"
    shifted: Iterable[Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_combination(self.combine)

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        feeds = required_feeds(self, knowledge)
        if self.shifted is None:
            raise DataError(
                "the criterion 'domain-similarity' compares two domains, and there is one",
                where="shifted",
                help="pass inputs of the other domain: criterion('domain-similarity', shifted=batches)",
            )
        shifted = Calibration(knowledge.model, self.shifted, name="shifted")
        membership = Membership(knowledge)
        places = {group.name: living_values(membership, group, knowledge.model) for group in groups}
        values = [value for found in places.values() for value in found]
        rigid = {
            value for group in groups for value in places[group.name] if 0 in membership.ownership(group).axes(value)
        }
        maps: list[dict[ir.Value, _Map]] = [{}, {}]
        for domain, batches in zip(maps, (feeds, shifted), strict=True):

            def see(value: ir.Value, array: np.ndarray, domain: dict[ir.Value, _Map] = domain) -> None:
                domain.setdefault(value, _Map(averaged=value not in rigid)).see(value, array)

            stream(knowledge.model, values, batches, see, knowledge.threads)
        found: dict[str, np.ndarray] = {}
        for group in groups:
            pairs = [(value, maps[0][value].mean, maps[1][value].mean) for value in places[group.name]]
            found[group.name] = self._similarity(membership, group, pairs)
        return found

    def _similarity(
        self, membership: Membership, group: ChannelGroup, pairs: Sequence[tuple[ir.Value, np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        ownership = membership.ownership(group)
        parts: list[np.ndarray] = []
        for value, source, target in pairs:
            if source.shape != target.shape:
                raise differing_shapes(value)
            for axis in ownership.axes(value):
                owned = ownership.owned(value, axis, source.shape[axis])
                maps = [by_channel(each, axis) for each in (source, target)]
                inner, left, right = (
                    owned.sums((a * b).sum(axis=1)) for a, b in (maps, (maps[0], maps[0]), (maps[1], maps[1]))
                )
                single = maps[0].shape[1] * len(owned.units) == group.units
                length = np.maximum(left, right) if single else np.sqrt(left * right)
                cosine = np.divide(inner, length, out=np.full(len(inner), -1.0), where=np.minimum(left, right) > 0)
                parts.append((1 + np.clip(cosine, -1, 1)) / 2)
        # What lives in subgraphs alone cannot be seen; nothing is known to depend on the domain.
        return combined(parts, self.combine) if parts else np.ones(group.units)


class _Map:
    """Mean over the first axis, the batch, position by position; over batches alone where channels are on it."""

    def __init__(self, *, averaged: bool) -> None:
        self.averaged = averaged
        self.count = 0
        self.total: np.ndarray | None = None

    @property
    def mean(self) -> np.ndarray:
        """Float64, the shape of one activation with a first axis of 1."""
        assert self.total is not None
        return self.total / max(self.count, 1)

    def see(self, value: ir.Value, array: np.ndarray) -> None:
        """Take in one batch."""
        total = array.sum(axis=0, keepdims=True, dtype=np.float64) if self.averaged else array.astype(np.float64)
        if self.total is not None and self.total.shape != total.shape:
            raise differing_shapes(value)
        self.total = total if self.total is None else self.total + total
        self.count += array.shape[0] if self.averaged else 1
