"""How important a channel is: criteria by weights, activations and gradients, one protocol for all."""

from graphopt.criteria.contract import Criterion, Knowledge, checked_scores
from graphopt.criteria.registry import CRITERIA, criterion

__all__ = ["CRITERIA", "Criterion", "Knowledge", "checked_scores", "criterion"]
