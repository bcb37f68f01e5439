"""How a configuration of the channel rules is written down, and the model that it stands for.

A case is one operator (or a few) in ONNX text with its operands. Graph inputs are frozen by design, so that a data
operand is an initializer times a number that only the run knows; graph outputs are as well, so that every result is
multiplied by weights of its own shape and summed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnxruntime

from graphopt.ir.session import session_options

MICROSOFT = "com.microsoft"
GATE = np.float32(1.25)
"""What the graph input `gate` is fed with."""
ROWS = 3
"""Length of the run-time axis of operands made by `rows`."""
_NEWEST_IR = {True: 13, False: 10}


@dataclass(frozen=True)
class Operand:
    """One operand of a case.

    Attributes:
        shape: of the operand; of `rows` without the first axis.
        steps: ops that make it of an initializer, the first reading it; none where it is the initializer.
        array: the initializer; drawn from `low` to `high` with either sign where None.
        feed: it is a graph input with this array.
        runtime: its first axis has a length that is decided at run time.
    """

    shape: tuple[int, ...]
    steps: tuple[str, ...] = ()
    array: np.ndarray | None = None
    low: float = 0.3
    high: float = 1.5
    signed: bool = True
    feed: bool = False
    runtime: bool = False

    def then(self, *steps: str) -> Operand:
        """The same with more ops behind it: "Sigmoid", "Cast<to=7>", "QuantizeLinear@scale,zero"."""
        return replace(self, steps=(*self.steps, *steps))

    def drawn(self, key: str) -> np.ndarray:
        """The initializer."""
        if self.array is not None:
            return self.array
        generator = np.random.default_rng(zlib.crc32(key.encode()))
        shape = (1, *self.shape) if self.runtime else self.shape
        found = generator.uniform(self.low, self.high, shape)
        if self.signed:
            found *= generator.choice([-1, 1], shape)
        return found.astype(np.float32)

    def __str__(self) -> str:
        shape = "x".join(map(str, ("n", *self.shape) if self.runtime else self.shape)) or "scalar"
        return "|".join((shape, *(step for step in self.steps if step != "gate")))


def weight(*shape: int, low: float = 0.3, high: float = 1.5, signed: bool = True) -> Operand:
    """An initializer as such."""
    return Operand(shape, low=low, high=high, signed=signed)


def data(*shape: int, low: float = 0.3, high: float = 1.5, signed: bool = True) -> Operand:
    """An initializer times `gate`: 0 where its weights are masked, and no constant."""
    return Operand(shape, ("gate",), low=low, high=high, signed=signed)


def positive(*shape: int, low: float = 0.3, high: float = 0.7) -> Operand:
    """As `data`, between 0 and 1."""
    return data(*shape, low=low, high=high, signed=False)


def moved(*shape: int) -> Operand:
    """As `data`, but not 0 where its weights are masked."""
    return data(*shape).then("Sigmoid")


def rows(*shape: int, low: float = 0.3, high: float = 1.5, signed: bool = True) -> Operand:
    """As `data`, with a leading axis of run-time length."""
    return Operand(shape, ("rows",), low=low, high=high, signed=signed, runtime=True)


def numbers(*shape: int, low: int = 1, high: int = 4, to: int = onnx.TensorProto.INT64) -> Operand:
    """Integers from `low` up to `high` - 1 made of a float initializer, 0 where it is masked."""
    return data(*shape, low=low, high=high - 0.5, signed=False).then(f"Cast<to={to}>")


def flags(*shape: int) -> Operand:
    """Booleans of which half are true, false where their weights are masked."""
    return data(*shape, low=-1, high=1, signed=False).then("Relu", f"Cast<to={onnx.TensorProto.BOOL}>")


def const(array: Any, dtype: Any = None) -> Operand:
    """An initializer with these values: int64 where they are Python integers, float32 where they are floats."""
    found = np.asarray(array)
    if dtype is None and not isinstance(array, np.ndarray):
        dtype = {"f": np.float32, "i": np.int64}.get(found.dtype.kind, found.dtype)
    return Operand(found.shape, array=found.astype(dtype) if dtype is not None else found)


def codes(*shape: int, dtype: str = "int8", low: int = -90, high: int = 90) -> Operand:
    """A quantized weight."""
    generator = np.random.default_rng(int(np.prod(shape)))
    return const(generator.integers(low, high, shape), dtype)


def fed(array: Any, dtype: Any = None) -> Operand:
    """A graph input."""
    return replace(const(array, dtype), feed=True)


@dataclass(frozen=True)
class Case:
    """A configuration of one operator.

    Attributes:
        statements: nodes in ONNX text; names that no node makes are operands.
        operands: by name.
        results: values that a consumer reads.
        passes: axes of the first result along which some channel must be removable.
        groups: fewest exact groups that must be prunable.
        reads: how results are consumed: "weights" (times weights, summed), "square" (its squares are summed: 0 must
            stay 0), or "itself" (the results are the graph outputs, an interface that is frozen).
        opset: of the standard domain.
        why: why nothing can be pruned, where that is by design.
        reference: onnx.reference runs it, since onnxruntime cannot.
    """

    statements: tuple[str, ...]
    operands: dict[str, Operand]
    results: tuple[str, ...] = ("y",)
    passes: tuple[int, ...] | None = None
    groups: int = 1
    reads: str = "weights"
    opset: int = 21
    why: str | None = None
    reference: bool = False

    def __str__(self) -> str:
        operands = ", ".join(f"{name} {operand}" for name, operand in self.operands.items())
        tail = "" if self.reads == "weights" else f", read as {self.reads}"
        return f"{'; '.join(self.statements)} with {operands or 'no operands'}{tail}"

    @property
    def symbolic(self) -> bool:
        """Whether some axis has a run-time length."""
        return any(operand.runtime for operand in self.operands.values())

    def feeds(self, count: int = ROWS) -> dict[str, np.ndarray]:
        """Values of the graph inputs."""
        found: dict[str, np.ndarray] = {}
        for name, operand in self.operands.items():
            if operand.feed:
                assert operand.array is not None
                found[name] = operand.array
            elif "rows" in operand.steps:
                rank = 1 + len(operand.shape)
                found[f"rows{rank}"] = np.linspace(0.5, 1.5, count, dtype=np.float32).reshape(-1, *[1] * (rank - 1))
            elif "gate" in operand.steps:
                found["gate"] = np.array(GATE)
        return found

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model."""
        builder = _Builder(self)
        return builder.model()


