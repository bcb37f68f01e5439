"""Accuracy against cost as a picture: which of several ways to make a network smaller keeps most at each budget."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from graphopt.errors import DataError
from graphopt.ir.figures import drawing

Point = tuple[float, float]
"""Cost and metric."""


def front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other one beats: none costs as little or less with a metric as high or higher.

    Args:
        points: cost (less is better) and metric (more is better).

    Returns:
        Ascending by cost, and so by metric.

    Example:
        >>> front([(0.5, 80.0), (0.6, 79.0), (0.8, 90.0), (1.0, 90.0)])
        ((0.5, 80.0), (0.8, 90.0))
    """
    best: list[Point] = []
    for cost, metric in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or metric > best[-1][1]:
            best.append((cost, metric))
    return tuple(best)


def plot_pareto(
    curves: Mapping[str, Sequence[Point]],
    path: str | os.PathLike[str],
    *,
    cost: str = "share of the latency that is left",
    metric: str = "accuracy",
    reference: float | None = None,
) -> Path:
    """Draw one line a way of making a network smaller, and the front of all of them.

    Args:
        curves: name to points of cost (less is better) and metric (more is better), in any order.
        path: ends in .svg, .png or .pdf.
        cost: what the horizontal axis says; it runs from much to little.
        metric: what the vertical axis says.
        reference: metric of the network as it was, drawn as a line across.

    Returns:
        The path.

    Raises:
        DataError: there is no point, or one is not finite.
        GraphoptError: matplotlib is not installed, or the format is unknown.
        WriteError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> plot_pareto({"uniform": [(0.8, 91.0), (0.5, 84.0)]}, Path(folder.name) / "curves.svg").name
        'curves.svg'
        >>> folder.cleanup()
    """
    try:
        every = [(float(cost_of), float(metric_of)) for points in curves.values() for cost_of, metric_of in points]
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            "curves are no curves", where="curves", help='pass {"name": [(cost, metric), ...]}, numbers all of them'
        ) from error
    if not every or not all(math.isfinite(value) for point in every for value in point):
        raise DataError("there are no points to draw, or some are not finite", where="curves")
    file = Path(path)
    with drawing(file, width=5.2, height=3.8) as figure:
        axes = figure.subplots()
        axes.plot(*zip(*front(every), strict=True), color="tab:gray", linewidth=4, alpha=0.3, label="front")
        for name, points in curves.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        if reference is not None:
            axes.axhline(reference, color="tab:gray", linewidth=0.8)
        axes.invert_xaxis()
        axes.set_xlabel(cost)
        axes.set_ylabel(metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return file
