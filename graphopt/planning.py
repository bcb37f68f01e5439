"""What a recipe would decide, before anything is changed: the plan of its first lossy pass, what it would cost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError, RecipeError
from graphopt.export.inspect import bound_sizes
from graphopt.inputs.calibration import Calibration
from graphopt.inputs.probes import InputSpec, check_specs, runnable_sizes
from graphopt.ir.load import Source, load, read
from graphopt.passes.contract import Context, Pass
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_diagnosis import Diagnosis, diagnose
from graphopt.passes.quantize_effects import Measure
from graphopt.recipe import Recipe, resolve


class Plan(Protocol):
    """The decisions of one lossy pass (design.md D5), printable and as plain data."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        ...


@runtime_checkable
class Planner(Protocol):
    """A pass that decides before it acts."""

    def plan(self, model: ir.Model, context: Context) -> Plan:
        """Every decision for this model, which is not changed."""
        ...


def plan_recipe(
    source: Source,
    inputs: Mapping[str, np.ndarray] | np.ndarray | None = None,
    *,
    recipe: str | os.PathLike[str] | Recipe | Sequence[Pass | str] = "prune",
    calibration: Iterable[Any] | None = None,
    specs: Mapping[str, InputSpec] | None = None,
    target: str = "cpu",
    threads: int = 1,
) -> Plan:
    """What the first pass of a recipe that plans (`prune-channels`, `quantize`) decides for a model.

    The passes before it run as in `graphopt.optimize`, without the guard. Nothing is timed and the model is not changed.

    Args:
        source: what `graphopt.load` reads.
        inputs: example inputs, by name or the one; they say the sizes of symbolic dimensions, on which costs depend.
        recipe: as for `graphopt.optimize`.
        calibration: as for `graphopt.optimize`.
        specs: what is known of the inputs, by name; as `inputs` of `graphopt.optimize`.
        target: "cpu", "cuda" or "openvino".
        threads: of onnxruntime and torch, 0 for their own defaults.

    Raises:
        RecipeError: unknown recipe, pass or option, or no pass of the recipe plans.
        LoadError, InvalidGraphError: the model cannot be read or is not valid.
        DataError: inputs, calibration or specs do not fit.
        GraphoptError: as the pass raises, for instance where nothing can be pruned.

    Example:
        >>> from graphopt.passes import PruneChannels
        >>> text = '''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,2] y)
        ...     <float[2,4] a = {1,0,0,3,0,2,0,4}, float[4,2] b = {1,0,0,1,0,0,1,1}>
        ...     { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }'''
        >>> plan = plan_recipe(ir.from_onnx_text(text), recipe=Recipe("narrow", (PruneChannels(ratio=0.25, round_to=1),)))
        >>> plan.selection
        {'mlp hidden of a': (2,)}
    """  # noqa: E501
    chosen = resolve(recipe)
    model, context = _prepared(source, inputs, calibration, specs, target, threads)
    for single in chosen.passes:
        if isinstance(single, Planner):
            return single.plan(model, context)
        single.run(model, context)
    raise RecipeError(
        "no pass of the recipe makes a plan",
        where=chosen.name,
        help="prune-channels and quantize do; say --recipe prune",
    )


def diagnose_recipe(
    source: Source,
    inputs: Mapping[str, np.ndarray] | np.ndarray | None = None,
    *,
    recipe: str | os.PathLike[str] | Recipe | Sequence[Pass | str] = "int8",
    calibration: Iterable[Any] | None = None,
    specs: Mapping[str, InputSpec] | None = None,
    target: str = "cpu",
    threads: int = 1,
    samples: int = 32,
    measure: str | Measure = "rms",
) -> Diagnosis:
    """Where the full plan of the first `quantize` of a recipe loses; nothing is searched, timed or changed.

    Args:
        source: what `graphopt.load` reads.
        inputs: example inputs, by name or the one; they say the sizes of symbolic dimensions.
        recipe: as for `graphopt.optimize`; the passes before `quantize` run.
        calibration: as for `graphopt.optimize`; ranges come from it, and what is compared is run on it.
        specs: what is known of the inputs, by name; as `inputs` of `graphopt.optimize`.
        target: "cpu", "cuda" or "openvino".
        threads: of onnxruntime, 0 for all cores.
        samples: how many samples of the calibration, or made-up ones, the nets are compared on.
        measure: "rms", "kl" (for class logits), or a function of the float and the quantized outputs.

    Raises:
        RecipeError: unknown recipe, pass or option, or the recipe does not quantize.
        LoadError, InvalidGraphError: the model cannot be read or is not valid.
        DataError: inputs, calibration or specs do not fit.
        GraphoptError: the measure is unknown.

    Example:
        >>> text = '''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,2] y)
        ...     <float[2,2] w = {1, 2, 3, 4}> { y = MatMul (x, w) }'''
        >>> found = diagnose_recipe(ir.from_onnx_text(text))
        >>> [one.op_type for one in found.operators], found.error < 0.05
        (['MatMul'], True)
    """
    chosen = resolve(recipe)
    model, context = _prepared(source, inputs, calibration, specs, target, threads)
    for single in chosen.passes:
        if isinstance(single, Quantize):
            model = single.unquantized(model, context)
            plan = replace(single, measure=False).plan(model, context)
            if not plan.tensors:
                raise GraphoptError(
                    "nothing of this model would be quantized, so there is nothing to compare",
                    where=model.graph.name,
                    help="a model that is quantized already: --set quantize.requantize=true diagnoses it anew",
                )
            batches = context.inputs(model, "probes" if calibration is None else "calibration", samples).batches
            return diagnose(model, plan, batches, measure=measure, threads=threads)
        single.run(model, context)
    raise RecipeError("the recipe does not quantize", where=chosen.name, help="say --recipe int8")


def _prepared(
    source: Source,
    inputs: Mapping[str, np.ndarray] | np.ndarray | None,
    calibration: Iterable[Any] | None,
    specs: Mapping[str, InputSpec] | None,
    target: str,
    threads: int,
) -> tuple[ir.Model, Context]:
    """The canonical model and what passes may know."""
    original = read(source)
    check_specs(original, specs or {})
    sizes = runnable_sizes(original, specs) if inputs is None else bound_sizes(original, inputs)
    model = load(original, sizes=sizes)
    data = None if calibration is None else Calibration(original, calibration)
    return model, Context(target, threads, sizes, data, specs=specs or {}, reference=model.clone())
