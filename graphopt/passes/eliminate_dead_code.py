"""Pass eliminate-dead-code: what no output depends on goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove nodes, optional outputs, initializers and functions that no graph output depends on.

    A node is live when a live node or a graph output reads one of its results; ONNX nodes have no effect
    besides their results. Graph inputs are interface and stay where nothing reads them (a remark says so).

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[4] w_unread) => (float[N,4] y) {
          y = Relu (x)
          twice = Add (x, w_unread)
          dead = Neg (twice)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x) => (float[N,4] y) {
          y = Relu (x)
        }
    """

    name: ClassVar[str] = "eliminate-dead-code"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Remove what is dead, subgraphs included."""
        RemoveUnusedNodesPass()(model)
        RemoveUnusedFunctionsPass()(model)
        for graph in model.graphs():
            for initializer in tuple(graph.initializers.values()):
                read = initializer.uses() or initializer.is_graph_output() or initializer.is_graph_input()
                if not read and initializer.name:
                    del graph.initializers[initializer.name]
        for value in model.graph.inputs:
            if not value.uses() and not value.is_graph_output():
                context.missed("eliminate input", "it is part of the interface, though nothing reads it", value)
