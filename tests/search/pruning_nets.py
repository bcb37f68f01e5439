"""Small nets with seeded weights for the tests of allocation and pruning, made without torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx.parser
import onnx_ir as ir

import graphopt
from graphopt.ir.channels import ChannelGroup, channel_groups
from graphopt.search import Candidate, CostModel, Problem, Target


def mlp(widths: Sequence[int], *, scales: Sequence[float] | None = None, seed: int = 0) -> ir.Model:
    """x -> MatMul, Relu, MatMul ... -> y; `scales` are the standard deviations of the layers' weights."""
    pairs = list(itertools.pairwise(widths))
    declared = ", ".join(f"float[{a},{b}] w{index}" for index, (a, b) in enumerate(pairs))
    lines, last = [], "x"
    for index in range(len(pairs)):
        final = index == len(pairs) - 1
        lines.append(f"{'y' if final else f'h{index}'} = MatMul({last}, w{index})")
        if not final:
            lines.append(f"r{index} = Relu(h{index})")
        last = f"r{index}"
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[n,{widths[0]}] x, {declared}) => (float[n,{widths[-1]}] y) {{ {" ".join(lines)} }}"""
    return weighted(text, seed=seed, scales=scales)


def conv_net(widths: Sequence[int] = (3, 16, 32, 8), *, seed: int = 0, size: int = 8) -> ir.Model:
    """Convolutions of 3 x 3 with Relu between them."""
    pairs = list(itertools.pairwise(widths))
    declared = ", ".join(f"float[{b},{a},3,3] w{index}, float[{b}] b{index}" for index, (a, b) in enumerate(pairs))
    lines, last = [], "x"
    for index in range(len(pairs)):
        final = index == len(pairs) - 1
        lines.append(f"{'y' if final else f'h{index}'} = Conv<pads=[1,1,1,1]>({last}, w{index}, b{index})")
        if not final:
            lines.append(f"r{index} = Relu(h{index})")
        last = f"r{index}"
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[n,{widths[0]},{size},{size}] x, {declared}) => (float[n,{widths[-1]},{size},{size}] y)
        {{ {" ".join(lines)} }}"""
    return weighted(text, seed=seed)


def weighted(text: str, *, seed: int = 0, scales: Sequence[float] | None = None) -> ir.Model:
    """The model of a text, every input but x a seeded weight, canonical."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    numbers = np.random.default_rng(seed)
    weights = [value for value in model.graph.inputs if value.name != "x"]
    for index, value in enumerate(weights):
        assert value.shape is not None
        model.graph.inputs.remove(value)
        shape = value.shape.numpy()
        scale = 1 / np.sqrt(max(np.prod(shape[1:]), 1)) if scales is None else scales[index]
        value.const_value = ir.Tensor((numbers.standard_normal(shape) * scale).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    return graphopt.load(model)


def norms(group: ChannelGroup, model: ir.Model) -> np.ndarray:
    """Euclidean norm of all that each unit owns, straight from its slices."""
    found: list[float] = []
    for unit in range(group.units):
        total = 0.0
        for name, axes in group.slices(unit).items():
            weight = model.graph.initializers[name].const_value
            assert weight is not None
            for axis, indices in axes:
                total += float(np.square(np.take(weight.numpy(), indices, axis=axis)).sum())
        found.append(total**0.5)
    return np.array(found)


def problem(
    model: ir.Model,
    target: Target,
    *,
    step: int = 1,
    least: int = 1,
    scores: Callable[[ChannelGroup, ir.Model], np.ndarray] = norms,
    chosen: Callable[[ChannelGroup], bool] = lambda group: True,
    feeds: Sequence[dict[str, np.ndarray]] | None = None,
) -> Problem:
    """Every prunable group of a model as a candidate."""
    groups = channel_groups(model)
    candidates = tuple(
        Candidate(group, scores(group, model), step, least) for group in groups if group.prunable and chosen(group)
    )
    return Problem(
        model, groups, candidates, target, CostModel(model, groups), None if feeds is None else lambda: feeds
    )
