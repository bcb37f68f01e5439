"""Configurations of the operators that work position by position, most of them generated from their schemas."""

from __future__ import annotations

from typing import Any

import onnx
import onnx.defs

from tests.laws.channel_cases import (
    Case,
    Cases,
    Operand,
    case,
    const,
    data,
    fed,
    flags,
    moved,
    numbers,
    positive,
    rows,
    weight,
)

NEWEST = 26
"""The newest opset of onnxruntime."""
_BOOL, _UINT8, _INT64, _DOUBLE, _UINT64 = 9, 2, 7, 11, 13
_RANDOM = "its numbers are drawn anew"

_BOUNDED = {"Asin", "Acos", "Atanh", "Sqrt", "Log", "Reciprocal"}
"""Ops that are fed with numbers between 0 and 1."""
_UNARY = {
    "Abs": "", "Neg": "", "Sign": "", "Ceil": "", "Floor": "", "Round": "", "Sqrt": "", "Erf": "", "Sin": "",
    "Tan": "", "Asin": "", "Atan": "", "Sinh": "", "Tanh": "", "Asinh": "", "Atanh": "", "Relu": "",
    "LeakyRelu": "alpha=0.3", "ThresholdedRelu": "alpha=0.5", "Elu": "alpha=2.0", "Celu": "alpha=0.5", "Selu": "",
    "Softsign": "", "Shrink": "lambd=0.4, bias=0.2", "HardSwish": "", "Swish": "alpha=1.5", "Mish": "",
    "Gelu": 'approximate="tanh"', "Cast": "to=11", "Exp": "", "Cos": "", "Acos": "", "Cosh": "", "Softplus": "",
    "Sigmoid": "", "HardSigmoid": "alpha=0.3, beta=0.4", "IsInf": "detect_negative=0", "IsNaN": "",
    "Reciprocal": "", "Log": "",
}  # fmt: skip
_NOT_EXACT = {"Reciprocal", "Log", "Acosh"}
"""Ops that masking breaks, as 0 becomes infinity or NaN: initializers are spared, channels of data are inexact."""


def schema_version(operator: str, newest: int = NEWEST) -> int:
    """The opset in which the newest form of an operator appeared."""
    return int(onnx.defs.get_schema(operator, newest, "").since_version)


def _unary(operator: str, attributes: str) -> list[Case]:
    """Read by weights at the newest version, with squares (0 must stay 0), after a weight alone, at a run-time size."""
    text = f"y = {operator}<{attributes}>(a)" if attributes else f"y = {operator}(a)"
    newest = max(21, schema_version(operator))
    bounds: Any = {"low": 0.3, "high": 0.6, "signed": False} if operator in _BOUNDED else {}
    groups = 0 if operator in _NOT_EXACT else 1
    return [
        case(text, a=data(2, 5, 3, **bounds), opset=newest, passes=(0, 1, 2), groups=groups),
        case(text, a=data(5, 3, **bounds), opset=newest, reads="square", groups=0),
        case(text, a=rows(4, 3, **bounds), opset=newest, passes=(1, 2), groups=groups),
    ]


