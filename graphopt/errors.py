"""The errors that graphopt raises on purpose: each says what is wrong, where, and the way out."""

from __future__ import annotations

from typing import Any


class GraphoptError(Exception):
    """Anything that graphopt refuses. Catch this to catch every error raised on purpose.

    Attributes:
        what: the fact, one sentence.
        where: the node, file, field or value that is to blame, or None.
        help: what the user can do about it, or None.

    Example:
        >>> error = GraphoptError("the file is empty", where="model.onnx", help="export it again")
        >>> print(error)
        the file is empty
          at model.onnx
          help: export it again
    """

    def __init__(self, what: str, *, where: str | None = None, help: str | None = None) -> None:  # noqa: A002
        self.what = what
        self.where = where
        self.help = help
        lines = [what]
        if where:
            lines.append(f"  at {where}")
        if help:
            lines.append(f"  help: {help}")
        super().__init__("\n".join(lines))


class LoadError(GraphoptError):
    """A file, bytes or proto that cannot be read as a model. Raised by `load`."""


class InvalidGraphError(GraphoptError):
    """A model that can be read but is not a valid graph, or that onnxruntime refuses to load."""


class TraceError(GraphoptError):
    """A torch module or program that cannot be exported, or whose export computes something else."""


class DataError(GraphoptError):
    """Example inputs, calibration data or an `evaluate` function that does not fit the model."""


class RecipeError(GraphoptError):
    """An unknown recipe, pass or option, or passes in an order that their contracts forbid."""


class SelectionError(GraphoptError):
    """Channels that are to be removed and do not exist, must stay, or are all there is on some axis."""


class WriteError(GraphoptError):
    """An output that cannot be written. What was at the path before is untouched."""


class TargetMissedError(GraphoptError):
    """A target that was asked for (`max_drop`, `tolerance`) and cannot be met.

    Attributes:
        least: the least that can be reached, in the unit of what was asked for; None where it is not known.
    """

    least: float | None = None


class LiftError(GraphoptError):
    """A graph that has no torch counterpart, or a module that no longer belongs to its graph."""


class TrainingError(GraphoptError):
    """Training that cannot start, or that stopped: no data, a loss that is NaN, a checkpoint of another model.

    Attributes:
        recovery: the `graphopt.Recovery` with the last good weights, where training had begun; None before.
    """

    recovery: Any = None


class BatchError(DataError, TrainingError):
    """A batch that does not fit the model, met while training runs: a `DataError` that carries `recovery`."""
