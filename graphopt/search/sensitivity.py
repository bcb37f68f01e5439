"""How much the outputs suffer as a group shrinks, and the shares that cost the least of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import onnx_ir as ir

from graphopt.criteria.contract import Knowledge
from graphopt.criteria.residual import residual_curves
from graphopt.errors import DataError, GraphoptError
from graphopt.ir.channels import ChannelGroups
from graphopt.ir.removal import mask_channels
from graphopt.ir.session import Feeds, Session, open_session
from graphopt.search.contract import Allocation, Candidate, Path, Problem
from graphopt.search.global_ranking import check_limit

Curve = tuple[tuple[float, ...], tuple[float, ...]]
"""Shares of a group that are gone, ascending in (0, 1), and the error at each, at least 0."""

_FLOOR = 1e-10
"""Added to errors before their logarithm is taken."""
_FLATTEST, _STEEPEST = 0.05, 200.0
"""Bounds of the fitted rate: an error that does not rise with the share says that anything may go, not everything."""
_LARGEST_ERROR = 1e6
_OBJECTIVES = ("error", "shape", "residual")


@dataclass(frozen=True)
class Exponential:
    """An error that grows as scale * exp(rate * share).

    Attributes:
        scale: a > 0.
        rate: k > 0.
    """

    scale: float
    rate: float

    @property
    def slope(self) -> float:
        """The derivative where nothing is gone, a k."""
        return self.scale * self.rate


@dataclass(frozen=True)
class Sensitivity(Allocation):
    """Shares that balance how fast the error of each group grows, from curves that are measured, computed or given.

    The lowest-scored units of one group alone are masked, at a few shares rho, and the relative squared error of the
    outputs is measured on the inputs at hand. An exponential is fitted to each curve, ln I = ln a + k rho, weighted by
    sqrt(I). Minimising the sum of F_l a_l exp(k_l rho_l) over groups of cost F_l at a given sum of F_l rho_l has the
    closed form

        rho_l = clip( ln( x / (a_l k_l) ) / k_l, 0, limit )

    with one number x, found by bisection, that the target decides. Source: the global rate optimisation of CC
    (Li et al. 2021, "Towards Compact CNNs via Collaborative Compression", arXiv 2105.11228), which divides each curve
    by its largest value ("shape"). With "error" curves keep their size and errors are not weighted by cost, so that
    the sum of the errors themselves is least: rho_l = clip( ln( x F_l / (a_l k_l) ) / k_l, 0, limit ).

    With "residual" nothing is masked: the error of a group is what least squares cannot make up for where its channels
    are read, in closed form at every number of units (`graphopt.criteria.residual.residual_curves`), whichever
    criterion ranks them. These curves begin at 0 and are no exponentials: the largest convex curve below each is
    followed itself, always where the next stretch costs least error for what it saves, which minimises the sum of
    these errors. It is meant for pruning with a reconstruction behind.

    Top-1 on 2,000 images after pruning inside of blocks and a least-squares rebuild, 256 images, ResNet-20 (87.75
    before) at 0.8, 0.65 and 0.5 of the MACs: 86.6, 85.4, 82.2 ("residual", units by `Residual`); 86.95, 85.35, 80.85
    ("residual", units by L2); 86.8, 84.85, 80.9 ("error", units by L2); uniform 85.55, 83.15, 77.4 (L2) and 86.3,
    83.65, 77.95 (`Residual`); `GlobalRanking` of `Residual`, normalise "none" and gain "mac": 86.9, 85.4, 83.05.
    ResNet-56 (90.0 before) at 0.5, in this order but for the second: 87.5, 86.85, 86.2, 85.5, 87.3.

    Curves are as good as the inputs. ResNet-20, MACs to 0.8 of what they were, units by L2, nothing compensated, top-1
    on 2,000 images: 80.0 with 128 unlabelled images, 78.5 with synthetic inputs, 64.9 on 1/f probes, which make the
    first and the last layers look harmless; 74.0 for uniform, 87.25 before. At 0.7: 61.8, 57.3, 28.2; uniform 57.6.

    Options:
        shares: of a group that are masked in turn, each in (0, 1); "residual" needs none.
        samples: number of inputs that errors are measured on, at most; "residual" takes all that there are.
        objective: "error", "shape" or "residual", see above.
        limit: largest share of a group that may go. CC has 0.95; curves that were measured up to 0.7 say nothing
            that far.
        curves: what somebody else computed, as pairs of a group's name and its `Curve`, or a mapping
            from one to the other. Groups without a curve are measured.

    Raises:
        GraphoptError: an option is out of range, or a curve is none.

    Example:
        >>> given = Sensitivity(curves={"layer1.conv1": ((0.25, 0.5), (0.01, 0.1))})
        >>> round(given.fitted["layer1.conv1"].rate, 2)
        9.21
    """

    name: ClassVar[str] = "sensitivity"
    needs: ClassVar[str] = "inputs"

    shares: tuple[float, ...] = (0.15, 0.3, 0.5, 0.7)
    samples: int = 32
    objective: str = "error"
    limit: float = 0.75
    curves: Mapping[str, Curve] | tuple[tuple[str, Curve], ...] = ()

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise GraphoptError(f"shares are {self.shares}", help="give shares of a group, each between 0 and 1")
        if self.samples < 1:
            raise GraphoptError(f"samples is {self.samples}, it must be at least 1")
        if self.objective not in _OBJECTIVES:
            raise GraphoptError(f"unknown objective {self.objective!r}", help=f"one of {', '.join(_OBJECTIVES)}")
        check_limit(self.limit)
        pairs = self.curves.items() if isinstance(self.curves, Mapping) else self.curves
        object.__setattr__(self, "curves", tuple((name, _checked(name, curve)) for name, curve in pairs))

    @property
    def given(self) -> dict[str, Curve]:
        """The curves that were given, by name of the group."""
        return dict(cast("tuple[tuple[str, Curve], ...]", self.curves))

    @property
    def fitted(self) -> dict[str, Exponential]:
        """The exponentials of the curves that were given."""
        return {name: self._fit(curve) for name, curve in self.given.items()}

    def path(self, problem: Problem) -> Path:
        """The pressure is the logarithm of x, from where the first group begins to where the last one ends.

        Raises:
            DataError: curves must be measured, and there are no inputs, or they do not fit the model.
        """
        curves = self.given
        missing = [candidate for candidate in problem.candidates if candidate.name not in curves]
        if missing:
            curves |= self._measured(problem, missing)
        if self.objective == "residual":
            return self._along_curves(problem, curves)
        fits = [self._fit(curves[candidate.name]) for candidate in problem.candidates]
        weights = np.ones(len(fits))
        if self.objective == "error":
            weights = np.array([_weight(problem, candidate) for candidate in problem.candidates])
        starts = [math.log(fit.slope / weight) for fit, weight in zip(fits, weights, strict=True)]
        ends = [start + fit.rate * self.limit for start, fit in zip(starts, fits, strict=True)]
        first, last = min(starts), max(ends)

        def removed(pressure: float) -> dict[str, float]:
            rates = exponential_rates(fits, first + pressure * (last - first), self.limit, weights)
            return {
                candidate.name: min(float(rate) * candidate.units, float(candidate.most))
                for candidate, rate in zip(problem.candidates, rates, strict=True)
            }

        return removed

    def _along_curves(self, problem: Problem, curves: Mapping[str, Curve]) -> Path:
        """The stretches of all curves by how much error they cost for what they save, the cheapest first."""
        stretches: list[tuple[float, int, float, float]] = []
        for number, candidate in enumerate(problem.candidates):
            shares, errors = convex_curve(curves[candidate.name], self.limit)
            prices = np.diff(errors) / np.diff(shares) / _weight(problem, candidate)
            pairs = zip(prices.tolist(), shares[:-1].tolist(), shares[1:].tolist(), strict=True)
            stretches.extend((price, number, first, last) for price, first, last in pairs)
        stretches.sort()

        def removed(pressure: float) -> dict[str, float]:
            position = pressure * len(stretches)
            gone = [0.0] * len(problem.candidates)
            for index, (_, number, first, last) in enumerate(stretches[: math.ceil(position)]):
                gone[number] = first + min(position - index, 1.0) * (last - first)
            return {
                candidate.name: min(share * candidate.units, float(candidate.most))
                for candidate, share in zip(problem.candidates, gone, strict=True)
            }

        return removed

    def _fit(self, curve: Curve) -> Exponential:
        shares, errors = (np.array(side, np.float64) for side in curve)
        if self.objective == "shape" and errors.max() > 0:
            errors = errors / errors.max()
        return fit_exponential(shares, errors)

    def _measured(self, problem: Problem, candidates: Sequence[Candidate]) -> dict[str, Curve]:
        if problem.feeds is None:
            raise DataError(
                f"the allocation {self.name!r} measures errors on inputs, and there are none",
                where="allocation",
                help="pass calibration inputs or let probes stand in, give curves, or choose allocation='uniform'",
            )
        if self.objective == "residual":
            knowledge = Knowledge(problem.model, problem.groups, problem.feeds(), problem.threads)
            scores = {candidate.name: candidate.scores for candidate in candidates}
            found = residual_curves(knowledge, [candidate.group for candidate in candidates], scores)
            return {name: _checked(name, (tuple(x), tuple(y))) for name, (x, y) in found.items()}
        feeds = first_samples(problem.feeds(), self.samples)
        return measured_curves(
            problem.model, candidates, self.shares, feeds, groups=problem.groups, threads=problem.threads
        )


def _weight(problem: Problem, candidate: Candidate) -> float:
    """F_l: what a whole group costs in the coin of the target."""
    return max(problem.saving(candidate, problem.target.kind), 1e-9) * candidate.units


def _checked(name: str, curve: Curve) -> Curve:
    """A curve as plain floats. Raises `GraphoptError` where it is none."""
    try:
        shares, errors = (tuple(float(number) for number in side) for side in curve)
    except (TypeError, ValueError):
        shares, errors = (), ()
    if not shares or len(shares) != len(errors):
        raise GraphoptError("a curve is a pair of shares and errors, equally many", where=name)
    if not all(0 < share <= 1 for share in shares) or not all(error >= 0 and math.isfinite(error) for error in errors):
        raise GraphoptError("shares of a curve are in (0, 1], errors are finite and at least 0", where=name)
    return shares, errors


def convex_curve(curve: Curve, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest convex curve from (0, 0) below the points of a curve, up to a share.

    Args:
        curve: shares and errors.
        limit: points of larger shares are left out.

    Returns:
        Its corners: shares, ascending from 0, and errors, float64 [corners]; slopes between them rise.

    Example:
        >>> convex_curve(((0.25, 0.5, 0.75, 1.0), (0.3, 0.4, 0.9, 5.0)), 0.75)
        (array([0.  , 0.5 , 0.75]), array([0. , 0.4, 0.9]))
    """
    points = sorted((share, error) for share, error in zip(*curve, strict=True) if share <= limit + 1e-9)
    corners = [(0.0, 0.0)]
    for share, error in points:
        if share <= corners[-1][0]:
            continue
        while len(corners) > 1:
            (first, low), (second, high) = corners[-2:]
            if (high - low) * (share - second) < (error - high) * (second - first):
                break
            corners.pop()
        corners.append((share, error))
    shares, errors = np.array(corners).T
    return shares, errors


