"""One step of the recurrent ops as the ONNX specification writes it, and the loop over time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from graphopt.ir.ops.torch.named_activations import Activation

State = tuple[torch.Tensor, ...]
"""Hidden state [batch, hidden], for the LSTM followed by the cell state."""
Cell = Callable[[torch.Tensor, State], State]
"""The state after a step, from X_t W^T + Wb as [batch, gates * hidden] and the state before."""


def lstm_cell(
    r: torch.Tensor,
    bias: torch.Tensor | None,
    peepholes: torch.Tensor | None,
    f: Activation,
    g: Activation,
    h: Activation,
    input_forget: bool,
    projected: torch.Tensor,
    state: State,
) -> State:
    """A step of LSTM, gates in the order i o f c and peepholes in the order i o f."""
    hidden, memory = state
    i, o, forget, c = (projected + functional.linear(hidden, r, bias)).chunk(4, -1)
    peephole_i, peephole_o, peephole_f = (0, 0, 0) if peepholes is None else peepholes.chunk(3)
    i = f(i if peepholes is None else i + peephole_i * memory)
    forget = 1 - i if input_forget else f(forget if peepholes is None else forget + peephole_f * memory)
    memory = forget * memory + i * g(c)
    o = f(o if peepholes is None else o + peephole_o * memory)
    return o * h(memory), memory


def gru_cell(
    r: torch.Tensor,
    bias: torch.Tensor | None,
    f: Activation,
    g: Activation,
    linear_before_reset: bool,
    projected: torch.Tensor,
    state: State,
) -> State:
    """A step of GRU, gates in the order z r h."""
    (hidden,) = state
    size = hidden.shape[-1]
    gate_bias, candidate_bias = (None, None) if bias is None else (bias[: 2 * size], bias[2 * size :])
    gates = f(projected[:, : 2 * size] + functional.linear(hidden, r[: 2 * size], gate_bias))
    z, reset = gates.chunk(2, -1)
    if linear_before_reset:
        recurrent = reset * functional.linear(hidden, r[2 * size :], candidate_bias)
    else:
        recurrent = functional.linear(reset * hidden, r[2 * size :], candidate_bias)
    return ((1 - z) * g(projected[:, 2 * size :] + recurrent) + z * hidden,)


def rnn_cell(r: torch.Tensor, bias: torch.Tensor | None, f: Activation, projected: torch.Tensor, state: State) -> State:
    """A step of RNN."""
    return (f(projected + functional.linear(state[0], r, bias)),)


def scan(
    cell: Cell, projected: torch.Tensor, state: State, lengths: torch.Tensor | None, reverse: bool
) -> tuple[torch.Tensor, State]:
    """Y [time, batch, hidden] and the last state of a loop over [time, batch, gates * hidden].

    A sequence that is shorter than the batch keeps its state in the steps that it lacks, and has zeros there.
    """
    steps: list[torch.Tensor] = []
    times = range(projected.shape[0])
    for time in reversed(times) if reverse else times:
        following = cell(projected[time], state)
        if lengths is None:
            state, y = following, following[0]
        else:
            running = time < lengths
            state = tuple(torch.where(running, new, old) for new, old in zip(following, state, strict=True))
            y = torch.where(running, following[0], 0)
        steps.append(y)
    return torch.stack(steps[::-1] if reverse else steps), state
