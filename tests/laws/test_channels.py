"""The laws of the dependency engine over the zoo and over random graphs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.ir.channels import ChannelGroup, ChannelGroups, channel_groups
from graphopt.ir.check import check_structure
from graphopt.passes import ALL_PASSES, Context, Semantics
from graphopt.recipe import preset
from tests.laws.channel_law import TOLERANCE, cut_against_masked, difference, partition, random_selection, run
from tests.laws.random_graphs import random_model
from tests.zoo.models import NAMES, QUICK, zoo_feeds, zoo_model

ZOO = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
FUZZED = [*range(60), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(60, 1000))]
EXACT = sorted(name for name, kind in ALL_PASSES.items() if kind.semantics is Semantics.EXACT)
UNABLE = {"scalars-only": "it has no axis of more than one element"}
"""Models of the zoo in which nothing can be removed, and why."""


def feeds_of(model: ir.Model) -> list[dict[str, np.ndarray]]:
    return [zoo_feeds(model, scale=scale, seed=scale) for scale in (1, 2)]


def is_quantized(model: ir.Model) -> bool:
    return any("Quantize" in node.op_type or "Integer" in node.op_type for node in model.graph)


@pytest.mark.torch
@pytest.mark.parametrize("name", ZOO)
def test_cut_equals_masked(name: str) -> None:
    model = zoo_model(name)
    before = {key: value.const_value for key, value in model.graph.initializers.items()}
    groups = channel_groups(model)
    feeds = feeds_of(model)
    if name in UNABLE:
        assert not any(group.prunable for group in groups)
        return
    assert any(group.prunable for group in groups)
    for seed, share in enumerate((0.3, 0.6)):
        selection = random_selection(groups, seed, share)
        error, _ = cut_against_masked(model, groups, selection, feeds, optimized=not is_quantized(model))
        assert error <= TOLERANCE
    everything = graphopt.remove_channels(model, random_selection(groups, 2, 0.3, inexact=True), groups=groups)
    check_structure(everything)
    for feed in feeds:
        assert [array.shape for array in run(everything, feed, optimized=True)] == [
            array.shape for array in run(model, feed)
        ]
    assert before == {key: value.const_value for key, value in model.graph.initializers.items()}


@pytest.mark.parametrize("seed", FUZZED)
def test_cut_equals_masked_on_random_graphs(seed: int) -> None:
    model = graphopt.load(random_model(seed, 4 + seed % 12))
    groups = channel_groups(model)
    assert not groups.analysis.opaque
    numbers = np.random.default_rng(seed)
    feeds = [{"x": numbers.standard_normal((batch, 3, 4)).astype(np.float32)} for batch in (2, 3)]
    selection = random_selection(groups, seed, (0.3, 0.5, 0.2)[seed % 3])
    error, _ = cut_against_masked(model, groups, selection, feeds, optimized=False)
    assert error <= TOLERANCE
    graphopt.remove_channels(model, random_selection(groups, seed, 0.4, inexact=True), groups=groups)


def test_masking_moves_the_outputs_of_random_graphs() -> None:
    """Else the law above would hold for an engine that selects what does not matter."""
    moved: list[float] = []
    for seed in range(20):
        model = graphopt.load(random_model(seed, 4 + seed % 12))
        groups = channel_groups(model)
        feeds = [{"x": np.random.default_rng(seed).standard_normal((2, 3, 4)).astype(np.float32)}]
        moved.append(cut_against_masked(model, groups, random_selection(groups, seed, 0.4), feeds, optimized=False)[1])
    assert np.median(moved) > 0.1


def test_inexact_groups_are_inexact() -> None:
    """Groups are not called inexact for nothing: in most random graphs that have some, removal shows."""
    told, shown = 0, 0
    for seed in range(60):
        model = graphopt.load(random_model(seed, 4 + seed % 12))
        groups = channel_groups(model)
        inexact = [group for group in groups if group.prunable and not group.exact]
        if not inexact:
            continue
        told += 1
        feeds = [{"x": np.random.default_rng(seed).standard_normal((2, 3, 4)).astype(np.float32)}]
        selection = random_selection(groups, seed, 0.3, inexact=True)
        selection = {group.name: selection[group.name] for group in inexact if group.name in selection}
        shown += cut_against_masked(model, groups, selection, feeds, optimized=False)[0] > TOLERANCE
    assert told > 10
    assert shown > 0.6 * told


# Invariance ---------------------------------------------------------------------------------------------------


def shuffled(model: ir.Model, seed: int) -> ir.Model:
    """The same graph with its nodes in another topological order."""
    random = Random(seed)
    result = model.clone()
    nodes = list(result.graph)
    waiting = {node: {v.producer() for v in captured(node)} & set(nodes) for node in nodes}
    ready = [node for node in nodes if not waiting[node]]
    order: list[ir.Node] = []
    while ready:
        node = ready.pop(random.randrange(len(ready)))
        order.append(node)
        for other, before in waiting.items():
            if node in before:
                before.discard(node)
                if not before:
                    ready.append(other)
    assert len(order) == len(nodes)
    for node in order:
        result.graph.remove(node)
    result.graph.extend(order)
    initializers = list(result.graph.initializers.values())
    random.shuffle(initializers)
    result.graph.initializers.clear()
    for value in initializers:
        result.graph.register_initializer(value)
    return result


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values of the main graph that a node or its subgraphs read."""
    for attribute in node.attributes.values():
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
        for graph in graphs:
            yield from graph.outputs
            for inner in graph:
                yield from captured(inner)
    yield from (value for value in node.inputs if value is not None)


