"""What half precision cannot hold: weights and constants by their values, activations by what was observed.

float16 has 11 significant bits from 6.1e-5 to 65504, fewer down to 6e-8, and nothing outside; bfloat16 has 8 bits over
the range of float32 (IEEE 754-2019; bfloat16 as in ONNX 1.11).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.inputs.observe import Statistics
from graphopt.ir.rewrite import constant_tensor, is_op

LARGEST_LOSS = 0.01
"""Largest root-mean-square error of a weight in half precision, relative to the weight."""
HEADROOM = 2.0
"""How far the largest observed value must lie below the largest of the type: other inputs may go further."""
_CARRIES_MASKS = frozenset({
    "Add", "Sub", "Mul", "Where", "Min", "Max", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Cast",
    "Slice", "Concat", "Gather", "Identity", "Trilu", "Tile", "CastLike", "Clip", "Flatten", "Split", "ScatterND",
})  # fmt: skip
_READS_MASKS = frozenset({"Softmax", "Attention", "LogSoftmax"})
_BEFORE_EPSILON = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Pow", "Mul", "Sqrt", "Cast"})
_BEHIND_EPSILON = frozenset({"Sqrt", "Reciprocal", "Log", "Pow", "Max", "Cast"})
_MASK_STEPS = 64
_CHUNK = 2**20
"""Elements of a weight that are looked at together."""
_FEW = 16
"""Elements up to which each number of a constant matters, as that of an epsilon does."""


@dataclass(frozen=True)
class HalfType:
    """The numbers of a half-precision type.

    Attributes:
        dtype: FLOAT16 or BFLOAT16.
        largest: its largest finite number.
        smallest: its smallest positive number, subnormal.

    Example:
        >>> HalfType.of(ir.DataType.FLOAT16).largest
        65504.0
    """

    dtype: ir.DataType
    largest: float
    smallest: float

    @classmethod
    def of(cls, dtype: ir.DataType) -> HalfType:
        """The numbers of FLOAT16 or BFLOAT16."""
        numbers = ml_dtypes.finfo(dtype.numpy())
        return cls(dtype, float(numbers.max), float(numbers.smallest_subnormal))

    def cast(self, array: np.ndarray) -> np.ndarray:
        """The nearest numbers of the type; what lies beyond becomes infinite."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return array.astype(self.dtype.numpy())

    def masked(self, array: np.ndarray) -> np.ndarray:
        """As `cast`, finite numbers below the type's range as half of its lowest: two of them can still be added."""
        beyond = np.isfinite(array) & (array < -self.largest)
        return self.cast(np.where(beyond, np.float32(-self.largest / 2), array))


def unfit(array: np.ndarray, half: HalfType) -> str | None:
    """Why a constant must stay in float32, None where half precision holds it. NaN and infinity it holds.

    Example:
        >>> unfit(np.array([1e6], np.float32), HalfType.of(ir.DataType.FLOAT16))
        'it holds 1e+06, float16 ends at 65504'
        >>> unfit(np.array([1e-9], np.float32), HalfType.of(ir.DataType.FLOAT16))
        'it holds 1e-09, which is 0 in float16'
        >>> unfit(np.array([0.5, -np.inf], np.float32), HalfType.of(ir.DataType.FLOAT16))
    """
    name, square, lost = half.dtype.name.lower(), 0.0, 0.0
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        part = part[np.isfinite(part)]
        cast = half.cast(part).astype(np.float32)
        over = ~np.isfinite(cast)
        if over.any():
            return f"it holds {float(part[over][0]):.6g}, {name} ends at {half.largest:.6g}"
        gone = (part != 0) & (cast == 0)
        if gone.any() and array.size <= _FEW:
            return f"it holds {float(part[gone][0]):.6g}, which is 0 in {name}"
        exact = part.astype(np.float64)
        square += float(np.vdot(exact, exact))
        exact -= cast
        lost += float(np.vdot(exact, exact))
    share = (lost / square) ** 0.5 if square else 0.0
    return f"{share:.1%} of it would be lost: its numbers are too small for {name}" if share > LARGEST_LOSS else None


def mask_values(constants: Iterable[ir.Value], half: HalfType) -> tuple[set[ir.Value], set[ir.Value]]:
    """Constants far below zero that only say what a softmax is to leave out, and the values that carry them there.

    Args:
        constants: float32 constants.
        half: the type.

    Returns:
        The constants with finite numbers below the range of the type that reach nothing but softmax; and every value
        on the way, of which large negative numbers may thus be cut.
    """
    masks: set[ir.Value] = set()
    carriers: set[ir.Value] = set()
    for value in constants:
        tensor = constant_tensor(value)
        array = None if tensor is None else tensor.numpy()
        if array is None or not array.size:
            continue
        finite = array[np.isfinite(array)]
        if not finite.size or finite.min() >= -half.largest or finite.max() > half.largest:
            continue
        reached = _carried_to_softmax(value)
        if reached is not None:
            masks.add(value)
            carriers |= reached
    return masks, carriers


def _carried_to_softmax(value: ir.Value) -> set[ir.Value] | None:
    """The values that a mask goes through, None where it goes anywhere else than into softmax."""
    reached: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current.is_graph_output() or len(reached) > _MASK_STEPS:
            return None
        for use in current.uses():
            if is_op(use.node, *_READS_MASKS):
                continue
            if not is_op(use.node, *_CARRIES_MASKS):
                return None
            for result in use.node.outputs:
                if result not in reached:
                    reached.add(result)
                    waiting.append(result)
    return reached


def epsilon_region(node: ir.Node) -> set[ir.Node]:
    """What has to stay in float32 with a node that adds a number too small for half precision.

    The squares and means before it, which may be as small, and the root and quotient behind it:
    y = d / sqrt(mean(d d) + epsilon).
    """
    region = {node}
    before = [node]
    while before:
        for value in before.pop().inputs:
            source = None if value is None else value.producer()
            if source is not None and source not in region and is_op(source, *_BEFORE_EPSILON):
                region.add(source)
                before.append(source)
    behind = [node]
    while behind:
        for value in behind.pop().outputs:
            for user in value.consumers():
                if user in region:
                    continue
                if is_op(user, *_BEHIND_EPSILON):
                    behind.append(user)
                if is_op(user, *_BEHIND_EPSILON, "Div", "Mul"):
                    region.add(user)
    return region


def overflowing(observed: Mapping[str, Statistics], half: HalfType, carriers: Collection[ir.Value]) -> dict[str, float]:
    """The values, by name, whose largest observed magnitude comes too near the end of the type, and that magnitude.

    Of values that carry masks only what is above zero counts.
    """
    masked = {value.name for value in carriers}
    found: dict[str, float] = {}
    for name, statistics in observed.items():
        if not statistics.count:
            continue
        magnitude = statistics.maximum if name in masked else max(statistics.maximum, -statistics.minimum)
        if magnitude * HEADROOM > half.largest and half.dtype == ir.DataType.FLOAT16:
            found[name] = magnitude
    return found
