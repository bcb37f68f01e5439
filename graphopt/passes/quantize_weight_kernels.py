"""What onnxruntime on this machine does with weights as integers: which it loads, computes right, and how exactly.

Measured on onnxruntime 1.31.1, an EPYC with AVX2 alone: the kernel of 2 bits at accuracy level 4 is wrong where the
number of outputs is no multiple of 4 (relative error above 1), those of 4 and 8 bits are right, with extreme values
too. Level 4, the default, rounds activations to 8 bits in blocks: relative error 0.005 of the product; levels 0 and 1
compute in float32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime

from graphopt.ir.check import declared_proto
from graphopt.ir.opset import lift_opset
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.session import session_options
from graphopt.passes.contract import Context
from graphopt.passes.quantize_blocks import Grid, block_scales
from graphopt.passes.quantize_plan import OperatorPlan, QuantizePlan
from graphopt.passes.quantize_weights_apply import apply_weights, storage_opset

ACCURACY_LEVELS = (0, 1, 4)
"""What the CPU kernels of MatMulNBits tell apart: 0 and 1 compute in float32, 4 rounds activations to int8."""
_INPUTS, _OUTPUTS = 1024, 64
_LANES = 16
"""Kernels work on so many outputs or fewer at a time; what is left over may take another path."""
_WRONG = 0.05
"""Relative error of a product beyond which its kernel is wrong."""


def is_right(storage: ir.DataType, block_size: int, dtype: ir.DataType, outputs: int) -> bool:
    """Whether onnxruntime loads a product with a weight in this storage and computes it. Tried once a process.

    Args:
        storage: type of the integers.
        block_size: 0 for one scale an output.
        dtype: element type of the weight as floats.
        outputs: of the product.

    Example:
        >>> is_right(ir.DataType.UINT4, 32, ir.DataType.FLOAT, 10)
        True
    """
    return _is_right(storage, block_size, dtype, _LANES + outputs % _LANES)


@cache
def _is_right(storage: ir.DataType, block_size: int, dtype: ir.DataType, outputs: int) -> bool:
    grid = Grid(storage.bitwidth, storage.name.startswith("INT"), block_size)
    try:
        model, weight = _product(storage, grid, dtype, 64, outputs)
        data = np.random.default_rng(0).standard_normal((5, 64)).astype(dtype.numpy())
        session = _session(model, ACCURACY_LEVELS[-1])
        found = [np.asarray(session.run(None, {"x": rows})[0]) for rows in (data, data[:1])]
    except Exception:  # onnxruntime raises several types for what it does not know
        return False
    expected = data.astype(np.float64) @ weight
    limit = _WRONG * float(np.linalg.norm(expected))
    return all(float(np.linalg.norm(rows - expected[: len(rows)])) < limit for rows in found)


@cache
def level_errors(storage: ir.DataType, block_size: int, bits: int) -> dict[int, float]:
    """Relative error of onnxruntime's product with a weight as integers against the same in float64, by accuracy level.

    Measured once a process on normal numbers, 1,024 inputs.

    Example:
        >>> found = level_errors(ir.DataType.UINT4, 32, 4)
        >>> bool(found[0] < 1e-6 < found[4] < 0.02)
        True
    """
    grid = Grid(bits, storage.name.startswith("INT"), block_size)
    model, weight = _product(storage, grid, ir.DataType.FLOAT, _INPUTS, _OUTPUTS)
    data = np.random.default_rng(0).standard_normal((16, _INPUTS)).astype(np.float32)
    expected = data.astype(np.float64) @ weight
    found: dict[int, float] = {}
    for level in ACCURACY_LEVELS:
        result = np.asarray(_session(model, level).run(None, {"x": data})[0])
        found[level] = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
    return found


def can_be_lifted(model: ir.Model, opset: int) -> bool:
    """Whether the converters carry a model to an opset that onnxruntime then has all its kernels for.

    Its weights are not read: they are declared as inputs.
    """
    trial = model.clone()
    if lift_opset(trial, opset) < opset:
        return False
    try:
        onnxruntime.InferenceSession(
            declared_proto(trial).SerializeToString(),
            session_options(threads=1, optimized=False),
            providers=["CPUExecutionProvider"],
        )
    except Exception:  # onnxruntime raises several types
        return False
    return True


def _product(
    storage: ir.DataType, grid: Grid, dtype: ir.DataType, inputs: int, outputs: int
) -> tuple[ir.Model, np.ndarray]:
    """One MatMul with a random weight as integers, and the weight that they stand for, float64."""
    element = "float16" if dtype == ir.DataType.FLOAT16 else "float"
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["": {storage_opset(storage, grid.block_size)}]>
        product ({element}[n, {inputs}] x, {element}[{inputs}, {outputs}] w) => ({element}[n, {outputs}] y)
        {{ y = MatMul (x, w) }}"""
    )
    value = model.graph.inputs.pop(1)
    weight = np.random.default_rng(1).standard_normal((inputs, outputs)).astype(dtype.numpy())
    value.const_value = ir.Tensor(weight, name="w")
    model.graph.register_initializer(value)
    model.graph[0].name = "product"
    axis = 0 if grid.block_size else 1
    tensor = TensorPlan("w", "weight", grid.bits, grid.signed, axis, (), (), "weights", grid.block_size)
    stored = replace(tensor, storage=storage.name.lower())
    plan = QuantizePlan((stored,), (OperatorPlan("product", "MatMul", "weights"),))
    apply_weights(model, plan, Context())
    return model, block_scales(weight, grid, weight.dtype).matrix().astype(np.float64)


def _session(model: ir.Model, level: int) -> onnxruntime.InferenceSession:
    settings = session_options(threads=1)
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
