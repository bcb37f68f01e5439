"""Which operators can compute in half precision: onnxruntime is asked, its schemas for types, its kernels for speed.

onnxruntime runs a float16 node without a kernel all the same: it puts Casts around it when it loads the model. So a
model in float16 loads everywhere, and only where kernels exist is it fast. A bfloat16 node without one does not load.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx_ir as ir
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_state  # pyright: ignore[reportAttributeAccessIssue]

from graphopt.ir.session import PROVIDERS

TYPE_NAMES = {ir.DataType.FLOAT: "tensor(float)", ir.DataType.FLOAT16: "tensor(float16)",
              ir.DataType.BFLOAT16: "tensor(bfloat16)"}  # fmt: skip
"""Names of floating-point tensors in onnxruntime's schemas."""
DTYPE_ATTRIBUTES = {"Cast": "to", "RandomNormal": "dtype", "RandomUniform": "dtype", "RandomNormalLike": "dtype",
                    "RandomUniformLike": "dtype", "EyeLike": "dtype", "Bernoulli": "dtype"}  # fmt: skip
"""Operators whose attribute says what type their result has."""
_TYPED_BY_ATTRIBUTE = {*DTYPE_ATTRIBUTES, "ConstantOfShape"}
_ALWAYS_RUN = {"Cast", "ConstantOfShape"}


@dataclass(frozen=True)
class Ports:
    """The operands of one node that change their type when it computes in half precision.

    Attributes:
        inputs: their indices.
        outputs: indices of the results.
    """

    inputs: frozenset[int]
    outputs: frozenset[int]


@dataclass(frozen=True)
class _Kernel:
    first: int
    last: int
    types: Mapping[str, frozenset[str]]


def half_ports(
    node: ir.Node, opsets: Mapping[str, int], half: ir.DataType, target: str, *, any_provider: bool = False
) -> Ports | str | None:
    """Which operands of a node become half when it computes in half precision.

    Args:
        node: of a graph whose types are known.
        opsets: of the model, by domain.
        half: FLOAT16 or BFLOAT16.
        target: "cpu" or "cuda", whose provider needs a kernel.
        any_provider: whether it is enough that the operator is defined for the type.

    Returns:
        The operands, why there is no way, or None for a node that touches no float32 at all.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
        >>> half_ports(model.graph[0], {"": 21}, ir.DataType.FLOAT16, "cuda", any_provider=True)
        Ports(inputs=frozenset({0}), outputs=frozenset({0}))
    """
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if not any(value.dtype == ir.DataType.FLOAT for value in values):
        return "the type of what it computes is not known" if any(value.dtype is None for value in values) else None
    if any(value.type is not None and not isinstance(value.type, ir.TensorType) for value in values):
        return "it works on sequences or optional values"
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return "it has subgraphs, in which values are not observed"
    domain = "" if node.domain == "ai.onnx" else node.domain
    schema = _schema(domain, node.op_type, opsets.get(domain, 1))
    if schema is None:
        return "onnxruntime does not know the operator"
    bound = _bind(node, schema)
    if isinstance(bound, str):
        return bound
    wanted = TYPE_NAMES[half]
    changed = {
        name for name, kinds in bound.types.items() if kinds == {ir.DataType.FLOAT} and wanted in bound.allowed[name]
    }
    inputs = frozenset(index for index, name in bound.inputs.items() if name in changed)
    outputs = frozenset(
        index
        for index, name in bound.outputs.items()
        if name in changed and node.outputs[index].dtype == ir.DataType.FLOAT
    )
    if not inputs and not outputs:
        return f"its definition does not allow {half.name.lower()}"
    if any_provider or target not in PROVIDERS or not has_kernels(target):
        if not inputs and node.op_type not in _ALWAYS_RUN:
            return "no kernel is known for it, and onnxruntime puts Casts only around what reads the type"
        return Ports(inputs, outputs)
    types = {
        name: {wanted}
        if name in changed
        else {TYPE_NAMES[kind] for kind in kinds if kind is not None and kind in TYPE_NAMES}
        for name, kinds in bound.types.items()
    }
    kernels = _kernels(PROVIDERS[target]).get((domain, node.op_type), ())
    if any(_runs(kernel, schema.since_version, types) for kernel in kernels):
        return Ports(inputs, outputs)
    return f"{PROVIDERS[target]} has no {half.name.lower()} kernel for it"


@cache
def has_kernels(target: str) -> bool:
    """Whether this onnxruntime has the provider of a target, so that it can be asked for kernels."""
    return bool(_kernels(PROVIDERS[target]))


def _runs(kernel: _Kernel, since: int, types: Mapping[str, set[str]]) -> bool:
    fits = kernel.first <= since <= kernel.last
    return fits and all(types[name] <= allowed for name, allowed in kernel.types.items() if name in types)


@cache
def _kernels(provider: str) -> Mapping[tuple[str, str], Sequence[_Kernel]]:
    found: dict[tuple[str, str], list[_Kernel]] = defaultdict(list)
    for kernel in onnxruntime_state.get_all_opkernel_def():
        if kernel.provider == provider:
            types = {name: frozenset(allowed) for name, allowed in kernel.type_constraints.items()}
            first, last = kernel.version_range
            found[kernel.domain, kernel.op_name].append(_Kernel(first, last, types))
    return found


@cache
def _schemas() -> Mapping[tuple[str, str], Sequence[Any]]:
    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for schema in onnxruntime_state.get_all_operator_schema():
        found[schema.domain, schema.name].append(schema)
    return found


def _schema(domain: str, op_type: str, opset: int) -> Any | None:
    fitting = [schema for schema in _schemas().get((domain, op_type), ()) if schema.since_version <= opset]
    return max(fitting, key=lambda schema: schema.since_version, default=None)


@dataclass(frozen=True)
class _Binding:
    """Type parameters of a schema at a node: which operands have them, their types there, and the types allowed."""

    inputs: Mapping[int, str]
    outputs: Mapping[int, str]
    types: Mapping[str, set[ir.DataType | None]]
    allowed: Mapping[str, set[str]]


def _bind(node: ir.Node, schema: Any) -> _Binding | str:
    allowed = {entry.type_param_str: set(entry.allowed_type_strs) for entry in schema.type_constraints}
    types: dict[str, set[ir.DataType | None]] = defaultdict(set)
    sides: list[dict[int, str]] = []
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        names: dict[int, str] = {}
        for index, value in enumerate(values):
            if value is None:
                continue
            if not formals:
                return "it has more operands than its definition"
            formal = formals[min(index, len(formals) - 1)]
            if index >= len(formals) - 1 and len(values) > len(formals) and not formal.isHomogeneous:
                return "its operands may have different types"
            if formal.typeStr in allowed:
                names[index] = formal.typeStr
        sides.append(names)
    inputs, outputs = sides
    for index, name in inputs.items():
        value = node.inputs[index]
        assert value is not None
        types[name].add(value.dtype)
    for index, name in list(outputs.items()):
        if name not in inputs.values() and node.op_type not in _TYPED_BY_ATTRIBUTE:
            del outputs[index]  # a type of its own, such as that of the statistics of LayerNormalization
        else:
            types[name].add(node.outputs[index].dtype)
    return _Binding(inputs, outputs, types, allowed)
