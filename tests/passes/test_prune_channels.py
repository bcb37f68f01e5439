"""Pass prune-channels: the plan, the cut, the refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest

import graphopt
from graphopt.criteria import Criterion, Knowledge
from graphopt.errors import DataError, GraphoptError, RecipeError, SelectionError, TargetMissedError
from graphopt.inputs.batches import batch_dimensions, resized
from graphopt.inputs.probes import symbolic_sizes
from graphopt.ir.channels import ChannelGroup, channel_groups
from graphopt.ir.check import check_structure
from graphopt.ir.cost import cost
from graphopt.ir.session import open_session
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from graphopt.ir.text import print_graph
from graphopt.passes import Context, FoldBatchnorm, PruneChannels
from graphopt.passes.prune_plan import GroupPlan, PrunePlan, digest_of
from graphopt.recipe import read_recipe, resolve
from graphopt.search import CostModel, GlobalRanking, Sensitivity
from tests.laws.channel_law import TOLERANCE, difference, run
from tests.laws.test_channels import UNABLE, is_quantized
from tests.passes.golden import docstring_blocks, parse
from tests.search.pruning_nets import conv_net, mlp, weighted
from tests.zoo.models import QUICK, zoo_feeds, zoo_model

PRUNED_IN_FAST_TESTS = ("resnet", "resnext", "vit", "mobilenet-v2", "densenet", "gru", "if-weights")


@dataclass(frozen=True)
class Coin(Criterion):
    """Seeded scores; counts what it was shown."""

    name: ClassVar[str] = "coin"
    needs: ClassVar[str] = "weights"

    seed: int = 0

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        numbers = np.random.default_rng(self.seed)
        return {group.name: numbers.random(group.units) for group in groups}


@dataclass(frozen=True)
class Watcher(Coin):
    """Needs inputs, and reads one batch."""

    name: ClassVar[str] = "watcher"
    needs: ClassVar[str] = "inputs"

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        assert knowledge.feeds is not None
        batch = next(iter(knowledge.feeds))
        return {group.name: np.arange(group.units) + float(np.abs(batch["x"]).mean()) for group in groups}


def everything(**options: Any) -> PruneChannels:
    return PruneChannels(criterion=Coin(), round_to=1, skip=(), **options)


# The law ------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", [n if n in PRUNED_IN_FAST_TESTS else pytest.param(n, marks=pytest.mark.slow) for n in QUICK]
)
def test_cut_equals_masked(name: str) -> None:
    model = zoo_model(name)
    if name in UNABLE:
        with pytest.raises(GraphoptError, match="nothing may be pruned"):
            everything().plan(model)
        return
    kind = PruneChannels(ratio=0.4, criterion=Coin(seed=1), round_to=1, skip=("inexact",))
    if not any(group.prunable and group.exact for group in channel_groups(model)):
        pytest.skip("all groups are inexact")
    plan = kind.plan(model)
    assert plan.selection
    masked, pruned = plan.masked(model), model.clone()
    kind.apply(pruned, plan)
    check_structure(pruned)
    assert cost(pruned).parameters < cost(model).parameters
    counted = cost(pruned, resized(model, symbolic_sizes(model), 1))
    assert (counted.macs, counted.parameters) == (plan.after.macs, plan.after.params)
    feeds = zoo_feeds(model)
    assert difference(run(masked, feeds), run(pruned, feeds, optimized=not is_quantized(model))) <= TOLERANCE
    assert [(v.name, str(v.shape), v.dtype) for v in (*pruned.graph.inputs, *pruned.graph.outputs)] == [
        (v.name, str(v.shape), v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)
    ]


@pytest.mark.torch
@pytest.mark.parametrize("name", ["resnet", "vit", "mobilenet-v2"])
def test_inexact_groups_and_streams_go_when_asked_for(name: str) -> None:
    model = zoo_model(name)
    whole, some = everything(ratio=0.3).plan(model), PruneChannels(ratio=0.3, criterion=Coin(), round_to=1).plan(model)
    assert not any(group.role == "residual stream" for group in some.groups)
    assert any(group.role == "residual stream" for group in whole.groups)
    pruned = model.clone()
    everything().apply(pruned, whole)
    assert [array.shape for array in run(pruned, zoo_feeds(model), optimized=True)] == [
        array.shape for array in run(model, zoo_feeds(model))
    ]


def test_the_docstring_is_true() -> None:
    before, after = docstring_blocks(PruneChannels)
    model = graphopt.load(parse(before))
    PruneChannels()(model)
    expected = parse(after, inputs={value.name or "" for value in model.graph.inputs})
    assert print_graph(model) == print_graph(expected)


def test_units_of_the_lowest_norm_go() -> None:
    model = conv_net((3, 16, 32, 8))
    plan = PruneChannels(ratio=0.25, round_to=1).plan(model)
    for group, weight in zip(plan.groups, ("w0", "w1"), strict=True):
        filters = model.graph.initializers[weight].const_value
        assert filters is not None
        lengths = np.linalg.norm(filters.numpy().reshape(group.units, -1), axis=1)
        assert set(group.removed) == set(np.argsort(lengths)[: group.units // 4].tolist())
        assert group.boundary == pytest.approx(tuple(np.sort(lengths)[group.units // 4 - 1 : group.units // 4 + 1]))


# The plan as data ---------------------------------------------------------------------------------------------


def test_plans_survive_json_and_replay_on_the_same_model_only() -> None:
    model, other = conv_net(), conv_net(seed=1)
    kind = PruneChannels(macs=0.5, allocation=GlobalRanking(), round_to=1)
    plan = kind.plan(model)
    again = PrunePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert isinstance(again.groups[0].removed, tuple)
    first, second = model.clone(), model.clone()
    kind.apply(first, plan)
    PruneChannels().apply(second, again)
    for name, value in first.graph.initializers.items():
        twin = second.graph.initializers[name].const_value
        assert value.const_value is not None
        assert twin is not None
        np.testing.assert_array_equal(value.const_value.numpy(), twin.numpy())
    before = print_graph(other)
    with pytest.raises(GraphoptError, match="another model"):
        kind.apply(other, plan)
    with pytest.raises(GraphoptError, match="another model"):
        plan.masked(other)
    with pytest.raises(GraphoptError, match="another model"):
        kind.apply(first, plan)
    assert print_graph(other) == before


def test_plan_changes_nothing(tmp_path: Path) -> None:
    model = conv_net()
    before, text = digest_of(model), print_graph(model)
    PruneChannels(params=0.5, allocation="sensitivity", source="probes", round_to=1).plan(model)
    assert (digest_of(model), print_graph(model)) == (before, text)
    graphopt.save(model, tmp_path / "model.onnx")
    assert digest_of(graphopt.load(tmp_path / "model.onnx")) == before


def test_a_plan_prints_what_it_does() -> None:
    text = str(PruneChannels(params=0.6, round_to=1, keep=("w0",)).plan(conv_net()))
    assert "prune to 0.6 of the params" in text
    assert "criterion l2" in text
    assert "keep has 'w0'" in text
    assert "graph output 'y'" in text
    assert "%" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("groups"),
        lambda data: data.update(speed=3),
        lambda data: data.update(share=float("nan")),
        lambda data: data.update(model=7),
        lambda data: data["groups"][0].update(removed=[5, 3]),
        lambda data: data["groups"][0].update(removed=[99]),
        lambda data: data["groups"][0].update(removed=["1"]),
        lambda data: data["groups"][0].update(removed=list(range(data["groups"][0]["units"]))),
        lambda data: data["groups"][0].update(removed=[*range(500), 7], units=1000),
        lambda data: data["groups"][0].update(boundary=[1.0]),
        lambda data: data["groups"][0].update(boundary=[0.5] * 300),
        lambda data: data.update(notes=[3]),
        lambda data: data["groups"][0].update(boundary=["low", "high"]),
        lambda data: data["groups"].append(data["groups"][0]),
        lambda data: data["before"].update(joules=1),
        lambda data: data.update(groups=3),
    ],
)
def test_damaged_plans_are_refused(change: Any) -> None:
    data = json.loads(json.dumps(PruneChannels(ratio=0.3).plan(conv_net()).to_json()))
    change(data)
    with pytest.raises(GraphoptError) as caught:
        PrunePlan.from_json(data)
    assert caught.value.help
    assert len(str(caught.value)) < 300
    with pytest.raises(GraphoptError, match="not a pruning plan"):
        PrunePlan.from_json([])  # type: ignore[arg-type]


def test_a_plan_with_a_group_that_is_not_there_is_refused() -> None:
    model = conv_net()
    plan = PrunePlan(digest_of(model), (GroupPlan("elsewhere", "channels", 4, (1,)),))
    with pytest.raises(SelectionError, match="elsewhere"):
        PruneChannels().apply(model, plan)


# Targets and options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "global", "cross-layer", "sensitivity"])
@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_targets_are_met(kind: str, allocation: str) -> None:
    model = conv_net((3, 32, 48, 64, 8))
    options: dict[str, Any] = {kind: 0.5}
    PruneChannels(allocation=allocation, round_to=1, source="probes", **options)(model)
    whole, after = cost(conv_net((3, 32, 48, 64, 8))), cost(model)
    figure = {"macs": "macs", "params": "parameters", "bytes": "weight_bytes"}[kind]
    assert getattr(after, figure) / getattr(whole, figure) == pytest.approx(0.5, rel=0.01)


def test_widths_are_rounded_for_the_kernels_unless_asked_not_to() -> None:
    model = conv_net((3, 16, 32, 64, 100, 8))
    assert [group.kept for group in PruneChannels(ratio=0.3).plan(model).groups] == [8, 32, 48, 64]
    assert [group.kept for group in PruneChannels(ratio=0.3, round_to=1).plan(model).groups] == [11, 22, 45, 70]
    assert [group.kept for group in PruneChannels(ratio=0.3, round_to=10).plan(model).groups] == [10, 30, 40, 70]


def test_a_ratio_that_the_widths_do_not_allow_is_noted() -> None:
    context = Context()
    plan = PruneChannels(ratio=0.3).plan(conv_net((3, 16, 8)), context)
    (note,) = plan.notes
    assert note.startswith("0.5 of the units go, 0.3 were asked for")
    assert note in [remark.why for remark in context.remarks]
    assert note in str(plan)
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert PruneChannels(ratio=0.5).plan(conv_net((3, 16, 8))).notes == ()
    plan = PruneChannels(macs=0.6, round_to=8).plan(conv_net((3, 16, 16, 8)))
    assert "come no nearer to 0.600" in str(plan)


@pytest.mark.parametrize("name", PRUNED_IN_FAST_TESTS)
@pytest.mark.torch
def test_a_plan_counts_one_sample_whatever_the_batch(name: str) -> None:
    model = zoo_model(name)
    batched = dict.fromkeys(batch_dimensions(model), 6)
    plans = [PruneChannels().plan(model, Context(sizes=sizes)) for sizes in ({}, batched)]
    ones = {**symbolic_sizes(model), **dict.fromkeys(batched, 1)}
    assert plans[0].before == plans[1].before == CostModel(model, channel_groups(model), ones).whole


def test_default_is_three_tenths() -> None:
    assert PruneChannels().plan(conv_net()).selection == PruneChannels(ratio=0.3).plan(conv_net()).selection
    assert PruneChannels(ratio=0).plan(conv_net()).selection == {}


def test_nothing_that_fits_the_widths_is_said() -> None:
    context = Context()
    model = conv_net((3, 16, 8))
    assert not PruneChannels(ratio=0.05).run(model, context).modified
    assert any("round_to=1" in remark.why for remark in context.remarks)
    context = Context()
    PruneChannels(macs=0.6, round_to=8).run(conv_net((3, 16, 16, 8)), context)
    assert any("come no nearer" in remark.why for remark in context.remarks)


@pytest.mark.parametrize("pattern", ["w0", "b0", "w0*", "channels of *[0]*", "*"])
def test_what_is_kept_stays_whole(pattern: str) -> None:
    model = conv_net()
    names = [group.name for group in channel_groups(model) if group.prunable]
    if pattern == "*":
        with pytest.raises(GraphoptError, match="nothing may be pruned"):
            PruneChannels(keep=(pattern,)).plan(model)
        return
    pattern = names[0] if pattern.startswith("channels") else pattern
    plan = PruneChannels(keep=(pattern,)).plan(model)
    assert list(plan.selection) == names[1:]
    assert any(group.name == names[0] and "keep" in group.reason for group in plan.skipped)


def test_nodes_are_kept_by_name() -> None:
    model = conv_net()
    relu = next(node for node in model.graph if node.op_type == "Relu")
    relu.name = "the relu"
    first = next(group.name for group in channel_groups(model) if group.prunable)
    assert first not in PruneChannels(keep=("the relu",)).plan(model).selection
    reader = next(use.node for use in relu.outputs[0].uses())
    reader.name = "reader"  # reads the first group's channels and makes the second's
    with pytest.raises(GraphoptError, match="nothing may be pruned"):
        PruneChannels(keep=("reader",)).plan(model)


def test_min_units_stay() -> None:
    plan = PruneChannels(params=0.4, min_units=10, round_to=1).plan(conv_net((3, 12, 64, 8)))
    assert min(group.kept for group in plan.groups) >= 10
    plan = PruneChannels(ratio=0.5, min_units=12, round_to=1).plan(conv_net((3, 12, 64, 8)))
    assert [group.units for group in plan.groups] == [64]
    assert any("min_units" in group.reason for group in plan.skipped)


@pytest.mark.torch
def test_roles_are_skipped_by_pattern() -> None:
    model = zoo_model("vit")
    assert {group.role for group in PruneChannels().plan(model).groups} == {"heads", "mlp hidden"}
    assert {group.role for group in PruneChannels(skip=("mlp*", "head*", "residual*")).plan(model).groups} == {
        "value width"
    }
    assert {group.role for group in PruneChannels(skip=("heads", "inexact")).plan(model).groups} >= {"head width"}


def test_what_stays_leaves_a_remark() -> None:
    context = Context()
    PruneChannels().plan(conv_net(), context)
    texts = [str(remark) for remark in context.remarks]
    assert any(text.startswith("missed prune channels: graph output 'y'") for text in texts)
    assert any("graph input 'x'" in text for text in texts)


def test_inputs_are_made_only_when_somebody_needs_them() -> None:
    context = Context()
    assert PruneChannels().plan(conv_net(), context).source == ""
    assert not any("inputs from" in remark.why for remark in context.remarks)
    plan = PruneChannels(criterion=Watcher(), source="probes").plan(conv_net(), context)
    assert plan.source.startswith("probes")
    assert any("inputs from probes" in remark.why for remark in context.remarks)
    data = [np.ones((2, 3, 8, 8), np.float32)]
    given = Context(calibration=graphopt.inputs.calibration.Calibration(conv_net(), data))
    plan = PruneChannels(criterion=Watcher(), allocation="sensitivity").plan(conv_net(), given)
    assert plan.source.startswith("calibration")


def test_statistics_of_batchnorm_are_cut_along() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,3,8,8] x, float[16,3,3,3] w, float[16] gamma, float[16] beta, float[16] mean, float[16] var,
           float[4,16,3,3] v) => (float[n,4,4,4] y) {
          c = Conv(x, w) b = BatchNormalization(c, gamma, beta, mean, var) r = Relu(b) y = Conv(r, v) }"""
    model = weighted(text)
    var = model.graph.initializers["var"]
    assert var.const_value is not None
    var.const_value = ir.Tensor(np.abs(var.const_value.numpy()) + 0.5, name="var")
    beta = model.graph.initializers["beta"].const_value
    assert beta is not None
    FoldBatchnorm()(model)
    kind = PruneChannels(ratio=0.5, round_to=1)
    plan = kind.plan(model)
    pruned = model.clone()
    kind.apply(pruned, plan)
    (statistics,) = [
        value.meta[BATCHNORM_STATISTICS]
        for node in pruned.graph
        for value in node.outputs
        if BATCHNORM_STATISTICS in value.meta
    ]
    ((removed),) = plan.selection.values()
    np.testing.assert_allclose(statistics[0], np.delete(beta.numpy(), removed), rtol=1e-6)
    assert statistics[1].shape == (8,)
    whole = [v.meta[BATCHNORM_STATISTICS] for n in model.graph for v in n.outputs if BATCHNORM_STATISTICS in v.meta]
    assert whole[0][0].shape == (16,)


# Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": "0.5"}, "must be a number[^$]*help: write it without quotes"),
        ({"source": "calib"}, "unknown source 'calib'[^$]*help: one of auto, calibration"),
        ({"ratio": True}, "must be a number"),
        ({"macs": 0.0}, "target of 0.0"),
        ({"params": 1.5}, "target of 1.5"),
        ({"macs": 0.5, "params": 0.5}, "several targets.*macs, params"),
        ({"criterion": "l3"}, "no criterion 'l3'"),
        ({"allocation": "globl"}, "did you mean 'global'"),
        ({"allocation": {"normalise": "max"}}, "without a name"),
        ({"criterion": {"name": "l2", "colour": 1}}, "no option 'colour'"),
        ({"round_to": 0}, "round_to is 0"),
        ({"min_units": 0}, "min_units is 0[^$]*help: 1 is the default"),
        ({"min_units": 1.5}, "min_units is 1.5"),
        ({"keep": "head"}, "one string"),
        ({"skip": "heads"}, "one string"),
        ({"skip": ("residual streams",)}, "did you mean 'residual stream'"),
        ({"keep": (3,)}, "must be a list of patterns[^$]*help: each is a text"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        PruneChannels(**options)


def test_keep_that_matches_nothing_names_what_is_near() -> None:
    with pytest.raises(GraphoptError, match="did you mean 'w1'"):
        PruneChannels(keep=("w1x",)).plan(conv_net())


def test_nothing_to_prune_lists_what_blocks() -> None:
    with pytest.raises(GraphoptError, match=r"nothing may be pruned: .*graph input 'x'"):
        PruneChannels().plan(mlp((4, 3)))
    with pytest.raises(GraphoptError, match="nothing may be pruned"):
        PruneChannels().plan(mlp((4, 1, 3)))


@pytest.mark.torch
def test_streams_alone_are_not_pruned_by_default_and_the_error_says_how() -> None:
    with pytest.raises(GraphoptError, match="residual stream") as caught:
        PruneChannels().plan(zoo_model("repvgg"))
    assert "skip=()" in (caught.value.help or "")


def test_a_missed_target_is_an_error() -> None:
    with pytest.raises(TargetMissedError, match="is left with all gone that may go"):
        PruneChannels(macs=0.001).plan(conv_net())


def test_a_missed_target_names_the_groups_in_the_way() -> None:
    with pytest.raises(TargetMissedError) as caught:
        PruneChannels(macs=0.001, keep=("w0",)).plan(conv_net())
    assert "these stay whole: " in (caught.value.help or "")
    assert "keep has 'w0'" in (caught.value.help or "")
    assert "graph output 'y'" in (caught.value.help or "")


def test_compensation_from_calibration_needs_some_before_anything_changes() -> None:
    step, model = PruneChannels(source="calibration", compensation="least-squares"), conv_net()
    with pytest.raises(DataError, match="there is none for the compensation"):
        step.plan(model)
    feeds = [{"x": np.ones((4, 3, 8, 8), np.float32)}]
    plan, before = step.plan(model, Context(calibration=feeds)), digest_of(model)
    with pytest.raises(DataError, match="there is none for the compensation"):
        step.apply(model, plan)
    assert digest_of(model) == before
    step.apply(model, plan, Context(calibration=feeds))
    assert digest_of(model) != before
    PruneChannels(source="calibration").plan(conv_net())  # ranks by weights alone


def test_criteria_that_need_data_say_so() -> None:
    with pytest.raises(DataError, match="calibration"):
        PruneChannels(criterion=Watcher(), source="calibration").plan(conv_net())


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(GraphoptError, match="dreams"):
        PruneChannels(criterion=Watcher(), source="dreams").plan(conv_net())


# Where it runs ------------------------------------------------------------------------------------------------


def test_in_a_sequential_of_onnx_ir() -> None:
    model = conv_net()
    result = ir.passes.Sequential(PruneChannels(ratio=0.5), common_passes.RemoveUnusedNodesPass())(model)
    assert result.modified
    assert result.model is model
    assert cost(model).parameters < 0.5 * cost(conv_net()).parameters


def test_under_the_guard() -> None:
    result = graphopt.optimize(conv_net((3, 32, 64, 8), size=16), recipe=[PruneChannels(macs=0.4)], quiet=True)
    assert cost(result.model).macs < 0.45 * cost(conv_net((3, 32, 64, 8), size=16)).macs
    assert "prune-channels" in {step.name for step in result.report.steps}
    open_session(result.model).run_feeds({"x": np.zeros((1, 3, 16, 16), np.float32)})


def test_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "prune.toml"
    file.write_text("""
[[pass]]
name = "prune-channels"
params = 0.5
round_to = 1
keep = ["w0"]
criterion = {name = "l1", combine = "max"}
allocation = {name = "sensitivity", shares = [0.2, 0.6], samples = 8}
""")
    (single,) = read_recipe(file).passes
    assert isinstance(single, PruneChannels)
    assert single.allocation == Sensitivity(shares=(0.2, 0.6), samples=8)
    assert single.keep == ("w0",)
    assert hash(single) == hash(read_recipe(file).passes[0])
    file.write_text('[[pass]]\nname = "prune-channels"\nratio = 1.5\n')
    with pytest.raises(RecipeError, match="ratio"):
        read_recipe(file)
    assert resolve(["prune-channels"]).passes == (PruneChannels(),)