ELEMENTWISE: Cases = {operator: _unary(operator, attributes) for operator, attributes in _UNARY.items()}
ELEMENTWISE["Shrink"].append(case("y = Shrink<lambd=-1.0, bias=0.5>(a)", a=data(5, 3), reads="square", groups=0))
ELEMENTWISE["Gelu"].append(case("y = Gelu(a)", a=data(5, 3), reads="square"))
ELEMENTWISE["Log"].append(case("b = Add(a, one)", "y = Log(b)", a=positive(5, 3), one=const([1.0]), passes=(0, 1)))
ELEMENTWISE["Reciprocal"].append(case("y = Reciprocal(b)", a=data(2), b=moved(5, 3), passes=(0, 1)))
ELEMENTWISE["Reciprocal"].append(
    case("r = Reciprocal(w)", "y = Mul(r, a)", a=data(5, 3), w=weight(3), passes=(0, 1), groups=2)
)
ELEMENTWISE["Cast"] += [
    case(f"y = Cast<to={kind}>(a)", a=data(5, 3, low=1, high=9), reads=reads, passes=(0, 1))
    for kind in (_BOOL, _INT64, 6, 10)
    for reads in ("weights", "square")
]
ELEMENTWISE |= {
    "Acosh": [
        case("y = Acosh(a)", a=data(5, 3, low=1.1, high=2, signed=False), groups=0, passes=(0, 1)),
        case("b = Add(a, a)", "y = Acosh(b)", a=moved(5, 3).then("Exp"), passes=(0, 1)),
    ],
    "Constant": [case("w = Constant<value = float[3] {1.0, 2.0, 3.0}>()", "y = Mul(a, w)", a=data(5, 3), groups=2)],
    "Identity": [case("y = Identity(a)", a=data(5, 3))],
    "BitCast": [
        case("y = BitCast<to=6>(a)", a=data(5, 3), opset=26, passes=(0, 1)),
        case("y = BitCast<to=6>(a)", a=data(5, 3), opset=26, reads="square", groups=0),
        case("y = BitCast<to=6>(a)", a=data(5, 3).then("Neg"), opset=26, reads="square", groups=0),
    ],
    "Not": [
        case("y = Not(a)", a=flags(5, 3), passes=(0, 1)),
        case("y = Not(a)", a=flags(5, 3), reads="square", groups=0),
    ],
    "BitwiseNot": [
        case("y = BitwiseNot(a)", a=numbers(5, 3), passes=(0, 1)),
        case("y = BitwiseNot(a)", a=numbers(5, 3), reads="square", groups=0),
    ],
    "Clip": [
        case("y = Clip(a, low, high)", a=data(5, 3), low=const(-0.5), high=const(0.5), reads="square"),
        case("y = Clip(a, low, high)", a=data(5, 3), low=const(0.2), high=const(0.9), passes=(0, 1)),
        case("y = Clip(a, low, high)", a=data(5, 3), low=const(0.2), high=const(0.9), reads="square", groups=0),
        case("y = Clip(a, , high)", a=data(5, 3), high=const(-0.2), reads="square", groups=0),
        case("y = Clip(a, , high)", a=rows(5, 3), high=const(0.4), reads="square"),
        case("y = Clip(a, low, high)", a=data(5, 3), low=fed(0.0), high=fed(0.4), groups=0, reads="square"),
        case("y = Clip(a)", a=data(5, 3), passes=(0, 1)),
        case("y = Clip(a, low, high)", a=data(5, 3), low=const(0.5), high=const(-0.5), reads="square", groups=0),
    ],
    "CastLike": [
        case("y = CastLike(a, like)", a=data(5, 3), like=const([1], "int64"), passes=(0, 1)),
        case("y = CastLike(a, b)", "z = Mul(y, y)", a=data(5, 3), b=numbers(5, 3), results=("z",), passes=(0, 1)),
    ],
    "Dropout": [
        case("y = Dropout(a)", a=data(5, 3), passes=None),
        case("y, m = Dropout(a, ratio)", a=data(5, 3), ratio=const(0.5), results=("y", "m")),
    ],
    "RandomNormalLike": [
        case("y = RandomNormalLike<mean=1.0, scale=1e-7>(a)", a=data(5, 3), passes=(0, 1)),
        case("y = RandomNormalLike<mean=1.0, scale=1e-7>(a)", a=data(5, 3), reads="square", groups=0),
    ],
    "RandomUniformLike": [case("y = RandomUniformLike<low=1.0, high=1.0>(a)", a=data(5, 3), passes=(0, 1))],
    "Bernoulli": [
        case("y = Bernoulli(p)", p=flags(5, 3).then("Cast<to=1>"), passes=(0, 1)),
        case("y = Bernoulli(p)", p=flags(5, 3).then("Cast<to=1>"), reads="square", groups=0),
    ],
    "RandomNormal": [
        case("r = RandomNormal<shape=[5, 3], mean=1.0, scale=1e-7>()", "y = Add(a, r)", a=data(5, 3), why=_RANDOM)
    ],
    "RandomUniform": [
        case("r = RandomUniform<shape=[5, 3], low=1.0, high=1.0>()", "y = Add(a, r)", a=data(5, 3), why=_RANDOM)
    ],
}


def _numeric(kind: str) -> Operand:
    return {"bool": flags(4, 3), "integer": numbers(4, 3), "float": data(4, 3)}[kind]


def _row(kind: str) -> Operand:
    return {"bool": flags(3), "integer": numbers(3), "float": data(3)}[kind]


def _column(kind: str) -> Operand:
    return {"bool": flags(4, 1), "integer": numbers(4, 1), "float": data(4, 1)}[kind]


def _kind(operator: str) -> str:
    """What the schema allows for the operands."""
    types = onnx.defs.get_schema(operator, NEWEST, "").inputs[0].types
    if "tensor(float)" in types:
        return "float"
    return "bool" if "tensor(bool)" in types else "integer"


