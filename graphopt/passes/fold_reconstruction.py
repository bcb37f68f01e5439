"""Pass fold-reconstruction: what pruning and rounding have damaged, rebuilt from what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.batches import SampleCounter, resized
from graphopt.inputs.probes import probe_feeds, symbolic_sizes
from graphopt.inputs.rebatch import rebatched
from graphopt.inputs.source import SOURCES, FirstSamples
from graphopt.ir.channels import channel_groups
from graphopt.ir.cost import cost
from graphopt.ir.dimensions import known_sizes
from graphopt.ir.origin import Origin, origin_of
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.reconstruct_closed import FORMS as CLOSED_FORMS
from graphopt.passes.reconstruct_closed import rebuild_closed
from graphopt.passes.reconstruct_forms import Ridge
from graphopt.passes.reconstruct_refit import refit
from graphopt.passes.reconstruct_sweep import Effort, Solved, Sweep

LEAST_SQUARES, BIAS = "least-squares", "bias"
RECONSTRUCTIONS = (LEAST_SQUARES, BIAS, "mean", *CLOSED_FORMS)
"""What may be asked for as `FoldReconstruction.form`."""
_MOST_SAMPLES, _LEAST_SAMPLES = 512, 32
_SAMPLE_MACS = 6.4e10
"""How much running all samples once may cost; within the bounds above it decides how many there are."""
_REFIT_MACS = 1e11
"""How much running all samples once may cost for the second solves to be worth their time, ten times as long."""


@dataclass(frozen=True)
class Reconstruction:
    """What a run of the pass did; print it for a table of the operators.

    Attributes:
        form: how it was rebuilt.
        source: where the inputs came from, empty where none were used.
        why: why from there.
        samples: how many samples at most.
        solved: the operators, in graph order; empty for closed forms.
        count: how many operators were rebuilt.
    """

    form: str
    source: str = ""
    why: str = ""
    samples: int = 0
    solved: tuple[Solved, ...] = ()
    count: int = 0

    def __str__(self) -> str:
        head = f"{self.form}, {self.count} operators, inputs: {self.source or 'none'}"
        width = max((len(one.node) for one in self.solved), default=0)
        rows = [
            f"{one.node:{width}}  {one.before:9.2e} -> {one.after:9.2e}  ridge {one.ridge:g}" for one in self.solved
        ]
        return "\n".join([head, *rows])


@dataclass(frozen=True)
class FoldReconstruction(Pass):
    """Rebuild what a lossy pass has damaged, and fold it into the weights and biases that are there.

    Channels that were pruned or rounded are, nearly, linear combinations of the channels that remain, so what reads
    them can make up for them: with A the activations before, K the kept ones as they are now,

        A_p = sum over k of s_pk K_k    =>    U'[:, k] = U[:, k] + sum over p of s_pk U[:, p]

    (Bai et al. 2023, "Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning"). The default form
    goes further: each operator that reads damaged values is solved anew as a whole, in closed form, in the metric of
    the values that it will really see,

        min over W, b:  E |z - (W p + b)|^2 + ridge |W - U|^2

    with p what the operator reads in the damaged graph as rebuilt so far and z the value behind it before the damage:
    through BatchNormalization, and through the addition of a residual branch, whose error is taken up too; where a
    Relu follows, only what it lets through counts. Then the operator that made the pruned channels is solved again,
    so that the channels that are left become those that serve best (`graphopt.passes.reconstruct_refit`). Nothing is
    added to the graph but a bias where a MatMul had none; no gradient and no label is used.

    The inputs are the user's calibration data, or made up (`source`). What the model was before is remembered by the
    pass that damaged it, so this one works in the same run, behind `prune-channels` or `quantize`.

    Options:
        form: "least-squares"; "bias", which leaves weights as they are and puts the mean of what each operator makes
            right on the inputs (the bias correction of Nagel et al. 2019), in part of the time; or, from weights and
            statistics alone and without any inputs, a closed form: "ridge", "neuron-merging", "lbyl", "moments", or
            "mean", which only corrects the mean.
        source: "auto", "calibration", "probes" or "synthetic"; "auto" is calibration where given, else synthetic.
        samples: how many samples at most; None for 512, fewer where the model is large.
        ridge: pull to the weight as it was, relative to the mean variance of an input; grows where samples are few.
        hinges: how often the target is adapted to the Relu behind.
        refits: how often the operator before is solved again; None for 3, or 0 where the model is large.
        mean_correction: whether a closed form also corrects the mean.

    Before (behind `prune-channels`, which has removed the second channel, that was twice the first)::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2] x) => (float[N,1] y) <float[2,1] a = {1, 2}, float[1,1] b = {1}>
        { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2] x) => (float[N,1] y) <float[2,1] a = {1, 2}, float[1,1] b = {3}>
        { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }
    """

    name: ClassVar[str] = "fold-reconstruction"
    semantics: ClassVar[Semantics] = Semantics.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = ("prune-channels", "decompose", "meet-budget")

    form: str = LEAST_SQUARES
    source: str = "auto"
    samples: int | None = None
    ridge: float = 1e-3
    hinges: int = 2
    refits: int | None = None
    mean_correction: bool = True

    def __post_init__(self) -> None:
        if self.form not in RECONSTRUCTIONS:
            raise GraphoptError(f"unknown form {self.form!r}", help=f"one of {', '.join(RECONSTRUCTIONS)}")
        if self.source not in SOURCES:
            raise GraphoptError(f"unknown source {self.source!r}", help=f"one of {', '.join(SOURCES)}")
        if not self.ridge >= 0:
            raise GraphoptError(f"ridge is {self.ridge}, it must be at least 0", help="0.001 is the default")
        for name, least in (("samples", 1), ("hinges", 0), ("refits", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or value < least):
                raise GraphoptError(f"{name} is {value!r}", help=f"give a whole number of at least {least}")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Rebuild in place; the remarks say what was rebuilt, and what could not be and why."""
        self.rebuild(model, context)

    def rebuild(self, model: ir.Model, context: Context | None = None) -> Reconstruction:
        """Rebuild in place.

        Args:
            model: what a lossy pass of this process left.
            context: calibration, specs and sizes for the inputs.

        Returns:
            What was done; nothing where no pass has damaged the model.

        Raises:
            DataError: there are no inputs for the model.
        """
        context = context or Context()
        origin = origin_of(model)
        if origin is None:
            context.note("rebuild", "no pass before has changed what the model computes", model.graph.name or "model")
            return Reconstruction(self.form)
        if self.form in (LEAST_SQUARES, BIAS):
            done = self._least_squares(model, origin, context)
        else:
            done = self._closed(model, origin, context)
        return done

    def _least_squares(self, model: ir.Model, origin: Origin, context: Context) -> Reconstruction:
        macs = _macs_of_one(origin.model, context.sizes)
        found = context.inputs(origin.model, self.source, self.samples)
        most = self.samples or int(np.clip(_SAMPLE_MACS / max(macs, 1), _LEAST_SAMPLES, _MOST_SAMPLES))
        refits = (3 if macs * most <= _REFIT_MACS else 0) if self.refits is None else self.refits
        context.note("rebuild", f"inputs from {found.source}: {found.why}", model.graph.name or "model")
        batches = rebatched(origin.model, FirstSamples(origin.model, found.batches, most))
        effort = Effort(self.ridge, self.hinges, refits, biases_alone=self.form == BIAS)
        sweep = Sweep(model, origin, batches, effort, context, refit)
        sweep.run()
        if sweep.solved:
            before = float(np.median([one.before for one in sweep.solved]))
            after = float(np.median([one.after for one in sweep.solved]))
            context.note(
                "rebuild",
                f"{len(sweep.solved)} operators, relative square error {before:.2g} -> {after:.2g} (median)",
                model.graph.name or "model",
            )
        return Reconstruction(self.form, found.source, found.why, most, tuple(sweep.solved), len(sweep.solved))

    def _closed(self, model: ir.Model, origin: Origin, context: Context) -> Reconstruction:
        if origin.selection is None:
            context.missed("rebuild", f"form {self.form} is for what one run of prune-channels removed", "model")
            return Reconstruction(self.form)
        form = Ridge(alpha2=np.inf) if self.form == "mean" else self.form
        count = rebuild_closed(
            origin.model,
            model,
            channel_groups(origin.model, sizes=known_sizes(origin.model, context.sizes)),
            origin.selection,
            form=form,
            mean_correction=self.mean_correction,
            context=context,
        )
        context.note("rebuild", f"{count} operators by {self.form}, no inputs needed", model.graph.name or "model")
        return Reconstruction(self.form, count=count)


def _macs_of_one(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """Multiply-accumulates of one sample."""
    known = resized(model, {**symbolic_sizes(model), **sizes}, 1)
    feeds = probe_feeds(model, sizes=known)[0]
    samples = SampleCounter(model)({name: array.shape for name, array in feeds.items()})
    return cost(model, known).macs // samples
