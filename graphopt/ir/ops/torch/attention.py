"""Attention and rotary position embedding."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch.nn import functional

from graphopt.ir.ops.torch.dtypes import torch_dtype
from graphopt.ir.ops.torch.operands import Numbers

_RAW_SCORES, _CAPPED_SCORES, _BIASED_SCORES, _PROBABILITIES = range(4)
"""The values of `qk_matmul_output_mode`."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    nonpad_kv_seqlen: Numbers | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> Any:
    """Attention 23+: Y, present key, present value and scores; [batch, heads, length, width] or heads packed in 3-D."""
    packed = q.ndim == 3
    if packed:
        q, k, v = _heads_apart(q, q_num_heads), _heads_apart(k, kv_num_heads), _heads_apart(v, kv_num_heads)
    query_length, offset = q.shape[2], 0
    if past_key is not None and past_value is not None:
        k, v, offset = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2), past_key.shape[2]
    lengths = None
    if nonpad_kv_seqlen is not None:
        lengths = torch.as_tensor(nonpad_kv_seqlen, device=q.device).reshape(-1, 1, 1, 1)
        offset = lengths - query_length
    values = v.to(q.dtype)
    native = outputs < 4 and not softcap and _is_native_precision(softmax_precision, q.dtype)
    windowed = left_window_size >= 0 or right_window_size >= 0
    triangular = bool(is_causal) and not (windowed or past_key is not None or lengths is not None)
    attend = partial(functional.scaled_dot_product_attention, scale=scale)
    if q.shape[1] != k.shape[1]:
        attend = partial(attend, enable_gqa=True)
    scores = None
    if native and triangular and attn_mask is None:
        y = attend(q, k, values, is_causal=True)
    else:
        limits = (left_window_size, 0 if is_causal else right_window_size)
        mask = _mask(attn_mask, q, k, _visible(q, k, limits, offset, lengths))
        if native:
            y = attend(q, k, values, mask)
        else:
            y, scores = _explicit(q, k, values, mask, scale, softcap, softmax_precision, qk_matmul_output_mode)
    if packed:
        y = y.transpose(1, 2).flatten(2)
    return y if outputs == 1 else (y, k, v, scores)[:outputs]


def rotary_embedding(
    x: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> torch.Tensor:
    """RotaryEmbedding 23: X as [batch, heads, length, width], or with the heads packed as [batch, length, hidden]."""
    data = x if x.ndim == 4 else _heads_apart(x, num_heads)
    width = rotary_embedding_dim or data.shape[3]
    cosine = cos_cache if position_ids is None else cos_cache[position_ids]
    sine = sin_cache if position_ids is None else sin_cache[position_ids]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)  # the same for all heads
    turned, kept = data[..., :width], data[..., width:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cosine * first - sine * second, sine * first + cosine * second
    turned = torch.stack((real, imaginary), -1).flatten(-2) if interleaved else torch.cat((real, imaginary), -1)
    result = turned if width == data.shape[3] else torch.cat((turned, kept), -1)
    return result if x.ndim == 4 else result.transpose(1, 2).flatten(2)


def _heads_apart(packed: torch.Tensor, heads: int | None) -> torch.Tensor:
    """[batch, length, heads * width] as [batch, heads, length, width]."""
    assert heads is not None, "3-D inputs come with a number of heads"
    return packed.unflatten(2, (heads, -1)).transpose(1, 2)


def _is_native_precision(softmax_precision: int | None, dtype: torch.dtype) -> bool:
    """Whether torch's own attention takes the softmax as precisely as the node asks: float32 at the least."""
    wanted = softmax_precision or ir.DataType.FLOAT
    return torch_dtype(wanted) == dtype or (
        dtype != torch.float64 if softmax_precision == ir.DataType.FLOAT else softmax_precision is None
    )


def _visible(
    q: torch.Tensor,
    k: torch.Tensor,
    limits: tuple[int, int],
    offset: int | torch.Tensor,
    lengths: torch.Tensor | None,
) -> torch.Tensor | None:
    """Which key each query may attend, 4-D, from window (-1: no limit), causal limit and lengths; None for all."""
    left, right = limits
    keys = torch.arange(k.shape[2], device=q.device)
    positions = torch.arange(q.shape[2], device=q.device).unsqueeze(-1) + offset
    conditions: list[torch.Tensor] = []
    if left >= 0:
        conditions.append(keys >= positions - left)
    if right >= 0:
        conditions.append(keys <= positions + right)
    if lengths is not None:
        conditions.append(keys < lengths)
    visible = None
    for condition in conditions:
        visible = condition if visible is None else visible & condition
    return None if visible is None else _four_axes(visible)


def _mask(
    attn_mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor | None:
    """`attn_mask` and `visible` as one mask, 4-D: bool, or numbers to be added; None where all is visible."""
    if attn_mask is None:
        return visible
    missing = k.shape[2] - attn_mask.shape[-1]
    boolean = attn_mask.dtype == torch.bool
    mask = _four_axes(attn_mask if boolean else attn_mask.to(q.dtype))
    if missing != 0:
        mask = functional.pad(mask, (0, missing), value=False if boolean else -math.inf)
    if visible is None:
        return mask
    return mask & visible if boolean else torch.where(visible, mask, -math.inf)


def _four_axes(mask: torch.Tensor) -> torch.Tensor:
    return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float,
    softmax_precision: int | None,
    mode: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention step by step: Y, and the scores after the step that `mode` names."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    # Each factor takes the root of the scale, so that their product does not overflow in half precision.
    root = q.shape[3] ** -0.25 if scale is None else math.sqrt(scale)
    raw = torch.matmul(q * root, k.transpose(2, 3) * root)
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    biased, hidden = capped, None
    if mask is not None:
        bias = torch.where(mask, 0.0, -math.inf).to(q.dtype) if mask.dtype == torch.bool else mask
        # A selection, not only a sum: whatever stands at a hidden position (infinity, NaN) does not matter.
        biased = torch.where(bias == -math.inf, -math.inf, capped + bias)
        hidden = (bias == -math.inf).all(-1, keepdim=True)
    logits = biased if softmax_precision is None else biased.to(torch_dtype(softmax_precision))
    if hidden is None:
        probabilities = torch.softmax(logits, -1)
    else:  # a query that sees no key has probability 0 everywhere, and a gradient of 0 instead of NaN
        probabilities = torch.softmax(torch.where(hidden, 0.0, logits), -1)
        probabilities = torch.where(hidden, 0.0, probabilities)
    probabilities = probabilities.to(q.dtype)
    steps = {_RAW_SCORES: raw, _CAPPED_SCORES: capped, _BIASED_SCORES: biased, _PROBABILITIES: probabilities}
    return torch.matmul(probabilities, v), steps[mode]
