"""`torch.autograd.gradcheck` of every differentiable row, on the inputs of its node cases, in float64."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import onnx
import onnx.parser
import torch

from graphopt.errors import GraphoptError
from graphopt.ir.lift import lift
from graphopt.ir.lifted import as_tensor
from graphopt.ir.load import load
from graphopt.ir.ops import default_table
from tests.laws.torch_conformance import RANDOM, operators_of, raw_cases, unclaimed, why_skipped

FLAT = {
    **dict.fromkeys(("Ceil", "Floor", "Round", "Sign", "Hardmax", "EyeLike"), "its derivative is 0 where it has one"),
    **dict.fromkeys(
        ("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
        "it computes integers",
    ),
    **dict.fromkeys(
        ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsInf", "IsNaN"),
        "it computes truth values",
    ),
    **dict.fromkeys(("ArgMax", "ArgMin", "NonZero", "NonMaxSuppression"), "it computes positions"),
    **dict.fromkeys(("Shape", "Size", "Range", "OneHot", "ConstantOfShape", "Constant"), "it reads no real values"),
    **dict.fromkeys(
        ("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BitCast"), "it works on bits"
    ),
    **dict.fromkeys(
        ("BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix"), "its operands are sizes, not signals"
    ),
    **dict.fromkeys(
        ("SequenceConstruct", "SequenceEmpty", "SequenceAt", "SequenceInsert", "SequenceErase", "SequenceLength",
         "ConcatFromSequence", "SplitToSequence", "SequenceMap", "Optional", "OptionalGetElement",
         "OptionalHasElement"),
        "its operands are lists, which gradcheck does not take; the tensors in them pass unchanged",
    ),
    **dict.fromkeys(RANDOM, "it draws at random"),
    "SimplifiedLayerNormalization": "no node case and no schema; it is RMSNormalization, which has both",
    "MaxRoiPool": "no differentiable input but the image, see the node cases of RoiAlign",
}  # fmt: skip
"""Operators with a torch function that no gradient passes, and why."""
STILL = {"NegativeLogLikelihoodLoss": (2,), "SoftmaxCrossEntropyLoss": (2,), "BatchNormalization": (3, 4)}
"""Inputs that torch's kernels have no gradient for: weights of classes, running statistics."""
WITHOUT_CASES = {
    "GlobalLpPool": "(float[1,2,3,3] x) => (float[1,2,1,1] y) { y = GlobalLpPool(x) }",
    "Mish": "(float[2,3] x) => (float[2,3] y) { y = Mish(x) }",
    "Trilu": "(float[3,3] x) => (float[3,3] y) { y = Trilu(x) }",
    "If": """(bool c, float[2] x) => (float[2] y) {
        y = If(c) <then_branch = a () => (float[2] t) { t = Exp(x) },
                   else_branch = b () => (float[2] e) { e = Sin(x) }> }""",
}
"""Graphs for operators whose node cases have no float input of their own."""
_MOST_ELEMENTS = 4000
_ENOUGH = 3
"""Cases of an operator after which the others are not tried."""


def gradients() -> tuple[Counter[str], dict[str, list[str]]]:
    """How many cases of each operator hold, and what failed."""
    held: Counter[str] = Counter()
    failed: dict[str, list[str]] = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, proto, data in raw_cases():
            operators = operators_of(proto)
            if len(operators) != 1 or operators[0] in FLAT or held[operators[0]] >= _ENOUGH or why_skipped(name, proto):
                continue
            try:
                found = check(proto, data[0][0])
            except GraphoptError:
                continue
            except Exception as error:
                failed[operators[0]].append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
                continue
            if found:
                held[operators[0]] += 1
        for operator, text in WITHOUT_CASES.items():
            proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
            generator = np.random.default_rng(1)
            feeds = {
                value.name: np.array(True)
                if value.name == "c"
                else generator.normal(size=[d.dim_value for d in value.type.tensor_type.shape.dim]).astype(np.float32)
                for value in proto.graph.input
            }
            held[operator] += check(proto, feeds)
    return held, failed


def check(proto: onnx.ModelProto, feeds: dict[str, Any]) -> bool:
    """Whether gradients were checked: False where no float leads to a float. Raises where they are wrong."""
    model = load(proto)
    if unclaimed(model):
        raise GraphoptError("not claimed")
    module = lift(model).double()
    generator = np.random.default_rng(0)
    tensors = [_double(feeds.get(name), generator) for name in module.interface.inputs]
    if sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)) > _MOST_ELEMENTS:
        raise GraphoptError("too large")
    still = STILL.get(operators_of(proto)[0], ())
    moving = [i for i, tensor in enumerate(tensors) if _is_real(tensor) and tensor.numel() and i not in still]

    def function(*moved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = list(tensors)
        for index, tensor in zip(moving, moved, strict=True):
            given[index] = tensor
        outputs = module(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output for output in outputs if _is_real(output) and output.requires_grad)

    inputs = [tensors[index].requires_grad_() for index in moving]
    if not inputs or not function(*inputs):
        return False
    torch.autograd.gradcheck(function, inputs, fast_mode=True, eps=1e-6, atol=1e-4, rtol=1e-3)
    return True


def _is_real(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64


def _double(value: Any, generator: np.random.Generator) -> Any:
    """Floats as float64, moved a little off ties and kinks; everything else as it is."""
    if value is None or isinstance(value, list):
        return value
    tensor = as_tensor(value)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return tensor
    noise = torch.from_numpy(generator.uniform(0.5e-2, 1e-2, tuple(tensor.shape)))
    return torch.nan_to_num(tensor.double(), 0.5, 0.5, -0.5) + noise


def differentiable() -> set[str]:
    """Standard operators with a torch function that a gradient passes."""
    return {row.op_type for row in default_table() if row.domain == "" and row.torch is not None} - set(FLAT)
