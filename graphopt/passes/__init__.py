"""The passes, and the one place where they are listed."""

from __future__ import annotations

from graphopt.passes.contract import Context, Pass, Remark, RewriteResult, Semantics
from graphopt.passes.convert_float import ConvertFloat
from graphopt.passes.decompose import Decompose
from graphopt.passes.dequantize import Dequantize
from graphopt.passes.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.eliminate_identity import EliminateIdentity
from graphopt.passes.equalize_channels import EqualizeChannels
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.fold_batchnorm import FoldBatchnorm
from graphopt.passes.fold_constants import FoldConstants
from graphopt.passes.fold_reconstruction import FoldReconstruction
from graphopt.passes.fuse_activations import FuseActivations
from graphopt.passes.fuse_attention import FuseAttention
from graphopt.passes.fuse_normalization import FuseNormalization
from graphopt.passes.fuse_pad import FusePad
from graphopt.passes.legalize import Legalize
from graphopt.passes.meet_budget import MeetBudget
from graphopt.passes.merge_branches import MergeBranches
from graphopt.passes.merge_common_subexpressions import MergeCommonSubexpressions
from graphopt.passes.merge_initializers import MergeInitializers
from graphopt.passes.merge_linear import MergeLinear
from graphopt.passes.migrate_scales import MigrateScales
from graphopt.passes.pad_channels import PadChannels
from graphopt.passes.pool_reduce_mean import PoolReduceMean
from graphopt.passes.prune_channels import PruneChannels
from graphopt.passes.quantize import Quantize

ALL_PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        EliminateDeadCode,
        EliminateIdentity,
        FoldConstants,
        FusePad,
        PoolReduceMean,
        FoldBatchnorm,
        FoldAffine,
        MergeBranches,
        MergeLinear,
        FuseActivations,
        FuseNormalization,
        FuseAttention,
        MergeCommonSubexpressions,
        Legalize,
        MergeInitializers,
        EqualizeChannels,
        MigrateScales,
        PruneChannels,
        MeetBudget,
        Decompose,
        Dequantize,
        FoldReconstruction,
        Quantize,
        PadChannels,
        ConvertFloat,
    )
}
"""Every pass by its name."""

__all__ = [
    "ALL_PASSES",
    "Context",
    "ConvertFloat",
    "Decompose",
    "Dequantize",
    "EliminateDeadCode",
    "EliminateIdentity",
    "EqualizeChannels",
    "FoldAffine",
    "FoldBatchnorm",
    "FoldConstants",
    "FoldReconstruction",
    "FuseActivations",
    "FuseAttention",
    "FuseNormalization",
    "FusePad",
    "Legalize",
    "MeetBudget",
    "MergeBranches",
    "MergeCommonSubexpressions",
    "MergeInitializers",
    "MergeLinear",
    "MigrateScales",
    "PadChannels",
    "Pass",
    "PoolReduceMean",
    "PruneChannels",
    "Quantize",
    "Remark",
    "RewriteResult",
    "Semantics",
]
