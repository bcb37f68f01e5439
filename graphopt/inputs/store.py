"""Inputs that took minutes to make, kept on disk: an SQLite file under the user's cache folder.

The key is a digest of the model and of everything else that the inputs depend on, so nothing is ever invalidated: it
is merely not found. A cache that is damaged, locked or full costs the saving, never the run.
"""

from __future__ import annotations

import hashlib
import io
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.inputs.database import Database, cache_folder
from graphopt.ir.statistics import BATCHNORM_STATISTICS

FILE_NAME = "inputs.sqlite3"
LARGEST_BYTES = 1024 * 1024 * 1024
"""How much is kept; what was written first goes first."""
_FORMAT = 1
"""Raised when what is stored under one key changes."""

_TABLE = """
CREATE TABLE IF NOT EXISTS inputs (
    key TEXT NOT NULL, batch INTEGER NOT NULL, name TEXT NOT NULL, dtype TEXT NOT NULL,
    written REAL NOT NULL, bytes INTEGER NOT NULL, checksum INTEGER NOT NULL, array BLOB NOT NULL,
    PRIMARY KEY (key, batch, name)
)
"""


class Store:
    """Batches of inputs on disk, by key. No method raises because of the disk: see `notes`.

    Arrays are written by `numpy.save` and read without pickle, with a checksum.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = Store(Path(folder.name))
        >>> store.write("some key", [{"x": np.zeros((2, 3), np.float32)}])
        >>> store.read("some key")[0]["x"].shape, store.read("another key")
        ((2, 3), None)
        >>> folder.cleanup()
    """

    def __init__(self, folder: Path | None = None, *, largest_bytes: int = LARGEST_BYTES) -> None:
        """Name a store; nothing is opened yet.

        Args:
            folder: where the database lies, `cache_folder()` where None.
            largest_bytes: size of all arrays above which the oldest are deleted.
        """
        self._database = Database((folder or cache_folder()) / FILE_NAME, _TABLE, "inputs")
        self._largest = largest_bytes

    @property
    def path(self) -> Path:
        """The database."""
        return self._database.path

    @property
    def notes(self) -> list[str]:
        """What went wrong, one sentence each."""
        return self._database.notes

    def read(self, key: str) -> list[dict[str, np.ndarray]] | None:
        """The batches of a key, None where there are none that can be read."""
        with self._database.reading() as database:
            if database is not None:
                rows = database.execute(
                    "SELECT batch, name, dtype, checksum, array FROM inputs WHERE key = ? ORDER BY batch", (key,)
                ).fetchall()
                return _decoded(rows) if rows else None
        return None

    def write(self, key: str, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Keep the batches under a key, in place of what was there, and delete what no longer fits."""
        size = sum(array.nbytes for feeds in batches for array in feeds.values())
        if size > self._largest:
            self.notes.append(f"{size >> 20} MiB of inputs are more than the cache holds ({self._largest >> 20} MiB)")
            return
        with self._database.writing() as database:
            if database is not None:
                database.execute("DELETE FROM inputs WHERE key = ?", (key,))
                database.executemany("INSERT INTO inputs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _encoded(key, batches))
                self._evict(database)

    def _evict(self, database: sqlite3.Connection) -> None:
        entries = database.execute(
            "SELECT key, SUM(bytes) FROM inputs GROUP BY key ORDER BY MAX(written) DESC"
        ).fetchall()
        total = 0
        for key, size in entries:
            total += int(size)
            if total > self._largest:
                database.execute("DELETE FROM inputs WHERE key = ?", (key,))


def _encoded(key: str, batches: Sequence[Mapping[str, np.ndarray]]) -> Iterator[tuple[object, ...]]:
    now = time.time()
    for number, feeds in enumerate(batches):
        for name, array in feeds.items():
            dtype = array.dtype.name
            plain = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array  # types that NumPy lacks
            buffer = io.BytesIO()
            np.save(buffer, plain, allow_pickle=False)
            blob = buffer.getvalue()
            yield key, number, name, dtype, now, len(blob), zlib.crc32(blob), blob


def _decoded(rows: Sequence[tuple[int, str, str, int, bytes]]) -> list[dict[str, np.ndarray]]:
    batches: dict[int, dict[str, np.ndarray]] = {}
    for number, name, dtype, checksum, blob in rows:
        if zlib.crc32(blob) != checksum:
            raise ValueError(f"the checksum of {name!r} in batch {number} is wrong")
        array = np.load(io.BytesIO(blob), allow_pickle=False)
        if array.dtype.name != dtype:
            array = array.view(np.dtype(getattr(ml_dtypes, dtype)))
        batches.setdefault(number, {})[name] = array
    return [batches[number] for number in sorted(batches)]


def storage_key(model_digest_: str, parts: Sequence[object]) -> str:
    """A key of a model's digest and the `repr` of everything else that the inputs depend on."""
    return hashlib.sha256("\n".join([str(_FORMAT), model_digest_, *map(repr, parts)]).encode()).hexdigest()


def model_digest(model: ir.Model) -> str:
    """SHA-256 of a model: nodes, attributes, weights, interface and recorded BatchNormalization statistics.

    Unlike `graphopt.ir.fingerprint.fingerprint` it reads the weights, and is the same in another process. Metadata
    and documentation do not count.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
        >>> model_digest(ir.from_onnx_text(text)) == model_digest(ir.from_onnx_text(text))
        True
        >>> model_digest(ir.from_onnx_text(text.replace("Relu", "Tanh"))) == model_digest(ir.from_onnx_text(text))
        False
    """
    found = hashlib.sha256(repr(sorted(model.opset_imports.items())).encode())
    for piece in _graph_pieces(model.graph):
        found.update(piece)
        found.update(b"\0")
    for function in model.functions.values():
        for piece in _graph_pieces(function.graph):
            found.update(piece)
            found.update(b"\0")
    return found.hexdigest()


def _graph_pieces(graph: ir.Graph) -> Iterator[bytes | memoryview]:
    yield repr([(value.name, str(value.type), str(value.shape)) for value in graph.inputs]).encode()
    yield repr([value.name for value in graph.outputs]).encode()
    for name, value in sorted(graph.initializers.items()):
        yield name.encode()
        if value.const_value is not None:
            yield from _tensor_pieces(value.const_value)
    for node in graph:
        names = [None if value is None else value.name for value in node.inputs]
        yield repr((node.domain, node.op_type, node.overload, names, [value.name for value in node.outputs])).encode()
        for name, attribute in sorted(node.attributes.items()):
            yield name.encode()
            yield from _attribute_pieces(attribute)
        for value in node.outputs:
            for array in value.meta.get(BATCHNORM_STATISTICS, ()):
                yield np.ascontiguousarray(array).tobytes()


def _attribute_pieces(attribute: ir.Attr) -> Iterator[bytes | memoryview]:
    kind, value = attribute.type, attribute.value
    yield repr((kind.name, attribute.ref_attr_name)).encode()
    if kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        for graph in [value] if kind == ir.AttributeType.GRAPH else value:
            yield from _graph_pieces(graph)
    elif kind in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        for tensor in [value] if kind == ir.AttributeType.TENSOR else value:
            yield from _tensor_pieces(tensor)
    else:
        yield repr(value).encode()


def _tensor_pieces(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    yield repr((tensor.dtype.name, tuple(map(str, tensor.shape)))).encode()
    if tensor.dtype == ir.DataType.STRING:
        yield repr(tensor.numpy().tolist()).encode()
    else:
        yield tensor.tobytes()
