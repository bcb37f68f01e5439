"""The benchmarks behind the README's figures: they load, and what they left says where it comes from."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import graphopt
from benchmarks import contest, datafree, datafree_sections, datafree_tables, datafree_verdict, old_file, results, run
from benchmarks.datafree_setting import without_statistics
from graphopt.ir.timing import Benchmark, Latency, Speed
from graphopt.passes.prune_channels import PruneChannels

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MEASURING = (
    *("accuracy", "channels", "channels_scale", "cost", "datafree", "exact", "int8", "lift", "old_file", "training"),
    *("weights", "latency", "decomposition", "budgets", "openvino_int8"),
)
WITH_DATA = {"accuracy", "datafree", "training", "decomposition", "budgets"}
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
    measuring = {*run.BENCHMARKS, *run.NETWORKED, *WITH_DATA}
    assert {*measuring, *run.STUDIES, "run", "openvino_worker"} == set(RUNNABLE)
    assert set(MEASURING) == measuring


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


def measured(section: str, date: str, **figures: object) -> dict[str, object]:
    """A document of `benchmarks.datafree` with one section of one row."""
    row = {"section": section, "variant": "float", "model": "ResNet-20", **figures}
    return {"sections": {section: {"date": date}}, "rows": [row]}


def test_a_section_that_runs_alone_leaves_the_others() -> None:
    found = datafree.SectionResults("datafree", "?", "python -m benchmarks.datafree bits", complete=False)
    committed = measured("forms", "2026-01-02", top1=1.0)
    for other in ("bits", "recovery"):
        part = measured(other, "2026-01-02", top1=1.0)
        committed = {
            "sections": {**committed["sections"], **part["sections"]},  # type: ignore[dict-item]
            "rows": [*committed["rows"], *part["rows"]],  # type: ignore[misc]
        }
    others = [name for name in datafree.SECTIONS if name != "bits"]
    for document in (
        committed,
        measured("recovery", "2026-01-03", top1=2.0),
        measured("forms", "2025-12-31", top1=3.0),
    ):
        found.take(document, others)
    found.put("bits", {"date": "2026-01-04"}, measured("bits", "", top1=4.0)["rows"])  # type: ignore[arg-type]
    assert {row["section"]: row["top1"] for row in found.rows} == {"forms": 1.0, "bits": 4.0, "recovery": 2.0}
    assert [row["section"] for row in found.rows] == ["forms", "bits", "recovery"]
    assert set(found.to_json()["sections"]) == {"forms", "bits", "recovery"}


def test_sections_are_kept_as_soon_as_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One section after the other, the last one failing once: what was done is in the result, and it is complete."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "committed")
    monkeypatch.setattr(results, "PARTIAL_FOLDER", tmp_path / "partial")
    monkeypatch.setattr(datafree, "PICTURE", tmp_path / "curves.svg")
    monkeypatch.setattr(datafree, "DATA", tmp_path)
    monkeypatch.setattr(datafree, "SECTIONS", {"recovery": lambda _: iter(recovered(1.0)), "cost": failing})
    with pytest.raises(RuntimeError, match="power failure"):
        datafree.main([])
    assert not (tmp_path / "committed").exists()
    monkeypatch.setitem(datafree.SECTIONS, "cost", lambda _: iter([cost_row(70.0, 100.0)]))
    datafree.main(["cost"])
    document = json.loads((tmp_path / "committed" / "datafree.json").read_text(encoding="utf-8"))
    assert problems(document) == []
    assert [row["section"] for row in document["rows"]] == ["recovery", "cost"]
    assert document["command"] == "python -m benchmarks.datafree"
    assert document["sections"]["cost"]["command"].endswith(" cost")
    assert "| ResNet-20 | recovered |" in (tmp_path / "committed" / "datafree.md").read_text(encoding="utf-8")
    datafree.main(["cost", "--quick"])
    again = json.loads((tmp_path / "committed" / "datafree.json").read_text(encoding="utf-8"))
    assert again == document
    assert not json.loads((tmp_path / "partial" / "datafree.json").read_text(encoding="utf-8"))["complete"]
    capsys.readouterr()


def failing(_: object) -> object:
    raise RuntimeError("power failure")


def recovered(lost: float) -> list[dict[str, object]]:
    counts = {"parameters": 2000, "macs": 3_000_000, "steps": 390}
    return [
        {"section": "recovery", "variant": "recovered", "model": "ResNet-20", "top1": 88 - lost, "lost": lost, **counts}
    ]


def cost_row(seconds: float, peak: float) -> dict[str, object]:
    sizes = {"loaded_bytes": 0, "peak_bytes": peak * 1e6, "model_bytes": 1e6, "moments_bytes": 1e6}
    times = {"seconds": seconds, "again_seconds": 1.0, "progress_updates": 3, "ratio": 0.3}
    return {"section": "cost", "variant": "probes", "model": "resnet50", **times, **sizes}


def reached(*rows: dict[str, object]) -> list[bool]:
    return [goal.reached for goal in datafree_verdict.goals(rows)]


def test_goals_of_pruning_can_be_reached_and_missed() -> None:
    """Each limit from both sides."""
    assert [reached(*recovered(lost)) for lost in (3.0, 3.1)] == [[True], [False]]
    assert [reached(cost_row(seconds, 900.0)) for seconds in (59.0, 61.0)] == [[True, True], [False, True]]
    assert reached(cost_row(59.0, 1011.0)) == [True, False]
    assert reached({**cost_row(1.0, 1.0), "failure": "died"}) == [False]
    common = {"ratio": 0.3, "model": "ResNet-56"}
    for section, variant, more, limit in (
        ("forms", datafree_verdict.BEST_FREE.name, {}, 1.2),
        ("forms", datafree_verdict.WITH_IMAGES.name, {}, 1.0),
        ("folded", datafree_verdict.BEST_FREE.name, {"cut": "own L2"}, 2.0),
        ("bits", "quantized, rebuilt", {"weight_bits": 6, "bits": 6}, 3.0),
    ):
        row = {"section": section, "variant": variant, **common, **more}
        assert [reached({**row, "top1": 89 - lost, "lost": lost}) for lost in (limit, limit + 0.1)] == [[True], [False]]
    bare = datafree_verdict.COMPENSATIONS[0][0]
    vit = {"section": "transformer", "model": "ViT", "ratio": 0.3}
    synthetic = datafree_verdict.COMPENSATIONS[-1][0]
    for lost, fine in ((2.0, True), (2.1, False)):
        assert reached({**vit, "variant": bare, "lost": 4.0}, {**vit, "variant": synthetic, "lost": lost}) == [fine]
    for median, fine in ((1.01, True), (0.99, False)):
        row = {"section": "forms", "variant": "rounded", **common, "speed": {"median": median}}
        assert reached(row, {**row, "ratio": 0.1, "speed": {"median": 0.5}}) == [fine]


@pytest.mark.parametrize("gain", [0.5, -0.5])
def test_the_curve_must_be_above_uniform_everywhere(gain: float) -> None:
    shared = {"section": "allocation", "model": "ResNet-20", "inputs": "free"}
    rows = [
        {**shared, "variant": name, "target": target, "macs_share": target, "top1": top1}
        for name, figures in (
            (datafree_sections.BASELINE, {0.9: 88.0, 0.5: 80.0}),
            (datafree_sections.STRATEGIES[1][0], {0.9: 88.0 + gain, 0.5: 85.0}),
        )
        for target, top1 in figures.items()
    ]
    assert reached(*rows) == [gain > 0]
    curves = datafree_tables.curves(rows)
    assert curves[datafree_sections.BASELINE] == [(0.9, 88.0), (0.5, 80.0)]


def test_the_curves_are_plotted(tmp_path: Path) -> None:
    shared = {"section": "allocation", "model": "ResNet-20", "top1": 80.0}
    rows: list[dict[str, object]] = [{**shared, "variant": "float"}]
    for inputs in ("free", "images"):
        for name in (datafree_sections.BASELINE, "another"):
            point = {**shared, "variant": name, "inputs": inputs}
            rows += [{**point, "target": target, "macs_share": target} for target in (0.9, 0.5)]
    assert datafree_tables.plot(rows, tmp_path / "img" / "curves.svg")
    text = (tmp_path / "img" / "curves.svg").read_text(encoding="utf-8")
    assert text.count('<g id="axes_') == 2


def test_the_same_units_go_with_and_without_batchnorm() -> None:
    """Filters of norm 1, 3 and 2, scaled by 9, 1 and 1 once folded: the order differs, the cut must not."""
    with_norm = graphopt.load(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 21]> g (float[n,1,4,4] x) => (float[n,1,4,4] y)
            <float[3,1,1,1] a = {1, 3, 2}, float[1,3,1,1] b = {1, 1, 1}, float[3] scale = {9, 1, 1},
             float[3] none = {0, 0, 0}, float[3] one = {1, 1, 1}>
            { c = Conv (x, a) z = BatchNormalization (c, scale, none, none, one) r = Relu (z) y = Conv (r, b) }"""
        )
    )
    folded = without_statistics(with_norm)
    pruner = PruneChannels(ratio=0.4, round_to=1)
    source, own = pruner.plan(with_norm), pruner.plan(folded)
    assert list(source.selection.values()) == [(0,)]
    assert list(own.selection.values()) == [(2,)]
    same = datafree_sections.transferred(source, with_norm, own, folded)
    assert list(same.selection.values()) == [(0,)]
    PruneChannels().apply(folded, same)
    assert folded.graph.initializers["a"].const_value.shape[0] == 2  # type: ignore[union-attr]
