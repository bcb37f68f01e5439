"""Control flow as plain Python: a branch or a number of iterations is decided by values, at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.ir.ops.torch.dtypes import ElementType, torch_dtype
from graphopt.ir.ops.torch.operands import Numbers, number

Body = Callable[..., tuple[Any, ...]]
"""A subgraph: takes the values of its inputs, returns those of its outputs."""


def if_(condition: torch.Tensor | bool, *, then_branch: Body, else_branch: Body, outputs: int = 1) -> Any:
    """If 1 to 25: the outputs of one branch. Gradients flow through the branch that ran."""
    return _results((then_branch if bool(number(condition)) else else_branch)(), outputs)


def loop(
    trips: Numbers | None,
    condition: Numbers | None,
    *carried: Any,
    body: Body,
    outputs: int = 1,
    device: torch.device | None = None,
    results: Sequence[tuple[ElementType, Sequence[int]]] = (),
) -> Any:
    """Loop 1 to 25: final carried values, then what every iteration put out, stacked along a new axis 0."""
    limit = None if trips is None else int(number(trips))
    running = condition is None or bool(number(condition))
    collected: list[list[torch.Tensor]] = [[] for _ in range(outputs - len(carried))]
    iteration = 0
    while running and (limit is None or iteration < limit):
        counter = torch.tensor(iteration, dtype=torch.int64, device=device)
        going = torch.tensor(True, device=device)
        result = body(counter, going, *carried)
        running = bool(number(result[0]))
        carried = result[1 : 1 + len(carried)]
        for kept, value in zip(collected, result[1 + len(carried) :], strict=False):
            kept.append(value)
        iteration += 1
    types = list(results)[len(carried) :] or [(torch.float32, [0])] * len(collected)
    stacked = [
        torch.stack(kept) if kept else torch.empty([0, *shape[1:]], dtype=torch_dtype(element_type), device=device)
        for kept, (element_type, shape) in zip(collected, types, strict=True)
    ]
    return _results((*carried, *stacked), outputs)


def scan(
    *operands: Any,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] = (),
    scan_input_directions: Sequence[int] = (),
    scan_output_axes: Sequence[int] = (),
    scan_output_directions: Sequence[int] = (),
    outputs: int = 1,
) -> Any:
    """Scan 9 to 25: final states, then what every step put out, stacked along `scan_output_axes`."""
    states = operands[: len(operands) - num_scan_inputs]
    scanned = operands[len(states) :]
    axes = list(scan_input_axes) or [0] * num_scan_inputs
    backward = list(scan_input_directions) or [0] * num_scan_inputs
    steps = [value.unbind(axis) for value, axis in zip(scanned, axes, strict=True)]
    steps = [values[::-1] if reverse else values for values, reverse in zip(steps, backward, strict=True)]
    count = outputs - len(states)
    collected: list[list[torch.Tensor]] = [[] for _ in range(count)]
    for entries in zip(*steps, strict=True):
        result = body(*states, *entries)
        states = result[: len(states)]
        for kept, value in zip(collected, result[len(states) :], strict=False):
            kept.append(value)
    output_axes = list(scan_output_axes) or [0] * count
    reverse = list(scan_output_directions) or [0] * count
    stacked = [
        torch.stack(kept[::-1] if turned else kept, axis)
        for kept, axis, turned in zip(collected, output_axes, reverse, strict=True)
    ]
    return _results((*states, *stacked), outputs)


def sequence_map(sequence: list[Any], *others: Any, body: Body, outputs: int = 1) -> Any:
    """SequenceMap 17: the body on every entry; further inputs are sequences, walked along, or tensors, given whole."""
    collected: list[list[Any]] = [[] for _ in range(outputs)]
    for index, entry in enumerate(sequence):
        result = body(entry, *(other[index] if isinstance(other, list) else other for other in others))
        for kept, value in zip(collected, result, strict=False):
            kept.append(value)
    return _results(tuple(collected), outputs)


def _results(values: tuple[Any, ...], outputs: int) -> Any:
    return values[0] if outputs == 1 else tuple(values)
