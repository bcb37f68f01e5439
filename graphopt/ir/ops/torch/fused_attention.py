"""Attention as onnxruntime's graph optimizer writes it."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.errors import GraphoptError
from graphopt.ir.ops.torch.attention import attention


def multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    attention_bias: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    past_sequence_length: Any = None,
    cache_indirection: torch.Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Any:
    """MultiHeadAttention of com.microsoft: [batch, length, heads * width], the biases of Q, K and V behind one another.

    Keys and values may also be packed into one tensor with another, or come as [batch, heads, length, width].
    """
    if cache_indirection is not None or past_sequence_length is not None:
        raise GraphoptError("MultiHeadAttention with a shared buffer or beam search cannot be lifted")
    q, k, v = _unpacked(query, key, value, num_heads)
    if bias is not None:
        width, value_width = num_heads * q.shape[3], bias.shape[0] - 2 * num_heads * q.shape[3]
        biases = bias.split((width, width, value_width))
        q = q + _by_heads(biases[0], num_heads)
        if key is None or key.ndim != 4:
            k, v = k + _by_heads(biases[1], num_heads), v + _by_heads(biases[2], num_heads)
    mask = attention_bias
    if key_padding_mask is not None:
        if key_padding_mask.ndim == 1:
            raise GraphoptError("MultiHeadAttention with a mask of lengths cannot be lifted")
        # The value is finite: a query that may attend nothing attends everything.
        padding = torch.where(key_padding_mask != 0, 0.0, mask_filter_value).to(q.dtype)
        padding = padding[:, None, None, :] if padding.ndim == 2 else padding.unsqueeze(1)
        mask = padding if mask is None else mask + padding
    y, present_key, present_value, scores = _padded(
        attention(q, k, v, mask, past_key, past_value, is_causal=unidirectional, scale=scale or None, outputs=outputs)
    )
    y = y.transpose(1, 2).flatten(2)
    return y if outputs == 1 else (y, present_key, present_value, scores)[:outputs]


def _unpacked(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V as [batch, heads, length, width]."""
    if query.ndim == 5:  # [batch, length, heads, 3, width]
        q, k, v = query.permute(3, 0, 2, 1, 4).unbind(0)
        return q, k, v
    assert key is not None, "only a packed query comes without keys"
    if key.ndim == 5:  # [batch, length, heads, 2, width]
        k, v = key.permute(3, 0, 2, 1, 4).unbind(0)
        return _apart(query, heads), k, v
    assert value is not None, "only packed keys come without values"
    if key.ndim == 4:
        return _apart(query, heads), key, value
    return _apart(query, heads), _apart(key, heads), _apart(value, heads)


def _apart(packed: torch.Tensor, heads: int) -> torch.Tensor:
    return packed.unflatten(2, (heads, -1)).transpose(1, 2)


def _by_heads(bias: torch.Tensor, heads: int) -> torch.Tensor:
    """A bias [heads * width] as it is added to [batch, heads, length, width]."""
    return bias.reshape(heads, 1, -1)


def _padded(result: Any) -> tuple[Any, ...]:
    """The outputs of `attention`, always four."""
    found = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    return (*found, None, None, None)[:4]
