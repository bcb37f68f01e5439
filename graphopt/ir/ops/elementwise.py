"""Rows of the ops that work position by position: activations, arithmetic, comparison, casts, random fill."""

from __future__ import annotations

from functools import partial

from graphopt.ir.ops.channels import elementwise as channels
from graphopt.ir.ops.channels.layout import positions
from graphopt.ir.ops.families import MICROSOFT, broadcast, broadcasting, same_shape, unary
from graphopt.ir.ops.row import OpRow, Shape, Site


def broadcast_shape(site: Site) -> list[Shape]:
    """Broadcast of all inputs."""
    return [broadcast(site.input_shape(index) for index in range(len(site.inputs)))]


def halved_shape(site: Site) -> list[Shape]:
    """Input 0 with its last axis halved: one half gates the other."""
    shape = site.input_shape(0)
    return [(*shape[:-1], shape[-1] // 2)]


_keeping = partial(unary, channels=channels.keeps_zero)
_moving = partial(unary, channels=channels.moves_zero)
_activation = partial(unary, channels=channels.activation)
_of_any = partial(broadcasting, channels=partial(channels.broadcast, how="any"))
_of_none = partial(broadcasting, channels=partial(channels.broadcast, how="none"))
_of_first = partial(broadcasting, channels=partial(channels.broadcast, how="first"))

ROWS: tuple[OpRow, ...] = (
    *_keeping("Abs", "Neg", "Sign", "Ceil", "Floor", "Round", "Sqrt", "Identity"),
    *unary("Cast", channels=channels.cast),
    *_keeping("Sin", "Tan", "Asin", "Atan", "Sinh", "Asinh", "Atanh"),
    *_activation("Relu", "LeakyRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "Softsign"),
    *unary("Shrink", channels=channels.shrink),
    *_activation("HardSwish", "Swish", "Mish", "Gelu", "Erf", "Tanh"),
    *unary("Softplus", "Sigmoid", "HardSigmoid", channels=partial(channels.activation, zero=False)),
    *_moving("BitCast", "Exp", "Cos", "Acos", "Cosh", "IsInf", "IsNaN", "Not", "BitwiseNot"),
    *unary("Reciprocal", "Log", "Acosh", channels=channels.singular),
    *unary("Clip", channels=channels.clip),
    # The second input of CastLike gives a type only.
    *unary("CastLike", structural=(1,), channels=channels.cast_like),
    *unary("Dropout", structural=(1, 2), channels=channels.dropout),
    *_moving("RandomNormalLike", "RandomUniformLike", "Bernoulli"),
    *unary("Multinomial", frozen="it draws positions by the values of all of them"),
    *unary("RandomNormal", "RandomUniform", channels=positions),
    *broadcasting("Add", "Sub", "Sum", "Mean", "Max", "Min"),
    *_of_any("Mul", "And", "SwiGLU", "BitwiseAnd"),
    *broadcasting("Div", "Mod", channels=channels.divide),
    *broadcasting("Pow", channels=channels.power),
    *broadcasting("Where", channels=channels.where),
    *_of_first("PRelu", "BitShift"),
    *_of_none("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *broadcasting("Or", "Xor", "BitwiseOr", "BitwiseXor"),
    *_activation("Gelu", "QuickGelu", "ScaledSiLU", domain=MICROSOFT),
    *unary("BiasAdd", "FastGelu", domain=MICROSOFT, channels=channels.broadcast),
    *broadcasting("BiasGelu", domain=MICROSOFT),
    *unary("ComplexMul", "ComplexMulConj", domain=MICROSOFT, shape=broadcast_shape),
    *unary("BiasSplitGelu", domain=MICROSOFT, shape=halved_shape),
    *unary("BiasDropout", domain=MICROSOFT, structural=(3, 4), shape=same_shape),
)
