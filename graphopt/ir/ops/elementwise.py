"""Rows of the ops that work position by position: activations, arithmetic, comparison, casts, random fill."""

from __future__ import annotations

from graphopt.ir.ops.families import MICROSOFT, broadcasting, same_shape, unary
from graphopt.ir.ops.row import OpRow, Shape, Site


def halved_shape(site: Site) -> list[Shape]:
    """Input 0 with its last axis halved: one half gates the other."""
    shape = site.input_shape(0)
    return [(*shape[:-1], shape[-1] // 2)]


ROWS: tuple[OpRow, ...] = (
    *unary("Abs", "Neg", "Sign", "Ceil", "Floor", "Round", "Reciprocal", "Sqrt", "Exp", "Log", "Erf"),
    *unary("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Tanh", "Asinh", "Acosh", "Atanh"),
    *unary("Relu", "LeakyRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "Softplus", "Softsign", "Shrink"),
    *unary("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish", "Gelu", "Clip"),
    *unary("IsInf", "IsNaN", "Not", "BitwiseNot", "Identity", "Cast", "BitCast"),
    # The second input of CastLike gives a type only.
    *unary("CastLike", structural=(1,)),
    *unary("Dropout", structural=(1, 2)),
    *unary("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"),
    *unary("RandomNormal", "RandomUniform"),
    *broadcasting("Add", "Sub", "Mul", "Div", "Mod", "Pow", "PRelu", "SwiGLU"),
    *broadcasting("Sum", "Mean", "Max", "Min", "Where"),
    *broadcasting("And", "Or", "Xor", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
    *broadcasting("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *unary("Gelu", "FastGelu", "QuickGelu", "ScaledSiLU", "BiasAdd", domain=MICROSOFT),
    *broadcasting("BiasGelu", "ComplexMul", "ComplexMulConj", domain=MICROSOFT),
    *unary("BiasSplitGelu", domain=MICROSOFT, shape=halved_shape),
    *unary("BiasDropout", domain=MICROSOFT, structural=(3, 4), shape=same_shape),
)
