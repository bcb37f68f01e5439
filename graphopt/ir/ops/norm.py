"""Rows of the normalisations and softmaxes. 0 MACs by convention: means and scales are no contraction."""

from __future__ import annotations

from functools import partial

from graphopt.ir.ops.families import MICROSOFT, no_macs, same_shape, unary
from graphopt.ir.ops.row import OpRow, Shape, Site


def skip_normalization_shape(site: Site) -> list[Shape]:
    """Outputs: normalised, mean and inverse deviation (axis -1 kept as 1), sum of input, skip and bias."""
    shape = site.input_shape(0)
    statistics = (*shape[:-1], 1)
    return [shape, statistics, statistics, shape]


def embedding_normalization_shape(site: Site, table: int) -> list[Shape]:
    """Outputs (normalised [batch, sequence, hidden], mask index [batch], sum of embeddings)."""
    identifiers = site.input_shape(0)
    embedded = (*identifiers, site.input_shape(table)[-1])
    return [embedded, identifiers[:1], embedded]


ROWS: tuple[OpRow, ...] = (
    *unary("BatchNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"),
    # Function ops whose bodies defeat onnx.shape_inference.
    *unary("GroupNormalization", "MeanVarianceNormalization", shape=same_shape),
    # onnxruntime's name for RMSNormalization before opset 23; it lives in the standard domain.
    *unary("SimplifiedLayerNormalization", shape=same_shape),
    *unary("LRN", "LpNormalization", "Softmax", "LogSoftmax", "Hardmax"),
    *unary("GroupNorm", "SkipGroupNorm", "GatedRMSNorm", "BranchwiseRMSNorm", "BiasSoftmax", domain=MICROSOFT),
    *unary(
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        domain=MICROSOFT,
        shape=skip_normalization_shape,
    ),
    OpRow(
        "EmbedLayerNormalization",
        domain=MICROSOFT,
        cost=no_macs,
        shape=partial(embedding_normalization_shape, table=2),
        element_type=2,
    ),
    OpRow(
        "QEmbedLayerNormalization",
        domain=MICROSOFT,
        cost=no_macs,
        shape=partial(embedding_normalization_shape, table=2),
        quantization=tuple(range(8, 18)),
        element_type=8,
    ),
)
