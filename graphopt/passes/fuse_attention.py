"""Pass fuse-attention: scaled dot-product attention in primitives becomes the Attention operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.dimensions import dimensions
from graphopt.ir.match import discard, require_closed, scalar
from graphopt.ir.opset import lift_opset
from graphopt.ir.rewrite import DeclinedError, Rewriter, is_op, rank, sole_consumer
from graphopt.ir.views import Atom, Part
from graphopt.passes.attention_mask import Mask, MaskBuilder, read_mask
from graphopt.passes.attention_operands import Operand, joined, read_operand, reshape_target, with_sizes
from graphopt.passes.contract import Context, Pass, Semantics

_OPSET = 23
_WHAT = "fuse attention"


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Write softmax(scale q k^T + mask) v as the operator Attention, over projections as they come where it can.

    The anchor is the Softmax. Backwards from it stand an added mask (or a Where with a very negative constant), any
    constant factors, and the product q k^T; forwards an optional guard Where(IsNaN(p), 0, p) and the product p v.
    Factors on q, on k and on the product (torch puts a fourth root on either side) make one `scale`. How q, k and v
    come from [batch, tokens, heads * width], and how the result goes back, is read by following axes through
    Reshape, Transpose, Unsqueeze and Expand (`graphopt.ir.views`), so the spelling does not matter; keys and
    values that Expand repeats for grouped queries are read before they are repeated::

        3-D   all three are split from [B, S, H D] and the result is joined to it: Attention(q, k, v)
              from one packed projection [B, S, 3 H D]:  Attention(Split(qkv)); joined to [B S, H D]:  a Reshape behind
        4-D   otherwise (rotary embeddings, caches):  Attention over [B, H, S, D], transposes stay

    (Vaswani et al. 2017; Ainslie et al. 2023 for grouped queries; operator Attention-23.) The model is lifted to
    opset 23 once, if it has anything to fuse; where the converters fail, nothing is fused.

    Speed over the torch export; 2026-11-22, onnxruntime 1.31.1, CPU, float32, one thread, command
    `python -m benchmarks.forms attention encoder`. Folding the scale into weights or moving it gains nothing,
    since onnxruntime folds it into its FusedMatMul; and opset 23 by itself costs nothing (0.99 to 1.01)::

                                  tokens  heads  scale moved   4-D    3-D   whole layer, 3-D
        ViT-S                        197      6         1.00  1.01   1.18   1.00 to 1.02
        BERT-base, mask              128     12         1.00  1.06   1.31   1.01
        LLaMA-like, 4 kv heads       128     16         1.00  1.12   1.31   -
        short, mask                   16     12         1.00  1.00   1.67   -
        long                        1024      6         1.00  1.01   1.05   -
        grouped rows, no repeat      128     16         1.10    -      -    -     (rows of one group in one product)
        packed, with its projection  197      6            -  1.01   1.05   -
        packed, short, batch 4        16     12            -  1.02   1.06   -
        packed, batch 4              197      3            -  1.04   1.08   -

    Declined: float16 on CPU (0.78), other targets (not measured), axes without a known size or symbol between the
    projections and the products, and whatever cannot be consumed whole.

    Rows whose keys are all masked: onnxruntime's Attention gives 0 where the largest score is minus infinity or the
    lowest float, the primitives NaN or the mean of v. A mask that can have such rows is kept from the lowest float
    by Max(mask, lowest / 2), which leaves every other row as it is: the mean stays the mean; NaN (minus infinity
    without the IsNaN guard) becomes the mean or 0, and the guarded 0 stays 0.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,5,8] q, float[2,5,8] k, float[2,5,8] v) => (float[2,5,8] y)
        <int64[4] split = {2,5,2,4}, int64[3] join = {2,5,8}, float scale = {0.5}> {
          q0 = Reshape (q, split)
          k0 = Reshape (k, split)
          v0 = Reshape (v, split)
          q1 = Transpose <perm = [0, 2, 1, 3]> (q0)
          k1 = Transpose <perm = [0, 2, 3, 1]> (k0)
          v1 = Transpose <perm = [0, 2, 1, 3]> (v0)
          product = MatMul (q1, k1)
          scores = Mul (product, scale)
          p = Softmax <axis = -1> (scores)
          o = MatMul (p, v1)
          o1 = Transpose <perm = [0, 2, 1, 3]> (o)
          y = Reshape (o1, join)
        }

    After::

        <ir_version: 11, opset_import: ["": 23]>
        g (float[2,5,8] q, float[2,5,8] k, float[2,5,8] v) => (float[2,5,8] y) {
          y = Attention <kv_num_heads = 2, q_num_heads = 2, scale = 0.5> (q, k, v)
        }
    """

    name: ClassVar[str] = "fuse-attention"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("eliminate-identity",)

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Fuse every attention that is recognized; a remark for each near miss."""
        if context.target != "cpu":
            context.note(_WHAT, f"not measured on target {context.target}", model.graph.name or "graph")
            return
        if not any(_is_fusible(node) for graph in model.graphs() for node in graph):
            Rewriter(model).until_stable(_explain, _WHAT, context.missed)
            return
        if model.opset_imports.get("", 0) < _OPSET and lift_opset(model, _OPSET) < _OPSET:
            context.missed(_WHAT, f"the model cannot be lifted to opset {_OPSET}", model.graph.name or "graph")
            return
        model.ir_version = max(model.ir_version or 0, 11)
        masks = MaskBuilder()

        def fuse(rewriter: Rewriter, node: ir.Node) -> bool:
            found = _match(node)
            if found is None:
                return False
            _emit(rewriter, found, masks)
            return True

        Rewriter(model).until_stable(fuse, _WHAT, context.missed)
        for graph in model.graphs():
            graph.sort()


@dataclass(frozen=True)
class _Attention:
    """A whole attention: operands, mask, the product with the values, the value to replace, the nodes consumed."""

    query: Operand
    key: Operand
    value: Operand
    scale: float
    mask: Mask | None
    heads: ir.Value
    result: ir.Value
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class _Scores:
    """What Softmax reads: a product of matrices, a factor, and a mask."""

    product: ir.Node
    factor: float
    mask: Mask | None
    nodes: frozenset[ir.Node]


def _is_fusible(node: ir.Node) -> bool:
    try:
        return _match(node) is not None
    except DeclinedError:
        return False


def _explain(rewriter: Rewriter, node: ir.Node) -> bool:
    """Changes nothing; the refusals of `_match` become remarks."""
    del rewriter
    _match(node)
    return False


def _match(node: ir.Node) -> _Attention | None:
    """The attention around a Softmax, None where there is none. Raises `DeclinedError` for a near miss."""
    if not is_op(node, "Softmax") or node.inputs[0] is None:
        return None
    dimension_count = rank(node.inputs[0])
    axis = node.attributes.get("axis")
    if dimension_count != 4 or (-1 if axis is None else axis.as_int()) not in (-1, 3):
        return None
    guarded, guard = _nan_guard(node)
    output = _product_with_values(guarded)
    scores = _scores(node.inputs[0], guarded=bool(guard))
    if scores is None or output is None:
        return None
    q, k, v = scores.product.inputs[0], scores.product.inputs[1], output.inputs[1]
    if q is None or k is None or v is None:
        return None
    if q.dtype != ir.DataType.FLOAT:
        raise DeclinedError("onnxruntime's CPU kernel is slower than the primitives (x0.78) unless float32")
    outer = {None if (shape := dimensions(value)) is None else shape[:2] for value in (q, k, v)}
    if len(outer) != 1 or None in outer:
        raise DeclinedError("queries, keys and values differ in batch or heads, or their shapes are not known")
    core = scores.nodes | guard | {node, output}
    result, joins = joined(output.outputs[0])
    for flat in (True, False):
        operands = [read_operand(value, flat, last) for value, last in ((q, 3), (k, 2), (v, 3))]
        end, tail = (result, joins) if flat else (output.outputs[0], frozenset[ir.Node]())
        if end is None or any(operand is None for operand in operands):
            continue
        query, key, value = (operand for operand in operands if operand is not None)
        if key.heads != value.heads or query.heads % key.heads or value.scale != 1.0:
            continue
        nodes = with_sizes(core | tail, end)
        if flat and not _is_closed(nodes, end):
            continue
        require_closed(nodes, end)
        scale = scores.factor * query.scale * key.scale
        return _Attention(query, key, value, scale, scores.mask, output.outputs[0], end, nodes)
    raise DeclinedError("queries, keys and values do not come as [batch, heads, tokens, width]")


def _is_closed(nodes: frozenset[ir.Node], end: ir.Value) -> bool:
    try:
        require_closed(nodes, end)
    except DeclinedError:
        return False
    return True


def _nan_guard(softmax: ir.Node) -> tuple[ir.Value, frozenset[ir.Node]]:
    """The probabilities, and the nodes of Where(IsNaN(p), 0, p) where they are guarded so."""
    probabilities = softmax.outputs[0]
    for use in probabilities.uses():
        choice = sole_consumer(use.node.outputs[0]) if is_op(use.node, "IsNaN") else None
        if choice is None or not is_op(choice, "Where") or scalar(choice.inputs[1]) != 0.0:
            continue
        if choice.inputs[0] is use.node.outputs[0] and choice.inputs[2] is probabilities:
            return choice.outputs[0], frozenset({use.node, choice})
    return probabilities, frozenset()


def _product_with_values(probabilities: ir.Value) -> ir.Node | None:
    for use in probabilities.uses():
        if is_op(use.node, "MatMul") and use.idx == 0:
            return use.node
    return None


def _scores(value: ir.Value, *, guarded: bool) -> _Scores | None:
    """Read backwards from the input of Softmax to the product of queries and keys; None where there is none."""
    node = value.producer()
    if node is None:
        return None
    if is_op(node, "MatMul"):
        return _Scores(node, 1.0, None, frozenset({node})) if rank(value) == 4 else None
    for index, data in enumerate(node.inputs):
        if data is None or rank(data) != 4 or (is_op(node, "Where") and index == 0):
            continue
        other = node.inputs[1 - index] if len(node.inputs) == 2 else None
        number = scalar(other)
        if is_op(node, "Mul") or (is_op(node, "Div") and index == 0):
            found = _scores(data, guarded=guarded) if number else None
            if found is None or found.mask is not None:
                continue
            factor = found.factor * (number if node.op_type == "Mul" else 1.0 / number)  # type: ignore[operator]
            return _Scores(found.product, factor, None, found.nodes | {node})
        if is_op(node, "Add", "Where"):
            found = _scores(data, guarded=guarded)
            if found is None:
                continue
            if found.mask is not None:
                raise DeclinedError("more than one mask is added to the scores", node)
            mask = read_mask(node, index, guarded=guarded)
            return _Scores(found.product, found.factor, mask, found.nodes | {node})
    return None


# Emission ---------------------------------------------------------------------------------------------------------


def _emit(rewriter: Rewriter, found: _Attention, masks: MaskBuilder) -> None:
    """Put an Attention node in the place of the result. Nodes are sorted once the pass has ended."""
    after = found.result.producer()
    assert after is not None
    inputs: list[ir.Value | None] = []
    blocks: dict[tuple[ir.Value, Atom], Sequence[ir.Value]] = {}
    for operand in (found.query, found.key, found.value):
        base = operand.base
        if operand.part is not None:
            key = (base, operand.part.atom)
            if key not in blocks:
                blocks[key] = _split(rewriter, after, base, operand.part)
            inputs.append(blocks[key][operand.part.index])
        elif operand.permutation is not None:
            order = {"perm": operand.permutation}
            inputs.append(
                rewriter.insert(after, "Transpose", [base], like=base, suffix="heads", attributes=order).outputs[0]
            )
        else:
            inputs.append(base)
    if found.mask is not None:
        axis = 1 if found.query.flat else (found.query.permutation or range(4))[2]
        inputs.append(masks.build(rewriter, after, found.mask, found.query.base, axis))
    attributes: dict[str, int | float | str | Sequence[int]] = {"scale": float(np.float32(found.scale))}
    if found.query.flat:
        attributes |= {"kv_num_heads": found.key.heads, "q_num_heads": found.query.heads}
    node = rewriter.insert(after, "Attention", inputs, attributes=attributes, like=found.result, suffix="attention")
    result = node.outputs[0]
    if found.query.flat and rank(found.result) != 3:
        target = reshape_target(found.heads, found.result)
        assert target is not None
        assert isinstance(after.graph, ir.Graph)
        shape = rewriter.initializer(after.graph, f"{found.result.name}_shape", ir.Tensor(np.array(target, np.int64)))
        result = rewriter.insert(node, "Reshape", [result, shape], like=found.result, suffix="joined").outputs[0]
    rewriter.supersede(found.result, result)
    discard(found.nodes.union(found.query.nodes, found.key.nodes, found.value.nodes))


def _split(rewriter: Rewriter, after: ir.Node, packed: ir.Value, part: Part) -> Sequence[ir.Value]:
    """Equal blocks of the last axis of [B, S, n H D]."""
    shape = dimensions(packed)
    assert isinstance(after.graph, ir.Graph)
    assert shape is not None
    count, width = part.atom.size, shape[2]
    assert isinstance(count, int)
    assert isinstance(width, int)
    sizes = np.full(count, width // count, dtype=np.int64)
    split = rewriter.initializer(after.graph, f"{packed.name}_sizes", ir.Tensor(sizes))
    node = rewriter.insert(
        after, "Split", [packed, split], like=packed, suffix="part", attributes={"axis": 2}, outputs=count
    )
    for block in node.outputs:
        block.shape = ir.Shape((*shape[:2], width // count))
    return node.outputs
