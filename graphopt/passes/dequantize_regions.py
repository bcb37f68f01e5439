"""What of a model is quantized already, and what of the rest may be quantized without guessing.

Where activations are quantized somewhere, whoever did it has decided about the rest too: what is float is meant to be.
Where only weights are (MatMulNBits, DequantizeLinear of constants), nothing was decided about other kinds of operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.ir.rewrite import constant_tensor
from graphopt.passes.dequantize_builder import MOVES
from graphopt.passes.dequantize_model import quantized_nodes

_FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), "convolution"),
    **dict.fromkeys(("MatMul", "Gemm", "MatMulNBits", "MatMulBnb4", "Attention", "Einsum"), "product"),
    **dict.fromkeys(("Gather", "GatherBlockQuantized"), "table"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent"),
}
_WEIGHTS_ALONE = frozenset({"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"})
_MOST_NAMED = 8


_UNPACKING = ("Gather", "BitwiseAnd", "BitShift")
"""What opens the bytes that several integers of a table are packed into."""


@dataclass(frozen=True)
class QuantizedRegions:
    """What is quantized in a model.

    Attributes:
        first: one of the operators, to point at.
        counts: how many operators of each type read or write quantized numbers.
        weights_alone: whether activations stay float everywhere.
        kept: the float operators that are to be left alone all the same, by name, with the reason.
    """

    first: ir.Node
    counts: Mapping[str, int]
    weights_alone: bool
    kept: Mapping[str, str]

    def __str__(self) -> str:
        named = [f"{count} {op_type}" for op_type, count in sorted(self.counts.items())][:_MOST_NAMED]
        rest = "the rest may be quantized" if self.weights_alone else "its other operators stay float as they are"
        rest += "; requantize=true quantizes all of it anew"
        return f"the model is quantized already ({', '.join(named)}): {rest}"


def quantized_regions(model: ir.Model) -> QuantizedRegions | None:
    """What is quantized in a model, None where nothing is.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ... g (float[n, 2] x) => (float[n, 1] y) <int8[2, 1] q = {3, -2}, float s = {0.5}>
        ... { w = DequantizeLinear (q, s) y = MatMul (x, w) }''')
        >>> str(quantized_regions(model)).partition(";")[0]
        'the model is quantized already (1 DequantizeLinear): the rest may be quantized'
    """
    nodes = list(quantized_nodes(model))
    if not nodes:
        return None
    families: set[str] = set()
    weights_alone = True
    for node in nodes:
        if node.op_type in _WEIGHTS_ALONE:
            families.add(_FAMILIES[node.op_type])
        elif node.op_type == "DequantizeLinear" and _is_stored(node.inputs[0]):
            families |= {"table"} if constant_tensor(node.inputs[0]) is None else _readers(node)
        else:
            weights_alone = False
    kept = {
        node.name or node.outputs[0].name or "": f"others of its kind ({_FAMILIES[node.op_type]}) are quantized already"
        for node in model.graph
        if weights_alone and _FAMILIES.get(node.op_type) in families
    }
    return QuantizedRegions(nodes[0], Counter(node.op_type for node in nodes), weights_alone, kept)


def _is_stored(value: ir.Value | None) -> bool:
    """Whether integers are constant, moved, picked from and unpacked from bytes at most."""
    if value is None or constant_tensor(value) is not None:
        return value is not None
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Concat":
        return all(map(_is_stored, node.inputs))
    return (node.op_type in MOVES or node.op_type in _UNPACKING) and _is_stored(node.inputs[0])


def _readers(node: ir.Node) -> set[str]:
    """The families of the operators that read a dequantized weight, moves in between."""
    found: set[str] = set()
    waiting = list(node.outputs)
    while waiting:
        for user in waiting.pop().consumers():
            family = _FAMILIES.get(user.op_type)
            if family is not None:
                found.add(family)
            elif user.op_type in MOVES:
                waiting += user.outputs
    return found
