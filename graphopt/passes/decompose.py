"""Pass decompose: linear layers as chains of smaller ones, where that is less work and measured faster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError, TargetMissedError
from graphopt.factorizations import FORMS, Metric, factorization
from graphopt.inputs.batches import resized
from graphopt.inputs.probes import symbolic_sizes
from graphopt.inputs.rebatch import rebatched
from graphopt.inputs.source import SOURCES, FirstSamples
from graphopt.ir.cost import cost
from graphopt.ir.dimensions import known_sizes
from graphopt.ir.origin import remember_origin
from graphopt.ir.propagate import propagate
from graphopt.ir.rewrite import DeclinedError, Rewriter
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.decompose_choice import Choice, Chooser
from graphopt.passes.decompose_layers import Metrics, Refusal, Site, find_sites, inner_operators
from graphopt.passes.decompose_plan import DeclinedLayer, DecomposePlan, LayerPlan, blockers
from graphopt.passes.decompose_speed import Speeds
from graphopt.passes.decompose_write import dense_weight, replace_by_chain
from graphopt.passes.prune_groups import check_patterns
from graphopt.passes.prune_plan import digest_of
from graphopt.search import Costs
from graphopt.search.rounding import check_round_to

WHAT = "decompose"
SELECTIONS = ("energy", "error", "evbmf", "ratio")
"""What may decide the ranks."""
AUTO_FORMS = ("svd", "channel-svd", "spatial-svd", "tucker")
"""What form "auto" tries: "cp" loses least for its multiply-accumulates, but not for its time."""
DEFAULT_ENERGY = 0.95
_SAMPLES = 256


@dataclass(frozen=True)
class Decompose(Pass):
    """Replace linear layers by chains of smaller ones, planned first: which form, which rank, where.

    For a layer y = W x + b of M outputs and C inputs and second moments S of what it reads,

        y  ~  U (V x) + b + (W - U V) E[x],      U V of rank r:  tr( (W - U V) S (W - U V)^T ) is least

    which is r (C + M) multiply-accumulates in the place of C M. Forms for kernels: k x k to r channels and 1 x 1
    ("channel-svd"), k x 1 and 1 x k ("spatial-svd"), 1 x 1, k x k, 1 x 1 ("tucker"), 1 x 1, depthwise along each axis,
    1 x 1 ("cp"); products and 1 x 1 convolutions have "svd". `graphopt.factorizations` has the maths and the sources.
    At full rank each equals the layer, with its stride, padding, dilation and groups. The bias goes to the last layer
    of the chain, takes up the mean error, and the last layer makes the value of the same name, so that what stands
    behind stays valid and `fold-reconstruction` finds what it was.

    Options:
        form: "auto" (all but "cp", whose depthwise layers were measured no faster in a whole network; the best for each
            layer), the name of one, or a tuple of names.
        ranks: what decides them. "energy": the smallest that keep a share `energy` of the power of each layer's
            outputs; "error": the smallest with a relative error (root mean square) of at most `error`; "evbmf": those
            that variational Bayes finds in the weights (Nakajima et al. 2013); "ratio": as small as `macs`, `params` or
            `bytes` asks for, by one multiplier over all layers: always where the next step costs least error for what
            it saves. None: "ratio" where one of these three is given, "error" where `error` is, else "energy".
        energy: see `ranks`, in (0, 1].
        error: see `ranks`, in (0, 1).
        macs, params, bytes: the share of multiply-accumulates, parameters or weight bytes of the whole model that is
            to be left, in (0, 1]. At most one of them.
        source: where second moments come from: "auto", "calibration", "probes", "synthetic"; "none" does without,
            and W itself is approximated.
        samples: how many inputs are looked at.
        keep: shell patterns of names of nodes or weights that stay.
        round_to: ranks are multiples of this; None for what kernels are fast at: 16, less where a layer is narrow.
        measure: whether a chain must be measured faster than its layer, on this machine; False is content with fewer
            multiply-accumulates.
        compensation: whether biases take up the mean error, where there are inputs.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,8,8] x, float[4,3,3,3] w_a, float[4] w_b) => (float[N,4,8,8] y) {
          y = Conv <pads = [1, 1, 1, 1]> (x, w_a, w_b)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,8,8] x, float[2,3,3,1] w_a_0, float[4,2,1,3] w_a_1, float[4] w_b) => (float[N,4,8,8] y) {
          y_factor_0 = Conv <kernel_shape = [3, 1], pads = [1, 0, 1, 0]> (x, w_a_0)
          y = Conv <kernel_shape = [1, 3], pads = [0, 1, 0, 1]> (y_factor_0, w_a_1, w_b)
        }
    """

    name: ClassVar[str] = "decompose"
    semantics: ClassVar[Semantics] = Semantics.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = ("eliminate-identity", "fold-constants", "prune-channels")

    form: str | tuple[str, ...] = "auto"
    ranks: str | None = None
    energy: float = DEFAULT_ENERGY
    error: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    source: str = "auto"
    samples: int = _SAMPLES
    keep: tuple[str, ...] = ()
    round_to: int | None = None
    measure: bool = True
    compensation: bool = True

    def __post_init__(self) -> None:
        for name in self.forms:
            factorization(name)
        if not self.forms:
            raise GraphoptError("form is empty", help=f"give one of {', '.join(FORMS)}, several, or auto")
        shares = self._shares()
        for name, value in {"energy": self.energy, **({"error": self.error} if self.error is not None else {}),
                            **shares}.items():  # fmt: skip
            _check_share(name, value)
        stated = [
            name
            for name, value in (("energy", self.energy), ("error", self.error))
            if value not in (None, DEFAULT_ENERGY)
        ]
        if len(stated) + len(shares) > 1:
            raise GraphoptError(f"several targets are given: {', '.join([*stated, *shares])}", help="give one of them")
        if self.ranks is not None and self.ranks not in SELECTIONS:
            raise GraphoptError(f"unknown ranks {self.ranks!r}", help=f"one of {', '.join(SELECTIONS)}")
        if (self.selection == "ratio") != bool(shares):
            wrong = "ranks is 'ratio' without" if not shares else f"ranks is {self.ranks!r}, which has no use for"
            raise GraphoptError(f"{wrong} macs, params or bytes", help="macs=0.6 leaves 60 % of the work")
        if self.selection == "error" and self.error is None:
            raise GraphoptError("ranks is 'error', and there is no error", help="error=0.1 is a tenth of the outputs")
        if self.source not in ("none", *SOURCES):
            raise GraphoptError(f"unknown source {self.source!r}", help=f"one of none, {', '.join(SOURCES)}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GraphoptError(f"samples is {self.samples!r}", help="give a whole number of at least 1")
        check_patterns("keep", self.keep)
        check_round_to(self.round_to)

    def _shares(self) -> dict[str, float]:
        found = {"macs": self.macs, "params": self.params, "bytes": self.bytes}
        return {name: share for name, share in found.items() if share is not None}

    @property
    def forms(self) -> tuple[str, ...]:
        """Names of the forms that are tried."""
        if isinstance(self.form, str):
            return AUTO_FORMS if self.form == "auto" else (self.form,)
        return tuple(self.form)

    @property
    def selection(self) -> str:
        """What decides the ranks, one of `SELECTIONS`."""
        if self.ranks is not None:
            return self.ranks
        return "ratio" if self._shares() else "error" if self.error is not None else "energy"

    @property
    def asked(self) -> str:
        """What was asked for, in words."""
        shares = self._shares()
        if self.selection == "ratio":
            ((kind, share),) = shares.items()
            return f"to {share:.4g} of the {kind}"
        if self.selection == "error":
            return f"to a relative error of {self.error:.4g}"
        return f"to {self.energy:.4g} of the energy" if self.selection == "energy" else "by variational Bayes"

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Plan and apply; the remarks say which layers stay, and why."""
        plan, metrics = self._decide(model, context)
        self._apply(model, plan, context, metrics)

    def plan(self, model: ir.Model, context: Context | None = None) -> DecomposePlan:
        """Decide everything, and change nothing.

        Args:
            model: canonical.
            context: `sizes` binds symbolic dimensions, on which costs and times depend; inputs come from it, and
                target and threads for which chains are timed.

        Returns:
            The plan.

        Raises:
            GraphoptError: a pattern of `keep` matches nothing, or no layer can be taken apart (the message lists why).
            TargetMissedError: a share cannot be met.
            DataError: inputs are asked for that cannot be had.
        """
        return self._decide(model, context or Context())[0]

    def _decide(self, model: ir.Model, context: Context) -> tuple[DecomposePlan, Metrics]:
        sizes = _sizes(model, context)
        sites, refused = find_sites(model, self.keep, propagate(model, sizes))
        remark_refused(refused, context)
        for node in inner_operators(model):
            context.missed(WHAT, "operators inside of subgraphs stay as they are", node)
        metrics, sentence = self._metrics(model, context)
        speeds = Speeds(context, model.opset_imports.get("", 21)) if self.measure else None
        chooser = Chooser(self.forms, self.round_to, self._kind, metrics, speeds, context)
        able = [site for site in sites if chooser.is_able(site)]
        refused += chooser.refused
        declined = [DeclinedLayer(one.node, one.weight, one.reason) for one in refused]
        if not able:
            raise GraphoptError(
                f"no layer can be taken apart: {blockers(declined) or 'there is no linear layer with a weight'}",
                where=model.graph.name,
                help="let more layers in (`keep`), allow more forms, or leave the pass out",
            )
        before = Costs.of(cost(model, sizes))
        chosen = self._choose(able, chooser, before)
        declined += [DeclinedLayer(one.node, one.weight, one.reason) for one in chooser.declined]
        for one in (*chooser.refused, *chooser.declined):
            context.missed(WHAT, one.reason, one.node)
        for name, why in metrics.notes.items():
            context.note(WHAT, f"taken apart without regard to its inputs: {why}", name)
        plan = DecomposePlan(
            digest_of(model),
            tuple(_layer_plan(choice) for choice in chosen),
            tuple(declined),
            asked=self.asked,
            source=sentence,
            compensation=self.compensation,
            before=before,
            after=before - sum((_saving(choice, metrics) for choice in chosen), Costs()),
            notes=tuple(f"{name}: {why}" for name, why in metrics.notes.items()),
        )
        return plan, metrics

    @property
    def _kind(self) -> str:
        return next(iter(self._shares()), "macs")

    def _choose(self, sites: Sequence[Site], chooser: Chooser, before: Costs) -> list[Choice]:
        """The choice of each layer that is taken apart, in graph order."""
        if self.selection == "ratio":
            ((kind, share),) = self._shares().items()
            wanted = (1 - share) * before.get(kind)
            chosen = chooser.by_budget(sites, wanted)
            saved = sum(choice.option.saved for choice in chosen)
            if saved < wanted * (1 - 1e-9):
                left = 1 - saved / max(before.get(kind), 1)
                raise TargetMissedError(
                    f"{share:.3f} of the {kind} was asked for, and {left:.3f} is left with every layer at its least",
                    where=kind,
                    help=f"ask for less, allow more forms or smaller steps (`round_to`), or measure=False; "
                    f"these stay: {blockers([DeclinedLayer(*_parts(one)) for one in chooser.all_declined])}",
                )
            return chosen
        if self.selection == "evbmf":
            return chooser.by_variational_bayes(sites)
        limit = 1 - self.energy if self.selection == "energy" else (self.error or 0.0) ** 2
        return chooser.by_error(sites, limit)

    def _metrics(self, model: ir.Model, context: Context) -> tuple[Metrics, str]:
        """Second moments, measured as they are asked for, and where the inputs come from."""
        threads = max(context.threads, 0)
        if self.source == "none":
            return Metrics(model, None, threads=threads), ""
        if self.source == "calibration" and context.calibration is None:
            raise DataError(
                "source is 'calibration', and there is none",
                where="source",
                help="pass calibration data (`calibration=`, or Context(calibration=...)), or choose another source",
            )
        found = context.inputs(model, self.source, self.samples)
        context.note(WHAT, f"inputs from {found.source}: {found.why}", model.graph.name or "model")
        batches = rebatched(model, FirstSamples(model, found.batches, self.samples))
        return Metrics(model, batches, self.compensation, threads), f"{found.source}: {found.why}"

    def apply(self, model: ir.Model, plan: DecomposePlan, context: Context | None = None) -> None:
        """Rewrite `model` in place as the plan says, whoever made it.

        Args:
            model: the model that the plan was made for.
            plan: what `plan` returned, `DecomposePlan.from_json` or `DecomposePlan.by_hand`.
            context: inputs for the second moments, and `sizes` where the model needs them.

        Raises:
            GraphoptError: the plan was made for another model, or names a layer, form or rank that there is not.
                Nothing has changed then.
            DataError: inputs are asked for that cannot be had. Nothing has changed then.
        """
        context = context or Context()
        plan.check(model)
        if plan.layers:
            self._apply(model, plan, context, self._metrics(model, context)[0])

    def _apply(self, model: ir.Model, plan: DecomposePlan, context: Context, metrics: Metrics) -> None:
        if not plan.layers:
            return
        work = _Work(model, plan, context)
        chains = [work.chain(site, layer, metrics) for site, layer in work.pairs]
        remember_origin(model)
        rewriter = Rewriter(model)
        for (site, _), (factors, shifts) in zip(work.pairs, chains, strict=True):
            try:
                replace_by_chain(rewriter, site, factors, shifts)
            except DeclinedError as refusal:
                context.missed(WHAT, refusal.why, site.name)

    def masked(self, model: ir.Model, plan: DecomposePlan, context: Context | None = None) -> ir.Model:
        """The dense reference: a new model in which each weight is what its chain amounts to.

        What `apply` leaves computes the same as this, up to rounding. Arguments and errors: as `apply`.
        """
        context = context or Context()
        plan.check(model)
        metrics, _ = self._metrics(model, context)
        found = model.clone()
        pairs = _Work(model, plan, context).pairs
        twins = {site.name: site for site, _ in _Work(found, plan, context).pairs}
        rewriter = Rewriter(found)
        for site, layer in pairs:
            factors, shifts = _Work.chain_of(site, layer, metrics, plan)
            for linear, shift in zip(twins[site.name].linears, shifts, strict=True):
                bias = linear.bias() if shift is None else linear.bias() + shift
                linear.store(rewriter, dense_weight(site, factors), bias)
        return found


