"""LSTM, GRU and RNN: torch's own kernels where they compute the node, else a loop over time.

Inside, data is laid out as with layout 0: X [time, batch, input], states [directions, batch, hidden].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from graphopt.ir.ops.torch.cells import Cell, State, gru_cell, lstm_cell, rnn_cell, scan
from graphopt.ir.ops.torch.named_activations import Activation, activation_functions
from graphopt.ir.ops.torch.operands import Numbers


def lstm(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    sequence_lens: Numbers | None = None,
    initial_h: torch.Tensor | None = None,
    initial_c: torch.Tensor | None = None,
    p: torch.Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    outputs: int = 1,
) -> Any:
    """LSTM 7+: Y [time, directions, batch, hidden], then h and c [directions, batch, hidden] (layout 0)."""
    x = x.transpose(0, 1) if layout else x
    states = _initial_states(x, r, (initial_h, initial_c), layout)
    lengths = _lengths(sequence_lens, x)
    if _is_plain(activations, ("sigmoid", "tanh", "tanh"), clip, lengths) and p is None and not input_forget:
        parameters = _native_parameters(w, r, b, order=(0, 2, 3, 1))  # i o f c as i f c o
        y, *final = _native(torch.lstm, x, states, parameters, direction)
        return _laid_out(y, final, layout, outputs)
    functions = _functions(
        activations, ("Sigmoid", "Tanh", "Tanh"), activation_alpha, activation_beta, clip, directions=w.shape[0]
    )
    cells: list[Cell] = []
    inputs: list[torch.Tensor] = []
    for index, (f, g, h) in enumerate(functions):
        input_bias, bias = _biases(b, index)
        inputs.append(functional.linear(x, w[index], input_bias))
        peepholes = None if p is None else p[index]
        cells.append(partial(lstm_cell, r[index], bias, peepholes, f, g, h, bool(input_forget)))
    return _scanned(cells, inputs, states, lengths, direction, layout, outputs)


def gru(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    sequence_lens: Numbers | None = None,
    initial_h: torch.Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    outputs: int = 1,
) -> Any:
    """GRU 7+: Y [time, directions, batch, hidden], then h [directions, batch, hidden] (layout 0)."""
    x = x.transpose(0, 1) if layout else x
    states = _initial_states(x, r, (initial_h,), layout)
    lengths = _lengths(sequence_lens, x)
    if _is_plain(activations, ("sigmoid", "tanh"), clip, lengths) and linear_before_reset:
        parameters = _native_parameters(w, r, b, order=(1, 0, 2))  # z r h as r z h
        y, *final = _native(torch.gru, x, states, parameters, direction)
        return _laid_out(y, final, layout, outputs)
    functions = _functions(
        activations, ("Sigmoid", "Tanh"), activation_alpha, activation_beta, clip, directions=w.shape[0]
    )
    cells: list[Cell] = []
    inputs: list[torch.Tensor] = []
    for index, (f, g) in enumerate(functions):
        input_bias, bias = _biases(b, index)
        inputs.append(functional.linear(x, w[index], input_bias))
        cells.append(partial(gru_cell, r[index], bias, f, g, bool(linear_before_reset)))
    return _scanned(cells, inputs, states, lengths, direction, layout, outputs)


def rnn(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    sequence_lens: Numbers | None = None,
    initial_h: torch.Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    outputs: int = 1,
) -> Any:
    """RNN 7+: Y [time, directions, batch, hidden], then h [directions, batch, hidden] (layout 0)."""
    x = x.transpose(0, 1) if layout else x
    states = _initial_states(x, r, (initial_h,), layout)
    lengths = _lengths(sequence_lens, x)
    for name, native in (("tanh", torch.rnn_tanh), ("relu", torch.rnn_relu)):
        if _is_plain(activations or ("tanh",), (name,), clip, lengths):
            y, *final = _native(native, x, states, _native_parameters(w, r, b, order=(0,)), direction)
            return _laid_out(y, final, layout, outputs)
    functions = _functions(activations, ("Tanh",), activation_alpha, activation_beta, clip, directions=w.shape[0])
    cells: list[Cell] = []
    inputs: list[torch.Tensor] = []
    for index, (f,) in enumerate(functions):
        input_bias, bias = _biases(b, index)
        inputs.append(functional.linear(x, w[index], input_bias))
        cells.append(partial(rnn_cell, r[index], bias, f))
    return _scanned(cells, inputs, states, lengths, direction, layout, outputs)


def _initial_states(
    x: torch.Tensor, r: torch.Tensor, given: Sequence[torch.Tensor | None], layout: int
) -> list[torch.Tensor]:
    """The states before the first step, zero where the node gives none: [directions, batch, hidden]."""
    zeros = x.new_zeros(r.shape[0], x.shape[1], r.shape[2])
    return [zeros if state is None else state.transpose(0, 1) if layout else state for state in given]


def _lengths(sequence_lens: Numbers | None, x: torch.Tensor) -> torch.Tensor | None:
    """Number of steps of each sequence as [batch, 1], None where all are known to have all steps."""
    if sequence_lens is None:
        return None
    if isinstance(sequence_lens, Sequence) and all(length == x.shape[0] for length in sequence_lens):
        return None
    return torch.as_tensor(sequence_lens, device=x.device).reshape(-1, 1)


def _is_plain(
    activations: Sequence[str] | None, native: Sequence[str], clip: float | None, lengths: torch.Tensor | None
) -> bool:
    """Whether a node has the activations of torch's kernel in all directions, and nothing that it lacks."""
    if clip is not None or lengths is not None:
        return False
    return all(name.lower() == native[index % len(native)] for index, name in enumerate(activations or ()))


