"""Lift an ONNX graph into torch and lower it back (design.md D7, ADR 0008). Torch is imported when this is called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.errors import LiftError
from graphopt.ir.channel_analysis import check_canonical
from graphopt.ir.ops import default_table
from graphopt.ir.ops.row import OpTable

if TYPE_CHECKING:
    from graphopt.ir.lifted import LiftedModule


def lift(model: ir.Model, *, table: OpTable | None = None, trainable: Iterable[str] = ()) -> LiftedModule:
    """The graph as a trainable `torch.fx.GraphModule`, exact to the semantics of ONNX.

    One call a node, through the `torch` column of the op table (docs/ops.md). Weights are copied; they keep their
    names in `state_dict`, except for what Python or torch cannot have in one (`interface.initializers` maps them).
    Floats are parameters, but for the statistics of BatchNormalization, scales and zero points of quantizers, operands
    that say how (`structural` in docs/ops.md), exponents, single numbers in elementwise arithmetic, and masks (whatever
    holds infinity or NaN): those and integers are buffers. For a traced module, its own buffers are buffers too. In
    training mode BatchNormalization normalises by the batch and updates its statistics, as `torch.nn.BatchNorm2d`.
    Sizes are computed on the host and may be dynamic. `module.to(torch.bfloat16)` computes in bfloat16.

    Args:
        model: canonical, from `graphopt.load` or `graphopt.trace` (or what a pass made of it). It is not changed.
        table: op rows; `default_table().with_rows([...])` adds custom operators.
        trainable: names of further float initializers that are to be parameters.

    Returns:
        A `graphopt.ir.lifted.LiftedModule` in evaluation mode: call it with tensors, or `run_feeds` with a dictionary.

    Raises:
        LiftError: an operator has no torch function; all of them are named.
        InvalidGraphError: the model is not canonical.

    Example:
        >>> import torch
        >>> from graphopt import load
        >>> model = load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) =>
        ...     (float[n,3] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}> { h = MatMul(x, w) y = Relu(h) }'''))
        >>> module = lift(model)
        >>> module(x=torch.tensor([[1.0, -1.0]])), list(module.state_dict())
        (tensor([[0., 0., 0.]], grad_fn=<ReluBackward0>), ['w'])
        >>> print(module.code.strip())
        def forward(self, x):
            w = self.w
            h = torch.matmul(x, w);  x = w = None
            y = torch.relu(h);  h = None
            return y
    """
    from graphopt.ir.lift_weights import build_module

    check_canonical(model, constants=True)
    wanted = frozenset(trainable)
    unknown = wanted - set(model.graph.initializers)
    if unknown:
        raise LiftError(f"no initializer {sorted(unknown)[0]!r}", help="`trainable` names initializers of the graph")
    return build_module(model, table or default_table(), wanted)


def lower(module: LiftedModule, model: ir.Model, *, table: OpTable | None = None) -> ir.Model:
    """The trained parameters, and what was inserted, written back into the graph that was lifted.

    Args:
        module: what `lift(model)` returned, trained, perhaps on another device or in another dtype.
        model: the graph that was lifted. It is not changed.
        table: the op rows that it was lifted with.

    Returns:
        A new model: the same names, the new weights, insertions folded to constants and ONNX operators.

    Raises:
        LiftError: the module is not a lifted one, its graph was edited or is that of another model, a parameter has
            another shape, or holds NaN or infinity that was not there before.

    Example:
        >>> import torch
        >>> from graphopt import load
        >>> model = load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y)
        ...     <float[1,1] w = {2}> { y = MatMul(x, w) }'''))
        >>> module = lift(model)
        >>> with torch.no_grad():
        ...     _ = module.w.mul_(3)
        >>> lower(module, model).graph.initializers["w"].const_value.numpy()
        array([[6.]], dtype=float32)
    """
    from graphopt.ir.lower import lower_module

    return lower_module(module, model, table or default_table())
