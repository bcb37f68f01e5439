"""Lifting a model to the opset that passes rely on."""

from __future__ import annotations

import contextlib
import io
import logging

import onnx
import onnx_ir as ir
import onnxscript.version_converter as version_converter

from graphopt.errors import InvalidGraphError
from graphopt.ir.opset_gaps import after_lifting, before_lifting, cannot_be_lifted

CANONICAL_OPSET = 21
"""The opset of the canonical form: new enough for blocked and 4-bit quantization, old enough for every runtime."""
OLDEST_OPSET = 7
"""Older files broadcast by attribute; converters no longer read them reliably."""
_OLDEST_CANONICAL = 18
"""The passes write operators of this opset; a model that cannot be lifted to it is refused."""


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

    Raises:
        InvalidGraphError: the converters do not carry the model to opset 18, or change its interface on the way.
    """
    current = model.opset_imports.get("", 0)
    reason = cannot_be_lifted(model, current)
    for goal in range(version, max(current, _OLDEST_CANONICAL - 1), -1):
        if reason is None and _convert(model, goal):
            return goal
    if 0 < current < _OLDEST_CANONICAL:
        operators = sorted({node.op_type for graph in model.graphs() for node in graph if node.domain == ""})
        raise InvalidGraphError(
            f"the model of opset {current} cannot be lifted to opset {_OLDEST_CANONICAL} or above"
            + (f": {reason}" if reason else ""),
            where=None if reason else f"one of the operators {', '.join(operators)}",
            help="export the model again with opset 18 or above",
        )
    return current


def _convert(model: ir.Model, goal: int) -> bool:
    """Try one conversion on a clone, so that a converter that fails half-way leaves the model as it was."""
    trial, opset = model.clone(), model.opset_imports.get("", goal)
    before_lifting(trial, opset)
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
    if trial.opset_imports.get("") != goal or not _same_interface(model, trial):
        return False
    after_lifting(trial, opset)
    _adopt(model, trial)
    return True


def _same_interface(model: ir.Model, trial: ir.Model) -> bool:
    """Whether inputs and outputs are still the same; what the converter inferred about their shapes is undone.

    The converter of Scan 8, for one, drops the batch axis of the model's inputs.
    """
    before = (*model.graph.inputs, *model.graph.outputs)
    after = (*trial.graph.inputs, *trial.graph.outputs)
    if len(before) != len(after):
        return False
    for old, new in zip(before, after, strict=True):
        if old.name != new.name or old.dtype != new.dtype or not _may_be_equal(old, new):
            return False
        new.type, new.shape = old.type, old.shape
    return True


def _may_be_equal(old: ir.Value, new: ir.Value) -> bool:
    """Whether no dimension is known on both sides with different sizes."""
    if old.shape is None or new.shape is None:
        return True
    return len(old.shape) == len(new.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in zip(old.shape, new.shape, strict=True)
    )


def _adopt(model: ir.Model, other: ir.Model) -> None:
    """Make `model` what `other` is."""
    model.graph = other.graph
    model.ir_version = max(model.ir_version, other.ir_version, 10)
