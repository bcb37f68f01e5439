"""Activations that are named in an attribute: those of the recurrent ops and of onnxruntime's fused ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from graphopt.errors import GraphoptError
from graphopt.ir.ops.torch.activations import elu, leaky_relu, softplus

Activation = Callable[[torch.Tensor], torch.Tensor]

_PLAIN: dict[str, Activation] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": functional.softsign,
    "softplus": softplus,
}
_WITH_PARAMETERS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, float]]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, {"alpha": 1.0, "beta": 0.0}),
    "leakyrelu": (leaky_relu, {"alpha": 0.01}),
    # Unlike the operator of the same name, the recurrent ops keep x where it equals alpha.
    "thresholdedrelu": (lambda x, alpha: torch.where(x >= alpha, x, 0), {"alpha": 1.0}),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), {"alpha": 1.0, "beta": 1.0}),
    "hardsigmoid": (lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), {"alpha": 0.2, "beta": 0.5}),
    "elu": (elu, {"alpha": 1.0}),
    "clip": (lambda x, alpha, beta: x.clamp(alpha, beta), {"alpha": float("-inf"), "beta": float("inf")}),
}
"""Functions with their parameters and the defaults of these."""


def activation_function(name: str, *given: float) -> Activation:
    """The activation `name` (in any case) with its parameters in order: defaults stand in for those not given."""
    key = name.lower()
    if key in _PLAIN:
        return _PLAIN[key]
    if key not in _WITH_PARAMETERS:
        raise GraphoptError(f"unknown activation {name!r}", help="the ONNX operator LSTM lists the activations")
    function, defaults = _WITH_PARAMETERS[key]
    parameters = {**defaults, **dict(zip(defaults, given, strict=False))}
    return lambda x: function(x, **parameters)


def activation_functions(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None
) -> list[Activation]:
    """The activations `names`; each that has an alpha (and a beta) takes the next one of its list while there are."""
    lists = {"alpha": list(alphas or ()), "beta": list(betas or ())}
    result: list[Activation] = []
    for name in names:
        _, defaults = _WITH_PARAMETERS.get(name.lower(), (None, {}))
        given = [lists[key].pop(0) if lists[key] else default for key, default in defaults.items()]
        result.append(activation_function(name, *given))
    return result