def _binary(operator: str) -> list[Case]:
    """Equal shapes, broadcasting on either side, a run-time axis, a scalar; squares ask whether 0 stays 0."""
    kind, newest = _kind(operator), max(21, schema_version(operator))
    text = f"y = {operator}(a, b)"
    found = [
        case(text, a=_numeric(kind), b=_numeric(kind), opset=newest, passes=(0, 1), groups=2),
        case(text, a=_numeric(kind), b=_row(kind), opset=newest, passes=(0, 1), groups=2),
        case(text, a=_column(kind), b=_row(kind), opset=newest, passes=(0, 1), groups=2),
        case(text, a=_numeric(kind), b=_numeric(kind), opset=newest, reads="square", groups=0),
        case(text, a=_column(kind), b=_numeric(kind), opset=newest, reads="square", groups=0),
    ]
    if kind == "float":
        found += [
            case(text, a=rows(4, 3), b=weight(4, 1), opset=newest, passes=(1, 2), groups=2),
            case(text, a=data(4, 3), b=const(0.5), opset=newest, passes=(0, 1)),
            case(text, a=const(0.5), b=data(4, 3), opset=newest, reads="square", groups=0),
            case(text, a=data(4, 3), b=moved(4, 3), opset=newest, reads="square", groups=0),
            case(text, a=moved(4, 3), b=weight(2, 4, 3), opset=newest, reads="square", groups=0),
        ]
    return found


