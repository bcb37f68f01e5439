"""Where an error of a linear operator is felt, how much varies there, and covariances of few rows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.criteria.members import Membership
from graphopt.ir.linear import Linear
from graphopt.ir.linear_rows import LinearRows
from graphopt.ir.pieces import Pieces
from graphopt.ir.rewrite import is_op, sole_consumer


def end_of(node: ir.Node, linear: Linear, membership: Membership) -> tuple[ir.Value, np.ndarray]:
    """What an operator makes, followed through constant scales and shifts up to the addition of another branch.

    Returns:
        The value there, and what the results are multiplied with on the way, float64 [M].
    """
    value, factor = node.outputs[0], np.ones(linear.out_channels)
    while (reader := sole_consumer(value)) is not None:
        others = [operand for operand in reader.inputs if operand is not None and operand is not value]
        constant = all(membership.is_weight(operand) for operand in others)
        if is_op(reader, "BatchNormalization") and constant and linear.out_axis == 1 and reader.inputs[0] is value:
            factor = factor * membership.normalization_factor(reader)
        elif not is_op(reader, "Add") or len(others) != 1:
            break
        value = reader.outputs[0]
        if not constant:
            break
    return value, factor


def variance_at(rows: LinearRows, end: ir.Value, pieces: Pieces) -> float | None:
    """Variance at the end of an operator, summed over channels; None where it has another layout there."""
    squares, sums, count = 0.0, 0.0, 0
    for batch in range(pieces.batches):
        array = np.asarray(pieces.array(end, batch), np.float64)
        axis = rows.linear.out_axis
        if not -array.ndim <= axis < array.ndim or array.shape[axis] != rows.linear.out_channels:
            return None
        made = rows.rows(array)
        squares, sums, count = squares + np.square(made).sum(axis=0), sums + made.sum(axis=0), count + len(made)
    variance = squares / max(count, 1) - np.square(sums / max(count, 1))
    total = float(np.maximum(variance, 0).sum())
    return total if np.isfinite(total) else None


def shrunk(covariance: np.ndarray, count: int, enough: int) -> np.ndarray:
    """Covariances [G, K, K] drawn towards their diagonal where rows are scarce.

    Correlations of few rows are too large, so that every column seems to follow from the others. They are multiplied
    by 1 - min(1, sum (1 - r^2)^2 / (n - 1) / sum r^2), sums over all pairs (Schaefer and Strimmer 2005, with the
    variance of r of normal numbers).
    """
    columns = covariance.shape[-1]
    if count >= enough * columns or columns < 2:
        return covariance
    result = covariance.copy()
    for block in result:
        variance = np.diagonal(block).copy()
        deviation = np.sqrt(np.where(variance > 0, variance, np.inf))
        squares = np.square(block / deviation[:, None] / deviation)
        np.fill_diagonal(squares, 0)
        spread = (np.square(1 - squares).sum() - columns) / max(count - 1, 1)
        block *= 1 - min(1.0, spread / max(float(squares.sum()), 1e-30))
        np.fill_diagonal(block, variance)
    return result
