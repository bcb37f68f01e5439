"""Insert something trainable into a lifted graph, train it, fold it to plain ONNX (ADR 0009). Imports torch."""

from __future__ import annotations

from graphopt.ir.lifted import Insertion
from graphopt.train.fake_quant import FakeQuant
from graphopt.train.mask import Mask
from graphopt.train.scale import Scale

__all__ = ["FakeQuant", "Insertion", "Mask", "Scale"]
