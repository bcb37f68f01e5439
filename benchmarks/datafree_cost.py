"""What a pruning with compensation costs on a model of ResNet-50's size: seconds and memory, in a fresh process."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from benchmarks.datafree_setting import QUICK_IMAGES, Setting
from benchmarks.isolation import Isolation
from benchmarks.models import exported
from benchmarks.results import Row, progress

MODEL, QUICK_MODEL = "resnet50", "resnet20"
SOURCES = ("probes", "synthetic")
RATIO = 0.3
LIMIT = 3600.0
"""Seconds after which a measurement is given up."""


def costs(setting: Setting) -> Iterator[Row]:
    """One row a source of inputs; the synthetic ones are made anew, and then asked for again."""
    model = QUICK_MODEL if setting.quick else MODEL
    exported(model)
    isolation = Isolation()
    for source in SOURCES:
        progress(f"{model}: {RATIO:.0%}, {source}")
        name = f"{model} {source} {QUICK_IMAGES if setting.quick else 0}"
        row = isolation.run(measure, name, LIMIT)
        yield {"section": "cost", "model": model, "variant": source, "ratio": RATIO, **row}


def measure(name: str) -> Row:
    """In a process of its own: prune and reconstruct "model source samples", once and again.

    Returns:
        Seconds of both runs, how often progress was told, resident bytes with the model loaded and at the peak, and
        bytes of the largest second moments that any convolution needs.
    """
    import graphopt
    from graphopt.passes.contract import Context
    from graphopt.passes.fold_reconstruction import FoldReconstruction
    from graphopt.passes.prune_channels import PruneChannels

    network, source, samples = name.split()
    told = 0

    def tell(done: int, total: int, text: str) -> None:
        nonlocal told
        told += 1
        if total and 5 * done // total != 5 * (done - 1) // total:
            progress(f"{network}, {source}: {text} {done} of {total}")

    def run(model: ir.Model) -> float:
        context = Context(reference=model, progress=tell)
        start = time.perf_counter()
        smaller = model.clone()
        PruneChannels(ratio=RATIO).rewrite(smaller, context)
        FoldReconstruction(source=source, samples=int(samples) or None).rewrite(smaller, context)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as temporary:
        os.environ["GRAPHOPT_CACHE"] = temporary
        file = exported(network)
        model = graphopt.load(file)
        loaded = _resident("VmRSS")
        seconds = run(model)
        peak, updates = _resident("VmHWM"), told
        return {
            "seconds": seconds,
            "again_seconds": run(model),
            "progress_updates": updates,
            "loaded_bytes": loaded,
            "peak_bytes": peak,
            "model_bytes": file.stat().st_size,
            "moments_bytes": largest_moments(model),
        }


def largest_moments(model: ir.Model) -> int:
    """Bytes of the float64 second moments of the widest patch that a convolution reads."""
    widest = 0
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "Conv" else None
        if weight is not None and weight.const_value is not None:
            widest = max(widest, math.prod(weight.const_value.shape.numpy()[1:]))
    return 8 * (widest + 1) ** 2


def _resident(field: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS now, VmHWM at the peak; 0 where there is no such file."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="ascii").splitlines() if status.exists() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