def renamed(model: ir.Model) -> ir.Model:
    """The same graph with other names of nodes and activations, and initializers prefixed."""
    result = model.clone()
    for index, node in enumerate(result.graph):
        node.name = f"other_{index}"
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"value_{index}_{value.index()}"
    for value in tuple(result.graph.initializers.values()):
        value.name = f"zz.{value.name}"
    return result


SOME = ("resnet-bottleneck", "shufflenet-v2", "llama", "recurrent", "if-captures", "loop-weights", "unet-groupnorm")


@pytest.mark.torch
@pytest.mark.parametrize("name", SOME)
def test_groups_do_not_depend_on_the_order_of_nodes(name: str) -> None:
    model = zoo_model(name)
    expected = [group.to_json() for group in channel_groups(model)]
    for seed in range(3):
        found = channel_groups(shuffled(model, seed))
        assert partition(found) == partition(channel_groups(model))
        assert [without_reasons(group) for group in (g.to_json() for g in found)] == list(
            map(without_reasons, expected)
        )


def without_reasons(group: dict[str, object]) -> dict[str, object]:
    """Where two operators freeze a group, the one that comes first is named."""
    return {key: value for key, value in group.items() if "reason" not in key}


@pytest.mark.parametrize("seed", range(25))
def test_random_groups_do_not_depend_on_the_order_of_nodes(seed: int) -> None:
    model = graphopt.load(random_model(seed, 4 + seed % 12))
    expected = channel_groups(model)
    for other in range(3):
        found = channel_groups(shuffled(model, other))
        assert {group.name: described(group) for group in found if group.prunable} == {
            group.name: described(group) for group in expected if group.prunable
        }


def described(group: ChannelGroup) -> tuple[object, ...]:
    """All that a saved selection relies on: exactness, and what each unit owns, in order."""
    slices = [
        {name: [(axis, indices.tolist()) for axis, indices in found] for name, found in group.slices(unit).items()}
        for unit in range(group.units)
    ]
    return group.exact, group.units, slices


@pytest.mark.torch
@pytest.mark.parametrize("name", SOME)
def test_groups_do_not_depend_on_names(name: str) -> None:
    model = zoo_model(name)
    found = partition(channel_groups(renamed(model)))
    assert {frozenset((re.sub("^zz.", "", t), a, i) for t, a, i in unit) for unit in found} == partition(
        channel_groups(model)
    )


MERGING = {"merge-initializers", "merge-common-subexpressions", "merge-branches", "merge-linear"}
"""Exact passes that make one weight of two, or one value of two equal ones: they tie on purpose, after pruning."""