class _Work:
    """The layers of a plan, found in a model."""

    def __init__(self, model: ir.Model, plan: DecomposePlan, context: Context) -> None:
        sites, refused = find_sites(model, (), propagate(model, _sizes(model, context)))
        known = {linear.node.name: site for site in sites for linear in site.linears}
        reasons = {one.node: one.reason for one in refused}
        found: dict[str, tuple[Site, LayerPlan]] = {}
        for layer in plan.layers:
            site = known.get(layer.node)
            if site is None or site.name in found:
                why = reasons.get(layer.node, "it is none with a weight")
                raise GraphoptError(
                    f"the layer cannot be taken apart: {why if site is None else 'its weight is planned twice'}",
                    where=layer.node,
                    help="leave it out of the plan",
                )
            factorization(layer.form).check(site.layer, layer.rank)
            found[site.name] = (site, layer)
        self.plan = plan
        self.pairs = [found[site.name] for site in sites if site.name in found]

    def chain(self, site: Site, layer: LayerPlan, metrics: Metrics) -> tuple[Any, list[Any]]:
        """Factors of a layer, and what the bias of each of its operators gains."""
        return self.chain_of(site, layer, metrics, self.plan)

    @staticmethod
    def chain_of(site: Site, layer: LayerPlan, metrics: Metrics, plan: DecomposePlan) -> tuple[Any, list[Any]]:
        """The same for any plan."""
        metric = metrics.of(site)
        factors = site.unscaled(factorization(layer.form).fit(site.scaled, metric).factors(layer.rank))
        if not plan.compensation or not metric.mean.any():
            return factors, [None] * len(site.linears)
        change = site.layer.matrices - dense_weight(site, factors).reshape(site.layer.matrices.shape)
        means = [metrics.of_linear(site, linear) for linear in site.linears]
        return factors, [Metric(None, mean).bias(change) for mean in means]


