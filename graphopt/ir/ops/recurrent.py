"""Rows of the recurrent ops. Peepholes, gates and activations are elementwise: 0."""

from __future__ import annotations

from functools import partial

from graphopt.ir.ops.channels.recurrent import recurrence, repair_hidden_size
from graphopt.ir.ops.families import MICROSOFT, elements
from graphopt.ir.ops.row import OpRow, Shape, Site, TorchFunction


def recurrent_macs(site: Site) -> int:
    """Time steps x batch x (elements of W + elements of R).

    W is [directions, gates * hidden, input] and R [directions, gates * hidden, hidden] (ONNX LSTM, GRU and
    RNN 7, 14, 22). X is [time, batch, input], or [batch, time, input] with layout 1: the product is the same.
    """
    return elements(site.input_shape(0)[:2]) * (elements(site.input_shape(1)) + elements(site.input_shape(2)))


def recurrent_shape(site: Site, states: int) -> list[Shape]:
    """Y [time, directions, batch, hidden], then `states` times [directions, batch, hidden] (layout 0).

    onnx.shape_inference knows the standard ops; this serves onnxruntime's.
    """
    time, batch, _ = site.input_shape(0)
    directions, hidden = site.input_shape(1)[0], int(site.attribute("hidden_size"))
    return [(time, directions, batch, hidden), *[(directions, batch, hidden)] * states]


ROWS: tuple[OpRow, ...] = (
    *(
        OpRow(
            name,
            structural=(4,),
            cost=recurrent_macs,
            channels=rule,
            repair=repair_hidden_size,
            torch=TorchFunction("recurrent", name),
        )
        for name, rule in (
            ("LSTM", partial(recurrence, gates=4, biases=8, peepholes=3)),
            ("GRU", partial(recurrence, gates=3, biases=6)),
            ("RNN", partial(recurrence, gates=1, biases=2)),
        )
    ),
    OpRow(
        "DynamicQuantizeLSTM",
        domain=MICROSOFT,
        structural=(4,),
        quantization=(8, 9, 10, 11),
        cost=recurrent_macs,
        shape=partial(recurrent_shape, states=2),
    ),
)
