"""Factorisations: one linear layer as a chain of smaller ones (design.md, floor 2). Pure maths, no graph is written."""

from __future__ import annotations

import difflib

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.factorizations.channel_svd import ChannelSvd
from graphopt.factorizations.contract import Factor, Factorization, FactorShape, Fit, Layer, Rank, composed, layer_of
from graphopt.factorizations.cp import Cp
from graphopt.factorizations.metric import Metric
from graphopt.factorizations.ranks import Budget, Option, candidate_ranks, cheapest_within, rounded_up, variational
from graphopt.factorizations.spatial_svd import SpatialSvd
from graphopt.factorizations.svd import Svd
from graphopt.factorizations.tucker import Tucker
from graphopt.factorizations.variational import variational_rank
from graphopt.ir.linear import Linear

FORMS: dict[str, Factorization] = {form.name: form for form in (Svd(), ChannelSvd(), SpatialSvd(), Tucker(), Cp())}
"""Every factorisation by its name."""


def factorization(name: str) -> Factorization:
    """The factorisation of that name.

    Raises:
        GraphoptError: there is none.

    Example:
        >>> factorization("tucker")
        Tucker()
    """
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, n=1, cutoff=0.4)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise GraphoptError(f"there is no factorisation {name!r}", help=f"{guess}there are {', '.join(FORMS)}")
    return FORMS[name]


def curve(
    layer: Layer | Linear, form: str, metric: Metric | None = None, *, round_to: int | None = None
) -> tuple[tuple[Rank, ...], np.ndarray, np.ndarray]:
    """What each rank of a form costs and loses.

    Args:
        layer: a layer with its sizes, or an operator of a graph: then costs are those of one place of its result.
        form: name of the factorisation.
        metric: second moments of what the layer reads; None for the identity.
        round_to: see `candidate_ranks`.

    Returns:
        Ranks below break-even, the cheapest first; expected squared error of the outputs over their power, float64
        [ranks]; multiply-accumulates, int64 [ranks].

    Raises:
        GraphoptError: there is no such form, or the layer has none.

    Example:
        >>> layer = Layer(np.diag([4.0, 3.0, 2.0, 1.0]) @ np.ones((4, 8)))
        >>> ranks, errors, macs = curve(layer, "svd", round_to=1)
        >>> ranks, errors.round(6).tolist(), macs.tolist()
        (((1,), (2,)), [0.0, 0.0], [12, 24])
    """
    layer = layer_of(layer) if isinstance(layer, Linear) else layer
    chosen = factorization(form)
    refusal = chosen.refusal(layer)
    if refusal is not None:
        raise GraphoptError(f"{form} does not fit the layer: {refusal}", help="choose another form")
    ranks = candidate_ranks(chosen, layer, round_to)
    fit = chosen.fit(layer, metric or Metric.identity(layer.groups, layer.columns))
    macs = np.array([chosen.macs(layer, rank) for rank in ranks], np.int64)
    return ranks, fit.errors(ranks), macs


__all__ = [
    "FORMS",
    "Budget",
    "ChannelSvd",
    "Cp",
    "Factor",
    "FactorShape",
    "Factorization",
    "Fit",
    "Layer",
    "Metric",
    "Option",
    "Rank",
    "SpatialSvd",
    "Svd",
    "Tucker",
    "candidate_ranks",
    "cheapest_within",
    "composed",
    "curve",
    "factorization",
    "layer_of",
    "rounded_up",
    "variational",
    "variational_rank",
]
