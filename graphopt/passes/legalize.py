"""Pass legalize: operators that the target's provider does not take, or runs slowly, in ones that it runs well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.rewrite import DeclinedError, Rewriter, discard_if_dead, is_op, rank, sole_consumer
from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class Legalize(Pass):
    """Write operators that the target's execution provider does not take, or runs slowly, in ones that it runs well.

    CPU: onnxruntime 1.31 fuses the Add of a residual stream and the LayerNormalization behind it to
    SkipLayerNormalization, whose kernel is five to seven times slower than that of LayerNormalization by itself. Sum is
    the same operator and is not fused (`python -m benchmarks.forms skip`, one thread of an AMD EPYC: 7.1 times as fast
    for [128, 768], 6.6 for [197, 384], 6.5 for [3136, 96], 1.4 for [1, 768]; BERT-base on integers 1.14 times)::

        LayerNormalization(Add(x, y))  =  LayerNormalization(Sum(x, y))

    OpenVINO: onnxruntime cuts a graph at every node that a provider does not take. What is between two cuts is compiled
    alone, so that layouts, fusions and integers end there, and one small operator in each layer is enough to lose
    everything. onnxruntime-openvino 1.24.1 does not take IsNaN, which every attention that torch exports has, as a
    guard of rows that are masked whole::

        Where(IsNaN(x), y, z)  =  Where(Equal(x, x), z, y)      IEEE 754: NaN alone is not equal to itself
        IsNaN(x)               =  Not(Equal(x, x))

    ViT-S is one graph instead of 13 so: 1.07 times as fast in floats, and quantized 2.7 instead of 0.94 times as fast
    as before (one thread of an EPYC with AVX-512; `python -m benchmarks.openvino_int8 vit-s bert-base` has all gains).

    On other targets it does nothing. The graphs below are those of `target="openvino"`.

    Options:
        target: "cpu" or "openvino"; None for the target of the run.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[N,4] z) => (float[N,4] y) {
          missing = IsNaN (x)
          y = Where (missing, z, x)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[N,4] z) => (float[N,4] y) {
          missing_equal = Equal (x, x)
          y = Where (missing_equal, x, z)
        }
    """

    name: ClassVar[str] = "legalize"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("fuse-attention", "merge-common-subexpressions")

    target: str | None = None

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Apply the rules of the target."""
        rewriter = Rewriter(model)
        for rule in _RULES.get(self.target or context.target, ()):
            rewriter.until_stable(rule, "legalize", context.missed)


def _not_itself(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "IsNaN"):
        return False
    data, result = node.inputs[0], node.outputs[0]
    if data is None or data.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16):
        raise DeclinedError("Equal is not known to compare numbers of this type")
    made = rewriter.insert(node, "Equal", [data, data], like=result, suffix="equal")
    equal = made.outputs[0]
    equal.shape = result.shape
    for user in result.consumers():
        if is_op(user, "Where") and user.inputs[0] is result:
            _, missing, present = user.inputs
            for index, value in enumerate((equal, present, missing)):
                user.replace_input_with(index, value)
    if result.uses() or result.is_graph_output():
        rewriter.supersede(result, rewriter.insert(made, "Not", [equal], like=result, suffix="not").outputs[0])
    else:
        discard_if_dead(node)
    return True


def _unfused_sum(rewriter: Rewriter, node: ir.Node) -> bool:
    """What onnxruntime would fuse to SkipLayerNormalization: an Add of [B, S, H] or [S, H] that nothing else reads."""
    value = node.inputs[0] if is_op(node, "LayerNormalization") else None
    added = None if value is None else value.producer()
    if value is None or added is None or not is_op(added, "Add") or sole_consumer(value) is not node:
        return False
    if value.dtype != ir.DataType.FLOAT or rank(value) not in (2, 3):
        return False
    made = rewriter.insert(added, "Sum", added.inputs, like=value, suffix="sum")
    rewriter.supersede(value, made.outputs[0])
    return True


_RULES: Mapping[str, tuple[Callable[[Rewriter, ir.Node], bool], ...]] = {
    "cpu": (_unfused_sum,),
    "openvino": (_not_itself,),
}
"""By target, what is rewritten for it."""
