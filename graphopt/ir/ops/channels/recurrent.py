"""Channels through the recurrent ops: one hidden unit is a row of every gate and a column of the recurrence."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir.ops.axes import Axis
from graphopt.ir.ops.channels.layout import known_sizes
from graphopt.ir.ops.channels.linear import contract
from graphopt.ir.ops.flow import ChannelSite, RepairSite, Track

_TIME = "its positions are time steps or directions"
_DEFAULTS = {
    "LSTM": ("sigmoid", "tanh", "tanh"),
    "GRU": ("sigmoid", "tanh"),
    "RNN": ("tanh",),
}
_ODD = {"tanh", "relu", "softsign", "affine", "leakyrelu", "elu", "thresholdedrelu", "scaledtanh"}
"""Activations with f(0) = 0; `affine` only with beta 0, which is its default."""


def recurrence(site: ChannelSite, gates: int, biases: int, peepholes: int = 0) -> None:
    """LSTM, GRU, RNN 7, 14, 22.

    Args:
        site: the node: X, W, R, B, sequence lengths, initial h, and for an LSTM initial c and peepholes P.
        gates: rows of W and R a hidden unit.
        biases: entries of B a hidden unit.
        peepholes: entries of P a hidden unit, 0 where there is no P.
    """
    batch_first = bool(site.attribute("layout", 0))
    x = site.take_all(0)
    hidden = site.take(2, 2)
    contract(site, x[2], site.take(1, 2))
    masked = True
    for index, count in ((1, gates), (2, gates), (3, biases), (7, peepholes)):
        if site.given(index):
            stacked = site.take(index, 1)
            masked = masked and stacked.zero
            site.unify(stacked, _stacked(site, hidden.axis, count))
    time, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    starts_at_zero = True
    for index in (5, 6):
        if site.given(index):
            site.unify(site.take(index, 2), hidden)
            site.unify(site.take(index, 0 if batch_first else 1), batch)
            starts_at_zero = starts_at_zero and site.take(index, 2).zero
    if site.given(4):
        site.unify(site.take(4, 0), batch)
    unit = Track(hidden.axis, masked and starts_at_zero and _keeps_zero(site))
    if not (unit.zero or hidden.zero):
        site.inexact(hidden, "neither the state nor the recurrence is 0 where masked, yet it sums over hidden units")
    site.behind("hidden_size", hidden.axis)
    site.role(hidden, "hidden units")
    site.freeze_rest(_TIME)
    site.freeze(time, _TIME, channel=False)
    _emit(site, time, batch, unit, batch_first)


def _stacked(site: ChannelSite, hidden: Axis, count: int) -> Axis:
    return site.product(site.repeats(count, "its positions are gates"), hidden) if count > 1 else hidden


def _keeps_zero(site: ChannelSite) -> bool:
    """Whether a unit whose weights are 0 stays at 0: so where all activations but the gates' map 0 to 0."""
    names: Sequence[str] = [name.lower() for name in site.attribute("activations") or ()]
    defaults = _DEFAULTS[site.node.op_type]
    names = names or defaults
    inner = [name for index, name in enumerate(names) if defaults[index % len(defaults)] == "tanh"]
    return all(name in _ODD for name in inner) and not site.attribute("activation_beta")


def _emit(site: ChannelSite, time: Track, batch: Track, unit: Track, batch_first: bool) -> None:
    directions = site.fixed(2 if site.attribute("direction", "forward") == "bidirectional" else 1, _TIME)
    plain = batch.nonzero()
    if site.node.outputs[0].name:
        length = site.fixed(known_sizes(site)[1 if batch_first else 0], _TIME)
        site.emit(0, [plain, length, directions, unit] if batch_first else [length, directions, plain, unit])
    for index in range(1, len(site.node.outputs)):
        site.emit(index, [plain, directions, unit] if batch_first else [directions, plain, unit])


def repair_hidden_size(site: RepairSite) -> None:
    """As many hidden units as stay."""
    units = site.counted("hidden_size")
    if units is not None:
        site.set_attribute("hidden_size", units)
