"""Rows of the ops that turn signals, images and text into numbers (and of the windows that they use)."""

from __future__ import annotations

import numpy as np

from graphopt.ir.ops.channels.layout import positions, transform
from graphopt.ir.ops.families import no_macs, unary
from graphopt.ir.ops.row import OpRow, Shape, Site, TorchFunction
from graphopt.ir.ops.shape import required_constant

_TEXT = "text and files have no channels"


def window_shape(site: Site) -> list[Shape]:
    """[size], the value of input 0."""
    return [(int(required_constant(site, 0).reshape(())),)]


def mel_matrix_shape(site: Site) -> list[Shape]:
    """[dft_length // 2 + 1, num_mel_bins]."""
    bins, length = (int(required_constant(site, index).reshape(())) for index in (0, 1))
    return [(length // 2 + 1, bins)]


def short_time_fourier_shape(site: Site) -> list[Shape]:
    """[batch, frames, frequencies, 2] (ONNX STFT 17).

    `onnx.shape_inference` (1.23) overlooks that `onesided` defaults to 1.
    """
    batch, length = site.input_shape(0)[:2]
    step = int(required_constant(site, 1).reshape(()))
    window = site.input_shape(2)[0] if len(site.inputs) > 2 and site.inputs[2] is not None else None
    frame = int(np.reshape(required_constant(site, 3), ())) if window is None else window
    frequencies = frame // 2 + 1 if site.attribute("onesided", 1) else frame
    return [(batch, (length - frame) // step + 1, frequencies, 2)]


ROWS: tuple[OpRow, ...] = (
    *unary(
        "BlackmanWindow",
        "HammingWindow",
        "HannWindow",
        structural=(0,),
        shape=window_shape,
        channels=positions,
        torch="preprocessing",
    ),
    OpRow(
        "MelWeightMatrix",
        structural=(0, 1, 2, 3, 4),
        cost=no_macs,
        shape=mel_matrix_shape,
        channels=positions,
        torch=TorchFunction("preprocessing", "MelWeightMatrix"),
    ),
    # A Fourier transform is as many MACs as the implementation's factorisation of its length.
    OpRow("DFT", structural=(1,), cost=None, channels=transform, torch=TorchFunction("preprocessing", "DFT17")),
    OpRow(
        "DFT",
        since=20,
        structural=(1, 2),
        cost=None,
        channels=transform,
        torch=TorchFunction("preprocessing", "DFT"),
    ),
    OpRow(
        "STFT",
        structural=(1, 3),
        cost=None,
        shape=short_time_fourier_shape,
        channels=positions,
        torch=TorchFunction("preprocessing", "STFT"),
    ),
    # Text and files: their work is not arithmetic.
    *unary("StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", frozen=_TEXT),
    *unary("ImageDecoder", frozen=_TEXT),
)
