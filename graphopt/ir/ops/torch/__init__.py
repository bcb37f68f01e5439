"""The `torch` column of the op table: one function an operator, exact to the semantics of ONNX and differentiable.

A file here has the functions of the family file of the same name in `graphopt/ir/ops`; `row.TorchRule` says what a
function is given and returns. These are the only files of the op table that import torch when they are loaded, and
nothing loads them before a model is lifted.
"""
