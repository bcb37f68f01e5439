"""NonMaxSuppression: the best boxes of each class, without those that overlap a better one."""

from __future__ import annotations

import torch

from graphopt.ir.ops.torch.operands import Numbers, number


def non_max_suppression(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    max_output_boxes_per_class: Numbers | None = None,
    iou_threshold: Numbers | None = None,
    score_threshold: Numbers | None = None,
    *,
    center_point_box: int = 0,
) -> torch.Tensor:
    """NonMaxSuppression 10 and 11: [n, 3], batch, class and box of each box kept, the best of a class first.

    boxes: [batches, boxes, 4]. scores: [batches, classes, boxes].
    """
    limit = 0 if max_output_boxes_per_class is None else int(number(max_output_boxes_per_class))
    overlap = 0.0 if iou_threshold is None else float(number(iou_threshold))
    floor = None if score_threshold is None else float(number(score_threshold))
    corners = _corners(boxes, bool(center_point_box))
    kept: list[torch.Tensor] = [torch.empty(0, 3, dtype=torch.int64, device=boxes.device)]
    for batch in range(scores.shape[0]):
        for label in range(scores.shape[1]):
            best = _best(corners[batch], scores[batch, label], limit, overlap, floor)
            kept.append(torch.stack((torch.full_like(best, batch), torch.full_like(best, label), best), 1))
    return torch.cat(kept)


def _best(corners: torch.Tensor, scores: torch.Tensor, limit: int, overlap: float, floor: float | None) -> torch.Tensor:
    """Indices of the boxes of one class that are kept."""
    candidates = scores.argsort(descending=True, stable=True)
    if floor is not None:
        candidates = candidates[scores[candidates] > floor]
    kept: list[torch.Tensor] = []
    while len(kept) < limit and candidates.shape[0]:
        best, candidates = candidates[:1], candidates[1:]
        kept.append(best)
        candidates = candidates[~(_intersection_over_union(corners[best], corners[candidates]) > overlap)]
    return torch.cat(kept) if kept else candidates[:0]


def _corners(boxes: torch.Tensor, centered: bool) -> torch.Tensor:
    """Boxes as [..., (low, high), 2]: from center and size, or from any two opposite corners."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if centered:
        return torch.stack((first - second / 2, first + second / 2), -2)
    return torch.stack((torch.minimum(first, second), torch.maximum(first, second)), -2)


def _intersection_over_union(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    low, high = torch.maximum(box[:, 0], others[:, 0]), torch.minimum(box[:, 1], others[:, 1])
    intersection = (high - low).clamp(min=0).prod(-1)
    areas = (box[:, 1] - box[:, 0]).prod(-1) + (others[:, 1] - others[:, 0]).prod(-1)
    return intersection / (areas - intersection)
