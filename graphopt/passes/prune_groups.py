"""Which groups a pruning may touch: what the analysis froze, what the user keeps, what is skipped by its role."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir

from graphopt.errors import GraphoptError, TargetMissedError
from graphopt.ir.channel_analysis import nodes_below, weight_sources
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.passes.contract import Context
from graphopt.passes.prune_plan import SkippedGroup
from graphopt.search.costs import producing_nodes

INEXACT = "inexact"
"""What stands among roles for all groups where removing differs from masking."""
ROLES = (
    "channels",
    "residual stream",
    "mlp hidden",
    "inner width",
    "hidden units",
    "heads",
    "query heads per key head",
    "head width",
    "value width",
    "groups",
    "group width",
    "rows",
    "inputs",
    "parts",
)
"""The roles that `graphopt.ir.channel_names` gives."""
DEFAULT_SKIP = ("residual stream", "head width", "value width", "query heads per key head", "groups", INEXACT)
"""Roles that stay whole unless asked for: what would cut the same weights twice, and what cannot be cut exactly."""
_MOST_BLOCKERS = 8
_MOST_REMARKS = 5
"""Groups of one reason that get a remark each; the rest share one."""


def check_patterns(option: str, patterns: Sequence[str]) -> None:
    """Raise `GraphoptError` where shell patterns are one string or something else, or roles that do not exist."""
    if isinstance(patterns, str):
        raise GraphoptError(
            f"{option} is one string", help=f"give a list of patterns: {option} = [{patterns!r}]", where=option
        )
    if not all(isinstance(pattern, str) for pattern in patterns):  # pyright: ignore[reportUnnecessaryIsInstance]
        example = '["head*"]' if option == "keep" else f'["{DEFAULT_SKIP[0]}"]'
        raise GraphoptError(
            f"{option} is {patterns!r}, it must be a list of patterns",
            where=option,
            help=f"each is a text, for instance {option} = {example}",
        )
    for pattern in patterns if option == "skip" else ():
        if not any(_matches(role, pattern) for role in (*ROLES, INEXACT)):
            raise GraphoptError(
                f"no channels have the role {pattern!r}", where=option, help=_suggestion(pattern, (*ROLES, INEXACT))
            )


def choose(
    groups: ChannelGroups, *, keep: Sequence[str], skip: Sequence[str], min_units: int
) -> tuple[list[ChannelGroup], list[SkippedGroup]]:
    """Split the groups into those that may lose units and those that stay, with the reason.

    Args:
        groups: all groups of a model.
        keep: shell patterns of names of groups, of initializers that they own a part of, or of nodes that their
            channels go into or come out of.
        skip: shell patterns of roles, or `INEXACT`.
        min_units: how many units of a group stay at least.

    Returns:
        The groups that may be pruned, at least one, and the others.

    Raises:
        GraphoptError: a pattern of `keep` matches nothing, or no group may be pruned.
    """
    check_keep(groups, keep)
    readers = _readers(groups) if keep else {}
    chosen: list[ChannelGroup] = []
    skipped: list[SkippedGroup] = []
    for group in groups:
        reason = group.reason if not group.prunable else _reason(groups, group, keep, skip, min_units, readers)
        if reason is None:
            chosen.append(group)
        else:
            skipped.append(SkippedGroup(group.name, group.role, group.units, reason))
    if not chosen:
        raise _nothing(skipped)
    return chosen, skipped


def _reason(
    groups: ChannelGroups,
    group: ChannelGroup,
    keep: Sequence[str],
    skip: Sequence[str],
    min_units: int,
    readers: dict[str, set[str]],
) -> str | None:
    """Why a group that could be pruned is not to be, None where it is."""
    touched = _nodes_around(groups, group, readers) if keep else set[str]()
    for pattern in keep:
        names = {group.name, *(name for name, _ in group.members), *touched}
        if any(_matches(name, pattern) for name in names):
            return f"keep has {pattern!r}"
    for pattern in skip:
        if _matches(group.role, pattern):
            return f"skip has {pattern!r}"
        if _matches(INEXACT, pattern) and not group.exact:
            return f"skip has {pattern!r}, and removing differs from masking: {group.inexact_reason}"
    if group.units <= min_units:
        return f"it has {group.units} units, and min_units keeps {min_units}"
    return None


def _nodes_around(groups: ChannelGroups, group: ChannelGroup, readers: dict[str, set[str]]) -> set[str]:
    """Names of the nodes that the channels of a group go into or come out of."""
    through = producing_nodes(groups, group, nodes_below(groups.analysis.model.graph))
    return {node.name or "" for node in through} | {node for name, _ in group.members for node in readers.get(name, ())}


def _readers(groups: ChannelGroups) -> dict[str, set[str]]:
    """Names of the nodes that read each initializer, directly or once it is transposed and the like."""
    found: dict[str, set[str]] = {}
    weights = groups.analysis.state.weights
    for node in nodes_below(groups.analysis.model.graph):
        for value in node.inputs:
            if value is None:
                continue
            sources: set[ir.Value] = weight_sources(value) if value in weights else {value}
            for source in sources:
                if source.is_initializer():
                    found.setdefault(source.name or "", set()).add(node.name or "")
    return found


def check_keep(groups: ChannelGroups, keep: Sequence[str]) -> None:
    """Raise `GraphoptError` where a pattern of `keep` matches no group, no weight and no node."""
    if not keep:
        return
    names = {group.name: None for group in groups} | {name: None for group in groups for name, _ in group.members}
    names |= {node.name or "": None for node in nodes_below(groups.analysis.model.graph)}
    names |= dict.fromkeys(groups.analysis.model.graph.initializers)
    for pattern in keep:
        if not any(_matches(name, pattern) for name in names):
            raise GraphoptError(
                f"keep has {pattern!r}, and no group, weight or node is called so",
                where="keep",
                help=_suggestion(pattern, list(names)),
            )


def _nothing(skipped: Sequence[SkippedGroup]) -> GraphoptError:
    """The error of a model in which nothing may be pruned, with what stands in the way."""
    by_choice = any(group.reason.startswith(("skip", "keep", "it has")) for group in skipped)
    return GraphoptError(
        f"nothing may be pruned: {_blockers(skipped) or 'the model has no channels'}",
        where="model",
        help="let more groups go: skip=(), a smaller keep or min_units"
        if by_choice
        else "`graphopt groups` shows what blocks which channels",
    )


def with_blockers(error: TargetMissedError, skipped: Sequence[SkippedGroup]) -> TargetMissedError:
    """The error of a target that cannot be met, with the groups that stand in its way and why they stay whole."""
    blockers = _blockers(skipped)
    advice = [*([error.help] if error.help else []), *([f"these stay whole: {blockers}"] if blockers else [])]
    return TargetMissedError(error.what, where=error.where, help="; ".join(advice) or None)


def _blockers(skipped: Sequence[SkippedGroup]) -> str:
    """The reasons for which groups stay, the most frequent first, each with the first of its groups."""
    reasons: dict[str, list[SkippedGroup]] = {}
    for group in skipped:
        reasons.setdefault(group.reason, []).append(group)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    lines = [
        f"{entries[0].name}{f' and {len(entries) - 1} more' if len(entries) > 1 else ''}: {reason}"
        for reason, entries in ordered[:_MOST_BLOCKERS]
    ]
    lines += [f"... and {len(ordered) - _MOST_BLOCKERS} more reasons"] if len(ordered) > _MOST_BLOCKERS else []
    return "; ".join(lines)


def remark_skipped(skipped: Sequence[SkippedGroup], context: Context) -> None:
    """One remark for each group that stays; of many with one reason the first few, and one for the rest."""
    counts = Counter(group.reason for group in skipped)
    told: Counter[str] = Counter()
    for group in skipped:
        told[group.reason] += 1
        if told[group.reason] <= _MOST_REMARKS:
            context.missed("prune channels", group.reason, group.name)
    for reason, count in counts.items():
        if count > _MOST_REMARKS:
            context.missed("prune channels", reason, f"{count - _MOST_REMARKS} more groups")


def _matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern matches; names hold brackets, and a name as it is matches itself."""
    return name == pattern or fnmatchcase(name, pattern)


def _suggestion(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    some = ", ".join(map(repr, known[:6])) + (", ..." if len(known) > 6 else "")
    return f"did you mean {near[0]!r}?" if near else f"there are {some or 'none'}"
