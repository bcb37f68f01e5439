"""The sections of `benchmarks.datafree` on trained CIFAR networks: each takes the setting and gives rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch

import graphopt
from benchmarks.datafree_setting import (
    BEST_FREE,
    FOLDED_FORMS,
    FORMS,
    FREE,
    PRUNE_ONLY,
    Net,
    Setting,
    exact_passes,
    sizes,
)
from benchmarks.results import Row, progress, stopwatch
from benchmarks.training import EPOCH, Images
from graphopt.criteria import Criterion, Knowledge, criterion
from graphopt.errors import GraphoptError
from graphopt.ir.channels import ChannelGroup, ChannelGroups, channel_groups
from graphopt.ir.origin import remember_origin
from graphopt.passes.contract import Context
from graphopt.passes.prune_channels import PruneChannels
from graphopt.passes.prune_plan import PrunePlan
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.search import Allocation, allocation

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
FOLDED_RATIOS = (0.3, 0.5)
BITS_RATIOS = (0.3,)
WIDTHS = tuple((weights, activations) for weights in (8, 6, 4) for activations in (8, 6))
MACS = (0.8, 0.7, 0.6, 0.5)
"""What is left of the multiply-accumulates, where allocations are compared."""
BASELINE = "uniform, l2"
STRATEGIES: tuple[tuple[str, str, str, Mapping[str, Any]], ...] = (
    (BASELINE, "l2", "uniform", {}),
    ("global, residual", "residual", "global", {"normalise": "none", "gain": "mac"}),
)
"""Name, criterion, allocation and its options."""
RECOVERED_RATIO = 0.5
LEARNING_RATE = 5e-3


def forms(setting: Setting) -> Iterator[Row]:
    """Every form on the same cut: L2, uniform, inner channels of every block; and how fast rounded widths are."""
    for net in setting.nets:
        yield net.float_row("forms")
        for ratio in setting.ratios(*RATIOS):
            plan = PruneChannels(ratio=ratio, round_to=1).plan(net.model)
            damaged = net.cut(plan)
            counted = sizes(damaged)
            for variant in FORMS:
                progress(f"{net.name}, {ratio:.0%}: {variant.name}")
                row = net.row(damaged, variant)
                yield {"section": "forms", "variant": variant.name, "ratio": ratio, **row, **counted}
        yield from rounded(setting, net)


def rounded(setting: Setting, net: Net) -> Iterator[Row]:
    """Widths that kernels are fast at, as the pass chooses them, timed in turns with the float network."""
    models, rows = [net.model], list[Row]()
    for ratio in setting.ratios(*RATIOS):
        progress(f"{net.name}, {ratio:.0%}: rounded widths")
        plan = PruneChannels(ratio=ratio).plan(net.model)
        model, row = net.rebuilt(net.cut(plan), BEST_FREE)
        rows.append({"section": "forms", "variant": "rounded", "ratio": ratio, **row, **sizes(model)})
        models.append(model)
    progress(f"{net.name}: timing")
    found = graphopt.benchmark(*models, seconds=setting.options.seconds, threads=1)
    for row, speed, latency in zip(rows, found.speeds[1:], found.latencies[1:], strict=True):
        yield {**row, "speed": vars(speed), "latency_ms": vars(latency), "float_ms": vars(found.latencies[0])}


def folded(setting: Setting) -> Iterator[Row]:
    """The networks without BatchNormalization: the very same cut as with it, and the cut that their own filters say."""
    for net, plain in zip(setting.folded, setting.nets, strict=True):
        yield net.float_row("folded")
        for ratio in FOLDED_RATIOS:
            own = PruneChannels(ratio=ratio, round_to=1).plan(net.model)
            same = transferred(PruneChannels(ratio=ratio, round_to=1).plan(plain.model), plain.model, own, net.model)
            for cut, plan in (("same units", same), ("own L2", own)):
                damaged = net.cut(plan)
                for variant in FOLDED_FORMS if cut == "own L2" else (BEST_FREE,):
                    progress(f"{net.name} folded, {ratio:.0%}, {cut}: {variant.name}")
                    row = net.row(damaged, variant)
                    yield {
                        "section": "folded",
                        "variant": variant.name,
                        "cut": cut,
                        "ratio": ratio,
                        **row,
                        **sizes(damaged),
                    }


def transferred(source: PrunePlan, of: ir.Model, target: PrunePlan, onto: ir.Model) -> PrunePlan:
    """The plan `target` with the units that `source` removes from another graph with the same weights by name.

    Raises:
        ValueError: a group has no counterpart, or another number of units.
    """
    theirs, ours = _by_producer(channel_groups(of)), _by_producer(channel_groups(onto))
    removed = {name: units for name, units in source.selection.items()}  # noqa: C416
    counterpart = {ours[weight]: theirs[weight] for weight in ours if weight in theirs}
    groups = []
    for group in target.groups:
        units = removed.pop(counterpart.get(group.name, ""), ())
        groups.append(replace(group, removed=units, boundary=None))
    if removed:
        raise ValueError(f"no counterpart of {sorted(removed)}")
    return replace(target, groups=tuple(groups))


def _by_producer(groups: ChannelGroups) -> dict[str, str]:
    """Name of each weight of a convolution whose output channels belong to one group alone, to that group's name."""
    convolutions = {
        node.inputs[1].name
        for node in groups.analysis.model.graph
        if node.op_type == "Conv" and node.inputs[1] is not None
    }
    return {name: group.name for group in groups for name, axis in group.members if axis == 0 and name in convolutions}


