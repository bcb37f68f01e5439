"""Where inputs come from: the choice, the reasons, the cache, the limit on samples, and what the user states."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import DataError
from graphopt.inputs import source as source_module
from graphopt.inputs.calibration import Calibration
from graphopt.inputs.probes import InputSpec
from graphopt.inputs.source import MADE_UP, SOURCES, FirstSamples, Inputs, InputSource, Probes, find_inputs
from graphopt.inputs.synthetic import Synthetic, UnavailableError
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.progress import Progress
from tests.inputs.nets import conv_net

TOKENS = ir.from_onnx_text(
    '<ir_version: 10, opset_import: ["": 21]> g (int64[n, 4] x) => (int64[n, 4] y) { y = Abs(x) }'
)
PLAIN = ir.from_onnx_text(
    '<ir_version: 10, opset_import: ["": 21]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }'
)
FIXED = ir.from_onnx_text(
    '<ir_version: 10, opset_import: ["": 21]> g (float[4, 3] x) => (float[4, 3] y) { y = Relu(x) }'
)
QUICK = Synthetic(matched=replace(Synthetic().matched, steps=2), confident=replace(Synthetic().confident, steps=2))


@dataclass(frozen=True)
class Looking(Pass):
    """Changes nothing, and keeps the context."""

    name: ClassVar[str] = "looking"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    seen: list[Context] = field(default_factory=list, compare=False)

    def rewrite(self, model: ir.Model, context: Context) -> None:
        self.seen.append(context)


def arrays(found: Inputs, name: str = "x") -> list[np.ndarray]:
    return [np.asarray(feeds[name]) for feeds in found.batches]


def rows(count: int, size: int = 3) -> list[dict[str, np.ndarray]]:
    return [{"x": np.full((size, 3), number, np.float32)} for number in range(count)]


class Stream:
    """A source that can be read again, and says how far it was read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            self.read += 1
            yield {"x": np.full((3, 3), self.read, np.float32)}


def test_the_sources() -> None:
    assert SOURCES == ("auto", "calibration", "probes", "synthetic")
    with pytest.raises(DataError, match="'synthetic'"):
        find_inputs(PLAIN, "synthetik")
    with pytest.raises(DataError, match="there is none"):
        find_inputs(PLAIN, "calibration")
    with pytest.raises(DataError, match="at least 1"):
        find_inputs(PLAIN, samples=0)
    with pytest.raises(DataError, match="no input named 'z'"):
        find_inputs(PLAIN, "probes", specs={"z": InputSpec()})
    with pytest.raises(DataError, match="is a dict"):
        find_inputs(PLAIN, "probes", specs={"x": {"low": 0}})  # type: ignore[dict-item]


def test_calibration_comes_first_and_is_bounded() -> None:
    stream = Stream()
    found = find_inputs(PLAIN, calibration=Calibration(PLAIN, stream), samples=7)
    assert found.source == "calibration"
    for _ in range(2):
        stream.read = 0
        assert [len(x) for x in arrays(found)] == [3, 3, 1]
        assert stream.read == 3


def test_calibration_is_streamed() -> None:
    stream = Stream()
    found = find_inputs(PLAIN, calibration=stream, samples=10**9)
    assert next(iter(found.batches))["x"][0, 0] == 1
    assert stream.read == 1


def test_a_generator_is_read_as_far_as_it_is_needed() -> None:
    found = find_inputs(PLAIN, calibration=Calibration(PLAIN, iter(Stream())), samples=7)
    assert [len(x) for x in arrays(found)] == [len(x) for x in arrays(found)] == [3, 3, 1]


def test_calibration_of_fixed_batch_is_not_cut() -> None:
    found = FirstSamples(FIXED, [{"x": np.zeros((4, 3), np.float32)}] * 5, 6)
    assert [feeds["x"].shape for feeds in found] == [(4, 3), (4, 3)]


def test_calibration_is_not_used_when_probes_are_asked_for() -> None:
    found = find_inputs(PLAIN, "probes", calibration=rows(2), samples=5)
    assert found.source == "probes"
    assert arrays(found)[0].shape == (5, 3)


