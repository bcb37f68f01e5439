"""The command line: the same calls, JSON on each, exit codes 0, 1 and 2, and no traceback without --debug."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.cli import main
from graphopt.ir.load import load
from graphopt.passes.prune_plan import PrunePlan


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A small conv net with everything that recipe `exact` removes."""
    rng = np.random.default_rng(0)
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n,3,16,16] x, float[16,3,3,3] w, float[16] gamma, float[16] beta, float[16] mean, float[16] variance)
      => (float[n,16,16,16] y) {
      same = Identity (x)
      c = Conv <pads = [1, 1, 1, 1]> (same, w)
      b = BatchNormalization (c, gamma, beta, mean, variance)
      y = Relu (b)
    }"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        shape = tuple(int(size) for size in value.shape)
        value.const_value = ir.tensor((rng.random(shape) + 0.5).astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    return path


def run(*arguments: object) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    code = caught.value.code
    return 0 if code is None else int(code)


def test_optimize_writes_the_model_and_the_report(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report, page = tmp_path / "out.onnx", tmp_path / "report.json", tmp_path / "diff.html"
    assert run("optimize", model_file, "-o", out, "--recipe", "exact", "--report", report, "--html", page) == 0
    assert [node.op_type for node in load(out).graph] == ["Conv", "Relu"]
    assert json.loads(report.read_text())["recipe"] == "exact"
    assert page.read_text().startswith("<!")
    assert "fold-batchnorm" in capsys.readouterr().out


def test_optimize_json_is_json_alone(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", model_file, "-o", tmp_path / "out.onnx", "--recipe", "exact", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"]
    assert captured.err == ""


def test_optimize_int8_with_calibration_files(model_file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32))
    out = tmp_path / "out.onnx"
    code = run("optimize", model_file, "-o", out, "--calibration", tmp_path / "images.npy", "--quiet")
    assert code == 0
    assert out.exists()


def test_a_missed_target_is_exit_code_1_and_the_file_is_written(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    assert run("optimize", model_file, "-o", out, "--recipe", "int8", "--tolerance", "1e-9") == 1
    assert out.exists()
    assert "target was missed" in capsys.readouterr().err


def test_inspect(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model_file) == 0
    text = capsys.readouterr().out
    for part in ("input   x: FLOAT[n,3,16,16]", "output  y", "opset   ai.onnx 21", "dynamic n", "Conv", "110,592"):
        assert part in text
    assert run("inspect", model_file, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["macs"] == 16 * 16 * 16 * 27
    assert document["inputs"] == {"x": "FLOAT[n,3,16,16]"}


def test_diff(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    run("optimize", model_file, "-o", out, "--recipe", "exact", "--quiet")
    capsys.readouterr()
    assert run("diff", model_file, out) == 0
    assert "BatchNormalization" in capsys.readouterr().out
    assert run("diff", model_file, out, "--json", "--html", tmp_path / "d.html") == 0
    assert json.loads(capsys.readouterr().out)["groups"]
    assert (tmp_path / "d.html").exists()


def test_bench(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", model_file, model_file, "--seconds", "0.2", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in document["models"]] == ["model.onnx", "model.onnx"]
    assert document["models"][0]["speed"]["median"] == 1.0
    assert run("bench", model_file, model_file, "--seconds", "0.2") == 0
    assert "interleaved rounds" in capsys.readouterr().out


def test_verify_same_and_different(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    run("optimize", model_file, "-o", out, "--recipe", "exact", "--quiet")
    assert run("verify", model_file, out) == 0
    assert capsys.readouterr().out.startswith("same (inputs: probes)")
    broken = ir.load(model_file)
    broken.graph.initializers["w"].const_value = ir.tensor(np.ones((16, 3, 3, 3), np.float32), name="w")
    ir.save(broken, tmp_path / "broken.onnx")
    assert run("verify", model_file, tmp_path / "broken.onnx") == 1
    assert "outputs differ" in capsys.readouterr().err
    assert run("verify", model_file, tmp_path / "broken.onnx", "--tolerance", "1000") == 0


def test_example_inputs_from_files(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.zeros((2, 3, 16, 16), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    for name in ("x.npy", "x.npz"):
        assert run("inspect", model_file, "--input", tmp_path / name, "--json") == 0
        assert json.loads(capsys.readouterr().out)["dynamic"] == {"n": 2}


@pytest.fixture
def wide_file(tmp_path: Path) -> Path:
    """Two convolutions with 32 channels between them, the last 16 of which are weakest."""
    rng = np.random.default_rng(1)
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n,3,16,16] x, float[32,3,3,3] a, float[4,32,3,3] b) => (float[n,4,12,12] y) {
      c = Conv (x, a)
      r = Relu (c)
      y = Conv (r, b)
    }"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        array = rng.standard_normal(tuple(int(size) for size in value.shape)).astype(np.float32)
        if value.name == "a":
            array[16:] *= 0.01
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    path = tmp_path / "wide.onnx"
    ir.save(model, path)
    return path


PROBES = ("--set", "prune-channels.source=probes")


def test_prune_with_options_of_the_recipe(wide_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    setting = ("--set", "prune-channels.ratio=0.5")
    stated = ("--input-spec", "x:kind=gaussian,mean=0.5,std=2")
    assert run("optimize", wide_file, "-o", out, "--recipe", "prune", *setting, *PROBES, *stated, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert "inputs from probes" in str(document)
    weights = load(out).graph.initializers
    assert [tuple(value.shape) for value in weights.values() if len(value.shape) == 4] == [(16, 3, 3, 3), (4, 16, 3, 3)]
    kept = load(out).graph.initializers["a"].const_value.numpy()
    assert np.abs(kept).max(axis=(1, 2, 3)).min() > 0.1, "the weak channels went"
    assert run("verify", wide_file, out, "--tolerance", "0.1") == 0


def test_prune_int8_rounds_what_was_pruned(wide_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32))
    code = run(
        "optimize", wide_file, "-o", out, "--recipe", "prune-int8", "--calibration", tmp_path / "x.npy", "--quiet"
    )
    assert code == 0
    shapes = [value.shape for value in load(out).graph.initializers.values()]
    assert sorted(tuple(shape) for shape in shapes if len(shape) == 4) == [(4, 16, 3, 3), (16, 3, 3, 3)]


def test_a_pruning_beyond_the_tolerance_is_rolled_back_and_missed(
    wide_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    assert run("optimize", wide_file, "-o", out, "--recipe", "prune", *PROBES, "--tolerance", "1e-9") == 1
    assert "prune-channels was rolled back" in capsys.readouterr().err
    assert load(out).graph.initializers["a"].shape == (32, 3, 3, 3)


def test_a_budget_below_what_must_remain_says_how_far_it_got(
    wide_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = ("--set", "prune-channels.params=0.001")
    assert run("optimize", wide_file, "-o", tmp_path / "out.onnx", "--recipe", "prune", *setting, "--quiet") == 1
    assert "0.001" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_plan_shows_what_would_go_and_writes_nothing(
    wide_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run("plan", wide_file, "--set", "prune-channels.ratio=0.5") == 0
    shown = capsys.readouterr().out
    assert "channels  32     16" in shown
    assert "note:" not in shown
    assert run("plan", wide_file, "--set", "prune-channels.ratio=0.4") == 0
    assert "note: 0.5 of the units go, 0.4 were asked for" in capsys.readouterr().out
    assert run("plan", wide_file, "--set", "prune-channels.macs=0.5", "--json") == 0
    plan = PrunePlan.from_json(json.loads(capsys.readouterr().out))
    assert plan.share == pytest.approx(0.5)
    (removed,) = plan.selection.values()
    assert removed == tuple(range(16, 32))
    assert plan.pruned(load(wide_file)).graph.initializers["a"].shape == (16, 3, 3, 3)
    assert run("plan", wide_file, "--recipe", "int8", "--input-spec", "x:low=-1,high=1") == 0
    assert "Conv" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


BAD = [
    ("optimize", "{missing}", "-o", "{out}"),
    ("optimize", "{text}", "-o", "{out}"),
    ("optimize", "{model}", "-o", "{out}", "--recipe", "nonsense"),
    ("optimize", "{model}", "-o", "{out}", "--recipe", "missing.toml"),
    ("optimize", "{model}", "-o", "/nowhere/out.onnx", "--recipe", "exact"),
    ("optimize", "{model}", "-o", "{out}", "--calibration", "{text}"),
    ("optimize", "{model}", "-o", "{out}", "--calibration", "{wrong}"),
    ("optimize", "{model}", "-o", "{out}", "--calibration", "{missing}"),
    ("optimize", "{model}", "-o", "{out}", "--input-spec", "x:std=wide"),
    ("optimize", "{model}", "-o", "{out}", "--input", "{wrong}"),
    ("optimize", "{model}", "-o", "{out}", "--target", "tpu"),
    ("optimize", "{model}", "-o", "{out}", "--tolerance", "-1"),
    ("optimize", "{model}"),
    ("optimize", "{model}", "-o", "{out}", "--nonsense"),
    ("optimize", "{model}", "-o", "{out}", "--recipe", "prune"),
    ("optimize", "{model}", "-o", "{out}", "--set", "quantize"),
    ("optimize", "{model}", "-o", "{out}", "--set", "prune-channels.ratio=0.5"),
    ("optimize", "{model}", "-o", "{out}", "--set", "quantize.bits=many"),
    ("optimize", "{model}", "-o", "{out}", "--input-spec", "x"),
    ("optimize", "{model}", "-o", "{out}", "--input-spec", "x:mean=high"),
    ("optimize", "{model}", "-o", "{out}", "--input-spec", "x:colour=3"),
    ("optimize", "{model}", "-o", "{out}", "--input-spec", "x:mean=1,mean=2"),
    ("optimize", "{model}", "-o", "{out}", "--input-spec", "x:kind=picture"),
    ("optimize", "{model}", "-o", "{out}", "--input-spec", "z:mean=1"),
    ("optimize", "{model}", "-o", "{out}", "--input-spec", "x:mean=1", "--input-spec", "x:std=1"),
    ("plan", "{missing}"),
    ("plan", "{model}"),
    ("plan", "{model}", "--recipe", "exact"),
    ("plan", "{model}", "--set", "prune-channels.ratio=1.5"),
    ("plan", "{model}", "--set", 'prune-channels.keep=["nonsense"]'),
    ("plan", "{model}", "--input", "{wrong}"),
    ("inspect", "{missing}"),
    ("inspect", "{folder}"),
    ("groups", "{missing}"),
    ("groups", "{text}"),
    ("groups", "{model}", "--input", "{wrong}"),
    ("groups", "{model}", "--svg", "/nowhere/groups.svg"),
    ("groups", "{model}", "--dot", "{folder}"),
    ("diff", "{model}", "{missing}"),
    ("bench", "{missing}"),
    ("verify", "{model}", "{text}"),
    ("nonsense",),
]


@pytest.mark.parametrize("arguments", BAD, ids=lambda arguments: " ".join(arguments))
def test_bad_usage_is_exit_code_2_without_a_traceback(
    arguments: tuple[str, ...], model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "wrong.npy", np.zeros((4, 5, 6), np.float32))
    places: dict[str, Any] = {
        "model": model_file,
        "missing": tmp_path / "missing.onnx",
        "text": tmp_path / "text.npy",
        "wrong": tmp_path / "wrong.npy",
        "folder": tmp_path,
        "out": tmp_path / "out.onnx",
    }
    before = sorted(tmp_path.iterdir())
    assert run(*[argument.format(**places) for argument in arguments]) == 2
    assert sorted(tmp_path.iterdir()) == before, "something half-written was left behind"
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.strip()


@pytest.mark.parametrize(
    ("arguments", "help_line"),
    [
        (("--calibration", "{folder}/missing.npy"), "help: paths are relative"),
        (("--calibration", "{folder}/empty"), "help: write some with numpy.save"),
        (("--calibration", "{folder}/scalar.npy"), "help: stack the samples"),
        (("--input-spec", "x:std=wide"), "help: all keys but `kind` take one number"),
    ],
)
def test_bad_data_says_the_way_out(
    arguments: tuple[str, str], help_line: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "scalar.npy", np.float32(1))
    (tmp_path / "empty").mkdir()
    option, value = arguments
    out = ("-o", tmp_path / "out.onnx", "--quiet")
    assert run("optimize", model_file, *out, option, value.format(folder=tmp_path)) == 2
    assert help_line in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path, place: int) -> None:
    arguments = ["inspect", str(tmp_path / "missing.onnx")]
    arguments.insert(place, "--debug")
    result = subprocess.run([sys.executable, "-m", "graphopt", *arguments], capture_output=True, text=True, check=False)
    assert "Traceback" in result.stderr
    assert result.returncode == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("graphopt 0.")


def test_output_paths_are_checked_before_the_work(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert run("optimize", model_file, "-o", out, "--report", "/nowhere/r.json", "--quiet") == 2
    assert not out.exists()


def test_written_files_can_be_read_by_others(model_file: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("out.onnx", "r.json", "d.html")]
    run(
        "optimize", model_file, "-o", files[0], "--recipe", "exact", "--report", files[1], "--html", files[2], "--quiet"
    )
    assert len({file.stat().st_mode for file in files}) == 1


def test_the_output_may_be_the_input(model_file: Path) -> None:
    assert run("optimize", model_file, "-o", model_file, "--recipe", "exact", "--quiet") == 0
    assert [node.op_type for node in load(model_file).graph] == ["Conv", "Relu"]


def test_groups(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dot, svg = tmp_path / "groups.dot", tmp_path / "groups.svg"
    assert run("groups", model_file, "--dot", dot, "--svg", svg) == 0
    text = capsys.readouterr().out
    assert "parameters 0 of 496 prunable (0 %)" in text
    assert "counted at n = 8" in text
    assert "--frozen lists them" in text
    assert dot.read_text().startswith("strict digraph")
    assert svg.read_text().startswith("<svg")
    assert run("groups", model_file, "--frozen") == 0
    assert "graph output 'y'" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 16, 16), np.float32))
    assert run("groups", model_file, "--json", "--frozen", "--input", tmp_path / "x.npy") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dynamic"] == {"n": 2}
    assert document["macs"]["total"] == 2 * 16 * 16 * 16 * 27
    assert {group["reason"] for group in document["groups"]} == {"graph input 'x'", "graph output 'y'"}


def test_groups_of_a_model_with_a_custom_operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "com.acme": 1]>
    g (float[1,2] x) => (float[1,2] y) <float[2,3] a = {1,2,3,4,5,6}, float[3,2] b = {1,2,3,4,5,6}, float[1,2] s> {
      h = MatMul (x, a)
      s = MatMul (h, b)
      [warp] y = com.acme.Warp (s)
    }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "custom.onnx")
    for option in ((), ("--frozen",), ("--json",)):
        assert run("groups", tmp_path / "custom.onnx", *option) == 0
        shown = capsys.readouterr().out
        assert "com.acme::Warp" in shown
        assert "warp" in shown
    assert json.loads(shown)["parameters"] == {"total": 12, "prunable": 12, "share": 1.0}
