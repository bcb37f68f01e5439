"""Writing ONNX files: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from graphopt.errors import WriteError
from graphopt.ir.ops.row import tensor_bytes

_LARGEST_PROTO = 2**31 - 2**20
"""Bytes that one protobuf file can hold, with a margin for the nodes."""
_STAYS_INSIDE = 1024
"""Weights up to this many bytes stay in the .onnx file even when the others move to a data file."""


def save(model: ir.Model, path: str | os.PathLike[str]) -> Path:
    """Write a model to an .onnx file; what was at the path before stays until the new file is complete.

    Models whose weights exceed 2 GiB get them written beside it, to `<name>.data`.

    Returns:
        The path that was written.

    Raises:
        WriteError: the folder does not exist or cannot be written, or the disk is full. Nothing is left behind.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
        >>> save(model, "/nowhere/model.onnx")
        Traceback (most recent call last):
        graphopt.errors.WriteError: the folder does not exist
          at /nowhere
          help: create it, or write somewhere else
    """
    if not isinstance(model, ir.Model):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise WriteError(
            f"a {type(model).__name__} cannot be saved", where=str(path), help="save takes what graphopt.load returns"
        )
    with _staged(path) as staged:
        _write(model, staged)
    return Path(path)


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a text file (report, diff, plan) whole or not at all. Raises `WriteError` as `save` does."""
    with _staged(path) as staged:
        staged.write_text(text, encoding="utf-8")
    return Path(path)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise `WriteError` where a file cannot be written, before the work that fills it is done."""
    with _staged(path):
        pass


@contextmanager
def _staged(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """A file name in a temporary folder beside the target; what is written there moves to the target at the end."""
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise WriteError("the folder does not exist", where=str(folder), help="create it, or write somewhere else")
    if target.is_dir():
        raise WriteError("the output path is a directory", where=str(target), help="name a file in it")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
    except OSError as error:
        raise WriteError(
            f"the folder cannot be written: {error.strerror}", where=str(folder), help="write somewhere else"
        ) from error
    try:
        yield staging / target.name
        for written in sorted(staging.iterdir(), key=lambda file: file.name == target.name):
            os.replace(written, folder / written.name)
    except OSError as error:
        raise WriteError(f"the file cannot be written: {error.strerror}", where=str(target)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included; sub-byte types are packed."""
    return sum(
        tensor_bytes(value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def _write(model: ir.Model, path: Path) -> None:
    if weight_bytes(model) < _LARGEST_PROTO:
        whole = model.clone()
        ir.external_data.load_to_model(whole)
        path.write_bytes(ir.to_proto(whole).SerializeToString())
        return
    ir.save(model.clone(), path, external_data=f"{path.name}.data", size_threshold_bytes=_STAYS_INSIDE)