@pytest.mark.parametrize("source", [Probes(), Synthetic(matched=replace(Synthetic().matched, steps=0))])
def test_the_number_of_samples_may_be_left_to_the_source(source: InputSource) -> None:
    found = find_inputs(conv_net(), source, samples=None)
    assert sum(map(len, arrays(found))) == 512
    given = find_inputs(PLAIN, calibration=rows(400), samples=None)
    assert sum(map(len, arrays(given))) == source_module.CALIBRATION_SAMPLES
    assert "up to 512 samples" in given.why


def test_images_may_be_noise_alone() -> None:
    images = {}
    for texture in ("leaves", "pink"):
        images[texture] = arrays(find_inputs(conv_net(), Probes(texture), samples=32))[0]
        start = arrays(find_inputs(conv_net(), replace(QUICK, texture=texture), samples=32))[0]
        assert np.corrcoef(start.ravel(), images[texture].ravel())[0, 1] > 0.9
    assert abs(np.corrcoef(images["leaves"].ravel(), images["pink"].ravel())[0, 1]) < 0.3
    for source in (Probes("stripes"), replace(QUICK, texture="stripes")):
        with pytest.raises(DataError, match="texture"):
            find_inputs(conv_net(), source, samples=2)


def test_what_is_wrong_with_calibration_is_still_said() -> None:
    found = find_inputs(PLAIN, calibration=Calibration(PLAIN, [np.zeros((3, 4), np.float32)]))
    with pytest.raises(DataError, match="the shape is"):
        list(found.batches)


def test_token_models_get_probes_with_the_reason() -> None:
    for asked in ("auto", "synthetic"):
        found = find_inputs(TOKENS, asked, samples=6)
        assert found.source == "probes"
        assert "no float input" in found.why
        assert arrays(found)[0].shape == (6, 4)
        np.testing.assert_array_equal(arrays(found)[0], arrays(found)[0])


@pytest.mark.torch
def test_auto_is_synthetic_where_it_can_be() -> None:
    found = Context().inputs(conv_net(), QUICK, samples=20)
    assert found.source == "synthetic"
    assert "statistics of 2 BatchNormalization" in found.why
    assert [x.shape for x in arrays(found)] == [(20, 3, 12, 12)]
    assert np.asarray(arrays(found)[0]).dtype == np.float32


def test_without_torch_probes_and_the_reason() -> None:
    code = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")

sys.meta_path.insert(0, NoTorch())
from graphopt.inputs.source import find_inputs
from tests.inputs.nets import conv_net
found = find_inputs(conv_net(), samples=3)
assert found.source == "probes", found
assert found.why.startswith("torch is not installed"), found.why
assert [feeds["x"].shape for feeds in found.batches] == [(3, 3, 12, 12)]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.torch
def test_a_model_that_cannot_be_lifted_gets_probes() -> None:
    custom = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21, "mine": 1]> g (float[n, 3] x) => (float[n, 3] y) { y = mine.Odd(x) }'
    )
    found = find_inputs(custom, samples=3)
    assert found.source == "probes"
    assert "cannot be lifted" in found.why
    assert arrays(found)[0].shape == (3, 3)


@pytest.mark.torch
def test_the_second_call_reads_the_first_ones_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_inputs(conv_net(), QUICK, samples=9)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("graphopt.ir.lift.lift", refuse)
    monkeypatch.setattr("graphopt.inputs.synthesis.lift", refuse)
    monkeypatch.setattr("graphopt.inputs.synthesis.synthesize", refuse)
    second = find_inputs(conv_net(), QUICK, samples=9)
    assert second.why == first.why
    for one, other in zip(arrays(first), arrays(second), strict=True):
        np.testing.assert_array_equal(one, other)
    for changed in (
        {"samples": 8},
        {"seed": 1},
        {"specs": {"x": InputSpec(low=-1, high=1)}},
        {"source": replace(QUICK, matched=replace(QUICK.matched, steps=3))},
        {"model": conv_net(normalized=False)},
    ):
        arguments = {"model": conv_net(), "source": QUICK, "samples": 9} | changed
        with pytest.raises(AssertionError, match="made again"):
            find_inputs(**arguments)  # type: ignore[arg-type]


@pytest.mark.torch
def test_the_device_is_no_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    find_inputs(conv_net(), QUICK, samples=2)
    monkeypatch.setattr("graphopt.inputs.synthesis.synthesize", None)
    assert find_inputs(conv_net(), replace(QUICK, device="cuda"), samples=2).source == "synthetic"