def remark_refused(refused: Sequence[Refusal], context: Context) -> None:
    """One remark for each weight that stays."""
    for one in refused:
        context.missed(WHAT, one.reason, one.node)


def _sizes(model: ir.Model, context: Context) -> Mapping[str, int]:
    """Sizes of the symbolic dimensions, for one sample."""
    return resized(model, {**symbolic_sizes(model), **(known_sizes(model, context.sizes) or {})}, 1)


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GraphoptError(f"{name} is {value!r}, it must be a number", help=f"write it without quotes: {name} = 0.5")
    if not 0 < value <= 1 or not math.isfinite(value):
        raise GraphoptError(f"{name} is {value}, it must be above 0 and at most 1", where=name, help=f"{name}=0.5")


def _layer_plan(choice: Choice) -> LayerPlan:
    site, option = choice.site, choice.option
    form = factorization(option.form)
    return LayerPlan(
        site.name,
        site.weight.name or "",
        option.form,
        option.rank,
        error=option.error,
        macs=(site.layer.macs, form.macs(site.layer, option.rank)),
        parameters=(site.layer.parameters, form.parameters(site.layer, option.rank)),
        speed=None if choice.speed is None else choice.speed.ratio,
    )


def _saving(choice: Choice, metrics: Metrics) -> Costs:
    form, rank, layer = factorization(choice.option.form), choice.option.rank, choice.site.layer
    fewer = layer.parameters - form.parameters(layer, rank) - metrics.new_biases(choice.site)
    return Costs(layer.macs - form.macs(layer, rank), fewer, fewer * choice.site.linear.dtype.bitwidth // 8)


def _parts(refusal: Refusal) -> tuple[str, str, str]:
    return refusal.node, refusal.weight, refusal.reason
