"""Chapter 2: an ONNX graph, one pass at a time, and what each of them changed.

Models are `onnx_ir.Model` objects, so a pass of graphopt runs alone, in your own `onnx_ir.passes.Sequential`, or in
a recipe. `graphopt.diff` shows the change as hunks; what a pass declined stands in its remarks.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

import graphopt
from graphopt.passes import Context, FoldBatchnorm, MergeBranches

text = """
<ir_version: 10, opset_import: ["": 21]>
block (float[n,8,16,16] x, float[8,8,3,3] w3, float[8,8,1,1] w1, float[8] gamma, float[8] beta, float[8] mean,
       float[8] variance) => (float[n,8,16,16] y) {
  wide = Conv <pads = [1, 1, 1, 1]> (x, w3)
  normal = BatchNormalization (wide, gamma, beta, mean, variance)
  narrow = Conv (x, w1)
  both = Add (normal, narrow)
  sum = Add (both, x)
  y = Relu (sum)
}
"""
model = ir.from_onnx_text(text)
generator = np.random.default_rng(0)
for value in list(model.graph.inputs)[1:]:  # what is not an input becomes a weight
    shape = tuple(int(size) for size in value.shape)
    value.const_value = ir.tensor((generator.random(shape) + 0.5).astype(np.float32), name=value.name)
    model.graph.inputs.remove(value)
    model.graph.register_initializer(value)

original, context = model.clone(), Context()
for single in (FoldBatchnorm(), MergeBranches()):
    before = model.clone()
    single.run(model, context)
    print(f"--- {single}")
    print(graphopt.diff(before, model))
for remark in context.remarks:
    print(remark)

feeds = {"x": generator.standard_normal((2, 8, 16, 16)).astype(np.float32)}
print(graphopt.compare(original, model, [feeds]))