def fit_exponential(shares: np.ndarray, errors: np.ndarray) -> Exponential:
    """The least-squares line through (share, ln error), weighted by the square root of the error.

    Args:
        shares: float64 [points] in (0, 1].
        errors: float64 [points], at least 0.

    Returns:
        The exponential; its rate is kept within bounds, which covers curves of one point and flat ones.

    Example:
        >>> fit = fit_exponential(np.array([0.2, 0.4, 0.8]), 0.01 * np.exp(5 * np.array([0.2, 0.4, 0.8])))
        >>> round(fit.scale, 4), round(fit.rate, 4)
        (0.01, 5.0)
    """
    logarithms = np.log(errors + _FLOOR)
    weights = np.sqrt(errors) + math.sqrt(_FLOOR)
    weights = weights / weights.sum()
    centre, middle = float(weights @ shares), float(weights @ logarithms)
    spread = float(weights @ (shares - centre) ** 2)
    rate = float(weights @ ((shares - centre) * (logarithms - middle))) / spread if spread > 1e-12 else 1.0
    rate = min(max(rate, _FLATTEST), _STEEPEST)
    return Exponential(math.exp(middle - rate * centre), rate)


def exponential_rates(
    fits: Sequence[Exponential], log_x: float, limit: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """rho_l = clip( (ln x + ln w_l - ln(a_l k_l)) / k_l, 0, limit ): float64 [groups].

    Args:
        fits: the error of each group.
        log_x: ln x.
        limit: largest share.
        weights: w_l > 0, 1 where not given.
    """
    logarithms = np.zeros(len(fits)) if weights is None else np.log(weights)
    slopes = np.array([math.log(fit.slope) for fit in fits])
    rates = np.array([fit.rate for fit in fits])
    return np.clip((log_x + logarithms - slopes) / rates, 0.0, limit)


def closed_form(fits: Sequence[Exponential], costs: np.ndarray, share: float, limit: float = 0.95) -> np.ndarray:
    """The shares that minimise sum F_l a_l exp(k_l rho_l) where sum F_l rho_l is `share` of sum F_l.

    Args:
        fits: a_l and k_l.
        costs: F_l > 0, float64 [groups].
        share: of the costs that goes, in [0, limit].
        limit: largest share of a group.

    Returns:
        rho_l, float64 [groups].

    Raises:
        GraphoptError: `share` is above `limit`.

    Example:
        >>> closed_form([Exponential(0.1, 3.0)] * 2, np.array([1.0, 5.0]), 0.4).round(3)
        array([0.4, 0.4])
    """
    if not 0 <= share <= limit:
        raise GraphoptError(f"a share of {share} is not between 0 and the limit {limit}")
    costs = np.asarray(costs, np.float64)
    starts = [math.log(fit.slope) for fit in fits]
    low, high = min(starts), max(start + fit.rate * limit for start, fit in zip(starts, fits, strict=True))
    for _ in range(200):
        middle = (low + high) / 2
        gone = float(costs @ exponential_rates(fits, middle, limit)) / float(costs.sum())
        low, high = (middle, high) if gone < share else (low, middle)
    return exponential_rates(fits, high, limit)


def measured_curves(
    model: ir.Model,
    candidates: Sequence[Candidate],
    shares: Sequence[float],
    feeds: Iterable[Feeds],
    *,
    groups: ChannelGroups | None = None,
    threads: int = 1,
) -> dict[str, Curve]:
    """Mask the lowest units of each group alone and measure how far the outputs move.

    Args:
        model: canonical; it is not changed.
        candidates: groups with scores.
        shares: of the units that are masked, rounded to whole units; equal counts are measured once.
        feeds: inputs, iterable more than once. They are kept while the curves are measured.
        groups: what `channel_groups(model)` returned.
        threads: intra-op threads of onnxruntime.

    Returns:
        Group name to curve. The error is the mean, over outputs, of sum (y - y_masked)^2 / sum y^2; of an output of
        integers the share of its elements that changed. A result that is not finite counts as 1e6.

    Raises:
        DataError: there are no inputs, or they do not fit the model.
    """
    batches = [dict(one) for one in feeds]
    if not batches:
        raise DataError("there is not a single input to measure errors on", where="allocation")
    reference = open_session(model, optimized=False, threads=threads)
    expected = [reference.run_feeds(one) for one in batches]
    found: dict[str, Curve] = {}
    for candidate in candidates:
        counts = sorted({min(max(1, round(share * candidate.units)), candidate.units - 1) for share in shares})
        errors: list[float] = []
        for count in counts:
            masked = mask_channels(model, {candidate.name: candidate.lowest(count)}, groups=groups)
            session = open_session(masked, optimized=False, threads=threads)
            errors.append(relative_error(session, batches, expected))
        found[candidate.name] = (tuple(count / candidate.units for count in counts), tuple(errors))
    return found


def relative_error(session: Session, batches: Sequence[Feeds], expected: Sequence[Sequence[np.ndarray]]) -> float:
    """Mean over outputs of the relative squared error over all batches, at most 1e6.

    Args:
        session: of the changed model.
        batches: inputs.
        expected: outputs of the model as it was, for each batch.
    """
    moved = np.zeros(len(expected[0]))
    size = np.zeros(len(expected[0]))
    for feeds, wanted in zip(batches, expected, strict=True):
        for index, (a, b) in enumerate(zip(wanted, session.run_feeds(feeds), strict=True)):
            if a.dtype.kind not in "fc" and a.dtype.kind in "biu":
                moved[index] += float((a != b).sum()) if a.shape == b.shape else a.size
                size[index] += a.size
            elif a.dtype.kind in "fcV" and a.shape == b.shape:
                a, b = a.astype(np.float64), b.astype(np.float64)
                kept = np.isfinite(a)
                moved[index] += float(np.square(np.where(kept, a, 0) - np.where(kept, b, 0)).sum())
                size[index] += float(np.square(np.where(kept, a, 0)).sum())
    errors = np.divide(moved, size, out=np.zeros_like(moved), where=size > 0)
    error = float(errors[size > 0].mean()) if (size > 0).any() else 0.0
    return min(error, _LARGEST_ERROR) if math.isfinite(error) else _LARGEST_ERROR


def first_samples(feeds: Iterable[Feeds], samples: int) -> list[dict[str, np.ndarray]]:
    """The first whole batches that hold `samples` samples, at least one batch; a sample is an entry of axis 0."""
    found: list[dict[str, np.ndarray]] = []
    count = 0
    for one in feeds:
        found.append(dict(one))
        sizes = [array.shape[0] for array in one.values() if array.ndim]
        count += max(sizes, default=1)
        if count >= samples:
            break
    return found
