"""The diagnosis against runs of whole nets: what each figure says is computed here once more, the long way."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError, GraphoptError
from graphopt.ir.compare import compare_runs
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_diagnosis import WORST, Diagnosis, diagnose
from graphopt.passes.quantize_effects import Rounding, measure_named, units
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.planning import diagnose_recipe
from tests.passes.breaking_nets import NETS, mobile, outlier, super_resolution
from tests.passes.quantized_nets import (
    GATED,
    MOBILE,
    RESIDUAL,
    TRANSFORMER,
    UNET,
    canonical_constants,
    feeds,
    tiny,
    weighted,
)
from tests.zoo.models import zoo_feeds, zoo_model

Feeds = list[dict[str, np.ndarray]]


def shape_of(model: ir.Model) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else 2 for size in model.graph.inputs[0].shape)


def planned(model: ir.Model, **options: Any) -> tuple[QuantizePlan, Feeds]:
    data = feeds(3, shape_of(model))
    return Quantize(**options).plan(model, Context(calibration=data, threads=1)), data


def moved(model: ir.Model, other: ir.Model, data: Feeds) -> float:
    """Relative rms error of whole runs, the worst run counts."""
    sessions = [open_session(one) for one in (model, other)]
    runs = [[session.run_feeds(one) for one in data] for session in sessions]
    names = [value.name or "" for value in model.graph.outputs]
    return max(compare_runs(names, [a], [b]).rms_error for a, b in zip(*runs, strict=True))


def applied(model: ir.Model, plan: QuantizePlan) -> ir.Model:
    result = model.clone()
    Quantize().apply(result, plan)
    return result


@pytest.mark.parametrize(
    "model", [RESIDUAL, MOBILE, UNET, GATED, TRANSFORMER], ids=["residual", "mobile", "unet", "gated", "transformer"]
)
def test_alone_equals_a_run_of_the_net_with_everything_else_excluded(model: ir.Model) -> None:
    """Operators with a weight: the pass itself can quantize one of them alone, by excluding all the others."""
    model = canonical_constants(model)
    plan, data = planned(model)
    found = diagnose(model, plan, data, threads=1)
    assert found.error == pytest.approx(moved(model, applied(model, plan), data), rel=1e-6)
    names = [operator.node for operator in units(plan)]
    assert sorted(one.node for one in found.operators) == sorted(names)
    seeds = [o for o in units(plan) if o.form == "dynamic" or (o.op_type == "Conv" and o.node not in ("n6",))]
    assert seeds
    for operator in seeds:
        others = tuple(name for name in names if name != operator.node)
        single = Quantize(exclude=others).plan(model, Context(calibration=data, threads=1))
        assert [o.node for o in units(single)] == [operator.node]
        expected = moved(model, applied(model, single), data)
        one = next(one for one in found.operators if one.node == operator.node)
        assert one.is_exact
        assert one.alone == pytest.approx(expected, rel=0.02, abs=1e-7)
    assert [one.alone for one in found.operators] == sorted((one.alone for one in found.operators), reverse=True)


def test_left_out_is_the_net_with_everything_but_this_one_quantized() -> None:
    model = outlier()
    plan, data = planned(model)
    found = diagnose(model, plan, data, threads=1)
    for one in found.operators:
        if one.op_type == "Gemm":
            single = Quantize(exclude=(one.node,)).plan(model, Context(calibration=data, threads=1))
            assert one.left_out == pytest.approx(moved(model, applied(model, single), data), rel=0.02)
    by_name = {one.node: one for one in found.operators}
    assert by_name["n4"].left_out == pytest.approx(found.error, rel=0.2)  # the other end of the tensor still rounds it


def test_tensors_are_measured_against_both_nets() -> None:
    model = RESIDUAL
    plan, data = planned(model)
    found = {one.name: one for one in diagnose(model, plan, data, threads=1).tensors}
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    session = open_session(model, optimized=False, extra_outputs=["c1"])
    array = np.concatenate([session.run(["c1"], one)[0] for one in data])
    plan_of = tensors["c1"]
    integers = np.clip(np.rint(array / np.float32(plan_of.scale[0])) + plan_of.zero_point[0], 0, 255)
    rounded = (integers - plan_of.zero_point[0]) * np.float32(plan_of.scale[0])
    noise = float(np.sum((array - rounded).astype(np.float64) ** 2))
    signal = float(np.sum(array.astype(np.float64) ** 2))
    assert found["c1"].sqnr == pytest.approx(10 * math.log10(signal / noise), abs=0.01)
    counts = np.bincount(integers.astype(int).ravel())
    share = counts[counts > 0] / counts.sum()
    assert found["c1"].bits_used == pytest.approx(-np.sum(share * np.log2(share)), abs=1e-6)
    quantized = applied(model, plan)
    scale = next(
        node for node in quantized.graph if node.op_type == "DequantizeLinear" and node.inputs[1].name == "c1.scale"
    )
    name = scale.outputs[0].name or ""
    session = open_session(quantized, optimized=False, extra_outputs=[name])
    inside = np.concatenate([session.run([name], one)[0] for one in data])
    noise = float(np.sum((array - inside).astype(np.float64) ** 2))
    assert found["c1"].accumulated == pytest.approx(10 * math.log10(signal / noise), abs=0.2)
    weight = model.graph.initializers["w1"].const_value.numpy()
    scales = np.asarray(tensors["w1"].scale, np.float32)[:, None, None, None]
    noise = float(np.sum((weight - np.rint(weight / scales) * scales) ** 2))
    assert found["w1"].sqnr == pytest.approx(10 * math.log10(np.sum(weight.astype(np.float64) ** 2) / noise), abs=0.01)
    assert found["w1"].accumulated is None


def test_clipping_is_counted() -> None:
    model = tiny()
    plan, data = planned(model)
    narrow = plan.to_json()
    for tensor in narrow["tensors"]:
        if tensor["name"] == "x":
            tensor["scale"] = [value / 3 for value in tensor["scale"]]
    plan = QuantizePlan.from_json(narrow)
    found = next(one for one in diagnose(model, plan, data, threads=1).tensors if one.name == "x")
    tensor = next(tensor for tensor in plan.tensors if tensor.name == "x")
    low, high = (float(bound) for bound in np.ravel(tensor.range()))
    values = np.concatenate([one["x"] for one in data])
    step = tensor.scale[0] / 2
    expected = float(np.mean((values < low - step) | (values > high + step)))
    assert expected > 0.1
    assert found.clipped == pytest.approx(expected, abs=1e-4)


def test_channels_that_drown_are_named() -> None:
    """The ratio of the whole tensor is high: it is that of the two large channels. Channel by channel it is not."""
    for model, tensor in ((outlier(), "c1"), (mobile(), "d1")):
        plan, data = planned(model)
        found = diagnose(model, plan, data, threads=1)
        worst = found.tensors[0]
        assert worst.name == tensor
        assert worst.sqnr > 30.0
        assert worst.channels is not None
        assert worst.channels < 3.0
        assert worst.bits_used < 3.0
        assert tensor in found.operators[0].weakest
        assert "of its channels below" in str(found)


def test_estimates_rank_large_nets_and_the_worst_are_exact() -> None:
    model = super_resolution()
    plan, data = planned(model)
    exact = diagnose(model, plan, data, threads=1)
    estimated = diagnose(model, plan, data, threads=1, exact=0)
    assert len(exact.operators) <= WORST
    assert estimated == exact
    many = weighted(
        "float[n,4,8,8] x => float[n,4,8,8] y",
        " ".join(
            f"c{i} = Conv({'x' if i == 0 else f'r{i - 1}'}, w{i}) r{i} = Relu(c{i})" for i in range(20)
        ) + " y = Conv(r19, w20)",
        **{f"w{i}": (4, 4, 1, 1) for i in range(21)},
    )  # fmt: skip
    for name, value in many.graph.initializers.items():
        value.const_value = ir.tensor(np.abs(value.const_value.numpy()), name=name)
    plan, data = planned(many)
    found = diagnose(many, plan, data, threads=1, exact=0)
    assert [one.is_exact for one in found.operators] == [True] * WORST + [False] * 5
    assert "~" in str(found)
    assert all(one.left_out is None for one in found.operators[WORST:])


def test_measures() -> None:
    model = tiny()
    plan, data = planned(model)
    divergence = diagnose(model, plan, data, threads=1, measure="kl")
    assert 0.0 < divergence.error < 0.01
    assert divergence.measure == "kl"

    def furthest(reference: Any, found: Any) -> float:
        return float(np.abs(reference[0] - found[0]).max())

    own = diagnose(model, plan, data, threads=1, measure=furthest)
    assert own.measure == "furthest"
    session, quantized = open_session(model), open_session(applied(model, plan))
    expected = max(furthest(session.run_feeds(one), quantized.run_feeds(one)) for one in data)
    assert own.error == pytest.approx(expected, rel=1e-4)
    with pytest.raises(GraphoptError, match="unknown measure 'snr'"):
        diagnose(model, plan, data, measure="snr")


def test_divergence_is_that_of_the_textbook() -> None:
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.6, 0.3, 0.1]])
    expected = float(np.sum(p * np.log(p / q)))
    assert measure_named("kl")([np.log(p) + 5], [np.log(q) - 2]) == pytest.approx(expected)
    assert measure_named("kl")([np.log(p)], [np.full((1, 3), np.nan)]) == math.inf


@pytest.mark.parametrize("name", ["detector", "voice"])
def test_round_trip_and_text(name: str) -> None:
    model = NETS[name]()
    plan, data = planned(model)
    found = diagnose(model, plan, data, threads=1)
    assert Diagnosis.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    assert diagnose(model, plan, data, threads=1) == found
    text = str(found)
    assert all(one.node in text for one in found.operators)
    assert len(found.top(2).operators) == 2
    assert len(found.summary()) == min(3, len(found.operators))


def test_infinite_figures_round_trip() -> None:
    """A tensor without noise has an infinite ratio."""
    model = weighted("float[1,2] x => float[1,2] y", "y = MatMul(x, w)", w=(2, 2))
    model.graph.initializers["w"].const_value = ir.tensor(np.array([[127, 0], [0, 127]], np.float32), name="w")
    data = [{"x": np.array([[1.0, 0.0]], np.float32)}]
    plan = Quantize(form="static", weight_range="full").plan(model, Context(calibration=data))
    found = diagnose(model, plan, data, threads=1)
    assert math.inf in [one.sqnr for one in found.tensors]
    assert Diagnosis.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


_INCOMPLETE = {"error": 1, "measure": "rms", "samples": 1, "operators": [{"node": "n"}], "tensors": []}


@pytest.mark.parametrize("data", [{}, {"error": 1}, _INCOMPLETE])
def test_what_is_no_diagnosis_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(GraphoptError, match="not a diagnosis"):
        Diagnosis.from_json(data)


def test_bad_input() -> None:
    model = tiny()
    plan, data = planned(model)
    with pytest.raises(DataError, match="not a single set of inputs"):
        diagnose(model, plan, [])
    with pytest.raises(DataError):
        diagnose(model, plan, [{"z": data[0]["x"]}])
    with pytest.raises(GraphoptError):
        diagnose(RESIDUAL, plan, data)
    assert diagnose(model, QuantizePlan(), data).operators == ()


def test_nan_and_infinity_in_activations_are_left_out() -> None:
    model = tiny()
    plan, data = planned(model)
    data[0]["x"][0, 0, 0, 0] = np.nan
    data[1]["x"][0, 0, 0, 0] = np.inf
    found = {one.name: one for one in diagnose(model, plan, data, threads=1).tensors}
    assert math.isfinite(found["x"].sqnr)


def test_a_constant_tensor() -> None:
    model = tiny()
    data = [{"x": np.zeros((1, 3, 16, 16), np.float32)}]
    plan = Quantize().plan(model, Context(calibration=data))
    found = {one.name: one for one in diagnose(model, plan, data, threads=1).tensors}
    assert found["x"].sqnr == math.inf
    assert found["x"].bits_used == 0.0
    assert found["x"].channels is None


def test_rounding_of_nothing() -> None:
    plan, _ = planned(tiny())
    empty = Rounding(plan.tensors[0])
    assert (empty.share_clipped, empty.bits_used, empty.channel_sqnr) == (0.0, 0.0, None)


@pytest.mark.parametrize("name", ["mobilenet-v3", "vit", "loop-captures", "shared-thrice"])
def test_zoo(name: str) -> None:
    model = zoo_model(name)
    data = [zoo_feeds(model, seed=seed) for seed in range(2)]
    plan = Quantize().plan(model, Context(calibration=data, threads=1))
    found = diagnose(model, plan, data, threads=1)
    assert {one.node for one in found.operators} == {operator.node for operator in units(plan)}
    assert all(math.isfinite(one.alone) for one in found.operators)
    assert found.error == pytest.approx(moved(model, applied(model, plan), data), rel=1e-5)


def test_weights_alone_are_diagnosed_too() -> None:
    model = canonical_constants(TRANSFORMER)
    data = feeds(2, (2, 6, 32))
    plan = Quantize(form="weights", weight_bits=4).plan(model, Context())
    found = diagnose(model, plan, data, threads=1)
    assert {one.form for one in found.operators} == {"weights"}
    assert found.error == pytest.approx(moved(model, applied(model, plan), data), rel=1e-3)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    model = tiny()
    plan, data = planned(model)
    found = diagnose(model, plan, data, threads=1)
    written = found.plot(tmp_path / f"plot{suffix}")
    start = written.read_bytes()[:200]
    assert start.startswith(b"<?xml") if suffix == ".svg" else start.startswith(b"\x89PNG")
    again = found.plot(tmp_path / f"again{suffix}")
    assert written.read_bytes() == again.read_bytes()
    with pytest.raises(GraphoptError, match="no format"):
        found.plot(tmp_path / "plot.bmp")


def test_plot_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def missing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(GraphoptError, match="matplotlib") as caught:
        Diagnosis(0.1, "rms", 1).plot(tmp_path / "plot.svg")
    assert caught.value.help == "pip install 'graphopt[plot]'"


def test_a_recipe_is_diagnosed_without_a_search() -> None:
    found = diagnose_recipe(outlier(), recipe=["quantize"], calibration=feeds(3, (2, 3, 16, 16)))
    assert found.error > 0.3
    assert found.operators[0].alone > 0.3
    assert diagnose_recipe(outlier(), calibration=feeds(3, (2, 3, 16, 16))).error < 0.05, "migrate-scales mends it"


def test_a_recipe_that_requantizes_is_diagnosed_on_the_float_model() -> None:
    eight = canonical_constants(TRANSFORMER)
    Quantize(form="weights").run(eight, Context())
    found = diagnose_recipe(eight, recipe=[Quantize(requantize=True)], calibration=feeds(2, (2, 6, 32)))
    assert 0.0 < found.error < 0.1


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from graphopt.cli import main
    from graphopt.export.write import save

    path = save(outlier(), tmp_path / "net.onnx")
    np.save(tmp_path / "images.npy", np.concatenate([one["x"] for one in feeds(4)]))
    (tmp_path / "plain.toml").write_text('[[pass]]\nname = "quantize"\n', encoding="utf-8")
    common = ["diagnose", str(path), "--calibration", str(tmp_path / "images.npy")]
    common += ["--recipe", str(tmp_path / "plain.toml")]
    with pytest.raises(SystemExit) as done:
        main([*common, "--plot", str(tmp_path / "loss.svg")])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "loses most in" in text
    assert "a quarter of its channels below" in text
    assert (tmp_path / "loss.svg").stat().st_size > 1000
    with pytest.raises(SystemExit) as done:
        main([*common, "--json"])
    assert done.value.code == 0
    assert Diagnosis.from_json(json.loads(capsys.readouterr().out)).error > 0.3
    for wrong in (["--measure", "psnr"], ["--recipe", "exact"]):
        with pytest.raises(SystemExit) as done:
            main([*common, *wrong])
        assert done.value.code == 2


def test_a_quantized_model_says_so() -> None:
    quantized = outlier()
    Quantize(search=False).rewrite(quantized, Context())
    with pytest.raises(GraphoptError, match="nothing of this model would be quantized") as caught:
        diagnose_recipe(quantized, recipe=[Quantize()])
    assert "requantize" in (caught.value.help or "")
