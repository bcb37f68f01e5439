"""Picture files drawn with matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import GraphoptError, WriteError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
"""What a picture file may end in."""


@contextmanager
def drawing(path: Path, *, width: float, height: float) -> Generator[Figure, None, None]:
    """A figure to draw on, which is written to `path` at the end: the same drawing gives the same file.

    Args:
        path: ends in one of `FORMATS`.
        width: inches.
        height: inches.

    Raises:
        GraphoptError: matplotlib is not installed, or `path` ends in something else.
        WriteError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with drawing(Path(folder.name) / "line.svg", width=2, height=2) as figure:
        ...     _ = figure.subplots().plot([1, 2])
        >>> (Path(folder.name) / "line.svg").stat().st_size > 0
        True
        >>> folder.cleanup()
    """
    check_drawing(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "graphopt", "font.size": 8}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise WriteError(f"the plot cannot be written: {error.strerror}", where=str(path)) from error


def check_drawing(path: Path) -> None:
    """Raise what `drawing` would, before the work that is to be drawn is done.

    Raises:
        GraphoptError: matplotlib is not installed, or `path` ends in something else than one of `FORMATS`.
    """
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise GraphoptError(
            "a plot needs matplotlib, which is not installed", help="pip install 'graphopt[plot]'"
        ) from error
    if path.suffix.lower() not in FORMATS:
        raise GraphoptError(f"no format {path.suffix!r} of plots", where=str(path), help=f"use {', '.join(FORMATS)}")
