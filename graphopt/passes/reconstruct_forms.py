"""Closed forms: how to write channels as combinations of others, from weights and statistics alone.

A removed channel is taken for a combination of the others, A_p = sum_k s_pk A_k. The combination folds into whatever
reads them: U[:, k] += sum_p s_pk U[:, p], and what is missing on average into the bias. Nothing new is in the graph.
Where S comes from is the *form*:

* `ridge`: min |v_p - V^T s|^2 + alpha1 (b_p - b^T s)^2 + alpha2 |s|^2 over folded filters v and biases b. The
  reconstruction of UDFC (Bai, Chen, Shen, Qian, Liu 2023), derived anew; alpha2 is relative to the mean |v|^2.
* `neuron-merging`: one nearest neighbour by direction and bias (Kim, Kim, Park 2020), with the scale as the
  mathematics says (the released code has its inverse).
* `lbyl`: a ridge in the space of raw filters (Lee, Kim, Choi 2022), folded as the mathematics says.
* `moments`: least squares in the metric of propagated second moments (`graphopt.inputs.gaussian`).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.passes.reconstruct_chain import Rows

_FLOOR = 1e-12
"""Eigenvalues below this share of the largest are 0: directions that nothing is known of stay untouched."""
_FEW_KINDS = 2
"""Different pairs of weights up to which each has a system of its own; more share one decomposition."""


class ClosedForm(abc.ABC):
    """A way to write channels as combinations of others. Subclasses are frozen dataclasses, fields are options.

    Class attributes:
        name: kebab-case.
        needs_covariance: whether it reads the covariance of the channels instead of their filters.
    """

    name: ClassVar[str]
    needs_covariance: ClassVar[bool] = False

    @abc.abstractmethod
    def combine(self, rows: Rows, wanted: np.ndarray, kept: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """S, float64 [wanted, kept]: row n rebuilds channel wanted[n] from the channels kept.

        Args:
            rows: what the channels are made of.
            wanted: int64 [wanted], rows that are to be rebuilt.
            kept: int64 [kept], rows that are there to combine.
            prior: float64 [wanted, kept], what S is pulled to: 0 for what was removed, 1 for itself.
        """


def solve_rows(
    gram: np.ndarray,
    right: np.ndarray,
    columns: np.ndarray,
    targets: np.ndarray,
    *,
    alpha1: np.ndarray,
    alpha2: np.ndarray,
    prior: np.ndarray,
) -> np.ndarray:
    """The minimum of |v - V^T s|^2 + alpha1 |b - B^T s|^2 + alpha2 |s - s0|^2 for many rows at once.

    Args:
        gram: float64 [K, K], V V^T.
        right: float64 [K, T], V v of each row.
        columns: float64 [K, J], B; zero columns where there are no biases.
        targets: float64 [T, J], b of each row.
        alpha1: float64 [T], >= 0.
        alpha2: float64 [T], >= 0; infinity gives s0.
        prior: float64 [T, K], s0.

    Returns:
        float64 [T, K]. Singular systems give the solution of least norm (duplicate and dead channels).

    Example:
        >>> solve_rows(np.eye(2), np.array([[2.0], [0.0]]), np.zeros((2, 0)), np.zeros((1, 0)),
        ...     alpha1=np.ones(1), alpha2=np.zeros(1), prior=np.zeros((1, 2))).tolist()
        [[2.0, 0.0]]
    """
    found = np.array(prior, np.float64)
    kinds, of_row = np.unique(np.stack([alpha1, alpha2]), axis=1, return_inverse=True)
    if kinds.shape[1] > _FEW_KINDS:
        return _solve_by_spectrum(gram, right, columns, targets, alpha1, alpha2, found)
    for kind, (first, second) in enumerate(kinds.T):
        chosen = np.flatnonzero(of_row.reshape(-1) == kind)
        if np.isinf(second):
            continue
        system = gram + first * columns @ columns.T + second * np.eye(len(gram))
        wanted = right[:, chosen] + first * columns @ targets[chosen].T + second * prior[chosen].T
        found[chosen] = _solve(system, wanted).T
    return found


def _solve(system: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    try:
        factor = cho_factor(system)
        pivots = np.abs(np.diag(factor[0]))
        if pivots.size and pivots.min() ** 2 > 1e-10 * pivots.max() ** 2:
            return cho_solve(factor, right)
    except LinAlgError:
        pass
    return _pseudo_inverse(system) @ right


def _pseudo_inverse(system: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(system)
    largest = float(np.abs(values).max(initial=0.0))
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=values > _FLOOR * largest)
    return (vectors * inverse) @ vectors.T


def _solve_by_spectrum(
    gram: np.ndarray,
    right: np.ndarray,
    columns: np.ndarray,
    targets: np.ndarray,
    alpha1: np.ndarray,
    alpha2: np.ndarray,
    prior: np.ndarray,
) -> np.ndarray:
    """As `solve_rows`, for weights that differ from row to row: one decomposition, and Woodbury for the biases."""
    values, vectors = np.linalg.eigh(gram)
    values = np.where(values > _FLOOR * float(values.max(initial=0.0)), values, 0.0)
    turned, wanted = vectors.T @ columns, vectors.T @ right
    found = prior.copy()
    for row, (first, second) in enumerate(zip(alpha1, alpha2, strict=True)):
        if np.isinf(second):
            continue
        total = values + second
        inverse = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)[:, None]
        vector = (wanted[:, row] + first * turned @ targets[row] + second * vectors.T @ prior[row])[:, None]
        inner = np.eye(turned.shape[1]) + first * turned.T @ (inverse * turned)
        solved = inverse * vector
        solved = solved - inverse * (turned @ np.linalg.solve(inner, first * turned.T @ solved))
        found[row] = vectors @ solved[:, 0]
    return found


@dataclass(frozen=True)
class Ridge(ClosedForm):
    """Folded filters and biases by ridge regression; see the module.

    Options:
        alpha1: weight of the biases.
        alpha2: pull to s0, relative to the mean squared length of the filters that are kept; infinity prunes only.
    """

    alpha1: float = 0.01
    alpha2: float = 0.008

    name: ClassVar[str] = "ridge"

    def combine(self, rows: Rows, wanted: np.ndarray, kept: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """One system for all rows."""
        gram = rows.gram[np.ix_(kept, kept)]
        size = float(np.diag(gram).mean()) if len(kept) else 0.0
        pull = self.alpha2 * size if self.alpha2 and np.isfinite(self.alpha2) else self.alpha2
        return solve_rows(
            gram,
            rows.gram[np.ix_(kept, wanted)],
            rows.columns[kept],
            rows.columns[wanted],
            alpha1=np.full(len(wanted), self.alpha1),
            alpha2=np.full(len(wanted), pull),
            prior=prior,
        )


@dataclass(frozen=True)
class NeuronMerging(ClosedForm):
    """The one nearest neighbour, scaled: s = |v_p| / |v_k|.

    Options:
        threshold: least cosine between the folded filters; below, the channel is only removed.
        balance: weight of the distance in direction; the rest goes to the distance in bias.
    """

    threshold: float = 0.1
    balance: float = 0.85

    name: ClassVar[str] = "neuron-merging"

    def combine(self, rows: Rows, wanted: np.ndarray, kept: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """At most one entry a row. Rows that are their own prior (nothing was removed) keep it."""
        found = prior.copy()
        length = np.sqrt(np.diag(rows.gram).clip(min=0))
        usable = length[kept] > 0
        for row in np.flatnonzero(~prior.any(axis=1)):
            unit = wanted[row]
            if length[unit] == 0 or not usable.any():
                continue
            safe = np.where(usable, length[kept], 1.0)
            cosine = np.where(usable, rows.gram[unit, kept] / (safe * length[unit]), -np.inf)
            scale = length[unit] / safe
            apart = np.linalg.norm(rows.columns[unit] - scale[:, None] * rows.columns[kept], axis=1)
            most = float(apart[usable].max())
            distance = self.balance * (1 - cosine) + (1 - self.balance) * (apart / most if most > 0 else apart)
            distance[~usable | (cosine < self.threshold)] = np.inf
            nearest = int(np.argmin(distance))
            if np.isfinite(distance[nearest]):
                found[row, nearest] = scale[nearest]
        return found


@dataclass(frozen=True)
class Lbyl(ClosedForm):
    """A ridge in raw filters w = v / r, r the gain of the channel, its solution s folded as s' = s r_p / r_k.

    min |w_p - sum s_k w_k|^2 + l1 (b_p - sum s'_k b_k)^2 + l2 |s'|^2. In s' and folded filters that is `ridge` with
    alpha1 = l1 r_p^2 and alpha2 = l2 r_p^2, which is what is solved: nothing is divided by a gain, which may be 0.

    Options:
        lambda1: weight of the biases.
        lambda2: weight of the size of s'.
    """

    lambda1: float = 2e-5
    lambda2: float = 6e-3

    name: ClassVar[str] = "lbyl"

    def combine(self, rows: Rows, wanted: np.ndarray, kept: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """Weights of their own for each row."""
        power = rows.gain[wanted] ** 2
        return solve_rows(
            rows.gram[np.ix_(kept, kept)],
            rows.gram[np.ix_(kept, wanted)],
            rows.columns[kept],
            rows.columns[wanted],
            alpha1=self.lambda1 * power,
            alpha2=self.lambda2 * power,
            prior=prior,
        )


@dataclass(frozen=True)
class MomentMatch(ClosedForm):
    """Regression of the channels on each other: S = C_PK (C_KK + a I)^-1, C their propagated covariance.

    Options:
        shrinkage: a, relative to the mean variance of what is kept.
    """

    shrinkage: float = 1e-3

    name: ClassVar[str] = "moments"
    needs_covariance: ClassVar[bool] = True

    def combine(self, rows: Rows, wanted: np.ndarray, kept: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """One system for all rows."""
        covariance = rows.covariance
        if covariance is None:
            raise GraphoptError("the form `moments` needs the covariance of the channels", help="use another form")
        of_kept = covariance[np.ix_(kept, kept)]
        pull = self.shrinkage * float(np.diag(of_kept).mean()) if len(kept) else 0.0
        return solve_rows(
            of_kept,
            covariance[np.ix_(kept, wanted)],
            np.zeros((len(kept), 0)),
            np.zeros((len(wanted), 0)),
            alpha1=np.zeros(len(wanted)),
            alpha2=np.full(len(wanted), pull),
            prior=prior,
        )


FORMS: dict[str, type[ClosedForm]] = {form.name: form for form in (Ridge, NeuronMerging, Lbyl, MomentMatch)}
"""All closed forms by name."""


def closed_form(form: str | ClosedForm) -> ClosedForm:
    """A form by its name, with default options, or the form itself.

    Raises:
        GraphoptError: there is no form of that name.

    Example:
        >>> closed_form("ridge")
        Ridge(alpha1=0.01, alpha2=0.008)
    """
    if isinstance(form, ClosedForm):
        return form
    if form not in FORMS:
        import difflib

        near = difflib.get_close_matches(str(form), FORMS, 1)
        raise GraphoptError(
            f"there is no closed form {form!r}",
            help=f"did you mean {near[0]!r}?" if near else f"forms are {', '.join(FORMS)}",
        )
    return FORMS[form]()


def scales_of_rounded(
    filters: np.ndarray,
    biases: np.ndarray,
    rounded: np.ndarray,
    rounded_biases: np.ndarray,
    *,
    alpha1: float = 0.01,
    alpha2: float = 0.0,
) -> np.ndarray:
    """One factor a channel that undoes what rounding did to its filter (DF-MPC, Chen et al. 2023): [N].

    Args:
        filters, rounded: float64 [N, ...] before and after.
        biases, rounded_biases: float64 [N].
        alpha1: weight of the biases.
        alpha2: pull to 1.

    A channel that was rounded to nothing keeps 1.

    Example:
        >>> scales_of_rounded(np.array([[2.0], [1.0]]), np.zeros(2), np.array([[1.0], [0.0]]), np.zeros(2)).tolist()
        [2.0, 1.0]
    """  # fmt: skip
    flat, other = filters.reshape(len(filters), -1), rounded.reshape(len(rounded), -1)
    above = (flat * other).sum(axis=1) + alpha1 * biases * rounded_biases + alpha2
    below = (other**2).sum(axis=1) + alpha1 * rounded_biases**2 + alpha2
    return np.divide(above, below, out=np.ones_like(above), where=below > 0)
