"""The benchmarks behind the README's figures: they load, and what they left says where it comes from."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import contest, old_file, results, run
from graphopt.export.benchmark import Benchmark, Latency, Speed

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MEASURING = ("accuracy", "channels", "channels_scale", "cost", "exact", "int8", "lift", "old_file", "training")
WITH_DATA = {"accuracy", "training"}
"""Those that need ../shared/data, and are run only where it is."""
RUNNABLE = sorted(file.stem for file in FOLDER.glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))
COMMITTED = sorted((FOLDER / "results").glob("*.json"))


def problems(document: dict[str, object]) -> list[str]:
    """What is missing for somebody who wants to judge the figures, or to measure them again."""
    machine, versions = document.get("machine"), document.get("versions")
    checks = {
        "no command": str(document.get("command", "")).startswith("python -m benchmarks."),
        "no date": str(document.get("date", ""))[:2] == "20",
        "no machine": isinstance(machine, dict) and machine.get("processor") and machine.get("cores"),
        "no versions": isinstance(versions, dict) and {"python", "onnxruntime", "graphopt"} <= set(versions),
        "no rows": bool(document.get("rows")),
        "no goals": bool(document.get("goals")),
        "not a complete run": document.get("complete") is True,
    }
    return [problem for problem, fine in checks.items() if not fine]


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_benchmark_can_be_run_by_name(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_run_runs_what_there_is() -> None:
    assert {*run.BENCHMARKS, *run.STUDIES, *WITH_DATA, "run"} == set(RUNNABLE)
    assert set(MEASURING) == {*run.BENCHMARKS, *WITH_DATA}


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_results_say_where_they_come_from(file: Path) -> None:
    assert file.stem in MEASURING
    assert problems(json.loads(file.read_text(encoding="utf-8"))) == []


def test_what_is_written_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    found = results.Results("exact", "question?", "python -m benchmarks.exact", complete=True)
    found.rows = [{"model": "a [b]", "error": float("inf")}]
    found.goals = [results.Goal("faster", "2.0 [1.9]", True), results.Goal("smaller", "3 MB", False)]
    path = found.show_and_write((("model", lambda row: row["model"]),))
    document = json.loads(path.read_text(encoding="utf-8"))
    assert problems(document) == []
    assert document["rows"][0]["error"] is None
    printed = capsys.readouterr().out
    assert "a [b]" in printed
    assert "reached  faster: 2.0 [1.9]" in printed
    assert "MISSED   smaller: 3 MB" in printed


def test_incomplete_results_are_told_apart() -> None:
    complete = results.Results("exact", "?", "python -m benchmarks.exact", True, [{}], [results.Goal("", "", True)])
    document = complete.to_json()
    for key in ("command", "date", "machine", "versions", "rows", "goals", "complete"):
        assert problems({**document, key: None}) != [], key


def test_a_part_of_the_models_is_no_complete_run() -> None:
    assert results.read_options("exact", None, [], models=("a", "b")).complete
    for arguments in (["a"], ["--quick"], ["--seconds", "1"]):
        assert not results.read_options("exact", None, arguments, models=("a", "b")).complete


def test_who_is_faster() -> None:
    """The rival takes 2 ms where the subject takes 1 ms: twice as fast, and not the other way round."""

    def opening(rival: float, low: float, high: float) -> Benchmark:
        latencies = (Latency(1.0, 1.0, 1.0), Latency(1 / rival, 1 / high, 1 / low))
        speeds = (Speed(1.0, 1.0, 1.0), Speed(rival, low, high))
        return Benchmark(("us", "them"), latencies, speeds, rounds=7, threads=1, target="cpu")

    def against(*openings: Benchmark) -> contest.Contest:
        return contest.Contest("us", {"them": openings}, {}, {})

    slower, faster = opening(0.5, 0.4, 0.8), opening(2.0, 1.6, 2.5)
    assert against(slower, slower, faster).speed_over("them") == Speed(2.0, 1.25, 2.5)
    assert against(faster, faster).is_beaten_by("them")
    assert not against(faster, faster, slower).is_beaten_by("them")
    assert not against(opening(1.01, 1.005, 1.02)).is_beaten_by("them")
    assert not against(opening(1.2, 0.9, 1.4)).is_beaten_by("them")


def test_the_old_file_is_old() -> None:
    proto = old_file.Detector().proto()
    inputs = {entry.name for entry in proto.graph.input}
    assert proto.opset_import[0].version == 9
    assert {weight.name for weight in proto.graph.initializer} <= inputs
    assert 100 <= len(proto.graph.node) <= 300


def test_a_contest_opens_files_and_measures_errors(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 21]> g (float[4] x) => (float[4] y) <float two = {%s}> { y = Mul(x, two) }'
    )
    files = {"right": tmp_path / "right.onnx", "wrong": tmp_path / "wrong.onnx"}
    for path, factor in zip(files.values(), ("2", "3"), strict=True):
        onnx.save(onnx.parser.parse_model(text % factor), path)
    feeds = {"x": np.array([1, 2, 3, 4], np.float32)}
    found = contest.contest(files, reference=files["right"], seconds=0.02, openings=2, feeds=feeds)
    assert found.errors == {"right": 0.0, "wrong": 0.5}
    assert len(found.pairs["wrong"]) == 2
    assert min(found.load_seconds.values()) > 0
    json.dumps(found.to_json(), allow_nan=False)
