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
    *_keeping("Abs", "Neg", "Sign", "Ceil", "Floor", "Round", "Sqrt", "Identity", torch="elementwise"),
    *unary("Cast", channels=channels.cast, torch="casts"),
    *_keeping("Sin", "Tan", "Asin", "Atan", "Sinh", "Asinh", "Atanh", torch="elementwise"),
    *_activation("Relu", "LeakyRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "Softsign", torch="activations"),
    *unary("Shrink", channels=channels.shrink, torch="activations"),
    *_activation("HardSwish", "Swish", "Mish", "Gelu", "Erf", "Tanh", torch="activations"),
    *unary(
        "Softplus",
        "Sigmoid",
        "HardSigmoid",
        channels=partial(channels.activation, zero=False),
        torch="activations",
    ),
    *_moving("BitCast", torch="casts"),
    *_moving("Exp", "Cos", "Acos", "Cosh", "IsInf", "IsNaN", "Not", "BitwiseNot", torch="elementwise"),
    *unary("Reciprocal", "Log", "Acosh", channels=channels.singular, torch="elementwise"),
    *unary("Clip", channels=channels.clip, torch="elementwise"),
    # The second input of CastLike gives a type only.
    *unary("CastLike", structural=(1,), channels=channels.cast_like, torch="casts"),
    *unary("Dropout", structural=(1, 2), channels=channels.dropout, torch="randomness"),
    *_moving("RandomNormalLike", "RandomUniformLike", "Bernoulli", torch="randomness"),
    *unary("Multinomial", frozen="it draws positions by the values of all of them", torch="randomness"),
    *unary("RandomNormal", "RandomUniform", channels=positions, torch="randomness"),
    *broadcasting("Add", "Sub", "Sum", "Mean", "Max", "Min", torch="elementwise"),
    *_of_any("Mul", "And", "BitwiseAnd", torch="elementwise"),
    *_of_any("SwiGLU", torch="activations"),
    *broadcasting("Div", "Mod", channels=channels.divide, torch="elementwise"),
    *broadcasting("Pow", channels=channels.power, torch="elementwise"),
    *broadcasting("Where", channels=channels.where, torch="elementwise"),
    *_of_first("PRelu", torch="activations"),
    *_of_first("BitShift", torch="elementwise"),
    *_of_none("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", torch="elementwise"),
    *broadcasting("Or", "Xor", "BitwiseOr", "BitwiseXor", torch="elementwise"),
    *_activation("Gelu", "QuickGelu", "ScaledSiLU", domain=MICROSOFT, torch="activations"),
    *unary("BiasAdd", domain=MICROSOFT, channels=channels.broadcast, torch="elementwise"),
    *unary("FastGelu", domain=MICROSOFT, channels=channels.broadcast, torch="activations"),
    *broadcasting("BiasGelu", domain=MICROSOFT, torch="activations"),
    *unary("ComplexMul", "ComplexMulConj", domain=MICROSOFT, shape=broadcast_shape),
    *unary("BiasSplitGelu", domain=MICROSOFT, shape=halved_shape),
    *unary("BiasDropout", domain=MICROSOFT, structural=(3, 4), shape=same_shape),
)
