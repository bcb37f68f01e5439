"""A linear operator and its adjoint as functions of data and weight, run by onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.linear_rows import LinearRows, apply_rows, split_rows
from graphopt.ir.rewrite import DeclinedError, is_op
from graphopt.ir.session import Session, open_session

_FLOAT = ir.TensorType(ir.DataType.FLOAT)


class LinearKernel:
    """What one linear operator computes, for any weight of its shape, without a bias.

    Example:
        >>> from graphopt.ir.linear import linear_at
        >>> from graphopt.ir.linear_rows import linear_rows
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,1,4] x) => (float[n,1,3] y)
        ...     <float[1,1,2] w = {1, 2}> { y = Conv (x, w) }''')
        >>> kernel = LinearKernel(linear_rows(linear_at(model.graph[0])))
        >>> kernel.forward(np.array([[[1, 2, 3, 4]]], np.float32), np.array([[[1, 1]]])).tolist()
        [[[3.0, 5.0, 7.0]]]
        >>> kernel.backward(np.array([[[1, 0, 0]]], np.float32), np.array([[[1, 1]]]), (1, 1, 4)).tolist()
        [[[1.0, 1.0, 0.0, 0.0]]]
    """

    def __init__(self, rows: LinearRows) -> None:
        self.rows = rows
        self._forward: Session | None = None
        self._backward: dict[tuple[int, ...], Session] = {}

    def forward(self, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The result [.., M, ..] in the operator's layout; the weight is [M, C / G, *kernel]."""
        linear = self.rows.linear
        if not linear.kernel:
            made = apply_rows(self.rows.patches(data), self.rows.by_group(weight))
            return self.rows.result(made, np.moveaxis(np.moveaxis(data, linear.in_axis, -1), -1, linear.out_axis))
        if self._forward is None:
            self._forward = _session(linear.node.op_type, _attributes(linear.node), len(linear.kernel) + 2)
        stored = np.ascontiguousarray(linear.as_read(weight), np.float32)
        return self._forward.run_feeds({"x": np.ascontiguousarray(data), "w": stored})[0]

    def backward(self, result: np.ndarray, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The adjoint: of an array like the result, one of `shape`, the data's.

        Raises:
            DeclinedError: the operator is a ConvTranspose.
        """
        linear, rows = self.rows.linear, self.rows
        if not linear.kernel:
            groups = split_rows(rows.rows(result), rows.groups)
            patches = groups @ rows.by_group(weight).astype(np.float32)
            return np.ascontiguousarray(rows.adjoint(patches, np.empty(shape, np.float32)))
        if is_op(linear.node, "ConvTranspose"):
            raise DeclinedError("the adjoint of ConvTranspose is not at hand", linear.node)
        if shape[2:] not in self._backward:
            self._backward[shape[2:]] = _session("ConvTranspose", self._turned(result.shape, shape), len(shape))
        feeds = {"x": np.ascontiguousarray(result), "w": np.ascontiguousarray(weight, np.float32)}
        return self._backward[shape[2:]].run_feeds(feeds)[0]

    def _turned(self, result: tuple[int, ...], data: tuple[int, ...]) -> list[ir.Attr]:
        """Attributes of the ConvTranspose that brings the result's sizes back to the data's."""
        rows = self.rows
        spans = zip(
            data[2:], result[2:], rows.linear.kernel, rows.strides, rows.dilations, rows.begins, rows.ends, strict=True
        )
        extra = [
            size - ((made - 1) * stride + (kernel - 1) * dilation + 1 - begin - end)
            for size, made, kernel, stride, dilation, begin, end in spans
        ]
        # what the last position leaves unread is more than an output_padding may be: cut less off the end instead
        ends = [end - more for end, more in zip(rows.ends, extra, strict=True)]
        values = {
            "group": rows.groups,
            "strides": rows.strides,
            "dilations": rows.dilations,
            "kernel_shape": rows.linear.kernel,
        }
        if min(ends) >= 0:
            values["pads"] = (*rows.begins, *ends)
        else:
            values |= {"pads": (*rows.begins, *rows.ends), "output_padding": tuple(extra)}
        return [ir.convenience.convert_attribute(name, value) for name, value in values.items()]


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())


def _session(op_type: str, attributes: list[ir.Attr], rank: int) -> Session:
    """A session of one node whose data is "x" and whose weight is "w"."""
    x, w = (
        ir.Value(name=name, type=_FLOAT, shape=ir.Shape([f"{name}{axis}" for axis in range(rank)])) for name in "xw"
    )
    y = ir.Value(name="y", type=_FLOAT)
    node = ir.Node("", op_type, [x, w], attributes, outputs=[y], name="linear")
    graph = ir.Graph([x, w], [y], nodes=[node], opset_imports={"": 21}, name="linear")
    return open_session(ir.Model(graph, ir_version=10), threads=0)
