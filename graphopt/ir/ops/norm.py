"""Rows of the normalisations and softmaxes. 0 MACs by convention: means and scales are no contraction."""

from __future__ import annotations

from functools import partial

from graphopt.ir.ops.channels import norm as channels
from graphopt.ir.ops.families import MICROSOFT, no_macs, same_shape, unary
from graphopt.ir.ops.row import OpRow, Shape, Site, TorchFunction


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
    OpRow(
        "BatchNormalization",
        statistics=(3, 4),
        cost=no_macs,
        channels=channels.batch_normalization,
        torch=TorchFunction("norm", "BatchNormalization"),
    ),
    *unary("InstanceNormalization", channels=channels.instance_normalization, torch="norm"),
    *unary("LayerNormalization", "RMSNormalization", channels=channels.layer_normalization, torch="norm"),
    # Function ops whose bodies defeat onnx.shape_inference. Before opset 21 there was one scale a group.
    OpRow(
        "GroupNormalization",
        cost=no_macs,
        shape=same_shape,
        frozen="before opset 21 it has one scale a group",
        torch=TorchFunction("norm", "GroupNormalization18"),
    ),
    OpRow(
        "GroupNormalization",
        since=21,
        cost=no_macs,
        shape=same_shape,
        channels=channels.group_normalization,
        repair=channels.repair_group_normalization,
        torch=TorchFunction("norm", "GroupNormalization"),
    ),
    *unary(
        "MeanVarianceNormalization",
        shape=same_shape,
        channels=channels.mean_variance_normalization,
        torch="norm",
    ),
    # onnxruntime's name for RMSNormalization before opset 23; it lives in the standard domain.
    *unary(
        "SimplifiedLayerNormalization",
        shape=same_shape,
        channels=channels.layer_normalization,
        torch="norm",
    ),
    *unary("LRN", channels=channels.local_response_normalization, torch="norm"),
    *unary("LpNormalization", channels=channels.norm_division, torch="norm"),
    *unary("Softmax", "LogSoftmax", "Hardmax", channels=channels.softmax, torch="norm"),
    *unary("GroupNorm", "SkipGroupNorm", "GatedRMSNorm", "BranchwiseRMSNorm", "BiasSoftmax", domain=MICROSOFT),
    *(
        OpRow(
            name,
            domain=MICROSOFT,
            cost=no_macs,
            shape=skip_normalization_shape,
            channels=partial(channels.skip_layer_normalization, bias=bias),
            torch=TorchFunction("norm", name),
        )
        for name, bias in (("SkipLayerNormalization", 4), ("SkipSimplifiedLayerNormalization", 3))
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
