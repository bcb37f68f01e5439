"""Damaged files: whatever bytes or fields are changed, `load` reads the model or raises a GraphoptError, and soon."""

from __future__ import annotations

import random
import time
from typing import Any

import onnx
import onnx.parser
import pytest

import graphopt
from graphopt.errors import GraphoptError

MODELS = (
    """<ir_version: 8, opset_import: ["": 13]> g (float[n,3,8,8] x) => (float[n,4] y)
    <float[4,3,1,1] w = {1,2,3,4,5,6,7,8,9,10,11,12}, int64[2] axes = {2,3}> {
      c = Conv (x, w)  r = Relu (c)  m = ReduceMean <axes = [2, 3], keepdims = 0> (r)  y = Softmax (m) }""",
    """<ir_version: 8, opset_import: ["": 17]> g (float[2,3] x, bool c) => (float[2,3] y)
    <float[3] w = {1,2,3}> {
      y = If (c) <then_branch = a () => (float[2,3] t) { t = Add (x, w) },
                  else_branch = b () => (float[2,3] e) { e = Mul (x, w) }> }""",
    """<ir_version: 8, opset_import: ["": 17, "own": 1]> g (float[2,3] x) => (float[2,3] y)
    { h = own.f <alpha = 0.5> (x)  y = own.f <alpha = 0.1> (h) }
    <domain: "own", opset_import: ["": 17]> f <alpha> (a) => (b)
    { k = LeakyRelu <alpha: float = @alpha> (a) b = Neg (k) }""",
)
NAMES = ("", "x", "y", "w", "Relu", "If", "axis", "own", "zz")
SECONDS = 5.0


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 4])):
        place, kind = generator.randrange(len(result)), generator.randrange(4)
        if kind == 0:
            result[place] = generator.choice([0, 1, 127, 128, 255, generator.randrange(256)])
        elif kind == 1:
            del result[place : place + generator.randrange(1, 8)]
        elif kind == 2:
            result[place:place] = bytes(generator.randrange(256) for _ in range(4))
        else:
            result = result[: max(place, 1)]
        result = result or bytearray(b"\0")
    return bytes(result)


def mutate_fields(data: bytes, generator: random.Random) -> bytes:
    """Change, drop or repeat fields of the parsed message: reaches behind the parser, unlike random bytes."""
    proto = onnx.ModelProto.FromString(data)
    for _ in range(generator.choice([1, 2, 3])):
        message, name, value, field = generator.choice(fields(proto))
        if field.is_repeated:
            place = generator.randrange(len(value))
            if generator.random() < 0.5 or field.type != field.TYPE_MESSAGE:
                del value[place]
            else:
                value.add().CopyFrom(value[place])
        elif generator.random() < 0.3 or field.type == field.TYPE_MESSAGE:
            message.ClearField(name)
        elif isinstance(value, str):
            setattr(message, name, generator.choice(NAMES))
        elif isinstance(value, bytes):
            setattr(message, name, generator.choice([b"", value[:-1], value + b"x", b"\xff" * len(value)]))
        elif field.type != field.TYPE_ENUM:
            setattr(message, name, generator.choice([0, 1, 2, 3, 5, 8, 17, 2**31 - 1]))
    return proto.SerializeToString()


def fields(message: Any) -> list[tuple[Any, str, Any, Any]]:
    """Every field that is set, of the message and of those within: its message, name, value and descriptor."""
    found: list[tuple[Any, str, Any, Any]] = []
    for field, value in message.ListFields():
        found.append((message, field.name, value, field))
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                found += fields(inner)
    return found


@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_fields])
@pytest.mark.parametrize("model", range(len(MODELS)))
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_only_graphopt_errors_come_out(mutate: Any, model: int, count: int) -> None:
    data = onnx.parser.parse_model(MODELS[model]).SerializeToString()
    graphopt.load(data)
    read = 0
    for seed in range(count):
        changed = mutate(data, random.Random(seed))
        start = time.monotonic()
        try:
            graphopt.load(changed)
            read += 1
        except GraphoptError:
            pass
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        assert time.monotonic() - start < SECONDS, f"seed {seed} took too long"
    assert 0 < read < count  # else the mutations are too harsh or too mild to test anything
