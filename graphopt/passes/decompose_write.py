"""A chain of factors as nodes, in the place of the operator that it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.factorizations import Factor, FactorShape, composed
from graphopt.ir.linear import Linear, linear_at
from graphopt.ir.rewrite import Rewriter, discard_if_dead, integers, is_op, set_attributes, to_tensor
from graphopt.passes.decompose_layers import Site

_BY_AXIS = ("strides", "dilations", "output_padding")
"""Attributes of a convolution with one number a spatial axis, and what they are where nothing walks."""


def stored(linear: Linear, factor: Factor) -> np.ndarray:
    """The weight of a factor as its node reads it."""
    view = linear
    if is_op(linear.node, "ConvTranspose") and any(factor.shape.axes):
        view = dataclasses.replace(linear, groups=factor.shape.groups)
    elif linear.kernel:
        return factor.weight
    return view.as_read(factor.weight)


def chain_node(
    linear: Linear,
    shape: FactorShape,
    operands: tuple[ir.Value, ir.Value, ir.Value | None],
    output: ir.Value,
    *,
    first: bool,
) -> ir.Node:
    """The node of one factor: of data, weight and bias. The `first` one of a Gemm that turns its data does so."""
    node, (data, weight, bias) = linear.node, operands
    if is_op(node, "MatMul"):
        sides = [data, weight] if linear.weight_index == 1 else [weight, data]
        return ir.node("MatMul", sides, outputs=[output])
    read = [data, weight] if bias is None else [data, weight, bias]
    if is_op(node, "Gemm"):
        names = ("transA", "transB") if first else ("transB",)
        attributes: dict[str, Any] = {name: node.attributes[name].as_int() for name in names if name in node.attributes}
        return ir.node("Gemm", read, attributes=attributes, outputs=[output])
    op_type = node.op_type if any(shape.axes) else "Conv"
    return ir.node(op_type, read, attributes=_placement(node, shape), outputs=[output])


def _placement(node: ir.Node, shape: FactorShape) -> dict[str, Any]:
    """Attributes of a convolution that walks along some of the axes of another."""
    found: dict[str, Any] = {"kernel_shape": shape.kernel}
    if shape.groups > 1:
        found["group"] = shape.groups
    if not any(shape.axes):
        return found
    auto_pad = node.attributes.get("auto_pad")
    if auto_pad is not None and auto_pad.as_string() != "NOTSET":
        found["auto_pad"] = auto_pad.as_string()
    for name in _BY_AXIS:
        values = integers(node, name)
        idle = 0 if name == "output_padding" else 1
        if values is not None:
            kept = tuple(value if walks else idle for value, walks in zip(values, shape.axes, strict=True))
            if any(value != idle for value in kept):
                found[name] = kept
    pads = integers(node, "pads")
    if pads is not None and "auto_pad" not in found:
        kept = tuple(pad if walks else 0 for pad, walks in zip(pads, (*shape.axes, *shape.axes), strict=True))
        if any(kept):
            found["pads"] = kept
    return found


def replace_by_chain(
    rewriter: Rewriter, site: Site, factors: Sequence[Factor], shifts: Sequence[np.ndarray | None]
) -> None:
    """Put a chain in the place of every operator of a site.

    The last node makes the value that the operator made, of the same name; the bias is its.

    Args:
        rewriter: of the model.
        site: the operators.
        factors: the chain.
        shifts: for each operator what its bias gains, float64 [M], or None.

    Raises:
        DeclinedError: a number is not finite in the element type of the weight. Nothing has changed then.
    """
    linear, weight = site.linear, site.weight
    tensors = [to_tensor(stored(linear, factor), linear.dtype) for factor in factors]
    biases = [None if shift is None else to_tensor(one.bias() + shift, one.dtype)
              for one, shift in zip(site.linears, shifts, strict=True)]  # fmt: skip
    graph = linear.node.graph
    assert isinstance(graph, ir.Graph)
    values = [
        rewriter.initializer(graph, f"{weight.name}.factor_{index}", tensor) for index, tensor in enumerate(tensors)
    ]
    for one, bias, shift in zip(site.linears, biases, shifts, strict=True):
        _replace_one(rewriter, one, factors, values, bias, shift)


def _replace_one(
    rewriter: Rewriter,
    linear: Linear,
    factors: Sequence[Factor],
    weights: Sequence[ir.Value],
    bias: ir.Tensor | None,
    shift: np.ndarray | None,
) -> None:
    node, old = linear.node, linear.node.outputs[0]
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    held = node.inputs[2] if len(node.inputs) > 2 else None
    in_place = bias is not None and not is_op(node, "MatMul")
    if in_place:
        assert bias is not None
        held = rewriter.initializer(graph, f"{weights[-1].name}.bias", bias)
    data, before = linear.data, node
    last = len(factors) - 1
    for index, (factor, weight) in enumerate(zip(factors, weights, strict=True)):
        name = rewriter.unique_name(f"{old.name}_factor_{index}")
        value = ir.Value(name=name, type=old.type, shape=_shape(linear, factor.shape, data, old))
        made = chain_node(
            linear, factor.shape, (data, weight, held if index == last else None), value, first=index == 0
        )
        made.name = rewriter.unique_name(f"{node.name}/factor_{index}")
        made.metadata_props.update(node.metadata_props)
        if index == last and is_op(node, "Gemm") and not in_place and "beta" in node.attributes:
            set_attributes(made, beta=node.attributes["beta"].as_float())
        graph.insert_after(before, made)
        data, before = value, made
    rewriter.supersede(old, data)
    if shift is not None and not in_place and shift.any():
        view = linear_at(before)
        assert view is not None
        tensor = to_tensor(_column(view, view.bias() + shift), view.dtype)
        view.store_matmul_bias(rewriter, tensor, needed=True, wanted_name=f"{weights[-1].name}.bias")
    discard_if_dead(node)


def _column(linear: Linear, bias: np.ndarray) -> np.ndarray:
    return bias[:, None] if linear.out_axis == -2 else bias


def _shape(linear: Linear, shape: FactorShape, data: ir.Value, result: ir.Value) -> ir.Shape | None:
    """What a factor makes: channels of its own, sizes of the result along the axes that have been walked."""
    if data.shape is None or result.shape is None or len(result.shape) < 2:
        return None
    if not linear.kernel:
        dims = list(result.shape)
        dims[linear.out_axis] = shape.outputs
        return ir.Shape(dims)
    dims = list(data.shape)
    dims[1] = shape.outputs
    for axis, walks in enumerate(shape.axes):
        if walks:
            dims[2 + axis] = result.shape[2 + axis]
    return ir.Shape(dims)


def dense_weight(site: Site, factors: Sequence[Factor]) -> np.ndarray:
    """What the chain amounts to: float64 [M, C / G, *kernel]."""
    return composed(site.layer, factors)
