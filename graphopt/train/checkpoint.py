"""The checkpoint of a training run: one file of tensors and plain data, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from graphopt.errors import TrainingError
from graphopt.ir.lifted import LiftedModule

_FORMAT = 1
"""Version of the file's layout."""


def model_digest(model: ir.Model) -> str:
    """A hash of a graph and its weights, the same in every process.

    Names, operators, attributes, interface and weights count; metadata and doc strings do not.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
        >>> model_digest(ir.from_onnx_text(text)) == model_digest(ir.from_onnx_text(text))
        True
    """
    digest = hashlib.sha256()
    digest.update(repr(sorted(model.opset_imports.items())).encode())
    for value in (*model.graph.inputs, *model.graph.outputs):
        digest.update(f"{value.name} {value.dtype} {value.shape}\n".encode())
    for node in model.graph:
        proto = ir.to_proto(node)
        proto.ClearField("metadata_props")
        proto.ClearField("doc_string")
        digest.update(proto.SerializeToString(deterministic=True))
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def structure_digest(module: LiftedModule) -> str:
    """A hash of what was inserted where: the generated code, and names, shapes and types of the insertions' state."""
    state = module.insertions.state_dict()
    parts = [f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in state.items() if _is_tensor(tensor)]
    return hashlib.sha256("\n".join([module.code, repr(module.insertions), *parts]).encode()).hexdigest()


def state_digest(module: torch.nn.Module) -> str:
    """A hash of the state of any module."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in module.state_dict().items():
        if _is_tensor(tensor):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any], purpose: Mapping[str, Any]) -> None:
    """Write `content`; what was at the path before stays until the new file is complete.

    Args:
        path: the file.
        content: tensors and plain data.
        purpose: what the checkpoint is good for, as `read_checkpoint` compares it.

    Raises:
        TrainingError: the file cannot be written.
    """
    target = Path(path)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with staged.open("wb") as file:
            torch.save({"format": _FORMAT, "purpose": dict(purpose), **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        staged.unlink(missing_ok=True)
        raise TrainingError(
            f"the checkpoint cannot be written: {_reason(error)}",
            where=str(target),
            help="free some space, or write somewhere else",
        ) from error


def read_checkpoint(path: str | os.PathLike[str], purpose: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `write_checkpoint` wrote, or None where there is no file. Only tensors and plain data are read.

    Raises:
        TrainingError: the file is no checkpoint, or one of another model or of other options, which are named.
    """
    if not Path(path).exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content["format"] != _FORMAT:
            raise ValueError("another format")
    except Exception as error:  # what torch raises on bytes that it cannot read is not documented
        raise TrainingError(
            f"this is no checkpoint of graphopt.recover, or it is damaged: {_reason(error)}",
            where=str(path),
            help="name another file, or start again with resume=False",
        ) from error
    _check_purpose(content["purpose"], purpose, str(path))
    return content


def _check_purpose(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    names = ("model", "insertions", "teacher")
    words = {"model": "another model", "insertions": "other insertions", "teacher": "another teacher"}
    for name in names:
        if found.get(name) != wanted.get(name):
            raise TrainingError(
                f"the checkpoint is of {words[name]}",
                where=where,
                help="resume with the same model, insertions and teacher, or start again with resume=False",
            )
    different = [
        f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}"
        for name in sorted({*found, *wanted} - set(names))
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise TrainingError(
            f"the checkpoint was made with other options: {'; '.join(different)}",
            where=where,
            help="resume with the same options, or start again with resume=False",
        )


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, torch.Tensor)
