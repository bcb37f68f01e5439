"""Whether a chain is faster than its layer: both timed in turns at the real sizes, between neighbours as it has them.

A convolution of four axes stands between a 1 x 1 convolution of one channel and a global pooling, so that its input and
result have the blocked layout in which onnxruntime runs convolutional networks, and nothing is reordered that is not
reordered in the network. What was found is kept on disk by structure, sizes and machine: weights do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.factorizations import Factor, FactorShape, Rank, factorization
from graphopt.inputs.machine import machine_key
from graphopt.inputs.measurements import Measurements
from graphopt.ir.linear import Linear
from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import is_op, sole_consumer, to_tensor
from graphopt.ir.session import Session, open_session
from graphopt.ir.text import print_graph
from graphopt.ir.timing import interleave
from graphopt.passes.contract import Context
from graphopt.passes.decompose_layers import Site
from graphopt.passes.decompose_write import chain_node, stored

FASTER = 1.02
"""A chain is taken where the median of the ratios is above this, and three quarters of the rounds agree."""
_SECONDS = 0.15
_ACTIVATIONS = ("Relu", "Clip", "Sigmoid", "HardSwish", "HardSigmoid", "LeakyRelu", "Tanh", "Gelu")
"""What onnxruntime computes along with a convolution or product, or right behind it."""


@dataclass(frozen=True)
class Speed:
    """How a chain compares with its layer.

    Attributes:
        ratio: how many times faster the chain is, median of rounds.
        low: first quartile of it.
        dense, chain: median milliseconds of the layer and of the chain, neighbours included.
    """

    ratio: float
    low: float
    dense: float
    chain: float

    @property
    def is_faster(self) -> bool:
        """Whether beyond noise."""
        return self.ratio > FASTER and self.low > 1.0

    def __str__(self) -> str:
        return f"{self.chain:.4g} ms instead of {self.dense:.4g} ms, {self.ratio:.2f}x"


Measure = Callable[[Sequence[Session], dict[str, np.ndarray], Context], Speed]


def timed(sessions: Sequence[Session], feeds: dict[str, np.ndarray], context: Context) -> Speed:
    """The layer and the chain in turns."""
    found = interleave(
        sessions, feeds, names=("layer", "chain"), seconds=_SECONDS, threads=context.threads, target=context.target
    )
    speed, (dense, chain) = found.speeds[1], found.latencies
    return Speed(speed.median, speed.low, dense.median, chain.median)


@dataclass
class Speeds:
    """Speeds of chains, each measured once.

    Attributes:
        context: target and threads.
        opset: of the graph.
        measure: the clock.
        trials: how many were timed in this run.
        failures: why some could not be, by layer.
    """

    context: Context
    opset: int = 21
    measure: Measure = timed
    trials: int = 0
    failures: dict[str, str] = field(default_factory=dict[str, str])
    _store: Measurements = field(default_factory=Measurements)

    @property
    def notes(self) -> list[str]:
        """What went wrong with the file that measurements are kept in."""
        return self._store.notes

    def of(self, site: Site, form: str, rank: Rank) -> Speed | None:
        """How a chain compares with its layer; None where onnxruntime runs neither as a model of its own."""
        shapes = factorization(form).shapes(site.layer, rank)
        dense, chain = (_model(site, one, self.opset) for one in ((site.layer.shape,), shapes))
        target, threads = self.context.target, self.context.threads
        parts = (print_graph(dense), print_graph(chain), target, threads, machine_key(target))
        key = hashlib.sha256("\n".join(map(repr, ("decompose", *parts))).encode()).hexdigest()
        known = self._store.read(key)
        try:
            return Speed(**{name: float(known[name]) for name in ("ratio", "low", "dense", "chain")})
        except (KeyError, TypeError, ValueError):
            pass  # not measured yet, or written by something else
        try:
            sessions = [open_session(one, target=target, threads=threads) for one in (dense, chain)]
            (value,) = dense.graph.inputs
            assert value.shape is not None
            assert value.dtype is not None
            array = np.random.default_rng(0).standard_normal(value.shape.numpy()).astype(value.dtype.numpy())
            found = self.measure(sessions, {"x": array}, self.context)
        except GraphoptError as error:
            self.failures[site.name] = error.what
            return None
        self.trials += 1
        self._store.write(key, "decompose", vars(found))
        return found


def _model(site: Site, shapes: Sequence[FactorShape], opset: int) -> ir.Model:
    """A model of a chain in the place of a layer, with seeded weights."""
    linear, layer = site.linear, site.layer
    builder = _Builder(linear.dtype)
    convolution = bool(linear.kernel)
    blocked = convolution and len(linear.kernel) == 2 and not layer.transposed
    if convolution:
        rows = max(layer.rows // len(site.linears), 1)
        entry = [rows, 1 if blocked else layer.inputs, *layer.before]
    else:
        wide = max(layer.rows // len(site.linears), 1)
        entry = [wide, layer.inputs] if linear.in_axis in (1, -1) else [layer.inputs, wide]
    data = source = ir.Value(name="x", type=ir.TensorType(linear.dtype), shape=ir.Shape(entry))
    if blocked:
        data = builder.add("Conv", [data, builder.weight((layer.inputs, 1, 1, 1))])
    for index, shape in enumerate(shapes):
        data = builder.chain(linear, shape, data, first=index == 0, last=index == len(shapes) - 1)
    follower = sole_consumer(linear.result)
    if follower is not None and is_op(follower, *_ACTIVATIONS) and follower.inputs[0] is linear.result:
        extra = [builder.constant(value) for value in follower.inputs[1:]]
        data = builder.add(follower.op_type, [data, *extra], list(follower.attributes.values()))
    if blocked:
        data = builder.add("GlobalAveragePool", [data])
    graph = ir.Graph(
        [source],
        [data],
        nodes=builder.nodes,
        initializers=builder.weights,
        opset_imports={"": opset},
        name="layer",
    )
    return ir.Model(graph, ir_version=10)


class _Builder:
    """Nodes and weights of a small model."""

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self._random = np.random.default_rng(0)

    def weight(self, shape: Sequence[int]) -> ir.Value:
        """A seeded weight."""
        scale = 1 / np.sqrt(max(np.prod(shape[1:]), 1))
        return self._register(to_tensor(self._random.standard_normal(shape) * scale, self.dtype))

    def constant(self, value: ir.Value | None) -> ir.Value | None:
        """A copy of a constant."""
        if value is None or value.const_value is None:
            return None
        return self._register(value.const_value)

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=f"w{len(self.weights)}",
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor_shape(tensor)),
            const_value=tensor,
        )
        self.weights.append(value)
        return value

    def _result(self) -> ir.Value:
        return ir.Value(name=f"v{len(self.nodes)}", type=ir.TensorType(self.dtype))

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        """One node more; returns what it makes."""
        node = ir.Node("", op_type, inputs, list(attributes), outputs=[self._result()], name=f"n{len(self.nodes)}")
        self.nodes.append(node)
        return node.outputs[0]

    def chain(self, linear: Linear, shape: FactorShape, data: ir.Value, *, first: bool, last: bool) -> ir.Value:
        """One factor more, the last one with a bias."""
        random = self._random.standard_normal(shape.weight_shape) / np.sqrt(max(np.prod(shape.weight_shape[1:]), 1))
        weight = self._register(to_tensor(stored(linear, Factor(shape, random)), linear.dtype))
        product = is_op(linear.node, "MatMul")
        bias = self.weight((shape.outputs, 1) if linear.out_axis == -2 else (shape.outputs,)) if last else None
        node = chain_node(linear, shape, (data, weight, None if product else bias), self._result(), first=first)
        node.name = f"n{len(self.nodes)}"
        self.nodes.append(node)
        if product and bias is not None:
            return self.add("Add", [node.outputs[0], bias])
        return node.outputs[0]