@pytest.mark.torch
def test_a_run_reads_the_disk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context()
    first = context.inputs(conv_net(), QUICK, samples=2)
    monkeypatch.setattr(source_module, "Store", None)
    assert context.inputs(conv_net(), QUICK, samples=2) is first
    with pytest.raises(TypeError):
        Context().inputs(conv_net(), QUICK, samples=2)


@pytest.mark.torch
def test_a_damaged_cache_costs_a_note(cache: Path) -> None:
    cache.mkdir()
    (cache / "inputs.sqlite3").write_bytes(b"x" * 5000)
    context = Context()
    assert context.inputs(conv_net(), QUICK, samples=2).source == "synthetic"
    assert ["not a database" in remark.why for remark in context.remarks] == [True]
    again = Context()
    assert again.inputs(conv_net(), QUICK, samples=2).source == "synthetic"
    assert again.remarks == []


def test_what_lies_on_disk_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module.Store, "read", lambda *_: [{"other": np.zeros(3)}])
    found = find_inputs(TOKENS, "synthetic", samples=2)
    assert set(next(iter(found.batches))) == {"x"}


def test_a_run_shares_the_inputs_of_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = conv_net()
    context = Context(reference=reference)
    seen: list[ir.Model] = []

    def remember(_: Synthetic, model: ir.Model, **__: Any) -> list[dict[str, np.ndarray]]:
        seen.append(model)
        return [{"x": np.zeros((1, 3, 12, 12), np.float32)}]

    monkeypatch.setattr(Synthetic, "feeds", remember)
    later = conv_net(normalized=False)
    assert context.inputs(later) is context.inputs(reference)
    assert seen == [reference]
    context.inputs(PLAIN)
    assert seen == [reference, PLAIN]


def test_a_new_source_is_one_more_value(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Zeros:
        name: ClassVar[str] = "zeros"
        stored: ClassVar[bool] = False

        def describe(self, model: ir.Model) -> str:
            return f"zeros for {model.graph.name}"

        def feeds(self, model: ir.Model, *, samples: int = 256, **_: Any) -> list[Mapping[str, np.ndarray]]:
            if samples > 10:
                raise UnavailableError("more than ten zeros")
            return [{"x": np.zeros((samples, 3), np.float32)}]

    zeros: InputSource = Zeros()
    monkeypatch.setitem(MADE_UP, "zeros", zeros)
    for asked in ("zeros", zeros):
        found = find_inputs(PLAIN, asked, samples=2)
        assert (found.source, found.why) == ("zeros", "zeros for g")
    assert find_inputs(PLAIN, "zeros", samples=20).why.startswith("more than ten zeros")


def test_progress_is_passed_on() -> None:
    told: list[tuple[int, int, str]] = []
    context = Context(progress=lambda *told_: told.append(told_))
    context.inputs(conv_net(), QUICK, samples=2)
    assert told == [(1, 2, "synthetic inputs"), (2, 2, "synthetic inputs")]


def test_progress_shows_how_far_the_inputs_are() -> None:
    progress = Progress(quiet=True, total=3)
    progress.start("quantize")
    find_inputs(conv_net(), QUICK, samples=2, progress=progress.detail)
    (task,) = progress._bar.tasks
    assert task.description == "quantize: synthetic inputs 2/2"
    assert task.completed == 0


def test_optimize_takes_what_is_stated_of_the_inputs() -> None:
    log = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2, 3] x) => (float[2, 3] y) { a = Identity(x) y = Log(a) }'
    )
    positive = {"x": InputSpec(low=1, high=2)}
    result = graphopt.optimize(log, recipe="exact", inputs=positive, quiet=True)
    assert result.report.final is not None
    with pytest.raises(DataError, match="no input named 'z'"):
        graphopt.optimize(log, recipe="exact", inputs={"z": InputSpec()}, quiet=True)

    looking = Looking()
    graphopt.optimize(log, recipe=[looking], inputs=positive, quiet=True)
    (context,) = looking.seen
    assert dict(context.specs) == positive
    assert context.reference is not None
    assert context.progress is not None
    context.progress(1, 2, "synthetic inputs")
    found = context.inputs(log, "probes", samples=4)
    assert all(1 <= x.min() <= x.max() <= 2 for x in arrays(found))
