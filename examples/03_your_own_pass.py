"""Chapter 3: a pass of your own, in a recipe, under the guard.

A pass is a frozen dataclass with a contract. Here: Clip(0, 6) becomes Relu, which is *not* the same function. Declared
EXACT, the guard catches it and rolls it back with the figures; declared LOSSY, your tolerance decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import graphopt
from graphopt import Context, Pass, Semantics


@dataclass(frozen=True)
class OpenClip(Pass):
    """Clip(x, 0, 6) -> Relu(x)."""

    name: ClassVar[str] = "open-clip"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Replace every Clip of the main graph."""
        for node in list(model.graph):
            if node.op_type != "Clip":
                continue
            relu = ir.node("Relu", [node.inputs[0]], outputs=[ir.Value(name=f"{node.outputs[0].name}.relu")])
            model.graph.insert_before(node, relu)
            node.outputs[0].replace_all_uses_with(relu.outputs[0], replace_graph_outputs=True)
            relu.outputs[0].name = node.outputs[0].name
            relu.outputs[0].type, relu.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            node.outputs[0].name = None
            model.graph.remove(node, safe=True)


@dataclass(frozen=True)
class OpenClipLossy(OpenClip):
    """The same, declared for what it is."""

    semantics: ClassVar[Semantics] = Semantics.LOSSY


model = ir.from_onnx_text(
    '<ir_version: 10, opset_import: ["": 21]> g (float[64,64] x) => (float[64,64] y) '
    "<float low = {0}, float high = {6}> { y = Clip (x, low, high) }"
)
x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) * 4
for single, tolerance in ((OpenClip(), None), (OpenClipLossy(), 0.5), (OpenClipLossy(), 0.01)):
    result = graphopt.optimize(model, {"x": x}, recipe=[single], tolerance=tolerance, quiet=True)
    step = result.report.steps[-1]
    print(f"{single.semantics.value}, tolerance {tolerance}: {step.status} {step.reason or ''}")
