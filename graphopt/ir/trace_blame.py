"""Why torch refused: the reason in one line, and the line of the user's own code."""

from __future__ import annotations

import linecache
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_MACHINERY = ("torch", "onnx", "onnx_ir", "onnxscript", "graphopt", "sympy")
"""Packages whose frames are never the user's code."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, the root cause first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return reversed(chain)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error message that says something, without colours."""
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:limit]


def reason(error: BaseException) -> str:
    """The root cause of a failed export in one line."""
    root = next(causes(error))
    return f"{type(root).__name__}: {first_line(root)}"


def is_data_dependent(error: BaseException) -> bool:
    """Whether an export failed because the control flow depends on the values in a tensor."""
    return any(
        type(cause).__name__.startswith("GuardOnDataDependent") or "data-dependent" in str(cause).lower()
        for cause in causes(error)
    )


def user_code(error: BaseException) -> str | None:
    """`file:line: source` of the innermost line of the user's code in an error of torch, or None.

    torch names it in the message ("from user code:"), or it is in the traceback of the root cause.
    """
    for cause in causes(error):
        named = [(match["file"], int(match["line"])) for match in _FRAME.finditer(str(cause))]
        frames: list[tuple[str, int]] = []
        traceback = cause.__traceback__
        while traceback is not None:
            frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
            traceback = traceback.tb_next
        for file, line in [*reversed(named), *reversed(frames)]:
            if _is_users(file):
                source = linecache.getline(file, line).strip()
                return f"{file}:{line}: {source}" if source else f"{file}:{line}"
    return None


def _is_users(file: str) -> bool:
    path = Path(file)
    if file.startswith("<") or not path.exists():
        return False
    parts = path.parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return parts[parts.index(folder) + 1] not in _MACHINERY
    if path.is_relative_to(Path(__file__).resolve().parents[1]):
        return False
    return not path.is_relative_to(sysconfig.get_paths()["stdlib"])
