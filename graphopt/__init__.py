"""graphopt: a trained network in, a verified, faster and smaller ONNX model and its report out.

The public door. `graphopt.optimize` is the main call; the others are its parts.
"""

from __future__ import annotations

from graphopt.errors import (
    DataError,
    GraphoptError,
    InvalidGraphError,
    LiftError,
    LoadError,
    RecipeError,
    SelectionError,
    TargetMissedError,
    TraceError,
    TrainingError,
    WriteError,
)
from graphopt.export.benchmark import benchmark
from graphopt.export.group_graph import group_graph
from graphopt.export.groups import GroupsReport, describe_groups
from graphopt.export.pareto import plot_pareto
from graphopt.export.report import Report, Step
from graphopt.export.verify import Verdict, compare, verify
from graphopt.export.write import save
from graphopt.inputs.probes import InputSpec
from graphopt.ir.channels import ChannelGroup, channel_groups
from graphopt.ir.compare import Comparison
from graphopt.ir.diff import GraphDiff, diff
from graphopt.ir.lift import lift, lower
from graphopt.ir.load import load
from graphopt.ir.removal import mask_channels, remove_channels
from graphopt.ir.timing import Benchmark
from graphopt.ir.trace import trace
from graphopt.latency.profile import Profile
from graphopt.optimize import Result, optimize
from graphopt.passes import Context, Pass, Remark, Semantics
from graphopt.profiling import profile
from graphopt.recipe import Recipe
from graphopt.recover import Recovery, recover
from graphopt.train_quantized import fake_quantize

__version__ = "0.1.0"

__all__ = [
    "Benchmark",
    "ChannelGroup",
    "Comparison",
    "Context",
    "DataError",
    "GraphDiff",
    "GraphoptError",
    "GroupsReport",
    "InputSpec",
    "InvalidGraphError",
    "LiftError",
    "LoadError",
    "Pass",
    "Profile",
    "Recipe",
    "RecipeError",
    "Recovery",
    "Remark",
    "Report",
    "Result",
    "SelectionError",
    "Semantics",
    "Step",
    "TargetMissedError",
    "TraceError",
    "TrainingError",
    "Verdict",
    "WriteError",
    "benchmark",
    "channel_groups",
    "compare",
    "describe_groups",
    "diff",
    "fake_quantize",
    "group_graph",
    "lift",
    "load",
    "lower",
    "mask_channels",
    "optimize",
    "plot_pareto",
    "profile",
    "recover",
    "remove_channels",
    "save",
    "trace",
    "verify",
]
