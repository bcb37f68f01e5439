"""Running a graph over many batches one piece at a time, so that it can be changed on the way.

Each node runs once a batch, however many times the caller stops. What later nodes still read is kept, in memory up to
a bound and in a temporary folder beyond it.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError
from graphopt.ir.session import Session, open_session

MEMORY_BYTES = 1536 * 1024 * 1024
"""How many bytes of intermediate values are kept in memory; what is beyond is written to a temporary folder."""


class Pieces:
    """The main graph of a model, run piece by piece over some batches.

    Weights may change while the nodes that read them have not run yet; see `redo` for those that have.

    Attributes:
        model: the graph. It is not changed here.
        batches: how many there are.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] z)
        ...     { y = Relu (x) z = Neg (y) }''')
        >>> pieces = Pieces(model, [{"x": np.array([-1, 1], np.float32)}])
        >>> y = model.graph[0].outputs[0]
        >>> pieces.compute([y])
        >>> pieces.array(y, 0)
        array([0., 1.], dtype=float32)
    """

    def __init__(
        self,
        model: ir.Model,
        batches: Iterable[Mapping[str, np.ndarray]],
        *,
        threads: int = 0,
        optimized: bool = True,
        memory: int = MEMORY_BYTES,
    ) -> None:
        """Read all batches.

        Args:
            model: canonical.
            batches: feeds; what the model does not take as an input is ignored.
            threads: intra-op threads of onnxruntime, 0 for all cores.
            optimized: whether onnxruntime may fuse.
            memory: bytes of values kept in memory.

        Raises:
            DataError: there is no batch, or one lacks an input.
        """
        self.model, self._threads, self._optimized = model, threads, optimized
        self._arrays = _Arrays(memory)
        self._done: set[ir.Node] = set()
        self._known: set[ir.Value] = set()
        self._held: Counter[ir.Value] = Counter()
        self.batches = 0
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        for feeds in batches:
            for value in inputs:
                if value.name not in feeds:
                    raise DataError(f"a batch lacks input {value.name!r}", help="feed every input of the model")
                self._arrays.put(value, self.batches, np.asarray(feeds[value.name or ""]))
            self.batches += 1
        if not self.batches:
            raise DataError("there is not a single set of inputs", help="pass at least one")
        self._known.update(inputs)

    def compute(self, values: Sequence[ir.Value]) -> None:
        """Run what is needed to know these values, and keep them until `release`.

        Raises:
            InvalidGraphError: onnxruntime cannot load the piece.
            DataError: it cannot run it on these inputs.
        """
        self._held.update(values)
        wanted = [value for value in values if value not in self._known and not value.is_initializer()]
        if not wanted:
            return
        graph = _Reading(self.model.graph)
        piece = graph.ancestors(wanted, self._done, self._known)
        outside = {value for node in piece for value in graph.reads[node] if value in self._known}
        made = [value for node in self.model.graph if node in piece for value in node.outputs if value.name]
        results = [
            value
            for value in made
            if value in self._held or any(reader not in piece for reader in graph.readers.get(value, ()))
        ]
        sources = [value for value in self._known if value in outside]
        nodes = [node for node in self.model.graph if node in piece]
        types = {value: self._arrays.get(value, 0).dtype for value in sources}
        session = open_piece(
            self.model, nodes, sources, results, types=types, threads=self._threads, optimized=self._optimized
        )
        for batch in range(self.batches):
            feeds = {value.name or "": self._arrays.get(value, batch) for value in sources}
            for value, array in zip(results, session.run_feeds(feeds), strict=True):
                self._arrays.put(value, batch, array)
        self._done |= piece
        self._known.update(results)
        self._forget_read(graph)

    def array(self, value: ir.Value, batch: int) -> np.ndarray:
        """A value that was computed and is held, or a constant."""
        if value.is_initializer() and value.const_value is not None:
            return value.const_value.numpy()
        return self._arrays.get(value, batch)

    def hold(self, values: Iterable[ir.Value]) -> None:
        """Keep these values from when they are computed until they are released as often as they were held."""
        self._held.update(values)

    def release(self, values: Iterable[ir.Value]) -> None:
        """Let values go, as soon as nothing that is to be run reads them."""
        self._held.subtract(values)
        self._held = +self._held
        self._forget_read(_Reading(self.model.graph))

    def pending(self, value: ir.Value) -> set[ir.Node]:
        """The nodes that have to run before `value` is known."""
        return set() if value in self._known else _Reading(self.model.graph).ancestors([value], self._done, self._known)

    @property
    def done(self) -> frozenset[ir.Node]:
        """The nodes that have run."""
        return frozenset(self._done)

    def frontier(self) -> list[ir.Value]:
        """The values, in graph order, from which all that has not run can be run: known, and read by some of it."""
        readers = _Reading(self.model.graph).readers
        inside = (value for node in self.model.graph for value in node.outputs)
        return [
            value
            for value in (*self.model.graph.inputs, *inside)
            if value in self._known and any(reader not in self._done for reader in readers.get(value, ()))
        ]

    def redo(self, nodes: Iterable[ir.Node]) -> None:
        """Run these nodes again when their results are next needed. What they read must be held."""
        for node in nodes:
            self._done.discard(node)
            for value in node.outputs:
                self._known.discard(value)
                self._arrays.drop(value)

    def _forget_read(self, graph: _Reading) -> None:
        for value in list(self._known):
            if value in self._held or any(reader not in self._done for reader in graph.readers.get(value, ())):
                continue
            self._known.discard(value)
            self._arrays.drop(value)


def open_piece(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    *,
    types: Mapping[ir.Value, np.dtype] | None = None,
    threads: int = 0,
    optimized: bool = True,
) -> Session:
    """A session of some nodes of the main graph, in their order.

    Args:
        model: holds them.
        nodes: what is run.
        inputs: what they read from outside, constants left out.
        outputs: what is returned.
        types: dtypes of the inputs whose type the graph does not know.
        threads: intra-op threads of onnxruntime, 0 for all cores.
        optimized: whether onnxruntime may fuse.

    Raises:
        InvalidGraphError: onnxruntime cannot load it.
    """
    read = dict.fromkeys(value for node in nodes for value in _read_by(node, model.graph))
    constants = [value for value in read if value is not None and value.is_initializer() and value not in inputs]
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=constants,
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    )
    graph = view.clone()
    for own, value in zip(graph.inputs, inputs, strict=True):
        if own.type is None and types is not None:
            own.type = ir.TensorType(ir.DataType.from_numpy(types[value]))
    piece = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    return open_session(piece, threads=threads, optimized=optimized)


class _Reading:
    """Who reads what in a main graph, values that subgraphs capture included."""

    def __init__(self, graph: ir.Graph) -> None:
        self.reads: dict[ir.Node, tuple[ir.Value, ...]] = {}
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node in graph:
            values = dict.fromkeys(value for value in _read_by(node, graph) if value is not None)
            self.reads[node] = tuple(values)
            for value in values:
                self.readers.setdefault(value, []).append(node)

    def ancestors(self, values: Iterable[ir.Value], done: set[ir.Node], known: set[ir.Value]) -> set[ir.Node]:
        """The nodes that must run before `values` are known."""
        found: set[ir.Node] = set()
        waiting = [value for value in values if value not in known]
        while waiting:
            node = waiting.pop().producer()
            if node is None or node in found or node not in self.reads:
                continue
            found.add(node)
            waiting += [value for value in self.reads[node] if value not in known]
        return found


def _read_by(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value | None]:
    """Values of the main graph that a node reads, by itself or from inside its subgraphs."""
    yield from node.inputs
    for attribute in node.attributes.values():
        subgraphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
        subgraphs = list(attribute.value) if attribute.type == ir.AttributeType.GRAPHS else subgraphs
        for subgraph in subgraphs:
            for inner in subgraph.all_nodes():
                yield from (value for value in inner.inputs if value is not None and _belongs(value, graph))
            yield from (value for value in subgraph.outputs if _belongs(value, graph))


def _belongs(value: ir.Value, graph: ir.Graph) -> bool:
    producer = value.producer()
    return value.graph is graph if producer is None else producer.graph is graph


class _Arrays:
    """Arrays by value and batch, the newest in a temporary folder once memory is full."""

    def __init__(self, memory: int) -> None:
        self._memory, self._used = memory, 0
        self._inside: dict[ir.Value, dict[int, np.ndarray | Path]] = {}
        self._folder: Path | None = None
        self._files = 0

    def put(self, value: ir.Value, batch: int, array: np.ndarray) -> None:
        entry: np.ndarray | Path = array
        if self._used + array.nbytes > self._memory and array.dtype != object:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="graphopt-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self._files += 1
            entry = self._folder / f"{self._files}.npy"
            np.save(entry, array, allow_pickle=False)
        else:
            self._used += array.nbytes
        self._inside.setdefault(value, {})[batch] = entry

    def get(self, value: ir.Value, batch: int) -> np.ndarray:
        entry = self._inside[value][batch]
        return np.load(entry, allow_pickle=False) if isinstance(entry, Path) else entry

    def drop(self, value: ir.Value) -> None:
        for entry in self._inside.pop(value, {}).values():
            if isinstance(entry, Path):
                entry.unlink(missing_ok=True)
            else:
                self._used -= entry.nbytes
