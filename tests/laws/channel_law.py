"""The law of the dependency engine, as functions that the zoo, the fuzzer and the row tests share.

Cut equals masked: a model without some units computes what the model with these units set to 0 computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import numpy as np
import onnx_ir as ir

import graphopt
from graphopt.errors import SelectionError
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.ir.session import open_session

TOLERANCE = 1e-4
"""Largest difference over the largest magnitude of the masked output."""


def random_selection(groups: ChannelGroups, seed: int, share: float, *, inexact: bool = False) -> dict[str, list[int]]:
    """About `share` of the units of every prunable group, at least one, as far as something is left on every axis."""
    random = Random(seed)
    selection: dict[str, list[int]] = {}
    for group in groups:
        if not group.prunable or not (group.exact or inexact):
            continue
        count = min(max(1, round(group.units * share)), group.units - 1)
        while count > 0:
            attempt = {**selection, group.name: sorted(random.sample(range(group.units), count))}
            try:
                groups.atoms(attempt)
            except SelectionError:
                count //= 2  # several groups share an axis, and nothing would be left on it
                continue
            selection = attempt
            break
    return selection


def difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Largest difference of any output over its largest magnitude; infinite where shapes or integers differ."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return np.inf
        if a.dtype.kind not in "fc":
            if not np.array_equal(a, b):
                return np.inf
        elif a.size:
            a, b = a.astype(np.float64), b.astype(np.float64)
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                return np.inf
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)))
    return worst


def run(model: ir.Model, feeds: Mapping[str, np.ndarray], *, optimized: bool = False) -> list[np.ndarray]:
    return open_session(model, optimized=optimized).run_feeds(dict(feeds))


def cut_against_masked(
    model: ir.Model,
    groups: ChannelGroups,
    selection: Mapping[str, Sequence[int]],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    optimized: bool = True,
) -> tuple[float, float]:
    """How far the pruned model is from the masked one, and the masked one from the model, over all feeds.

    Args:
        optimized: whether the pruned model runs with onnxruntime's own optimisations, at its default level.
    """
    cut = graphopt.remove_channels(model, selection, groups=groups)
    masked = graphopt.mask_channels(model, selection, groups=groups)
    sessions = [open_session(masked, optimized=False), open_session(cut, optimized=optimized)]
    sessions.append(open_session(model, optimized=False))
    error = moved = 0.0
    for feed in feeds:
        expected, found, original = (session.run_feeds(dict(feed)) for session in sessions)
        error, moved = max(error, difference(expected, found)), max(moved, difference(expected, original))
    return error, moved


def partition(groups: Sequence[ChannelGroup]) -> set[frozenset[tuple[str, int, int]]]:
    """What every unit that can be removed owns, without names of groups: (initializer, axis, index)."""
    return {
        frozenset(
            (name, axis, int(index))
            for name, slices in group.slices(unit).items()
            for axis, indices in slices
            for index in indices
        )
        for group in groups
        if group.prunable
        for unit in range(group.units)
    }