@pytest.mark.torch
@pytest.mark.parametrize("name", SOME)
def test_groups_do_not_depend_on_exact_passes(name: str) -> None:
    """Units stay the same sets on all weights that a pass leaves as they are."""
    model = zoo_model(name)
    groups = channel_groups(model)
    for pass_name in EXACT:
        if pass_name in MERGING:
            continue
        changed = model.clone()
        if not ALL_PASSES[pass_name]()(changed).modified:
            continue
        after = channel_groups(graphopt.load(changed))
        common = {
            key
            for key, value in model.graph.initializers.items()
            if (other := changed.graph.initializers.get(key)) is not None and other.shape == value.shape
        }
        assert restricted(after, common) == restricted(groups, common), pass_name


def restricted(groups: ChannelGroups, names: set[str]) -> set[frozenset[tuple[str, int, int]]]:
    return {kept for unit in partition(groups) if (kept := frozenset(e for e in unit if e[0] in names))}


# Removal ------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", SOME)
def test_removing_in_two_steps_is_removing_at_once(name: str) -> None:
    model = zoo_model(name)
    two_steps(model, channel_groups(model), zoo_feeds(model))


@pytest.mark.parametrize("seed", range(25))
def test_removing_in_two_steps_is_removing_at_once_on_random_graphs(seed: int) -> None:
    model = graphopt.load(random_model(seed, 4 + seed % 12))
    feeds = {"x": np.random.default_rng(seed).standard_normal((2, 3, 4)).astype(np.float32)}
    two_steps(model, channel_groups(model), feeds)


def two_steps(model: ir.Model, groups: ChannelGroups, feeds: dict[str, np.ndarray]) -> None:
    """Half of the groups first, then the others, whose units are found again by what they own."""
    selection = random_selection(groups, 0, 0.3, inexact=True)
    at_once = graphopt.remove_channels(model, selection, groups=groups)
    first = {name: selection[name] for name in list(selection)[::2]}
    between = graphopt.remove_channels(model, first, groups=groups)
    later = channel_groups(between)
    places = {owned(group, unit): (group.name, unit) for group in later for unit in range(group.units)}
    removed = groups.atoms(first)
    second: dict[str, list[int]] = {}
    for name in list(selection)[1::2]:
        for unit in selection[name]:
            found, index = places[owned(groups.named(name), unit, groups, removed)]
            second.setdefault(found, []).append(index)
    in_turn = graphopt.remove_channels(between, second, groups=later)
    assert weights(at_once) == weights(in_turn)
    assert difference(run(at_once, feeds), run(in_turn, feeds)) <= 1e-6


def owned(
    group: ChannelGroup, unit: int, groups: ChannelGroups | None = None, removed: np.ndarray | None = None
) -> frozenset[tuple[str, int, int]]:
    """What a unit owns, in the coordinates of the model that `removed` has left of the one of `groups`."""
    entries: set[tuple[str, int, int]] = set()
    for name, slices in group.slices(unit).items():
        for axis, indices in slices:
            kept = None
            if groups is not None and removed is not None:
                value = groups.analysis.model.graph.initializers[name]
                kept = groups.units.kept(value, axis, removed)
            for index in indices.tolist():
                if kept is None:
                    entries.add((name, axis, index))
                elif kept[index]:
                    entries.add((name, axis, int(kept[:index].sum())))
    return frozenset(entries)


def weights(model: ir.Model) -> dict[str, tuple[list[int], bytes]]:
    """The float weights, by name: removal makes up names for sizes and indices."""
    return {
        name: (list(value.const_value.shape.numpy()), value.const_value.numpy().tobytes())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    }


@pytest.mark.torch
def test_exact_passes_run_after_removal() -> None:
    model = zoo_model("shufflenet-v2")
    groups = channel_groups(model)
    cut = graphopt.remove_channels(model, random_selection(groups, 0, 0.3, inexact=True), groups=groups)
    expected = run(cut, zoo_feeds(cut))
    for single in preset("exact").passes:
        single.run(cut, Context())
    assert difference(expected, run(cut, zoo_feeds(cut), optimized=True)) <= TOLERANCE