def _native_parameters(
    w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, order: Sequence[int]
) -> list[torch.Tensor]:
    """The parameters in the order of torch, direction by direction: ONNX gate order[i] comes i-th."""

    def ordered(matrix: torch.Tensor) -> torch.Tensor:
        gates = matrix.chunk(len(order))
        return torch.cat([gates[index] for index in order]) if len(order) > 1 else matrix

    parameters: list[torch.Tensor] = []
    for direction in range(w.shape[0]):
        parameters += [ordered(w[direction]), ordered(r[direction])]
        if b is not None:
            parameters += map(ordered, b[direction].chunk(2))
    return parameters


def _native(
    kernel: Any, x: torch.Tensor, states: Sequence[torch.Tensor], parameters: list[torch.Tensor], direction: str
) -> tuple[torch.Tensor, ...]:
    """Y and the final states by a kernel of torch."""
    reverse, bidirectional = direction == "reverse", direction == "bidirectional"
    has_biases = len(parameters) == (8 if bidirectional else 4)
    states = [state.contiguous() for state in states]  # cuDNN insists
    hidden = states if len(states) > 1 else states[0]
    # Kept for the backward pass, which cuDNN refuses otherwise. Without dropout training is the same.
    training = torch.is_grad_enabled()
    data = x.flip(0) if reverse else x.contiguous()
    y, *final = kernel(data, hidden, parameters, has_biases, 1, 0.0, training, bidirectional, False)
    y = y.flip(0) if reverse else y
    return y.unflatten(2, (2 if bidirectional else 1, -1)).transpose(1, 2), *final


def _functions(
    names: Sequence[str] | None,
    defaults: Sequence[str],
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float | None,
    directions: int,
) -> list[list[Activation]]:
    """The activations of each direction; what goes into those of gates is clipped.

    The third, h of the LSTM, takes the cell state, which onnxruntime does not clip; the specification leaves it open.
    """
    functions = activation_functions(names or [*defaults] * directions, alphas, betas)
    count = len(defaults)
    result = [functions[index * count : (index + 1) * count] for index in range(directions)]
    if clip is None:
        return result
    return [[partial(_clipped, gate, clip) for gate in gates[:2]] + gates[2:] for gates in result]


def _clipped(function: Activation, clip: float, x: torch.Tensor) -> torch.Tensor:
    return function(x.clamp(-clip, clip))


def _biases(b: torch.Tensor | None, direction: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bias of the input and bias of the recurrence of a direction."""
    if b is None:
        return None, None
    input_bias, bias = b[direction].chunk(2)
    return input_bias, bias


def _scanned(
    cells: Sequence[Cell],
    inputs: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    lengths: torch.Tensor | None,
    direction: str,
    layout: int,
    outputs: int,
) -> Any:
    """The outputs of the node by a loop over time, direction by direction."""
    sequences: list[torch.Tensor] = []
    finals: list[State] = []
    for index, (cell, projected) in enumerate(zip(cells, inputs, strict=True)):
        reverse = direction == "reverse" or index == 1
        y, final = scan(cell, projected, tuple(state[index] for state in states), lengths, reverse)
        sequences.append(y)
        finals.append(final)
    final = [torch.stack(state) for state in zip(*finals, strict=True)]
    return _laid_out(torch.stack(sequences, 1), final, layout, outputs)


def _laid_out(y: torch.Tensor, final: Sequence[torch.Tensor], layout: int, outputs: int) -> Any:
    """The outputs that the node has: with layout 1, Y [batch, time, directions, hidden] and states batch first."""
    if layout:
        y, final = y.permute(2, 0, 1, 3), [state.transpose(0, 1) for state in final]
    return y if outputs == 1 else (y, *final)[:outputs]
