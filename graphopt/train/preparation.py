"""From a graph and settings to a module that can be trained: lifted, insertions attached, parameters chosen."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

import onnx_ir as ir
import torch

from graphopt.errors import TrainingError
from graphopt.ir.lift import lift
from graphopt.ir.lifted import LiftedModule
from graphopt.ir.lower import attribute
from graphopt.ir.ops.row import tensor_shape
from graphopt.train.settings import DEFAULT_LEARNING_RATE, Settings

_PATTERN = set("*?[")


def prepare_module(model: ir.Model, settings: Settings) -> LiftedModule:
    """Lift, move to the device, attach copies of the insertions, and freeze what is not to be trained.

    Half-precision models are trained in float32; `lower` rounds back to the type of each weight.

    Raises:
        LiftError: an operator has no torch function, or an insertion does not fit.
        TrainingError: `trainable` names nothing, or there is no float parameter.
    """
    named = [name for name in settings.trainable or () if not _PATTERN & set(name) and name in model.graph.initializers]
    module = lift(model, table=settings.table, trainable=named)
    if module.dtype.itemsize < 4:
        module.to(torch.float32)
    module.to(settings.device)
    chosen = _chosen(module, settings.trainable)
    for name in module.interface.trainable - chosen:
        attribute(module, module.interface.initializers[name]).requires_grad_(False)
    for name, insertion in settings.insertions.items():
        module.attach(name, copy.deepcopy(insertion))
    if not any(parameter.requires_grad for parameter in module.parameters()):
        if settings.trainable == ():
            raise TrainingError(
                "`trainable` names nothing",
                where="trainable",
                help="leave it out to train all float weights, name some, or pass `insertions` that have parameters",
            )
        raise TrainingError(
            "the model has no float parameter to train",
            where=model.graph.name or "the graph",
            help="recover the float model with insertions; name other float weights in `trainable`",
        )
    return module


def trained_parameters(module: LiftedModule) -> dict[str, torch.Tensor]:
    """The parameters of the graph itself that are trained, by ONNX name, in the order of the graph."""
    found = {
        name: attribute(module, path)
        for name, path in module.interface.initializers.items()
        if name in module.interface.trainable
    }
    return {name: parameter for name, parameter in found.items() if parameter.requires_grad}


def make_optimizer(module: LiftedModule, settings: Settings) -> torch.optim.Optimizer:
    """The user's optimizer, or AdamW: decay on weights of the graph with two axes or more, none on the rest.

    Raises:
        TrainingError: the user's function raised, or returned no optimizer.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if settings.optimizer is not None:
        try:
            made = settings.optimizer(parameters)
        except Exception as error:
            raise TrainingError(
                f"`optimizer` raised {type(error).__name__}: {error}",
                where="optimizer",
                help="it is called with a list of parameters",
            ) from error
        if not isinstance(made, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TrainingError(
                f"`optimizer` returned a {type(made).__name__}",
                where="optimizer",
                help="for instance optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)",
            )
        return made
    weights = {id(parameter) for parameter in trained_parameters(module).values() if parameter.ndim > 1}
    groups = [
        {"params": [p for p in parameters if id(p) in weights], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if id(p) not in weights], "weight_decay": 0.0},
    ]
    rate = settings.learning_rate or DEFAULT_LEARNING_RATE
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)


def integer_note(model: ir.Model, trained: Mapping[str, torch.Tensor]) -> str | None:
    """A sentence where weights are integers and stay as they are, as in a quantized model."""
    fixed = sum(
        tensor.size
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None
        and len(tensor_shape(tensor)) > 1
        and (tensor.dtype.is_integer() and tensor.dtype.bitwidth <= 8)
    )
    if not fixed:
        return None
    moving = sum(parameter.numel() for parameter in trained.values())
    return f"{fixed} elements of weights are integers and stay as they are; {moving} float elements are trained"


def _chosen(module: LiftedModule, patterns: tuple[str, ...] | None) -> frozenset[str]:
    """Initializers that names and patterns stand for."""
    available = module.interface.trainable
    if patterns is None:
        return available
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in available if name == pattern or fnmatchcase(name, pattern)}
        if not found:
            close = difflib.get_close_matches(pattern, available, 3) or sorted(available)[:3]
            raise TrainingError(
                f"`trainable` names {pattern!r}, and no float weight is called so",
                where="trainable",
                help=f"names are those of the ONNX initializers, for instance {', '.join(close) or '(there are none)'}",
            )
        chosen |= found
    return frozenset(chosen)
