"""Matrix products, plain, integer, quantized and fused."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from graphopt.ir.ops.torch import unsigned
from graphopt.ir.ops.torch.integers import accumulated, requantized
from graphopt.ir.ops.torch.named_activations import activation_function

mat_mul = unsigned.wrapping(torch.matmul)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> torch.Tensor:
    """Gemm 13: alpha * A' @ B' + beta * C, of [M, K] and [K, N] after the transpositions, C broadcast to [M, N]."""
    if a.dtype in unsigned.SIGNED:
        signed = partial(gemm, alpha=alpha, beta=beta, transA=transA, transB=transB)
        return unsigned.modular(signed, a, b) if c is None else unsigned.modular(signed, a, b, c)
    if not transA and transB and alpha == 1.0 and (c is None or (beta == 1.0 and c.ndim == 1)):
        return functional.linear(a, b, c)
    left, right = a.t() if transA else a, b.t() if transB else b
    if not a.dtype.is_floating_point:  # torch takes no fractions for integers
        alpha, beta = int(alpha), int(beta)
    if c is not None:
        return torch.addmm(c, left, right, beta=beta, alpha=alpha)
    product = torch.mm(left, right)
    return product if alpha == 1 else alpha * product


def einsum(*inputs: torch.Tensor, equation: str) -> torch.Tensor:
    """Einsum 12."""
    return torch.einsum(equation, *inputs)


def mat_mul_integer(
    a: torch.Tensor,
    b: torch.Tensor,
    a_zero_point: torch.Tensor | None = None,
    b_zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """MatMulInteger 10: matmul of integers less their zero points (one a row of A, one a column of B), in int32."""
    rows = None if a_zero_point is None else _per_row(a_zero_point)
    return torch.matmul(accumulated(a, rows), accumulated(b, b_zero_point)).to(torch.int32)


def q_linear_mat_mul(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero_point: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero_point: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero_point: torch.Tensor,
) -> torch.Tensor:
    """QLinearMatMul 10, 21: matmul of quantized data, quantized again; scales one a row of A, one a column of B."""
    products = torch.matmul(accumulated(a, _per_row(a_zero_point)), accumulated(b, b_zero_point))
    return requantized(products, _per_row(a_scale) * b_scale / _per_row(y_scale), _per_row(y_zero_point))


def fused_mat_mul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> torch.Tensor:
    """FusedMatMul of com.microsoft: alpha * matmul of the operands as the four attributes orient them."""
    product = torch.matmul(_oriented(a, transA, transBatchA), _oriented(b, transB, transBatchB))
    return product if alpha == 1.0 else alpha * product


def fused_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
) -> torch.Tensor:
    """FusedGemm of com.microsoft: activation(gemm(a, b, c))."""
    result = gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    parameters = [value for value in (activation_alpha, activation_beta) if value is not None]
    return activation_function(activation, *parameters)(result) if activation else result


def _per_row(operand: torch.Tensor) -> torch.Tensor:
    """A vector with an element a row as a column; a single element and higher ranks as they are."""
    return operand.unsqueeze(-1) if operand.ndim == 1 and operand.shape[0] != 1 else operand


def _oriented(operand: torch.Tensor, transposed: int, batch_transposed: int) -> torch.Tensor:
    """[batch..., rows, columns]: transBatch says that axis 0 holds the rows, trans swaps the last two axes."""
    if batch_transposed and operand.ndim > 2:
        operand = operand.movedim(0, -2)
    return operand.transpose(-1, -2) if transposed and operand.ndim > 1 else operand
