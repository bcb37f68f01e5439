"""Torch functions of the ops that turn signals into spectra, and of the windows and filter banks that they use."""

from __future__ import annotations

import math

import torch

from graphopt.ir.ops.torch.dtypes import ElementType, torch_dtype
from graphopt.ir.ops.torch.operands import Numbers, number

_HALF = (torch.float16, torch.bfloat16)


def hann_window(
    size: Numbers, *, periodic: int = 1, output_datatype: ElementType = 1, device: torch.device | None = None
) -> torch.Tensor:
    """HannWindow 17: [size]."""
    window = torch.hann_window(number(size), bool(periodic), dtype=torch.float64, device=device)
    return window.to(torch_dtype(output_datatype))


def hamming_window(
    size: Numbers, *, periodic: int = 1, output_datatype: ElementType = 1, device: torch.device | None = None
) -> torch.Tensor:
    """HammingWindow 17: [size]; ONNX has 25 / 46 for the usual 0.54."""
    window = torch.hamming_window(number(size), bool(periodic), 25 / 46, 21 / 46, dtype=torch.float64, device=device)
    return window.to(torch_dtype(output_datatype))


def blackman_window(
    size: Numbers, *, periodic: int = 1, output_datatype: ElementType = 1, device: torch.device | None = None
) -> torch.Tensor:
    """BlackmanWindow 17: [size]."""
    window = torch.blackman_window(number(size), bool(periodic), dtype=torch.float64, device=device)
    return window.to(torch_dtype(output_datatype))


def mel_weight_matrix(
    num_mel_bins: Numbers,
    dft_length: Numbers,
    sample_rate: Numbers,
    lower_edge_hertz: Numbers,
    upper_edge_hertz: Numbers,
    *,
    output_datatype: ElementType = 1,
    device: torch.device | None = None,
) -> torch.Tensor:
    """MelWeightMatrix 17: [dft_length // 2 + 1, num_mel_bins], a triangle over the frequencies in each column."""
    bands, length, rate = number(num_mel_bins), number(dft_length), number(sample_rate)
    lowest, highest = (2595 * math.log10(1 + number(edge) / 700) for edge in (lower_edge_hertz, upper_edge_hertz))
    mels = (lowest + index * (highest - lowest) / (bands + 2) for index in range(bands + 2))
    edges = [int((length + 1) * 700 * (10 ** (mel / 2595) - 1) // rate) for mel in mels]
    corners = torch.tensor(edges, dtype=torch.float64, device=device)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    frequency = torch.arange(length // 2 + 1, dtype=torch.float64, device=device).unsqueeze(1)
    rising = torch.where(centre > left, (frequency - left) / (centre - left), 1.0)
    falling = (right - frequency) / (right - centre)
    weights = torch.where((left <= frequency) & (frequency <= centre), rising, 0.0)
    weights = torch.where((centre <= frequency) & (frequency < right), falling, weights)
    return weights.to(torch_dtype(output_datatype))


def dft(
    x: torch.Tensor,
    dft_length: Numbers | None = None,
    axis: Numbers | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> torch.Tensor:
    """DFT 20 of x [..., 1 (real) or 2 (real and imaginary)] along one axis.

    [..., 2], of the frequencies up to the middle with `onesided`; its inverse is real, [..., 1].
    """
    return dft17(x, dft_length, axis=-2 if axis is None else number(axis), inverse=inverse, onesided=onesided)


def dft17(
    x: torch.Tensor, dft_length: Numbers | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> torch.Tensor:
    """DFT 17: as DFT 20, with the axis as an attribute."""
    dim = axis % x.ndim
    length = None if dft_length is None else number(dft_length)
    signal = _complex(x.float() if x.dtype in _HALF else x)
    if inverse and onesided:
        return torch.fft.irfft(signal, length, dim).unsqueeze(-1).to(x.dtype)
    if inverse:
        spectrum = torch.fft.ifft(signal, length, dim)
    else:
        spectrum = torch.fft.rfft(signal, length, dim) if onesided else torch.fft.fft(signal, length, dim)
    return torch.view_as_real(torch.resolve_conj(spectrum)).to(x.dtype)


def stft(
    signal: torch.Tensor,
    frame_step: Numbers,
    window: torch.Tensor | None = None,
    frame_length: Numbers | None = None,
    *,
    onesided: int = 1,
) -> torch.Tensor:
    """STFT 17: signal [batch, length], [batch, length, 1] or [batch, length, 2] to [batch, frames, frequencies, 2]."""
    if frame_length is not None:
        length = number(frame_length)
    else:
        length = signal.shape[1] if window is None else window.shape[0]
    parts = signal.unsqueeze(-1) if signal.ndim == 2 else signal
    frames = parts.unfold(1, length, number(frame_step))  # [batch, frames, parts, length]
    if window is not None:
        frames = frames * window
    return dft17(frames.transpose(2, 3), axis=2, onesided=onesided)


def _complex(x: torch.Tensor) -> torch.Tensor:
    """[..., 1] as real [...], [..., 2] as complex [...]."""
    return x.squeeze(-1) if x.shape[-1] == 1 else torch.complex(x[..., 0], x[..., 1])
