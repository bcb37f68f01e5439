"""Where the time goes, by block, node, operator and region; printed, drawn and from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import profiling
from graphopt.cli import main
from graphopt.errors import DataError, GraphoptError
from graphopt.latency.profile import VIEWS, Profile, block_paths
from graphopt.latency.table import LatencyTable, this_machine


def net() -> ir.Model:
    """Two linear layers in two blocks and what follows them."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,64] x, float[64,64] "body.first.weight",'
        ' float[64,512] "body.second.weight") => (float[n,512] y) { [one] a = MatMul (x, "body.first.weight")'
        ' [bend] b = Sin (a) [two] c = MatMul (b, "body.second.weight") [soft] y = Softmax (c) }'
    )
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        shape = tuple(int(size) for size in value.shape or ())
        value.const_value = ir.tensor(np.full(shape, 0.1, np.float32), name=value.name)
        model.graph.register_initializer(value)
    return model


@pytest.fixture(scope="module")
def profile() -> Profile:
    return graphopt.profile(net(), np.ones((16, 64), np.float32), seconds=0.05)


def test_every_view_adds_up(profile: Profile) -> None:
    for view in VIEWS:
        parts = profile.by(view)
        assert sum(part.microseconds for part in parts) == pytest.approx(profile.microseconds)
        assert sum(part.share for part in parts) == pytest.approx(1.0)
        assert sum(part.macs for part in parts) == 16 * 64 * (64 + 512)
    two = next(part for part in profile.by_node() if part.name == "two")
    assert two.bytes == 4 * (16 * 64 + 64 * 512 + 16 * 512)
    assert two.gflops == pytest.approx(2 * 16 * 64 * 512 / two.microseconds / 1e3)
    assert [part.name for part in profile.by_block()] == ["first", "second"]
    assert [part.name for part in profile.by_region({"mine": ["two", "soft"]})] == ["(elsewhere)", "mine"]
    assert {part.name for part in profile.by_operator()} == {"MatMul", "Sin", "Softmax"}


def test_the_printed_table(profile: Profile) -> None:
    text = str(profile.table("node", top=2))
    assert "(2 more)" in text
    assert "1 thread" in text
    assert "two" in text
    assert json.loads(json.dumps(profile.to_json()))["kernels"][0]["nodes"] == ["one"]


def test_module_paths_are_read_where_exporters_leave_them() -> None:
    nodes = [ir.Node("", name, [], name=where) for name, where in (("Exp", "/a/b/Exp"), ("Sin", "/a/c/Sin"))]
    nodes[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'net', 'net.a', 'net.a.z', 'exp']"
    assert block_paths(["one", "two"], nodes) == {"one": ("net", "a", "z"), "two": ("a", "c")}
    assert block_paths(["one"], [ir.Node("", "Exp", [])]) == {"one": ()}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plot(profile: Profile, tmp_path: Path, suffix: str) -> None:
    first = profile.plot(tmp_path / f"a{suffix}")
    assert first.read_bytes() == profile.plot(tmp_path / f"b{suffix}").read_bytes()
    with pytest.raises(GraphoptError, match="no format"):
        profile.plot(tmp_path / "a.bmp")


def test_bad_input(profile: Profile) -> None:
    for call in (
        lambda: profile.table("layer"),
        lambda: profile.table(top=0),
        lambda: profile.by_block(0),
        lambda: graphopt.profile(net(), np.ones((16, 63), np.float32)),
    ):
        with pytest.raises(GraphoptError):
            call()
    with pytest.raises(DataError, match="time to measure"):
        graphopt.profile(net(), np.ones((16, 64), np.float32), seconds=0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = graphopt.save(net(), tmp_path / "net.onnx")
    table, plot = tmp_path / "table.json", tmp_path / "plot.svg"

    def run(*options: str) -> int:
        with pytest.raises(SystemExit) as caught:
            main(["profile", str(path), "--seconds", "0.1", *options])
        return int(caught.value.code or 0)

    assert run("--json", "--table", str(table), "--plot", str(plot)) == 0
    assert {part["name"] for part in json.loads(capsys.readouterr().out)["blocks"]} == {"first", "second"}
    assert plot.exists()
    known = LatencyTable.load(table)
    assert len(known.rows) == 4
    assert run("--by", "op", "--top", "1", "--table", str(table)) == 0
    assert "(2 more)" in capsys.readouterr().out
    assert LatencyTable.load(table).rows.keys() == known.rows.keys()
    before = table.read_bytes()
    assert run("--threads", "2", "--table", str(table)) == 2
    assert "another machine" in capsys.readouterr().err
    assert table.read_bytes() == before
    assert run("--by", "layer") == 2
    assert run("--plot", str(tmp_path / "plot.bmp")) == 2


@pytest.mark.parametrize("notes", [(), ("the machine is noisy",)])
def test_only_what_is_measured_without_doubt_is_kept(
    profile: Profile, notes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    measured = replace(profile.measured, notes=notes)
    monkeypatch.setattr(profiling, "profile_kernels", lambda *arguments, **options: (measured,))
    assert graphopt.profile(net(), np.ones((16, 64), np.float32)).measured.notes == notes
    assert len(LatencyTable.kept(this_machine()).rows) == (0 if notes else 4)