def bits(setting: Setting) -> Iterator[Row]:
    """Fewer bits on top of the cut, without data; once as they are, and once made good again."""
    for net in setting.nets:
        yield net.float_row("bits")
        for ratio in (0.3,) if setting.quick else BITS_RATIOS:
            model = net.model.clone()
            remember_origin(model)
            if ratio:
                plan = PruneChannels(ratio=ratio, round_to=1).plan(net.model)
                model, _ = net.rebuilt(net.cut(plan), BEST_FREE)
            context = net.context(FREE)
            exact_passes(model, context)
            for weights, activations in ((6, 6),) if setting.quick else WIDTHS:
                progress(f"{net.name}, {ratio:.0%}, W{weights}A{activations}")
                rounded_model = model.clone()
                quantize(rounded_model, weights, activations, context)
                shared: Row = {"section": "bits", "ratio": ratio, "weight_bits": weights, "bits": activations}
                yield {**shared, "variant": "quantized", **net.row(rounded_model, PRUNE_ONLY)}
                yield {**shared, "variant": "quantized, rebuilt", **net.row(rounded_model, BEST_FREE)}


def quantize(model: ir.Model, weight_bits: int, activation_bits: int, context: Context) -> None:
    """Quantize in place with other widths for weights than for activations: two plans, merged."""
    weights = Quantize(bits=weight_bits).plan(model, context)
    if weight_bits == activation_bits:
        Quantize(bits=weight_bits).apply(model, weights)
        return
    activations = Quantize(bits=activation_bits).plan(model, context)
    narrow = {(tensor.name, tensor.axis): tensor for tensor in weights.tensors if tensor.role == "weight"}
    tensors = tuple(narrow.get((tensor.name, tensor.axis), tensor) for tensor in activations.tensors)
    Quantize(bits=activation_bits).apply(model, QuantizePlan(tensors, activations.operators))


class Remembered(Criterion):
    """Another criterion, asked once for each group: planning for several targets scores only once.

    Args:
        ranking: the criterion.
    """

    name: ClassVar[str] = "remembered"
    needs: ClassVar[str] = "inputs"

    def __init__(self, ranking: Criterion) -> None:
        self.ranking = ranking
        self._found: dict[str, np.ndarray] = {}

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """As those of the criterion, float64 [units] by name of the group. Raises what it raises."""
        missing = [group for group in groups if group.name not in self._found]
        if missing:
            self._found |= self.ranking.scores(knowledge, missing)
        return {group.name: self._found[group.name] for group in groups}

    def __str__(self) -> str:
        return str(self.ranking)


def allocations(setting: Setting) -> Iterator[Row]:
    """Accuracy against multiply-accumulates: what goes where, without data and without second solves."""
    for net in setting.nets:
        yield net.float_row("allocation")
        whole = sizes(net.model)["macs"]
        assert BEST_FREE.rebuild is not None
        once = replace(BEST_FREE, rebuild=replace(BEST_FREE.rebuild, refits=0))  # a tenth of the time
        for name, ranking, how in strategies():
            for share in (0.7,) if setting.quick else MACS:
                progress(f"{net.name}, {share:.0%} of the MACs: {name}")
                source = "probes" if setting.quick else "auto"
                pruner = PruneChannels(macs=share, criterion=ranking, allocation=how, round_to=1, source=source)
                damaged = net.cut(pruner.plan(net.model, net.context(FREE)))
                row, counted = net.row(damaged, once), sizes(damaged)
                shared: Row = {"section": "allocation", "variant": name, "inputs": FREE, "target": share}
                yield {**shared, "macs_share": counted["macs"] / whole, **row, **counted}


def strategies() -> Iterator[tuple[str, Criterion, Allocation]]:
    """Those of `STRATEGIES` that this version has, each with scores of its own."""
    for name, ranking, how, options in STRATEGIES:
        try:
            yield name, Remembered(criterion(ranking)), allocation(how, **options)
        except GraphoptError as error:
            progress(f"left out: {name}: {error}")


def recovery(setting: Setting) -> Iterator[Row]:
    """Half of the inner channels gone without data, then one epoch on training images with the original as teacher."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = 2 if setting.quick else EPOCH
    for net in setting.nets:
        yield net.float_row("recovery")
        plan = PruneChannels(ratio=RECOVERED_RATIO, round_to=1).plan(net.model)
        model, row = net.rebuilt(net.cut(plan), BEST_FREE)
        shared: Row = {"section": "recovery", "ratio": RECOVERED_RATIO, **sizes(model)}
        yield {**shared, "variant": "rebuilt", **row, "steps": 0}
        progress(f"{net.name}: {steps} steps of recovery on {device}")
        with stopwatch() as watch:
            done = graphopt.recover(
                model,
                Images(setting.training),
                steps=steps,
                teacher=net.model,
                match=streams(model),
                learning_rate=LEARNING_RATE,
                device=device,
                quiet=True,
            )
        row = net.measured(done.model)
        yield {**shared, "variant": "recovered", **row, "steps": steps, "seconds": watch.seconds, "device": device}


def streams(model: ir.Model) -> list[str]:
    """Names of what the blocks put out: each Relu behind an Add."""
    producers = {node: node.inputs[0].producer() for node in model.graph if node.op_type == "Relu" and node.inputs[0]}
    return [
        node.outputs[0].name or ""
        for node, producer in producers.items()
        if producer is not None and producer.op_type == "Add"
    ]
