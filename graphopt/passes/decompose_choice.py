"""Which layers are taken apart, in which form, at which rank: by error, by variational Bayes, by a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.factorizations import (
    Budget,
    Fit,
    Option,
    Rank,
    candidate_ranks,
    cheapest_within,
    factorization,
    rounded_up,
    variational,
)
from graphopt.passes.contract import Context
from graphopt.passes.decompose_layers import Metrics, Refusal, Site
from graphopt.passes.decompose_speed import Speed, Speeds

_ROUNDS = 12
"""How often a budget is spread anew after layers turned out not to be faster."""


@dataclass(frozen=True, eq=False)
class Choice:
    """One layer that is taken apart, and how much faster the chain was measured; None where it was not."""

    site: Site
    option: Option
    speed: Speed | None = None


class Chooser:
    """Chooses for the layers of one model.

    Args:
        forms: names of the forms that are tried, in this order.
        round_to: see `candidate_ranks`.
        kind: what is to be saved: "macs", "params" or "bytes".
        metrics: of the inputs of each layer.
        speeds: None where nothing is measured.
        context: hears of the progress.
    """

    def __init__(
        self,
        forms: Sequence[str],
        round_to: int | None,
        kind: str,
        metrics: Metrics,
        speeds: Speeds | None,
        context: Context,
    ) -> None:
        self.forms, self.round_to, self.kind = forms, round_to, kind
        self.metrics, self.speeds, self.context = metrics, speeds, context
        self.refused: list[Refusal] = []
        self.declined: list[Refusal] = []
        self._ranks: dict[tuple[str, str], tuple[Rank, ...]] = {}

    @property
    def all_declined(self) -> list[Refusal]:
        """Layers that have no form, and those that are not worth it."""
        return [*self.refused, *self.declined]

    def is_able(self, site: Site) -> bool:
        """Whether a layer has one of the forms; the reason is kept where it has none."""
        reasons: dict[str, str] = {}
        for name in self.forms:
            refusal = factorization(name).refusal(site.layer)
            if refusal is None:
                return True
            reasons[name] = refusal
        why = "; ".join(f"no {name}: {reason}" for name, reason in reasons.items())
        if len(set(reasons.values())) == 1:
            why = next(iter(reasons.values()))
        self.refused.append(Refusal(site.name, site.weight.name or "", why))
        return False

    def by_error(self, sites: Sequence[Site], limit: float) -> list[Choice]:
        """Of each layer the chain that saves most among those with a squared relative error of at most `limit`."""
        chosen: list[Choice] = []
        for number, site in enumerate(sites):
            self._tell(number, len(sites), site)
            options: list[Option] = []
            least = 1.0
            for name, fit in self._fits(site):
                ranks = self._candidates(site, name)
                rank = cheapest_within(fit, ranks, limit)
                if rank is not None:
                    options.append(self._option(site, name, rank, fit.error(rank)))
                elif ranks:
                    least = min(least, min(fit.error(one) for one in ranks[-1:]))
            if options:
                chosen += self._fastest(site, options)
            else:
                self._decline(site, self._too_dear(site, f"errs by {least:.3g}, and {limit:.3g} is accepted"))
        return chosen

    def by_variational_bayes(self, sites: Sequence[Site]) -> list[Choice]:
        """Of each layer the chain that saves most at the ranks that variational Bayes finds in its weight."""
        chosen: list[Choice] = []
        for number, site in enumerate(sites):
            self._tell(number, len(sites), site)
            options: list[Option] = []
            found: list[str] = []
            for name, fit in self._fits(site):
                wanted = variational(fit.form, site.layer)
                rank = rounded_up(wanted, self._candidates(site, name))
                found.append(f"{name} {' '.join(map(str, wanted))}")
                if rank is not None:
                    options.append(self._option(site, name, rank, fit.error(rank)))
            if options:
                chosen += self._fastest(site, options)
            else:
                self._decline(site, f"variational Bayes finds a rank at or above break-even: {', '.join(found)}")
        return chosen

    def by_budget(self, sites: Sequence[Site], wanted: float) -> list[Choice]:
        """Chains that save `wanted` together, with the least sum of errors; as much as can be where it cannot."""
        options: dict[str, list[Option]] = {}
        for number, site in enumerate(sites):
            self._tell(number, len(sites), site)
            options[site.name] = [
                self._option(site, name, rank, fit.error(rank))
                for name, fit in self._fits(site)
                for rank in self._candidates(site, name)
            ]
        by_name = {site.name: site for site in sites}
        reasons: dict[str, str] = {}
        measured: dict[str, Speed | None] = {}
        chosen: dict[str, Option] = {}
        slow: dict[str, Option] = {}
        for _ in range(_ROUNDS):
            chosen = Budget(options).choose(wanted)
            slow = {}
            for name, option in chosen.items():
                measured[name] = self._speed(by_name[name], option)
                speed = measured[name]
                if self.speeds is not None and (speed is None or not speed.is_faster):
                    slow[name], reasons[name] = option, self._not_faster(by_name[name], option, speed)
            if not slow:
                break
            for name, option in slow.items():  # what saves less is slower still
                options[name] = [one for one in options[name] if one.form != option.form or one.saved > option.saved]
        else:
            chosen = {name: option for name, option in chosen.items() if name not in slow}
        for site in sites:
            if site.name not in chosen:
                nothing = "" if options[site.name] or site.name in reasons else self._too_dear(site, "")
                kept = nothing or "what it would save costs more error than elsewhere"
                self._decline(site, reasons.get(site.name, kept))
        return [Choice(by_name[name], option, measured.get(name)) for name, option in chosen.items()]

    def _tell(self, number: int, total: int, site: Site) -> None:
        if self.context.progress is not None:
            self.context.progress(number, total, f"take {site.name} apart")

    def _fits(self, site: Site) -> list[tuple[str, Fit]]:
        """The forms that a layer has, each taken apart."""
        found: list[tuple[str, Fit]] = []
        for name in self.forms:
            form = factorization(name)
            if form.refusal(site.layer) is None and self._candidates(site, name):
                found.append((name, form.fit(site.scaled, self.metrics.of(site))))
        return found

    def _candidates(self, site: Site, name: str) -> tuple[Rank, ...]:
        key = site.name, name
        if key not in self._ranks:
            form = factorization(name)
            able = form.refusal(site.layer) is None
            self._ranks[key] = candidate_ranks(form, site.layer, self.round_to) if able else ()
        return self._ranks[key]

    def _option(self, site: Site, name: str, rank: Rank, error: float) -> Option:
        form, layer = factorization(name), site.layer
        if self.kind == "macs":
            saved = layer.macs - form.macs(layer, rank)
        else:
            saved = layer.parameters - form.parameters(layer, rank)
            saved *= (site.linear.dtype.bitwidth // 8) if self.kind == "bytes" else 1
        return Option(name, rank, error, float(saved))

    def _fastest(self, site: Site, options: Sequence[Option]) -> list[Choice]:
        """The option that is measured fastest, beyond the layer itself; that which saves most where nothing is."""
        ordered = sorted(options, key=lambda option: (-option.saved, option.error))
        if self.speeds is None:
            return [Choice(site, ordered[0])]
        timed = [(option, self._speed(site, option)) for option in ordered]
        faster = [(speed.ratio, option, speed) for option, speed in timed if speed is not None and speed.is_faster]
        if not faster:
            self._decline(site, "; ".join(self._not_faster(site, option, speed) for option, speed in timed))
            return []
        _, option, speed = max(faster, key=lambda one: one[0])
        return [Choice(site, option, speed)]

    def _speed(self, site: Site, option: Option) -> Speed | None:
        return None if self.speeds is None else self.speeds.of(site, option.form, option.rank)

    def _not_faster(self, site: Site, option: Option, speed: Speed | None) -> str:
        what = f"{option.form} {' '.join(map(str, option.rank))} with error {option.error:.3g}"
        if speed is not None:
            return f"{what} is not faster: {speed}"
        assert self.speeds is not None
        return f"{what} could not be timed: {self.speeds.failures.get(site.name, 'no reason given')}"

    def _too_dear(self, site: Site, errs: str) -> str:
        if any(self._candidates(site, name) for name in self.forms):
            return f"the highest rank below break-even {errs}"
        return "no rank that kernels are fast at is below break-even"

    def _decline(self, site: Site, reason: str) -> None:
        self.declined.append(Refusal(site.name, site.weight.name or "", reason))
