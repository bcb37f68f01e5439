"""Products of two activations in form "operands" of quantize: which they are, and where their quantizers stand.

OpenVINO compiles the scores q k^T of an attention in integers all through where q and k are quantized right behind the
layer that makes them, and move as integers from there (Swin: 1.07 times as fast, ViT-S: the same), without an offset:
signed, unless nothing is negative (ViT-S is at 1.04 of NNCF's speed so and was at 0.95, BERT-base at 1.02 and 0.93;
unsigned ones with their zero point in the middle gain nothing). The product with the probabilities is faster with its
quantizers right before it (ViT-S: 1.05 times), or in floats (Swin: 1.06 times; ViT-S: 0.97 times), which is timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import onnx_ir as ir

from graphopt.ir.rewrite import constant, is_op, rank, sole_consumer

_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


def is_product(node: ir.Node) -> bool:
    """Whether a MatMul multiplies by something that is no weight: scores and values of attention."""
    return is_op(node, "MatMul") and constant(node.inputs[1]) is None


def moves_before_scores(nodes: Iterable[ir.Node], products: Set[ir.Node]) -> set[ir.Node]:
    """What only moves elements between a layer and a product of `products` that is none with probabilities.

    Args:
        nodes: of a graph, in order.
        products: what is to compute on integers.
    """
    found: set[ir.Node] = set()
    for node in reversed(list(nodes)):
        reader = sole_consumer(node.outputs[0]) if is_op(node, *_MOVES) else None
        if reader is None or constant(node.inputs[0]) is not None:
            continue
        if reader in found or (reader in products and is_product(reader) and not reads_probabilities(reader)):
            found.add(node)
    return found


def may_be_signed(value: ir.Value, static: Set[ir.Node]) -> bool:
    """Whether nothing but products of activations reads it, moved or not.

    Before operators in float, a Reshape or Transpose makes onnxruntime 1.31 write an invalid graph of signed integers
    at load: one of its passes states their type, another makes them unsigned. It puts such a Reshape before a MatMul by
    a matrix itself, when a bias follows.
    """
    return all(
        reader in static
        and (
            may_be_signed(reader.outputs[0], static)
            if is_op(reader, *_MOVES)
            else is_product(reader) and reader.inputs[1] is not None and rank(reader.inputs[1]) not in (None, 1, 2)
        )
        for reader in value.consumers()
    )


def reads_probabilities(node: ir.Node) -> bool:
    """Whether the left operand is a Softmax, or one that is guarded from NaN."""
    value = node.inputs[0]
    source = None if value is None else value.producer()
    if is_op(source, "Where") and source is not None:
        return any(is_op(value.producer(), "Softmax") for value in source.inputs if value is not None)
    return is_op(source, "Softmax")
