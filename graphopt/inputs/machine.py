"""What a measurement depends on besides what is measured: the processor, and the onnxruntime that uses it."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import onnxruntime

_CPU_FIELDS = ("model name", "flags", "CPU part", "Features")
"""Of /proc/cpuinfo, on x86 and on ARM."""


@cache
def processor() -> str:
    """The name of the processor and what it can do, by which onnxruntime chooses its kernels.

    The name does not say it alone: virtual machines on different processors have the same.

    Example:
        >>> processor() == processor()
        True
    """
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
        found = [line.partition(":")[2].strip() for line in lines if line.startswith(_CPU_FIELDS)]
        if found:
            return f"{', '.join(found)}, {os.cpu_count()}"
    return f"{platform.machine()}, {platform.processor()}, {os.cpu_count()}"


def device(target: str) -> str:
    """What runs the kernels of a target: the processor, for "cuda" the graphics cards beside it.

    Example:
        >>> device("cpu") == processor()
        True
    """
    if target != "cuda":
        return processor()
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    cards = [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return f"{', '.join(cards) or 'unknown card'}, {processor()}"


def machine_key(target: str = "cpu") -> tuple[str, str]:
    """What a timing is kept by: `device` of the target and version of onnxruntime.

    Example:
        >>> machine_key()[0] == processor()
        True
    """
    return device(target), onnxruntime.__version__
