"""Torch functions of sequences (lists of tensors, never changed in place) and optionals (the value, or None)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from graphopt.ir.ops.torch.dtypes import ElementType
from graphopt.ir.ops.torch.operands import Numbers, number, numbers


def sequence_construct(*inputs: torch.Tensor) -> list[torch.Tensor]:
    """SequenceConstruct 11."""
    return list(inputs)


def sequence_empty(*, dtype: ElementType = ir.DataType.FLOAT) -> list[torch.Tensor]:
    """SequenceEmpty 11."""
    return []


def sequence_length(sequence: list[torch.Tensor], *, device: torch.device | None = None) -> torch.Tensor:
    """SequenceLength 11: int64."""
    return torch.tensor(len(sequence), device=device)


def sequence_at(sequence: list[torch.Tensor], position: Numbers) -> torch.Tensor:
    """SequenceAt 11."""
    return sequence[number(position)]


def sequence_insert(
    sequence: list[torch.Tensor], tensor: torch.Tensor, position: Numbers | None = None
) -> list[torch.Tensor]:
    """SequenceInsert 11: before `position`, or at the end."""
    index = len(sequence) if position is None else number(position)
    return [*sequence[:index], tensor, *sequence[index:]]


def sequence_erase(sequence: list[torch.Tensor], position: Numbers | None = None) -> list[torch.Tensor]:
    """SequenceErase 11: without the tensor at `position`, or without the last."""
    index = (-1 if position is None else number(position)) % len(sequence)
    return [*sequence[:index], *sequence[index + 1 :]]


def split_to_sequence(
    data: torch.Tensor, split: Numbers | None = None, *, axis: int = 0, keepdims: int = 1
) -> list[torch.Tensor]:
    """SplitToSequence 11+: parts of the given sizes (a vector) or of one size; of size 1 without them.

    Only parts that no split asks for lose their axis under `keepdims` 0.
    """
    if split is None:
        return list(torch.split(data, 1, axis) if keepdims else data.unbind(axis))
    vector = split.dim() == 1 if isinstance(split, torch.Tensor) else not isinstance(split, int | float)
    return list(torch.split(data, numbers(split) if vector else number(split), axis))


def concat_from_sequence(sequence: list[torch.Tensor], *, axis: int, new_axis: int = 0) -> torch.Tensor:
    """ConcatFromSequence 11: joined along `axis`, or along a new one."""
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


def optional(value: Any = None, *, type: Any = None) -> Any:  # noqa: A002  (the name of the attribute)
    """Optional 15: without an input an empty one."""
    return value


def optional_get_element(value: Any) -> Any:
    """OptionalGetElement 15+."""
    return value


def optional_has_element(value: Any = None, *, device: torch.device | None = None) -> torch.Tensor:
    """OptionalHasElement 15+: a bool scalar."""
    return torch.tensor(value is not None, device=device)
