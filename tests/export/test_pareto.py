"""Accuracy against cost as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import graphopt
from graphopt.errors import DataError, GraphoptError
from graphopt.export.pareto import front

CURVES = {"uniform": [(0.8, 90.0), (0.5, 70.0)], "milp": [(0.5, 84.0), (0.8, 91.0), (0.6, 88.0)]}


def test_the_front_is_what_nothing_beats() -> None:
    points = [point for curve in CURVES.values() for point in curve]
    found = front(points)
    assert found == ((0.5, 84.0), (0.6, 88.0), (0.8, 91.0))
    for point in points:
        assert point in found or any(cost <= point[0] and metric >= point[1] for cost, metric in found)


def test_the_picture_names_each_way_and_is_the_same_twice(tmp_path: Path) -> None:
    first, second = (graphopt.plot_pareto(CURVES, tmp_path / name, reference=92.0) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == second.read_bytes()
    assert graphopt.plot_pareto(CURVES, tmp_path / "c.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(("curves", "name", "kind"), [
    ({}, "a.svg", DataError),
    ({"a": [(0.5, math.nan)]}, "a.svg", DataError),
    ([], "a.svg", DataError),
    ({"a": [(1,)]}, "a.svg", DataError),
    ({"a": [("much", "little")]}, "a.svg", DataError),
    (CURVES, "a.bmp", GraphoptError),
])  # fmt: skip
def test_bad_input(curves: Any, name: str, kind: type, tmp_path: Path) -> None:
    with pytest.raises(kind):
        graphopt.plot_pareto(curves, tmp_path / name)
    assert not list(tmp_path.iterdir())
