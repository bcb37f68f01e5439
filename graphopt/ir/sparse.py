"""Sparse constants of a model file, written out: the graph object that graphopt works on knows dense tensors only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from graphopt.errors import LoadError

_LARGEST = 2**31
"""Bytes of the largest dense tensor that a sparse one is written out to."""


def with_dense_weights(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The model with its sparse initializers and sparse Constant nodes as dense ones, subgraphs and functions included.

    Args:
        proto: any model; it is not changed, and handed back where nothing in it is sparse.
        where: name of the model, for the message.

    Raises:
        LoadError: a sparse tensor is malformed, or its dense form is larger than 2 GiB.
    """
    if not any(graph.sparse_initializer for graph in _graphs(proto)) and not any(_sparse_constants(proto)):
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for graph in _graphs(result):
        for sparse in graph.sparse_initializer:
            dense = _dense(sparse, where)
            dense.name = sparse.values.name
            graph.initializer.append(dense)
        del graph.sparse_initializer[:]
    for attribute in _sparse_constants(result):
        attribute.t.CopyFrom(_dense(attribute.sparse_tensor, where))
        attribute.ClearField("sparse_tensor")
        attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
    return result


def _sparse_constants(proto: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    nodes = [node for graph in _graphs(proto) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                yield attribute


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph, those in functions included."""
    waiting: list[onnx.GraphProto] = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while waiting or nodes:
        if waiting:
            graph = waiting.pop()
            yield graph
            nodes.extend(graph.node)
        else:
            for attribute in nodes.pop().attribute:
                waiting.extend(attribute.graphs)
                if attribute.HasField("g"):
                    waiting.append(attribute.g)


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
    except (ValueError, IndexError, KeyError, TypeError, NotImplementedError) as error:
        raise LoadError(
            f"sparse weight {name!r} cannot be read: {error}", where=where, help="export the weight as a dense tensor"
        ) from error
    return onnx.numpy_helper.from_array(dense)
