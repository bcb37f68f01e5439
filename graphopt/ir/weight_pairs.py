"""Which weight of one model is which weight of another: by name and content, reading no more of them than needed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.ir.text import dtype_text, shape_text, tensor_digest, type_text


@dataclass(frozen=True)
class WeightPair:
    """Two initializers of one name whose dtype, shape or content differ."""

    name: str
    before: ir.Value
    after: ir.Value


@dataclass
class Weights:
    """The initializers of both models by what they hold: equal content is one key, whatever the names."""

    key: dict[ir.Value, Hashable] = field(default_factory=dict)
    changed: list[WeightPair] = field(default_factory=list)
    removed: list[tuple[str, ir.Value]] = field(default_factory=list)
    added: list[tuple[str, ir.Value]] = field(default_factory=list)


def match_weights(a: dict[str, ir.Value], b: dict[str, ir.Value]) -> Weights:
    """Initializers that correspond: same name and content, else same content, else same name.

    A tensor object that both models share is never read, and only those tensors are hashed that have a rival of
    their dtype and shape without a partner.
    """
    weights = Weights()
    rest_a, rest_b = dict(a), dict(b)
    for name in [name for name in a if name in b and _same_content(a[name].const_value, b[name].const_value)]:
        weights.key[rest_a.pop(name)] = weights.key[rest_b.pop(name)] = ("weight", name)
    if rest_a or rest_b:
        forms = {_form(value) for rest in (rest_a, rest_b) for value in rest.values()}
        settled: dict[Hashable, Hashable] = {}
        for values in (a, b):
            for value in values.values():
                if value in weights.key and _form(value) in forms:
                    content = (_form(value), _digest(value))
                    weights.key[value] = settled.setdefault(content, weights.key[value])
        _match_content(rest_a, rest_b, settled, weights)
    for name in [name for name in rest_a if name in rest_b]:
        before, after = rest_a.pop(name), rest_b.pop(name)
        weights.key[before] = weights.key[after] = ("changed weight", name)
        weights.changed.append(WeightPair(name, before, after))
    for side, (rest, listed) in enumerate(((rest_a, weights.removed), (rest_b, weights.added))):
        for name, value in rest.items():
            weights.key.setdefault(value, ("own weight", side, name))
            listed.append((name, value))
    return weights


def _match_content(
    rest_a: dict[str, ir.Value], rest_b: dict[str, ir.Value], settled: dict[Hashable, Hashable], weights: Weights
) -> None:
    """Pair what is left by content; a copy of a settled weight gets its key and stays listed as added or removed."""
    unpaired: dict[Hashable, list[str]] = defaultdict(list)
    contents = {id(value): (_form(value), _digest(value)) for rest in (rest_a, rest_b) for value in rest.values()}
    for name, value in rest_a.items():
        unpaired[contents[id(value)]].append(name)
    keys: dict[Hashable, Hashable] = dict(settled)
    for name, value in list(rest_b.items()):
        content = contents[id(value)]
        if unpaired.get(content):
            partner = unpaired[content].pop(0)
            weights.key[value] = weights.key[rest_a.pop(partner)] = keys.setdefault(content, ("content", *content))
            del rest_b[name]
    for rest in (rest_a, rest_b):
        for value in rest.values():
            if contents[id(value)] in keys:
                weights.key[value] = keys[contents[id(value)]]


def _form(value: ir.Value) -> Hashable:
    tensor = value.const_value
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape.numpy()))


def _digest(value: ir.Value) -> str | None:
    return None if value.const_value is None else tensor_digest(value.const_value)


def _same_content(a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> bool:
    if a is b:
        return True
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = a.numpy(), b.numpy()
    if left.dtype == object or not (left.flags.c_contiguous and right.flags.c_contiguous):
        return tensor_digest(a) == tensor_digest(b)
    return bool(np.array_equal(left.reshape(-1).view(np.uint8), right.reshape(-1).view(np.uint8)))


def weight_type(value: ir.Value) -> str:
    """`f32[16,3,3,3]`."""
    tensor = value.const_value
    if tensor is None:
        return type_text(value)
    return dtype_text(tensor.dtype) + shape_text([int(dim) for dim in tensor.shape.numpy()])


def weight_change(pair: WeightPair) -> str:
    """`f32[16] -> f32[8]`, or where only the content differs, by how much: max|a-b| / max|a|."""
    before, after = weight_type(pair.before), weight_type(pair.after)
    if before != after:
        return f"{before} -> {after}"
    a, b = pair.before.const_value, pair.after.const_value
    if a is None or b is None or not (a.dtype.is_floating_point() or a.dtype.is_integer()) or a.size == 0:
        return f"{before}, other content"
    x, y = np.asarray(a.numpy(), np.float64), np.asarray(b.numpy(), np.float64)
    with np.errstate(all="ignore"):
        scale, distance = float(np.abs(x).max()), float(np.abs(x - y).max())
    relative = distance / scale if scale else math.inf
    return (
        f"{before}, content differs by {relative:.2g} of its largest"
        if math.isfinite(relative)
        else f"{before}, other content"
    )
