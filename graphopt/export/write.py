"""Writing ONNX files: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from graphopt.errors import WriteError
from graphopt.ir.ops.row import tensor_bytes

_LARGEST_PROTO = 2**31 - 2**20
"""Bytes that one protobuf file can hold, with a margin for the nodes."""
_STAYS_INSIDE = 1024
"""Weights up to this many bytes stay in the .onnx file even when the others move to a data file."""
_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_RAW_DATA = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


def save(model: ir.Model, path: str | os.PathLike[str]) -> Path:
    """Write a model to an .onnx file; what was at the path before stays until the new file is complete.

    Models whose weights exceed 2 GiB get them written beside it, to `<name>.data`. One weight is in memory at a time
    besides those that the model holds there.

    Returns:
        The path that was written.

    Raises:
        WriteError: the folder does not exist or cannot be written, or the disk is full. Nothing is left behind.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
        >>> save(model, "/nowhere/model.onnx")
        Traceback (most recent call last):
        graphopt.errors.WriteError: the folder does not exist
          at /nowhere
          help: create it, or write somewhere else
    """
    if not isinstance(model, ir.Model):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise WriteError(
            f"a {type(model).__name__} cannot be saved", where=str(path), help="save takes what graphopt.load returns"
        )
    with _staged(path) as staged:
        _write(model, staged)
    return Path(path)


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a text file (report, diff, plan) whole or not at all. Raises `WriteError` as `save` does."""
    with _staged(path) as staged:
        staged.write_text(text, encoding="utf-8")
    return Path(path)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise `WriteError` where a file cannot be written, before the work that fills it is done."""
    with _staged(path):
        pass


@contextmanager
def _staged(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """A file name in a temporary folder beside the target; what is written there moves to the target at the end."""
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise WriteError("the folder does not exist", where=str(folder), help="create it, or write somewhere else")
    if target.is_dir():
        raise WriteError("the output path is a directory", where=str(target), help="name a file in it")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
    except OSError as error:
        raise WriteError(
            f"the folder cannot be written: {error.strerror}", where=str(folder), help="write somewhere else"
        ) from error
    try:
        yield staging / target.name
        for written in sorted(staging.iterdir(), key=lambda file: file.name == target.name):
            os.replace(written, folder / written.name)
    except OSError as error:
        raise WriteError(f"the file cannot be written: {error.strerror}", where=str(target)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included; sub-byte types are packed."""
    return sum(
        tensor_bytes(value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def _write(model: ir.Model, path: Path) -> None:
    if weight_bytes(model) < _LARGEST_PROTO:
        _write_whole(model, path)
        return
    ir.save(model.clone(), path, external_data=f"{path.name}.data", size_threshold_bytes=_STAYS_INSIDE)


def _write_whole(model: ir.Model, path: Path) -> None:
    """Write one protobuf file with its weights inside, one weight in memory at a time.

    Serializing the message as a whole would hold all weights three times. So all but the large weights of the main
    graph is serialized, and those are appended to the graph where protobuf has them: a field may stand anywhere.
    """
    shell = model.clone()
    large: dict[str, ir.TensorProtocol] = {}
    for name, value in shell.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes > _STAYS_INSIDE:
            large[name], value.const_value = tensor, None
    ir.external_data.load_to_model(shell)
    for name, tensor in large.items():
        shell.graph.initializers[name].const_value = _absent(name, tensor)
    proto = ir.to_proto(shell)
    initializers = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(one for one in initializers if one.name not in large)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads = [_head(one, large[one.name]) for one in initializers if one.name in large]
    bodies = [_field(_RAW_DATA, tensor.nbytes) for tensor in large.values()]
    length = len(graph) + sum(
        len(head) + len(body) + tensor.nbytes for head, body, tensor in zip(heads, bodies, large.values(), strict=True)
    )
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(_field(_GRAPH, length))
        file.write(graph)
        for head, body, tensor in zip(heads, bodies, large.values(), strict=True):
            file.write(head)
            file.write(body)
            file.write(tensor.tobytes())


def _absent(name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """All that is said of a tensor but its data."""
    return ir.ExternalTensor(
        "absent",
        0,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _head(proto: onnx.TensorProto, tensor: ir.TensorProtocol) -> bytes:
    """An initializer of the graph up to its data."""
    proto.ClearField("external_data")
    proto.ClearField("data_location")
    said = proto.SerializeToString()
    data = len(_field(_RAW_DATA, tensor.nbytes)) + tensor.nbytes
    return _field(_INITIALIZER, len(said) + data) + said


def _field(number: int, length: int) -> bytes:
    """The head of a protobuf field of bytes or of a message: its number with wire type 2, then its length."""
    return _variable(number << 3 | 2) + _variable(length)


def _variable(number: int) -> bytes:
    """A number in protobuf's variable length: seven bits a byte, the lowest first, the last without the eighth bit."""
    parts: list[int] = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
