"""Quantization-aware training from the plan of the pass `quantize`, written by the pass itself (ADR 0011).

On top of the house, because it joins two rooms that do not know one another: `graphopt.passes` plans and writes the
quantized graph, `graphopt.train` trains the float one. Torch is imported when something is trained.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError, LiftError
from graphopt.inputs.source import FirstSamples
from graphopt.ir.compare import compare_runs
from graphopt.ir.origin import origin_of, remember_origin
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.quantizer_places import QuantizerPlaces
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_places import quantizer_places
from graphopt.passes.quantize_plan import QuantizePlan

if TYPE_CHECKING:
    from graphopt.train.fake_quant import FakeQuant
    from graphopt.train.trainer import Outcome

_JUDGED_SAMPLES = 128
"""Samples on which the weights that win are chosen."""
_MEASUREMENTS = 5
"""How often that is measured while training."""
_DISTILLATIONS = ("mse", "kl")
_PACKED = 4
"""Weights of so many bits or fewer have types of their own in ONNX."""
_WIDEST = 7
"""Weights of these bits are the widest that no kernel saturates with."""


def fake_quantize(model: ir.Model, plan: QuantizePlan | Mapping[str, Any]) -> tuple[ir.Model, FakeQuant]:
    """The float graph that a quantization plan is for, and the quantizers of the plan as something to train in it.

    What `lower` (or `recover`) makes of the graph with these quantizers is what the pass `quantize` itself would
    write: the same nodes and types, with the weights, scales and zero points that were learned. Untrained it is the
    pass's own result, bit by bit.

    Args:
        model: the graph that the plan was made from. It is not changed.
        plan: what `Quantize.plan` returned, or its JSON.

    Returns:
        The graph to lift or to recover (every operator in the form that has an int8 kernel, the function is that of
        `model`), and the quantizers to attach.

    Raises:
        GraphoptError: the plan is of another model, or no plan.

    Example:
        >>> import graphopt
        >>> from graphopt.passes import Quantize
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[1,2] x) =>
        ...     (float[1,2] y) <float[2,2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }'''))
        >>> plan = Quantize(form="static").plan(model, Context())
        >>> graph, quantizers = fake_quantize(model, plan.to_json())
        >>> lifted = graphopt.lift(graph)
        >>> lifted.attach("quantizers", quantizers)
        >>> [node.op_type for node in graphopt.lower(lifted, graph).graph][:3]
        ['QuantizeLinear', 'DequantizeLinear', 'DequantizeLinear']
    """
    from graphopt.train.fake_quant import FakeQuant

    chosen = plan if isinstance(plan, QuantizePlan) else QuantizePlan.from_json(plan)
    graph, places = _float_form(model, chosen)
    return graph, FakeQuant(places, write=functools.partial(_write, of=chosen))


def _float_form(model: ir.Model, plan: QuantizePlan) -> tuple[ir.Model, QuantizerPlaces]:
    graph = model.clone()
    if not plan.weights_alone:
        legalize(graph, static=plan.static)
    remember_origin(graph)
    return graph, quantizer_places(graph, plan)


def _write(model: ir.Model, tensors: tuple[TensorPlan, ...], of: QuantizePlan) -> ir.Model:
    Quantize().apply(model, of.with_tensors(tensors))
    return model


@dataclass(frozen=True)
class TrainQuantized(Pass):
    """Quantize as `quantize` does, and train weights, scales and zero points in that form against the float original.

    Forward, every quantizer of the plan computes what its integers will, q = clamp(round(x / s) + z) and (q - z) s, and
    biases are rounded to units of s_x s_w; backward, gradients go straight through the rounding where nothing is
    clamped, and to s and z as in LSQ and LSQ+ (Esser et al. 2020, Bhalgat et al. 2020; `graphopt.train.FakeQuant`). The
    loss is the distance of the outputs from those of the original (`graphopt.recover`). Where ranges are taken at run
    time (form "dynamic") they are in training too.

    The graph is written by `quantize` from the learned plan: the same nodes between QuantizeLinear and
    DequantizeLinear, as fast as without training. Widths below 8 bits are simulated: the integers keep to fewer levels
    but are stored in 8 bits, so that the graph is not faster than at 8 bits. Not so with weights of 4 bits or fewer of
    products that would run dynamically (transformers), and of tables: they get the form "weights", types of their own
    in the file, and activations stay float. Needs torch. Without calibration it trains
    on inputs that are made up, and says so. Of the weights at several times, those before training included, the ones
    with the smallest error in onnxruntime are kept.

    Options:
        bits: width of the inputs of linear operators, 2 to 8. What no linear operator reads has 8.
        weight_bits: width of their weights, None for `bits`.
        edge_bits: the same for the first and the last linear operators (7 for weights that saturate at 8), where that
            is more.
        steps: batches to train on.
        batch_size: samples of a batch, where the batch dimension is dynamic.
        learning_rate: of AdamW; rises for a twentieth of the steps, then falls to 0 as a cosine. None is 1e-3 below 8
            bits and 1e-4 at 8, where there is little to win and much to lose.
        distillation: "mse" or "kl" (outputs are logits of classes), as in `graphopt.recover`.
        temperature: for "kl".
        seed: of the order of the data and of all random numbers.
        device: of torch, None for "cuda" where the target is, else "cpu".
        form: as that of `quantize`; "auto" chooses form "weights" as said above, "dynamic" does not.
        ranges, exclude, weight_range: as those of `quantize`.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[1,3,8,8] x, float[4,3,1,1] w) => (float[1,4,8,8] y) { c = Conv(x, w) y = Relu(c) }

    After::

        x_q = QuantizeLinear (x, x_s, x_z)         x_d = DequantizeLinear (x_q, x_s, x_z)
        w_d = DequantizeLinear <axis = 0> (w_q, w_s, w_z)
        c = Conv (x_d, w_d)
        y_q = QuantizeLinear (c, y_s, y_z)         y = DequantizeLinear (y_q, y_s, y_z)
    """

    name: ClassVar[str] = "train-quantized"
    semantics: ClassVar[Semantics] = Semantics.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = Quantize.runs_after

    bits: int = 8
    weight_bits: int | None = None
    edge_bits: int = 8
    steps: int = 500
    batch_size: int = 32
    learning_rate: float | None = None
    distillation: str = "mse"
    temperature: float = 1.0
    seed: int = 0
    device: str | None = None
    form: str = "auto"
    ranges: str = "minmax"
    exclude: tuple[str, ...] = ()
    weight_range: str = "auto"

    def __post_init__(self) -> None:
        self._quantize()
        for name, value, least in (
            ("steps", self.steps, 1),
            ("batch_size", self.batch_size, 1),
            ("seed", self.seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise GraphoptError(f"{name} is {value!r}", help=f"a whole number from {least}")
        for name, value in (("bits", self.bits), ("weight_bits", self._weight_bits), ("edge_bits", self.edge_bits)):
            if value not in range(2, 9):
                raise GraphoptError(f"{name} is {value!r}, it must be between 2 and 8")
        if self.learning_rate is not None and not 0.0 < self.learning_rate < 1.0:
            raise GraphoptError(f"learning_rate is {self.learning_rate!r}", help="between 0 and 1, for instance 1e-3")
        if self.distillation not in _DISTILLATIONS:
            raise GraphoptError(f"unknown distillation {self.distillation!r}", help="one of mse, kl")
        if not self.temperature > 0.0:
            raise GraphoptError(f"temperature is {self.temperature!r}", help="a positive number")

    @property
    def _weight_bits(self) -> int:
        return self.bits if self.weight_bits is None else self.weight_bits

    def _quantize(self) -> Quantize:
        """The pass whose plan is trained, at 8 bits: placement does not depend on the width."""
        return Quantize(
            ranges=self.ranges,
            form=self.form,
            exclude=tuple(self.exclude),
            weight_range=self.weight_range,
            weight_bits=self._weight_bits if self.form == "weights" else None,
        )

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Plan, train, write; the remarks say what it was trained on and what that did to the error.

        Raises:
            GraphoptError: torch is not installed.
            TrainingError: there is no such device.
            DataError: calibration is empty or does not fit the model.
        """
        if importlib.util.find_spec("torch") is None:
            raise GraphoptError(
                "train-quantized needs torch", help="pip install 'graphopt[torch]', or use the pass quantize"
            )
        plan = self.plan(model, context)
        if not any(operator.form != "float" for operator in plan.operators):
            return
        try:
            outcome = self._trained(model, plan, context)
        except LiftError as error:
            context.missed("train quantized", f"{error.what}; quantized without training", error.where or "model")
            self._untrained(model, plan, context)
            return
        for note in outcome.notes:
            context.note("train quantized", note, "model")
        if outcome.error is not None:
            context.missed("train quantized", f"stopped: {outcome.error.what}", outcome.error.where or "model")
        if outcome.model is None:
            self._untrained(model, plan, context)
            return
        model.graph = outcome.model.graph

    def plan(self, model: ir.Model, context: Context) -> QuantizePlan:
        """What is trained: the plan of `quantize` with the widths of the options, for `fake_quantize`.

        Tensors narrower than 8 bits have no scale in it: training finds one, of least squared error, in the weight and
        in the first inputs.

        Args:
            model: canonical, BatchNormalization folded. It is not changed.
            context: as for `Quantize.plan`.

        Raises:
            DataError: the calibration data is empty or does not fit the model.
        """
        from graphopt.train.places import is_edge, linear_layers

        plan = self._quantize().plan(model, context)
        graph, places = _float_form(model, plan)
        if self.form == "auto" and self._weight_bits <= _PACKED:
            plan = self._packed(graph, places, plan, context)
            places = quantizer_places(graph, plan)
        layers = linear_layers(graph)
        inner = {layer.node.name or "" for layer in layers if not is_edge(layer, layers)}
        readers: dict[int, list[str]] = {}
        for layer in places.layers:
            readers.setdefault(layer.data, []).append(layer.node)
        tensors: list[TensorPlan] = []
        for index, place in enumerate(places.quantizers):
            tensor, weight = place.tensor, place.tensor.role == "weight"
            read_by = (place.consumers or ()) if weight else readers.get(index, ())
            width = self._weight_bits if weight else self.bits
            if not set(read_by) <= inner:
                width = max(width, self.edge_bits)
            narrower = bool(read_by) and width < tensor.bits and not tensor.storage
            tensors.append(replace(tensor, bits=width, scale=(), zero_point=()) if narrower else tensor)
        return plan.with_tensors(tensors)

    def _packed(self, graph: ir.Model, places: QuantizerPlaces, plan: QuantizePlan, context: Context) -> QuantizePlan:
        """The plan with products that would run dynamically, and tables, in form "weights": real narrow integers."""
        loose = {operator.node for operator in plan.operators if operator.form in ("dynamic", "table")}
        single = replace(self._quantize(), form="weights", weight_bits=self._weight_bits)
        packed = single.plan(graph, context.silent())
        chosen = {operator.node: operator for operator in packed.operators if operator.form in ("weights", "table")}
        readers: dict[str, set[str]] = {}
        for place in places.quantizers:
            if place.tensor.role == "weight":
                readers.setdefault(place.tensor.name, set()).update(place.consumers or ())
        names = {name for name, nodes in readers.items() if nodes <= loose & set(chosen)}
        tensors = {tensor.name: tensor for tensor in packed.tensors if tensor.name in names}
        moved = {node for name in tensors for node in readers[name]}
        kept = tuple(tensor for tensor in plan.tensors if tensor.role != "weight" or tensor.name not in tensors)
        operators = tuple(chosen[one.node] if one.node in moved else one for one in plan.operators)
        return QuantizePlan((*kept, *tensors.values()), operators)

    def _untrained(self, model: ir.Model, plan: QuantizePlan, context: Context) -> None:
        """The plan itself, with the scales that the pass quantize takes at its widths where training finds them."""
        single = replace(self._quantize(), bits=self.bits, weight_bits=self._weight_bits)
        found = {(one.name, one.axis): one for one in single.plan(model, context.silent()).tensors}
        tensors = [one if one.scale or one.storage else found[one.name, one.axis] for one in plan.tensors]
        Quantize().apply(model, plan.with_tensors(tensors))

    def _trained(self, model: ir.Model, plan: QuantizePlan, context: Context) -> Outcome:
        from graphopt.optimize import canonical_form
        from graphopt.train.minibatches import Minibatches
        from graphopt.train.settings import Settings
        from graphopt.train.trainer import train

        origin = origin_of(model)
        teacher = canonical_form(model.clone() if origin is None else origin.model)
        data, source = self._data(model, context)
        judge = _Judge.made(teacher, FirstSamples(model, data, _JUDGED_SAMPLES), context)
        graph, quantizers = fake_quantize(model, plan)
        settings = Settings(
            steps=self.steps,
            distillation=self.distillation,
            temperature=self.temperature,
            learning_rate=self.learning_rate or (1e-3 if min(self.bits, self._weight_bits) < _WIDEST else 1e-4),
            warmup=self.steps // 20,
            norm="frozen",
            insertions={"quantizers": quantizers},
            device=self.device or ("cuda" if context.target == "cuda" else "cpu"),
            evaluate=judge,
            evaluate_every=max(1, self.steps // _MEASUREMENTS),
            seed=self.seed,
        )

        def watch(step: int, value: float) -> None:
            if context.progress is not None:
                context.progress(step, self.steps, f"training, loss {value:.3g}")

        outcome = train(graph, Minibatches(model, data, self.batch_size, self.seed), settings, teacher, watch)
        self._say(outcome, source, context)
        return outcome

    def _data(self, model: ir.Model, context: Context) -> tuple[Any, str]:
        """Re-iterable feeds, all of the user's where there are any, and what they are."""
        if context.calibration is not None:
            return context.calibration, "calibration"
        found = context.inputs(model)
        return found.batches, f"no data was given, so on {found.source} inputs ({found.why})"

    def _say(self, outcome: Outcome, source: str, context: Context) -> None:
        """What it was trained on and how the error went."""
        errors = {step: -metric for step, metric in outcome.metrics}
        if 0 in errors and outcome.best_step in errors:
            trained = f"error of the outputs {errors[0]:.3g} before, {errors[outcome.best_step]:.3g} after"
            kept = f"{len(outcome.history)} steps, the weights after {outcome.best_step} are kept"
            context.note("train quantized", f"{trained} ({kept}), trained on {source}", "model")


@dataclass(frozen=True)
class _Judge:
    """How near a graph in onnxruntime comes to the original: minus the mean rms error of batches, relative."""

    names: tuple[str, ...]
    feeds: tuple[Mapping[str, np.ndarray], ...]
    expected: tuple[list[np.ndarray], ...]
    context: Context

    @classmethod
    def made(cls, teacher: ir.Model, batches: FirstSamples, context: Context) -> _Judge:
        feeds = tuple(batches)
        session = open_session(teacher, target=context.target, threads=context.threads)
        names = tuple(value.name or "" for value in teacher.graph.outputs)
        return cls(names, feeds, tuple(session.run_feeds(one) for one in feeds), context)

    def __call__(self, model: ir.Model) -> float:
        session = open_session(model, target=self.context.target, threads=self.context.threads)
        found = [session.run_feeds(one) for one in self.feeds]
        pairs = zip(self.expected, found, strict=True)
        return -float(np.mean([compare_runs(self.names, [ours], [theirs]).rms_error for ours, theirs in pairs]))
