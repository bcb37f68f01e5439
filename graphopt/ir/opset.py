"""Lifting a model to the opset that passes rely on."""

from __future__ import annotations

import contextlib
import io
import logging

import onnx
import onnx_ir as ir
import onnxscript.version_converter as version_converter

from graphopt.errors import InvalidGraphError

CANONICAL_OPSET = 21
"""The opset of the canonical form: new enough for blocked and 4-bit quantization, old enough for every runtime."""
OLDEST_OPSET = 7
"""Older files broadcast by attribute; converters no longer read them reliably."""


def check_opset(model: ir.Model) -> None:
    """Raise `InvalidGraphError` for a standard-domain opset that graphopt cannot read."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    newest = onnx.defs.onnx_opset_version()
    if version and version < OLDEST_OPSET:
        raise InvalidGraphError(
            f"opset {version} is older than {OLDEST_OPSET}, the oldest that graphopt reads",
            where=model.graph.name,
            help="export the model again with opset 17 or above",
        )
    if version > newest:
        raise InvalidGraphError(
            f"opset {version} is newer than {newest}, the newest that onnx {onnx.__version__} knows",
            where=model.graph.name,
            help="upgrade the onnx package, or export the model with an older opset",
        )


def lift_opset(model: ir.Model, version: int = CANONICAL_OPSET) -> int:
    """Convert a model, in place, to `version` or as near to it as the converters carry it.

    Models that are newer already stay as they are. Returns the opset that was reached.
    """
    current = model.opset_imports.get("", 0)
    for goal in range(version, max(current, 17), -1):
        if _convert(model, goal):
            return goal
    return model.opset_imports.get("", current)


def _convert(model: ir.Model, goal: int) -> bool:
    """Try one conversion on a clone, so that a converter that fails half-way leaves the model as it was."""
    trial = model.clone()
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            version_converter.convert_version(trial, goal, fallback=True)
    except Exception:  # converters raise anything; the next lower opset is tried
        return False
    finally:
        logger.setLevel(level)
    if trial.opset_imports.get("") != goal:
        return False
    _adopt(model, trial)
    return True


def _adopt(model: ir.Model, other: ir.Model) -> None:
    """Make `model` what `other` is."""
    model.graph = other.graph
    model.ir_version = max(model.ir_version, other.ir_version, 10)
