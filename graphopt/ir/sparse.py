"""Sparse constants of a model file, written out: the graph object that graphopt works on knows dense tensors only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from graphopt.errors import LoadError

_LARGEST = 2**31
"""Bytes of the largest dense tensor that a sparse one is written out to."""


def write_sparse_out(proto: onnx.ModelProto, where: str) -> None:
    """Turn sparse initializers and sparse Constant nodes into dense ones, in place, subgraphs and functions included.

    Args:
        proto: any model; what is not sparse is not touched.
        where: name of the model, for the message.

    Raises:
        LoadError: a sparse tensor is malformed, or its dense form is larger than 2 GiB.
    """
    for graph in _graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            dense = _dense(sparse, where)
            dense.name = sparse.values.name
            graph.initializer.append(dense)
        del graph.sparse_initializer[:]
    nodes = [node for graph in _graphs(proto.graph) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                attribute.t.CopyFrom(_dense(attribute.sparse_tensor, where))
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _dense(sparse: onnx.SparseTensorProto, where: str) -> onnx.TensorProto:
    """The dense tensor; indices are flat positions, or one row of coordinates a value."""
    name, shape = sparse.values.name, tuple(sparse.dims)
    try:
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        size = values.itemsize
        for dimension in shape:
            size *= dimension
        if not 0 <= size <= _LARGEST:
            raise ValueError(f"its dense form of shape {list(shape)} is larger than 2 GiB")
        dense = np.zeros(shape, values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
    except (ValueError, IndexError, TypeError, NotImplementedError) as error:
        raise LoadError(
            f"sparse weight {name!r} cannot be read: {error}", where=where, help="export the weight as a dense tensor"
        ) from error
    return onnx.numpy_helper.from_array(dense)
