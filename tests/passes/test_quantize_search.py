"""Mixed precision: the budget is met, with as little in float as any choice could have, and only where it must be."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graphopt.ir.cost import cost
from graphopt.ir.session import open_session
from graphopt.optimize import optimize
from graphopt.passes.contract import Context, Verdict
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_effects import units
from graphopt.passes.quantize_plan import KEPT, QuantizePlan
from graphopt.passes.quantize_protection import IMAGE_DB, RUINED, protection
from graphopt.passes.quantize_search import MOST_TRIES, Search
from graphopt.pipeline import Budget, Guard
from graphopt.recipe import Recipe
from tests.passes.breaking_nets import NETS, detector, mobile, outlier, super_resolution, voice
from tests.passes.quantized_nets import MOBILE, RESIDUAL, TRANSFORMER, canonical_constants, feeds, tiny
from tests.zoo.models import zoo_feeds, zoo_model

Feeds = list[dict[str, np.ndarray]]


def data_of(model: ir.Model, count: int = 4) -> Feeds:
    return feeds(count, tuple(size if isinstance(size, int) else 2 for size in model.graph.inputs[0].shape))


def guard_of(model: ir.Model, data: Feeds, budget: Budget) -> Guard:
    guard = Guard(model, data, budget, "cpu", 1, {"n": len(next(iter(data[0].values())))})
    guard.first_step()
    return guard


def run(model: ir.Model, data: Feeds, options: Quantize | None = None, **knowledge: Any) -> tuple[ir.Model, Context]:
    context = Context(threads=1, calibration=data, **knowledge)
    result = model.clone()
    (options or Quantize()).run(result, context)
    return result, context


def search_of(context: Context) -> Search:
    found = context.evidence["search"]
    assert isinstance(found, Search)
    return found


class Oracle:
    """Every subset of the operators in float, tried."""

    def __init__(self, model: ir.Model, data: Feeds) -> None:
        self.judge = guard_of(model, data, Budget(tolerance=1.0)).verdict
        macs = {entry.node.name: entry.macs for entry in cost(model, {"n": 2}).nodes}
        context = Context(threads=1, calibration=data)
        names = [operator.node for operator in units(Quantize().plan(model, context))]
        self.errors: dict[tuple[str, ...], tuple[float, float]] = {}
        for count in range(len(names)):
            for kept in itertools.combinations(names, count):
                plan = Quantize(exclude=kept).plan(model, context)
                candidate = model.clone()
                Quantize().apply(candidate, plan)
                share = sum(macs[one.node] for one in units(plan)) / sum(macs.values())
                self.errors[kept] = self.judge(candidate).error, share

    def fewest(self, tolerance: float) -> int:
        return min(len(kept) for kept, (error, _) in self.errors.items() if error <= tolerance)

    def largest_share(self, tolerance: float) -> float:
        return max(share for error, share in self.errors.values() if error <= tolerance)


@pytest.mark.parametrize(
    ("make", "tolerances"),
    [(outlier, (0.3, 0.02, 0.004)), (voice, (0.1, 0.02)), (detector, (0.3, 0.007))],
    ids=["outlier", "voice", "detector"],
)
def test_as_little_goes_back_as_any_choice_needs(make: Callable[[], ir.Model], tolerances: tuple[float, ...]) -> None:
    model = make()
    data = data_of(model)
    oracle = Oracle(model, data)
    for tolerance in tolerances:
        guard = guard_of(model, data, Budget(tolerance=tolerance))
        result, context = run(model, data, judge=guard.verdict)
        verdict = guard.verdict(result)
        assert verdict.within
        assert verdict.error <= tolerance
        if oracle.errors[()][0] <= tolerance:
            assert "search" not in context.evidence
            continue
        found = search_of(context)
        assert found.chosen is not None
        chosen = found.tries[found.chosen]
        assert chosen.error == pytest.approx(verdict.error)
        assert len(chosen.kept_float) == oracle.fewest(tolerance)
        assert chosen.share >= oracle.largest_share(tolerance) - 0.2  # of several as small, not always the cheapest
        assert len(found.tries) < len(oracle.errors)


@pytest.mark.parametrize("name", ["mobilenet-v3"])
def test_zoo_nets_meet_a_tolerance(name: str) -> None:
    model = zoo_model(name)
    data = [zoo_feeds(model, seed=seed) for seed in range(2)]
    guard = Guard(model, data, Budget(tolerance=1.0), "cpu", 1, {})
    guard.first_step()
    full, _ = run(model, data, Quantize(search=False))
    tolerance = guard.verdict(full).error / 2
    guard.budget = Budget(tolerance=tolerance)
    result, context = run(model, data, judge=guard.verdict)
    assert guard.verdict(result).within
    found = search_of(context)
    assert found.chosen is not None
    chosen = found.tries[found.chosen]
    assert 0.0 < chosen.share < 1.0 or len(chosen.kept_float) < len(units(Quantize().plan(model, context))) / 2
    assert len(found.tries) <= MOST_TRIES


def test_nothing_is_searched_where_the_budget_is_met() -> None:
    model = RESIDUAL
    data = data_of(model)
    seen: list[ir.Model] = []

    def judge(candidate: ir.Model) -> Verdict:
        seen.append(candidate)
        return Verdict(True, 0.01)

    result, context = run(model, data, judge=judge)
    assert len(seen) == 1
    assert not context.evidence
    plain, _ = run(model, data, Quantize(search=False))
    assert [node.name for node in result.graph] == [node.name for node in plain.graph]
    assert [node.name for node in result.graph] == [node.name for node in seen[0].graph]


def test_search_can_be_turned_off() -> None:
    model = outlier()

    def judge(candidate: ir.Model) -> Verdict:
        raise AssertionError("nobody is asked")

    result, context = run(model, data_of(model), Quantize(search=False), judge=judge)
    assert not context.evidence
    assert sum(node.op_type == "DequantizeLinear" for node in result.graph) > 10


@pytest.mark.parametrize("name", sorted(NETS))
def test_ruined_outputs_are_seen_and_repaired_without_a_budget(name: str) -> None:
    model = NETS[name]()
    data = data_of(model)
    if name == "super-resolution":  # an image, so that the output shows one
        data = list(Context().inputs(model, "probes", samples=4).batches)
    plan = Quantize().plan(model, Context(threads=1, calibration=data))
    context = Context(threads=1, calibration=data)
    judge = protection(model, plan, context)
    assert judge is not None
    full, _ = run(model, data, Quantize(search=False))
    assert not judge(full).within
    assert "ruined" in judge(full).reason
    result, context = run(model, data)
    assert judge(result).within
    assert any("mixed precision" in remark.why for remark in context.remarks)
    assert any(remark.why == KEPT for remark in context.remarks)
    assert any(node.op_type == "DequantizeLinear" for node in result.graph)


def test_images_are_held_to_a_higher_standard() -> None:
    """The error of an image is small beside the image, and still 5 dB of what the network gained."""
    model = super_resolution()
    data = list(Context().inputs(model, "probes", samples=4).batches)
    full, _ = run(model, data, Quantize(search=False))
    result, context = run(model, data)

    def ratio(candidate: ir.Model) -> float:
        """Peak signal to noise of the candidate against a truth that the float net is 32 dB away from."""
        generator = np.random.default_rng(0)
        exact, other = open_session(model), open_session(candidate)
        expected = np.stack([exact.run_feeds(one)[0] for one in data])
        found = np.stack([other.run_feeds(one)[0] for one in data])
        peak = float(np.ptp(expected))
        truth = expected + generator.standard_normal(expected.shape) * peak * 10 ** (-32 / 20)
        return float(20 * np.log10(peak) - 10 * np.log10(np.mean((found - truth) ** 2)))

    assert ratio(model) == pytest.approx(32.0, abs=0.1)
    lost, left = ratio(model) - ratio(full), ratio(model) - ratio(result)
    assert lost > 1.0
    assert left < 0.3
    assert search_of(context).tries[0].error < RUINED
    assert f"{IMAGE_DB:.0f} dB" in search_of(context).budget


def test_zoo_nets_that_take_eight_bits_are_left_alone() -> None:
    for name in ("resnet", "unet", "two-outputs", "fpn"):
        model = zoo_model(name)
        data = [zoo_feeds(model, seed=seed) for seed in range(2)]
        _, context = run(model, data)
        assert not context.evidence, name


def test_narrow_widths_that_were_asked_for_are_not_undone_without_a_budget() -> None:
    _, context = run(RESIDUAL, data_of(RESIDUAL), Quantize(bits=3))
    assert not context.evidence


@pytest.mark.parametrize(
    "options", [Quantize(weight_bits=4), Quantize(bits=5), Quantize(bits=4, form="static")], ids=str
)
def test_bits_are_raised_before_anything_goes_to_float(options: Quantize) -> None:
    model = canonical_constants(MOBILE)
    data = data_of(model)
    wide, _ = run(model, data, Quantize(search=False))
    guard = guard_of(model, data, Budget(tolerance=0.03))
    assert guard.verdict(wide).within
    result, context = run(model, data, options, judge=guard.verdict)
    assert guard.verdict(result).within
    found = search_of(context)
    assert found.chosen is not None
    chosen = found.tries[found.chosen]
    assert chosen.widened
    assert not chosen.kept_float
    assert len(chosen.widened) < len(units(options.plan(model, Context(calibration=data))))
    assert chosen.share == 1.0


def test_what_was_raised_is_in_the_plan_with_its_bits() -> None:
    model = canonical_constants(TRANSFORMER)
    data = feeds(2, (2, 6, 32))
    options = Quantize(weight_bits=4)
    tolerance = 0.03
    guard = guard_of(model, data, Budget(tolerance=tolerance))
    plans: list[QuantizePlan] = []
    apply = Quantize.apply

    class Spy(Quantize):
        def apply(self, model: ir.Model, plan: QuantizePlan) -> None:
            plans.append(plan)
            apply(self, model, plan)

    context = Context(threads=1, calibration=data, judge=guard.verdict)
    Spy(weight_bits=4).run(model.clone(), context)
    chosen = search_of(context).tries[search_of(context).chosen or 0]
    operators = {operator.node: operator for operator in plans[-1].operators}
    assert chosen.widened
    for name in chosen.widened:
        assert operators[name].weight_bits in (7, 8)
        assert "raised to 8 bits" in operators[name].reason
    others = {one.node for one in units(plans[-1])} - set(chosen.widened)
    assert {operators[name].weight_bits for name in others} == {4}
    assert QuantizePlan.from_json(json.loads(json.dumps(plans[-1].to_json()))) == plans[-1]
    assert options.plan(model, Context(calibration=data)).operators[0].weight_bits == 4


def test_weights_alone_are_raised_too() -> None:
    model = canonical_constants(TRANSFORMER)
    data = feeds(2, (2, 6, 32))
    guard = guard_of(model, data, Budget(tolerance=0.03))
    result, context = run(model, data, Quantize(form="weights", weight_bits=4), judge=guard.verdict)
    assert guard.verdict(result).within
    found = search_of(context)
    assert found.chosen is not None
    assert 0 < len(found.tries[found.chosen].widened) < 4
    strict = guard_of(model, data, Budget(tolerance=0.003))
    result, context = run(model, data, Quantize(form="weights", weight_bits=4), judge=strict.verdict)
    assert strict.verdict(result).within
    assert search_of(context).tries[search_of(context).chosen or 0].kept_float


def test_weights_of_a_quantized_model_are_searched_in_its_float_form() -> None:
    eight = canonical_constants(TRANSFORMER)
    Quantize(form="weights").run(eight, Context())
    data = feeds(2, (2, 6, 32))
    guard = guard_of(eight, data, Budget(tolerance=0.03))
    options = Quantize(form="weights", weight_bits=3, requantize=True)
    result, context = run(eight, data, options, judge=guard.verdict)
    assert guard.verdict(result).within
    assert search_of(context).chosen is not None


def test_what_is_judged_is_rounded_on_the_inputs_that_the_result_is_rounded_on() -> None:
    model, data = canonical_constants(TRANSFORMER), feeds(2, (2, 6, 32))
    options = Quantize(form="weights", weight_bits=3, rounding="error-feedback")
    guard = guard_of(model, data, Budget(tolerance=0.0))
    result, context = run(model, data, options, judge=guard.verdict)
    assert search_of(context).tries[0].error == guard.verdict(result).error


def test_every_operator_that_went_back_says_why() -> None:
    model = outlier()
    data = data_of(model)
    guard = guard_of(model, data, Budget(tolerance=0.02))
    _, context = run(model, data, judge=guard.verdict)
    found = search_of(context)
    text = "\n".join(found.summary())
    assert "tolerance 0.02" in text
    for name in found.tries[found.chosen or 0].kept_float:
        assert name in text
        assert any(remark.where == name and remark.why == KEPT for remark in context.remarks)
    assert "what it works on went back to float" in {remark.why for remark in context.remarks}  # the Relu of a Conv
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(document["tries"]) == len(found.tries)
    assert set(document["effects"]) == set(found.tries[found.chosen or 0].kept_float)
    assert str(found).count("\n") == 2 + len(found.tries)


def test_it_is_deterministic() -> None:
    model = mobile()
    data = data_of(model)
    guard = guard_of(model, data, Budget(tolerance=0.01))
    (first, one), (second, two) = (run(model, data, judge=guard.verdict) for _ in range(2))
    assert one.evidence == two.evidence
    assert [node.name for node in first.graph] == [node.name for node in second.graph]


def test_where_nothing_fits_the_guard_rejects_the_full_graph() -> None:
    model = tiny()
    data = data_of(model)
    guard = guard_of(model, data, Budget(tolerance=1e-9))
    result, context = run(model, data, judge=guard.verdict)
    assert search_of(context).chosen is None
    assert "no operator can be quantized" in search_of(context).summary()[0]
    assert not guard.verdict(result).within
    assert any("no operator can run on integers within the budget" in remark.why for remark in context.remarks)


def test_the_judge_and_the_guard_say_the_same() -> None:
    model = outlier()
    data = data_of(model)
    full, _ = run(model, data, Quantize(search=False))
    for budget in (Budget(tolerance=0.5), Budget(tolerance=0.02), Budget(_first_score), Budget(_first_score, 1e9)):
        guard = guard_of(model, data, budget)
        verdict = guard.verdict(full)
        step = guard.judge("quantize", full, Quantize.semantics)
        assert verdict.within == (step.cause != "budget")
        assert step.error is not None
        assert verdict.error == pytest.approx(step.error.rms_error)
        assert (verdict.reason or None) == (step.reason if step.cause == "budget" else None)


def _first_score(session: onnxruntime.InferenceSession) -> float:
    generator = np.random.default_rng(7)
    image = generator.standard_normal((2, 3, 16, 16)).astype(np.float32)
    return -abs(float(session.run(None, {"x": image})[0][0, 0]) - 1.0)


def test_a_metric_is_a_budget_too() -> None:
    model = outlier()
    data = data_of(model)
    exact = open_session(model)
    expected = np.concatenate([exact.run_feeds(one)[0] for one in data])

    def agreement(session: onnxruntime.InferenceSession) -> float:
        found = np.concatenate([session.run(None, one)[0] for one in data])
        return 100.0 - 100.0 * float(np.abs(found - expected).mean() / np.abs(expected).mean())

    guard = guard_of(model, data, Budget(agreement, 2.0))
    result, context = run(model, data, judge=guard.verdict)
    found = search_of(context)
    assert found.budget == "metric at least 98"
    assert found.chosen is not None
    assert found.tries[found.chosen].metric >= 98.0
    assert guard.verdict(result).within


def test_a_net_that_cannot_be_run_is_quantized_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.errors import DataError

    def refuse(self: Context, *arguments: Any, **keywords: Any) -> Any:
        raise DataError("no inputs")

    monkeypatch.setattr(Context, "inputs", refuse)
    result, context = run(tiny(), data_of(tiny()))
    assert any(remark.what == "measure what quantization does" for remark in context.remarks)
    assert any(node.op_type == "QuantizeLinear" for node in result.graph)


def test_optimize_prints_what_went_back_and_why() -> None:
    model = outlier()
    data = data_of(model)
    recipe = Recipe("int8", (Quantize(),))
    result = optimize(model, recipe=recipe, calibration=data, tolerance=0.02, quiet=True)
    step = next(step for step in result.report.steps if step.name == "quantize")
    assert step.cause in (None, "speed")  # within the budget; whether it is faster is for the clock to say
    text = str(result.report)
    assert "mixed precision" in text
    assert "2 back to float" in " ".join(text.split())
    assert "diagnosis" in text
    document = result.report.to_json()
    evidence = next(entry["evidence"] for entry in document["steps"] if entry["name"] == "quantize")
    assert evidence["search"]["tries"][0]["kept_float"] == []
    assert evidence["diagnosis"]["operators"][0]["alone"] > 0.3
    untouched = optimize(model, recipe=replace(recipe, passes=(Quantize(search=False),)), tolerance=0.02, quiet=True)
    assert untouched.report.steps[-1].cause == "budget"
    assert untouched.report.steps[-1].evidence == {}
