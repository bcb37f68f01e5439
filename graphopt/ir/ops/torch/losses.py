"""Torch functions of the losses."""

from __future__ import annotations

import torch
from torch.nn import functional

_NO_CLASS = -100
"""torch's default of `ignore_index`, which is no class."""


def negative_log_likelihood_loss(
    log_probabilities: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """NegativeLogLikelihoodLoss 13+: [batch, classes, ...] and classes [batch, ...] to [batch, ...] or a scalar."""
    ignored = _NO_CLASS if ignore_index is None else ignore_index
    return functional.nll_loss(log_probabilities, target.long(), weight, ignore_index=ignored, reduction=reduction)


def softmax_cross_entropy_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    outputs: int = 1,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """SoftmaxCrossEntropyLoss 13: as above of scores; the second output is their log probabilities."""
    log_probabilities = torch.log_softmax(scores, dim=1)
    loss = negative_log_likelihood_loss(
        log_probabilities, labels, weights, ignore_index=ignore_index, reduction=reduction
    )
    return loss if outputs == 1 else (loss, log_probabilities)