def case(*statements: str, opset: int = 21, **operands: Any) -> Case:
    """A case; settings of `Case` and operands by name."""
    settings = {name: operands.pop(name) for name in _SETTINGS if name in operands}
    wrong = [name for name, operand in operands.items() if not isinstance(operand, Operand)]
    assert not wrong, wrong
    return Case(statements, operands, opset=opset, **settings)


_SETTINGS = ("results", "passes", "groups", "reads", "why", "reference")


class _Builder:
    def __init__(self, spec: Case) -> None:
        self.spec = spec
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.inputs: dict[str, tuple[int, Sequence[int | str]]] = {}

    def model(self) -> onnx.ModelProto:
        for name, operand in self.spec.operands.items():
            self.operand(name, operand)
        for statement in self.spec.statements:
            self.nodes.append(onnx.parser.parse_node(statement))
        shapes = self.shapes()
        if self.spec.reads == "itself":
            return self.proto({name: kind for name, (_, kind) in shapes.items()})
        return self.proto({self.consumer(name, *found): onnx.TensorProto.FLOAT for name, found in shapes.items()})

    def operand(self, name: str, operand: Operand) -> None:
        if operand.feed:
            assert operand.array is not None
            self.inputs[name] = (onnx.helper.np_dtype_to_tensor_dtype(operand.array.dtype), operand.shape)
            return
        array = operand.drawn(f"{self.spec.statements} {name}")
        last = f"{name}_weight" if operand.steps else name
        self.initializers[last] = array
        for index, step in enumerate(operand.steps):
            result = name if index + 1 == len(operand.steps) else f"{name}_{index}"
            if step == "gate":
                self.inputs["gate"] = (onnx.TensorProto.FLOAT, ())
                text = f"{result} = Mul({last}, gate)"
            elif step == "rows":
                self.inputs[f"rows{array.ndim}"] = (onnx.TensorProto.FLOAT, ("n", *[1] * (array.ndim - 1)))
                text = f"{result} = Mul({last}, rows{array.ndim})"
            else:
                call, _, others = step.partition("@")
                text = f"{result} = {call}({last}{', ' if others else ''}{others})"
            self.nodes.append(onnx.parser.parse_node(text))
            last = result

    def shapes(self) -> dict[str, tuple[list[int | None], int]]:
        """Shape of every result (None where it is decided at run time) and its element type."""
        proto = self.proto(dict.fromkeys(self.spec.results))
        runs = [self.run(proto, count) for count in ((ROWS, ROWS + 1) if self.spec.symbolic else (ROWS,))]
        found: dict[str, tuple[list[int | None], int]] = {}
        for name, *arrays in zip(self.spec.results, *runs, strict=True):
            shape = [
                sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(a.shape for a in arrays), strict=True)
            ]
            found[name] = shape, onnx.helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
        return found

    def run(self, proto: onnx.ModelProto, count: int) -> list[np.ndarray]:
        if self.spec.reference:
            from onnx.reference import ReferenceEvaluator

            return [np.asarray(found) for found in ReferenceEvaluator(proto).run(None, self.spec.feeds(count))]
        options = session_options(threads=1, optimized=False)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(found) for found in session.run(None, self.spec.feeds(count))]

    def consumer(self, name: str, shape: list[int | None], kind: int) -> str:
        """Multiply by weights and sum, or sum the squares, over all axes."""
        read = name
        if kind != onnx.TensorProto.FLOAT:
            read = f"{name}_float"
            self.node(f"{read} = Cast<to=1>({name})")
        if self.spec.reads == "square":
            self.node(f"{name}_sum = ReduceSumSquare<keepdims=0>({read})")
            return f"{name}_sum"
        sizes = [1 if size is None else size for size in shape]
        self.initializers[f"{name}_reader"] = weight(*sizes).drawn(f"{self.spec.statements} reads {name}")
        self.node(f"{name}_product = Mul({read}, {name}_reader)")
        self.node(f"{name}_sum = ReduceSum<keepdims=0>({name}_product)")
        return f"{name}_sum"

    def node(self, text: str) -> None:
        self.nodes.append(onnx.parser.parse_node(text))

    def proto(self, outputs: Mapping[str, int | None]) -> onnx.ModelProto:
        inputs = [onnx.helper.make_tensor_value_info(name, *found) for name, found in self.inputs.items()]
        results = [
            onnx.helper.make_value_info(name, onnx.TypeProto())
            if kind is None
            else onnx.helper.make_tensor_value_info(name, kind, None)
            for name, kind in outputs.items()
        ]
        initializers = [onnx.numpy_helper.from_array(array, name) for name, array in self.initializers.items()]
        graph = onnx.helper.make_graph(self.nodes, "case", inputs, results, initializers)
        imports = [onnx.helper.make_opsetid("", self.spec.opset), onnx.helper.make_opsetid(MICROSOFT, 1)]
        return onnx.helper.make_model(graph, opset_imports=imports, ir_version=_NEWEST_IR[self.spec.opset > 23])


Cases = dict[str, list[Case]]
"""By operator: "Conv", "com.microsoft::Gelu"."""