_BINARY = (
    "Add", "Sub", "Sum", "Mean", "Max", "Min", "Mul", "And", "BitwiseAnd", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Or", "Xor", "BitwiseOr", "BitwiseXor",
)  # fmt: skip
ELEMENTWISE |= {operator: _binary(operator) for operator in _BINARY}
ELEMENTWISE["PRelu"] = [
    case("y = PRelu(a, s)", a=data(2, 4, 3), s=weight(4, 1), passes=(0, 1, 2)),
    case("y = PRelu(a, s)", a=data(2, 4, 3), s=weight(4, 1), reads="square"),
    case("y = PRelu(a, s)", a=data(4, 3), s=const([0.25]), reads="square"),
    case("y = PRelu(a, s)", a=moved(4, 3), s=weight(4, 3), reads="square", groups=0),
    case("y = PRelu(a, s)", a=rows(4, 3), s=weight(1, 4, 3), passes=(1, 2)),
]
ELEMENTWISE["Sum"] += [
    case("y = Sum(a, b, c)", a=data(4, 3), b=data(2, 1, 3), c=data(1), passes=(0, 1, 2)),
    case("y = Sum(a, b, c)", a=data(4, 3), b=data(4, 3), c=data(1, 3), reads="square", groups=0),
    case("y = Sum(a)", a=data(4, 3), reads="square"),
]
ELEMENTWISE["Mean"].append(case("y = Mean(a, b, c)", a=data(4, 3), b=data(4, 3), c=data(4, 3), reads="square"))
ELEMENTWISE["Max"].append(case("y = Max(a, b)", a=data(4, 3), b=const(0.0), reads="square", groups=0))
ELEMENTWISE["Mul"] += [
    case("y = Mul(a, a)", a=data(4, 3), reads="square"),
    case("s = Sigmoid(a)", "y = Mul(a, s)", a=data(4, 3), reads="square"),
]
ELEMENTWISE["Add"] += [
    case("t = Transpose(a)", "y = Add(a, t)", a=data(4, 4), passes=(0, 1)),
    case("y = Add(a, x)", a=data(4, 3), x=fed([[1.0, 2.0, 3.0]]), passes=(0,)),
]
ELEMENTWISE["SwiGLU"] = [
    case("y = SwiGLU(a, b)", a=data(4, 3), b=data(4, 3), opset=28, reference=True, passes=(0, 1), groups=2),
    case("y = SwiGLU<alpha=1.5>(a, b)", a=data(4, 3), b=moved(4, 3), opset=28, reference=True, reads="square"),
    case("y = SwiGLU(a, b)", a=moved(4, 3), b=data(4, 3), opset=28, reference=True, reads="square"),
]
ELEMENTWISE |= {
    "BitShift": [
        case('y = BitShift<direction="LEFT">(a, b)', a=numbers(4, 3, to=_UINT64), b=numbers(3, to=_UINT64),
             passes=(0, 1)),
        case('y = BitShift<direction="RIGHT">(a, b)', a=numbers(4, 3, high=9, to=_UINT64), b=const([[1]], "uint64")),
        case('y = BitShift<direction="LEFT">(a, b)', a=const([[1, 2, 3]], "uint64"), b=numbers(4, 3, to=_UINT64)),
    ],
    "Mod": [
        case("y = Mod<fmod=1>(a, b)", a=data(4, 3), b=const([0.4]), passes=(0, 1)),
        case("y = Mod<fmod=1>(a, b)", a=data(4, 3), b=const([0.4]), reads="square", groups=0),
        case("y = Mod<fmod=1>(a, b)", a=data(4, 3), b=moved(4, 3), passes=(0, 1)),
        case("y = Mod<fmod=1>(a, b)", a=data(4, 3), b=weight(3), passes=(0, 1)),
        case("y = Mod<fmod=1>(a, b)", a=data(4, 3), b=data(4, 1), groups=0),
        case("y = Mod(a, b)", a=numbers(4, 3, high=9), b=const([3, 2, 4]), passes=(0, 1)),
    ],
    "Div": [
        case("y = Div(a, b)", a=data(4, 3), b=weight(3), passes=(0, 1), groups=2),
        case("y = Div(a, b)", a=data(4, 3), b=weight(3), reads="square"),
        case("y = Div(a, b)", a=data(4, 3), b=data(4, 3), passes=(0, 1), groups=0),
        case("y = Div(a, b)", a=data(4, 3), b=moved(4, 1), passes=(0, 1), groups=2),
        case("y = Div(a, b)", a=moved(4, 3), b=const(3.0), reads="square", groups=0),
        case("y = Div(a, b)", a=rows(4, 3), b=weight(4, 1), passes=(1, 2), groups=2),
        case("s = ReduceSum<keepdims=1>(a, axes)", "y = Div(a, s)", a=positive(2, 4, 3), axes=const([1]), groups=1),
        case("n = ReduceL2<keepdims=1>(v, axes)", "u = Div(v, n)", "y = MatMul(a, u)", a=data(2, 4), v=weight(4, 3),
             axes=const([0]), passes=(0, 1)),
        case("y = Div(a, b)", a=numbers(4, 3, high=9), b=const([[2], [3], [1], [2]]), passes=(0, 1)),
        case("y = Div(b, a)", "z = Mul(y, y)", a=moved(4, 3), b=weight(4, 3), results=("z",), reads="square"),
    ],
    "Pow": [
        case("y = Pow(a, e)", a=data(4, 3), e=const(2.0), reads="square"),
        case("y = Pow(a, e)", a=positive(4, 3), e=const([0.5, 1.5, 2.5]), passes=(0, 1)),
        case("y = Pow(a, e)", a=positive(4, 3), e=const([0.5, 1.5, 2.5]), reads="square", groups=0),
        case("y = Pow(a, e)", a=positive(4, 3), e=const([[0.5, 1.5, 2.5]] * 4), reads="square", groups=0),
        case("y = Pow(a, e)", a=positive(4, 3), e=const(-1.0), groups=0),
        case("y = Pow(a, e)", a=positive(4, 3), e=const(0.0), groups=0, reads="square"),
        case("y = Pow(a, e)", a=positive(4, 3), e=data(3), groups=0),
        case("y = Pow(b, e)", b=const(2.0), e=data(4, 3), passes=(0, 1)),
        case("y = Pow(b, e)", b=const(2.0), e=data(4, 3), reads="square", groups=0),
        case("y = Pow(a, e)", "z = Mul(y, b)", a=weight(3, low=1, high=2, signed=False), e=const(-2.0), b=data(4, 3),
             results=("z",), passes=(0, 1)),
        case("y = Pow(a, e)", a=positive(4, 3), e=const([2]), passes=(0, 1)),
    ],
    "Where": [
        case("y = Where(c, a, b)", c=flags(4, 3), a=data(4, 3), b=data(4, 3), passes=(0, 1)),
        case("y = Where(c, a, b)", c=const([[True], [False], [True], [False]]), a=data(4, 3), b=const(0.0),
             reads="square", groups=0),
        case("y = Where(c, a, b)", c=const([True, False, True]), a=data(4, 3), b=const(0.5), reads="square", groups=0),
        case("y = Where(c, a, b)", c=const([True, False, True]), a=data(4, 3), b=const(0.5), passes=(0, 1)),
        case("y = Where(c, a, b)", c=fed([True]), a=data(4, 3), b=data(4, 3), reads="square"),
        case("y = Where(c, a, b)", c=flags(4, 1), a=data(3), b=data(2, 1, 3), passes=(0, 1, 2)),
        case("y = Where(c, a, b)", c=flags(4, 3), a=moved(4, 3), b=data(4, 3), reads="square", groups=0),
        case("y = Where(c, a, b)", c=flags(4, 3), a=const(1.0), b=const(0.0), passes=(0, 1)),
        case("y = Where(c, a, b)", c=flags(4, 3), a=const(1.0), b=const(0.0), reads="square", groups=0),
        case("y = Where(c, a, b)", c=flags(4, 3), a=rows(4, 3), b=const(0.0), passes=(1, 2)),
    ],
}  # fmt: skip
ELEMENTWISE |= {
    f"com.microsoft::{operator}": [
        case(f"y = com.microsoft.{operator}(a{', b' if bias else ''})", a=data(4, 3), reads=reads, **bias)
        for bias in biases
        for reads in ("weights", "square")
    ]
    for operator, biases in (
        ("Gelu", [{}]),
        ("FastGelu", [{}, {"b": weight(3)}]),
        ("QuickGelu", [{}]),
        ("ScaledSiLU", [{}]),
        ("BiasGelu", [{"b": weight(3)}]),
    )
}
