from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.inputs import observe as observe_module
from graphopt.inputs.observe import BINS, Histogram, Statistics, bound_sizes, observe
from graphopt.passes.quantize_ranges import activation_range, asymmetric_quantizer, entropy_range, symmetric_scales

CHAIN = ir.from_onnx_text(
    '<ir_version: 10, opset_import: ["": 21]> g (float[n, 64] x) => (float[n, 64] y)'
    " { a = Neg(x) b = Exp(a) c = Sqrt(b) y = Relu(c) }"
)


def filled(values: np.ndarray, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values, parts):
        histogram.add(part)
    return histogram


def test_histogram_counts_survive_widening() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(0, s, 1000) for s in (0.01, 1, 100, 1e4)]).astype(np.float32)
    histogram = filled(values, parts=40)
    assert int(histogram.counts.sum()) == values.size
    expected, _ = np.histogram(values, histogram.edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    assert histogram.width * BINS <= 8 * np.ptp(values)


@pytest.mark.parametrize("values", [[0.0], [5.0], [-5.0], [0.0, 1e-20], [1e30, -1e30]])
def test_histogram_of_few_values(values: list[float]) -> None:
    histogram = filled(np.array(values))
    assert int(histogram.counts.sum()) == len(values)
    low, high = histogram.percentile(100.0)
    assert low <= min(values)
    assert max(values) <= high


def test_percentile_of_a_known_distribution() -> None:
    histogram = filled(np.linspace(0, 100, 100_001), parts=7)
    low, high = histogram.percentile(99.0)
    assert abs(low - 0.5) <= histogram.width
    assert abs(high - 99.5) <= histogram.width


def test_entropy_cuts_a_lone_outlier_and_keeps_a_uniform_range() -> None:
    generator = np.random.default_rng(0)
    body = generator.normal(0, 1, 200_000)
    _, high = entropy_range(filled(np.append(body, 60.0)), float(body.min()), 60.0, 8)
    assert high < 30
    uniform = filled(generator.uniform(0, 1, 200_000))
    _, high = entropy_range(uniform, 0.0, 1.0, 8)
    assert high > 0.95


def test_ranges_hold_zero() -> None:
    statistics = Statistics(histogram=Histogram())
    statistics.add(np.array([3.0, 4.0, 5.0], np.float32))
    for method in ("minmax", "percentile", "entropy"):
        low, high = activation_range(statistics, method, 99.9, 8)
        assert low == 0.0
        assert 4.9 < high <= 5.0
    assert activation_range(Statistics(), "minmax", 99.9, 8) == (0.0, 0.0)


def test_quantizers_of_empty_and_tiny_ranges() -> None:
    assert asymmetric_quantizer(0.0, 0.0, 8) == (1.0, 0)
    scale, zero = asymmetric_quantizer(-1e-40, 1e-40, 8)
    assert np.float32(scale) > 0
    assert 0 <= zero <= 255
    assert asymmetric_quantizer(-2.0, -1.0, 8)[1] == 255
    assert (symmetric_scales(np.zeros((2, 3)), 0, 8) == 1).all()


def test_statistics_leave_out_what_is_not_finite() -> None:
    statistics = Statistics()
    statistics.add(np.array([1.0, np.nan, 3.0, np.inf], np.float32))
    assert (statistics.count, statistics.non_finite, statistics.minimum, statistics.maximum) == (2, 2, 1.0, 3.0)
    assert (statistics.mean, statistics.std) == (2.0, 1.0)


def test_observes_in_groups_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"x": np.random.default_rng(i).normal(size=(4, 64)).astype(np.float32)} for i in range(3)]
    whole = observe(CHAIN, ["x", "a", "b", "c", "y"], feeds, histograms=True)
    opened: list[list[str]] = []
    original = observe_module.open_session

    def counting(model: ir.Model, **options: object) -> object:
        opened.append(list(options["extra_outputs"]))  # type: ignore[call-overload]
        return original(model, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(observe_module, "open_session", counting)
    monkeypatch.setattr(observe_module, "OBSERVED_BYTES", 2 * 4 * 64 * 4)
    parts = observe(CHAIN, ["x", "a", "b", "c", "y"], feeds, histograms=True)
    assert opened == [["a", "b"], ["c", "y"]]
    stacked = np.concatenate([one["x"] for one in feeds])
    for name, expected in (("x", stacked), ("a", -stacked), ("b", np.exp(-stacked))):
        assert parts[name].count == expected.size
        assert parts[name].minimum == whole[name].minimum
        assert abs(parts[name].maximum - expected.max()) <= 1e-5 * expected.max()
        assert abs(parts[name].mean - expected.mean()) <= 1e-5


def test_no_inputs_is_an_error() -> None:
    for names in (["x"], ["a"]):
        with pytest.raises(DataError, match="no inputs"):
            observe(CHAIN, names, [])


def test_sizes_of_symbolic_dimensions_come_from_the_feeds() -> None:
    assert bound_sizes(CHAIN, {"x": np.zeros((5, 64), np.float32)}) == {"n": 5}
