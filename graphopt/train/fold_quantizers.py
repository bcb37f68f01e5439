"""Quantizers as ONNX operators: what `FakeQuant` folds to."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.errors import LiftError
from graphopt.ir.lower import Folding, Link
from graphopt.ir.quantizer import TensorPlan

_INT32_LIMIT = 2**31 - 1


def fold_weight(folding: Folding, name: str, plan: TensorPlan) -> None:
    """An initializer becomes integers and a DequantizeLinear."""
    array = folding.constant(name)
    kind = ir.DataType.from_numpy(array.dtype)
    integers = folding.add_constant(f"{name}_quantized", plan.quantize(np.asarray(array, np.float32)))
    operands = _parameters(folding, name, plan, array.dtype)
    attributes = {} if plan.axis is None else {"axis": plan.axis}
    folding.insert_after(name, [Link("DequantizeLinear", operands, attributes, kind)], source=integers)


def fold_activation(folding: Folding, name: str, plan: TensorPlan) -> None:
    """Behind a value come [Clip], QuantizeLinear and DequantizeLinear."""
    kind = folding.element_type(name)
    operands = _parameters(folding, name, plan, kind.numpy())
    attributes = {} if plan.axis is None else {"axis": plan.axis}
    stored = np.iinfo(plan.dtype)
    chain: list[Link] = []
    if plan.limits != (stored.min, stored.max):
        low, high = (bound.astype(kind.numpy()) for bound in plan.range())
        chain += _clamp(folding, name, plan, low, high)
    chain.append(Link("QuantizeLinear", operands, attributes, ir.DataType.from_numpy(plan.dtype)))
    chain.append(Link("DequantizeLinear", operands, attributes, kind))
    folding.insert_after(name, chain)


def fold_bias(folding: Folding, name: str, scale: np.ndarray) -> None:
    """A bias [channels] becomes int32 in units of `scale` ([1] or [channels]) and a DequantizeLinear.

    Where operators stand behind it already, what they compute is rounded to these units.
    """
    kind = folding.element_type(name)
    units = folding.add_constant(f"{name}_scale", scale.astype(kind.numpy()).reshape((-1,) if scale.size > 1 else ()))
    if not folding.is_constant(name):
        folding.insert_after(name, [Link("Div", [units]), Link("Round"), Link("Mul", [units])])
        return
    whole = np.rint(folding.constant(name).astype(np.float32) / scale.astype(np.float32)).astype(np.float64)
    integers = np.clip(whole, -_INT32_LIMIT, _INT32_LIMIT).astype(np.int32)
    stored = folding.add_constant(f"{name}_quantized", integers)
    attributes = {"axis": 0} if scale.size > 1 else {}
    folding.insert_after(name, [Link("DequantizeLinear", [units], attributes, kind)], source=stored)


def _clamp(folding: Folding, name: str, plan: TensorPlan, low: np.ndarray, high: np.ndarray) -> list[Link]:
    """Operators that keep a value in the range of a quantizer, one scale or one a channel."""
    if plan.axis is None:
        shape: tuple[int, ...] = ()
    else:
        known = folding.value(name).shape
        if known is None:
            raise LiftError(
                "the rank of a value with a scale a channel is unknown", where=name, help="give it one scale"
            )
        shape = tuple(-1 if axis == plan.axis % len(known) else 1 for axis in range(len(known)))
    lowest = folding.add_constant(f"{name}_low", low.reshape(shape))
    highest = folding.add_constant(f"{name}_high", high.reshape(shape))
    if plan.axis is None:
        return [Link("Clip", [lowest, highest])]
    return [Link("Max", [lowest]), Link("Min", [highest])]


def _parameters(folding: Folding, name: str, plan: TensorPlan, dtype: np.dtype[Any]) -> list[ir.Value]:
    smallest = float(ml_dtypes.finfo(dtype).tiny)  # a scale of 0 would make its channel 0
    scale = np.maximum(np.asarray(plan.scale), smallest).astype(dtype)
    zero = np.asarray(plan.zero_point, plan.dtype)
    shape = () if plan.axis is None else (-1,)
    return [
        folding.add_constant(f"{name}_scale", scale.reshape(shape)),
        folding.add_constant(f"{name}_zero_point", zero.reshape(shape)),
    ]
