"""Reading a model from a file, bytes, a proto or an `onnx_ir.Model`. Models are untrusted input."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import external_data_helper

from graphopt.errors import InvalidGraphError, LoadError
from graphopt.ir.canonical import canonicalize
from graphopt.ir.check import check_structure, sort_nodes, unsorted_nodes
from graphopt.ir.opset import check_opset
from graphopt.ir.sparse import with_dense_weights

Source = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

_SMALL_WEIGHT = 1024
"""Bytes up to which an external tensor is read at once."""


def load(source: Source, *, sizes: Mapping[str, int] | None = None) -> ir.Model:
    """Read an ONNX model and bring it into canonical form (`graphopt.ir.canonical`).

    Args:
        source: path of an .onnx file (external data beside it is found), its bytes, an `onnx.ModelProto`, or an
            `onnx_ir.Model` (which is cloned, not changed).
        sizes: elements of the symbolic input dimensions by name, where the model accepts only certain sizes.

    Raises:
        LoadError: the file is missing, empty, a directory, not an ONNX model, or its external data is missing or
            lies outside the model's folder.
        InvalidGraphError: a cycle, a name that nobody produces, a type error, an opset that is not known.

    Example:
        >>> import onnx.parser
        >>> proto = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
        >>> load(proto).opset_imports[""]
        21
    """
    model = read(source)
    check_opset(model)
    check_structure(model)
    return canonicalize(model, sizes=sizes)


def read(source: Source) -> ir.Model:
    """Read a model as it is but for the order of its nodes, without canonical form.

    Raises:
        LoadError: as `load`.
        InvalidGraphError: the graph has a cycle, or is so malformed that it cannot be held in memory.
    """
    if isinstance(source, ir.Model):
        return _clone(source)
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, "ModelProto", None)
    if isinstance(source, bytes):
        return _from_proto(_parse(source, "bytes"), "bytes", None)
    if not isinstance(source, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise LoadError(
            f"a model cannot be read from a {type(source).__name__}",
            help="pass a path, bytes, an onnx.ModelProto or an onnx_ir.Model; torch modules go to graphopt.trace",
        )
    path = Path(source)
    if not path.exists():
        raise LoadError("there is no such file", where=str(path), help="check the path")
    if path.is_dir():
        raise LoadError("this is a directory, not an ONNX file", where=str(path), help="name the .onnx file in it")
    try:
        proto = _parse(path.read_bytes(), str(path))
    except OSError as error:
        raise LoadError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    return _from_proto(proto, str(path), path.parent)


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    if not data:
        raise LoadError("the file is empty", where=where, help="export the model again")
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise LoadError(
            "this is not an ONNX model, or the file is truncated",
            where=where,
            help="graphopt reads .onnx files; pass a torch module to graphopt.optimize or graphopt.trace",
        ) from error
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise LoadError(
            "this protobuf holds no ONNX graph", where=where, help="graphopt reads .onnx files (ModelProto)"
        )
    return proto


def _from_proto(proto: onnx.ModelProto, where: str, folder: Path | None) -> ir.Model:
    _check_external_data(proto, where, folder)
    proto = with_dense_weights(proto, where)
    try:
        model = ir.from_proto(proto)
        if folder is not None:
            ir.external_data.set_base_dir(model.graph, folder)
        _hold_weights(model)
    except Exception as error:  # onnx_ir raises many types on malformed protos
        raise InvalidGraphError(f"the model is malformed: {error}", where=where, help="export it again") from error
    sort_nodes(model)
    return model


def _hold_weights(model: ir.Model) -> None:
    """Hold each weight as one array that all sessions share.

    A tensor over a proto copies its bytes whenever it is read. External tensors stay mapped from their file, but
    for small ones: shape constants must be at hand.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if (isinstance(tensor, ir.TensorProtoTensor) and tensor.dtype != ir.DataType.STRING) or (
                isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _SMALL_WEIGHT
            ):
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _clone(model: ir.Model) -> ir.Model:
    """A copy that shares the tensors. onnx_ir clones sorted graphs only, others go through a proto."""
    if not unsorted_nodes(model.graphs()):
        return model.clone()
    copy = ir.from_proto(ir.to_proto(model))
    sort_nodes(copy)
    return copy


def _check_external_data(proto: onnx.ModelProto, where: str, folder: Path | None) -> None:
    for tensor in external_data_helper._get_all_tensors(proto):  # pyright: ignore[reportPrivateUsage]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if folder is None:
            raise LoadError(
                f"weight {tensor.name!r} lies in external file {location!r}, and bytes have no folder",
                where=where,
                help="pass the path of the .onnx file",
            )
        target = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not target.is_relative_to(folder.resolve()):
            raise LoadError(
                f"external data of weight {tensor.name!r} points outside the model's folder: {location!r}",
                where=where,
                help="move the data file beside the model and export it again",
            )
        if not target.is_file():
            raise LoadError(
                f"external data file {location!r} of weight {tensor.name!r} is missing",
                where=where,
                help=f"put {location!r} into {folder}",
            )
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        if offset < 0 or length < 0 or offset + length > target.stat().st_size:
            raise LoadError(
                f"external data file {location!r} is too short for weight {tensor.name!r}",
                where=where,
                help="the data file is truncated or belongs to another model",
            )
