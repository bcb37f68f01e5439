"""Which form runs fastest on this machine: whole graphs timed in turns, one kind of operator after the other.

What an int8 kernel gains depends on what is beside it: on layouts, on what onnxruntime fuses, on conversions at the
border of a region. No table of single operators adds up to that, so the graph itself is asked. The fully quantized
graph, in each form that there is, is timed in turns with the float graph. From the fastest of them, kinds of operators
(the same operator on the same sizes, and what stands between two products) go back to float one after the other, the
dearest first, and stay there where that is faster beyond noise. What was found is kept on disk, by the structure of the
graph and the machine: the next call measures nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.machine import machine_key
from graphopt.inputs.measurements import Measurements
from graphopt.inputs.probes import probe_feeds, symbolic_sizes
from graphopt.ir.cost import cost
from graphopt.ir.session import Session, open_session
from graphopt.ir.text import print_graph
from graphopt.ir.timing import interleave
from graphopt.passes.contract import Context
from graphopt.passes.pad_channels import pad_channels
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_placement import OPERANDS, is_depthwise, node_name
from graphopt.passes.quantize_plan import OperatorPlan, Overrides, QuantizePlan
from graphopt.passes.quantize_products import is_product, reads_probabilities

COMPARED = ("auto", "static", "dynamic")
"""Forms that are timed; the first is taken where nothing is faster."""
COMPARED_ON = {"openvino": (*COMPARED, OPERANDS)}
"""The same for targets that compile whole graphs."""
FASTER = 1.02
"""A form is taken where the median of the ratios is above this, and three quarters of the rounds agree."""
_MOST_TRIALS = 24
_SECONDS = 45.0
"""No trial is begun after this time; what was found by then stays."""
_LEAST_SECONDS, _MOST_SECONDS, _ROUNDS = 0.1, 1.5, 15
"""A timing takes about so many rounds, within these bounds."""
_KERNELS = ("static", "dynamic", "integer", "folded")
"""Forms of operators that compute on integers."""

Decide = Callable[[str, Overrides], QuantizePlan]
Write = Callable[[ir.Model, QuantizePlan], None]


@dataclass(frozen=True)
class Trial:
    """One graph that was timed.

    Attributes:
        what: what was different from the best graph before it.
        speed: how many times faster it was than that, median of rounds.
        taken: whether it was taken.
    """

    what: str
    speed: float
    taken: bool

    def __str__(self) -> str:
        return f"{self.what} {self.speed:.2f}x{' (taken)' if self.taken else ''}"


@dataclass(frozen=True)
class Fastest:
    """What was found; evidence of a run (`graphopt.passes.contract.Evidence`).

    Attributes:
        form: of `Quantize.form`.
        kept_float: operators that are faster in float, by name, each with the reason.
        trials: what was timed, in order.
        speed: of the chosen form over the float graph, before operators went back to float; 1 where there is none.
        remembered: whether it was measured in an earlier call.
    """

    form: str
    kept_float: Mapping[str, str] = field(default_factory=dict[str, str])
    trials: tuple[Trial, ...] = ()
    speed: float = 1.0
    remembered: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` takes."""
        trials = [vars(trial) for trial in self.trials]
        return {"form": self.form, "kept_float": dict(self.kept_float), "speed": self.speed, "trials": trials}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fastest:
        """What `to_json` wrote, in an earlier call. Raises `KeyError`, `TypeError` where it is something else."""
        trials = tuple(Trial(**trial) for trial in data["trials"])
        return cls(str(data["form"]), dict(data["kept_float"]), trials, float(data["speed"]), True)

    def summary(self) -> list[str]:
        """One line: the form, and what went back to float for speed."""
        kept = Counter(reason for reason in self.kept_float.values())
        back = "; ".join(f"{count} operators: {reason}" for reason, count in kept.items())
        known = ", measured in an earlier call" if self.remembered else f", {len(self.trials)} timed"
        return [f"fastest form: {self.form}, {self.speed:.2f}x of float{known}" + (f"; {back}" if back else "")]


def fastest(
    model: ir.Model, forms: Sequence[str], context: Context, *, decide: Decide, write: Write, by_kind: bool = True
) -> Fastest:
    """Find the fastest form, and the operators that are faster in float.

    Args:
        model: the float model; it is not changed.
        forms: what to compare, of `Quantize.form`; the first is taken where nothing is faster.
        context: target, threads and sizes to time for.
        decide: the plan in a form, under overrides.
        write: rewrites a model as a plan says.
        by_kind: whether operators that are faster in float are looked for.

    Returns:
        What was found, from the cache where the same structure was measured on this machine before. Where the model
        does not run on made-up inputs of the sizes in `context`, the first form, and a remark says so.
    """
    store = Measurements()
    key = _key(model, forms, context, [decide(form, Overrides()) for form in forms], by_kind)
    known = store.read(key)
    if known is not None:
        try:
            return Fastest.from_json(known)
        except (KeyError, TypeError, ValueError):
            context.note("quantize", "what an earlier call had measured cannot be read, and is measured anew", "model")
    try:
        found = _Timing(model, context, decide, write).run(forms, by_kind)
    except GraphoptError as error:  # made-up inputs need not suit a model that real ones do
        context.missed("time the forms", error.what, error.where or "model")
        return Fastest(forms[0])
    store.write(key, "quantize", found.to_json())
    for line in store.notes:
        context.note("keep measurements on disk", line, "model")
    return found


def _key(model: ir.Model, forms: Sequence[str], context: Context, plans: Sequence[QuantizePlan], by_kind: bool) -> str:
    """All that a timing depends on; weights do not count, so a fine-tuned network is known."""
    widths = [[(one.node, one.form, one.weight_bits) for one in plan.operators] for plan in plans]
    parts = (print_graph(model), tuple(forms), sorted(context.sizes.items()), context.target, context.threads, widths)
    parts += ("channels padded",) if by_kind else ("channels padded", "forms alone")
    return hashlib.sha256("\n".join(map(repr, (*parts, *machine_key(context.target)))).encode()).hexdigest()


class _Timing:
    """The graphs of one model, timed against the best of them so far."""

    def __init__(self, model: ir.Model, context: Context, decide: Decide, write: Write) -> None:
        self.model, self.context, self.decide, self.write = model, context, decide, write
        sizes = {**symbolic_sizes(model), **context.sizes}
        self.feeds = probe_feeds(model, sizes=sizes, specs=context.specs)[0]
        self.deadline = time.perf_counter() + _SECONDS
        self.trials: list[Trial] = []
        self.seen = set[str]()
        self.best = open_session(model, target=context.target, threads=context.threads)
        start = time.perf_counter()
        for _ in range(3):
            self.best.run_feeds(self.feeds)
        once = (time.perf_counter() - start) / 3
        self.seconds = min(max(2 * _ROUNDS * once, _LEAST_SECONDS), _MOST_SECONDS)

    def run(self, forms: Sequence[str], by_kind: bool) -> Fastest:
        """The fastest form, then, where asked for, the kinds of operators that are faster in float."""
        best: tuple[float, str, QuantizePlan, Session] | None = None
        seen: list[tuple[OperatorPlan, ...]] = []
        for form in forms:
            plan = self.decide(form, Overrides())
            if plan.operators in seen or not _compute(plan):
                continue
            seen.append(plan.operators)
            timed = self._time(f"form {form} over float", plan)
            if timed is not None and (best is None or timed[0] > FASTER * best[0]):
                best = timed[0], form, plan, timed[2]
        if best is None:
            return Fastest(forms[0], trials=tuple(self.trials))
        speed, chosen, plan, self.best = best
        kept: dict[str, str] = {}
        for kind, names in kinds(self.model, plan, self.context) if by_kind else ():
            more = dict.fromkeys((name for name in names if name not in kept), f"timed with {kind} in float")
            candidate = self.decide(chosen, Overrides({**kept, **more})) if more else None
            timed = self._time(f"{kind} in float", candidate) if candidate is not None and _compute(candidate) else None
            if timed is not None and timed[1]:
                self.best, self.trials[-1] = timed[2], replace(self.trials[-1], taken=True)
                kept |= dict.fromkeys(more, f"float is faster here: {timed[0]:.2f}x with {kind} in float")
        return Fastest(chosen, kept, tuple(self.trials), speed)

    def _time(self, what: str, plan: QuantizePlan) -> tuple[float, bool, Session] | None:
        """How much faster than the best graph so far a plan is, whether beyond noise, and its session.

        None: it is the same graph as one before, or onnxruntime does not run it, or it is out of time.
        """
        if len(self.trials) >= _MOST_TRIALS or time.perf_counter() > self.deadline:
            return None
        if self.context.progress is not None:
            self.context.progress(len(self.trials), _MOST_TRIALS, f"time {what}")
        candidate = self.model.clone()
        try:
            self.write(candidate, plan)
            if self.context.target == "cpu":  # as recipes do behind this pass
                pad_channels(candidate, lambda *_: None)
            text = print_graph(candidate)
            if text in self.seen:  # a sum between two integer products is fused whether it is asked for or not
                return None
            self.seen.add(text)
            session = open_session(candidate, target=self.context.target, threads=self.context.threads)
            speed, is_faster = self._compare(session)
        except GraphoptError as error:
            self.context.missed(f"time {what}", error.what, error.where or "model")
            return None
        self.trials.append(Trial(what, round(speed, 3), taken=False))
        return speed, is_faster, session

    def _compare(self, session: Session) -> tuple[float, bool]:
        found = interleave(
            [self.best, session],
            self.feeds,
            names=("best", "candidate"),
            seconds=self.seconds,
            threads=self.context.threads,
            target=self.context.target,
        )
        speed = found.speeds[1]
        return speed.median, speed.median > FASTER and speed.low > 1.0


def _compute(plan: QuantizePlan) -> int:
    return sum(one.form in ("static", "dynamic") for one in plan.operators)


def kinds(model: ir.Model, plan: QuantizePlan, context: Context) -> list[tuple[str, list[str]]]:
    """What may go back to float together: name of the kind and the operators in it, the dearest kind first.

    A product with a weight is of the kind of its operator, weight and result; everything that runs on integers between
    two products, in one piece, is of the kind of its operators and the result of the first. Depthwise convolutions of
    all sizes, products with probabilities of all sizes, and everything between products, are kinds too: what is slow on
    its own may be fast in company, and gain only together.

    Args:
        model: the float model.
        plan: what runs on integers.
        context: sizes of symbolic dimensions.
    """
    legal = model.clone()
    legalize(legal, static=plan.static)
    forms = {one.node: one.form for one in plan.operators if one.form in _KERNELS}
    counted = {node_name(entry.node): entry for entry in cost(legal, context.sizes).nodes}
    nodes = {node_name(node): node for node in legal.graph if node_name(node) in forms}
    products = {name for name, node in nodes.items() if node.op_type in ("Conv", "Gemm", "MatMul")}
    found: dict[str, list[str]] = {}

    def add(kind: str, names: Iterable[str]) -> None:
        found.setdefault(kind, []).extend(names)

    between = networkx.Graph()
    between.add_nodes_from(name for name in nodes if name not in products)
    for name in list(between):
        for value in nodes[name].inputs:
            producer = None if value is None else value.producer()
            if producer is not None and node_name(producer) in between:
                between.add_edge(node_name(producer), name)
    place = {name: index for index, name in enumerate(nodes)}
    pieces = [sorted(piece, key=place.__getitem__) for piece in networkx.connected_components(between)]
    pieces = [piece for piece in pieces if any(forms[name] == "static" for name in piece)]
    add("everything between products", [name for piece in pieces for name in piece])
    add("depthwise Conv", [name for name in products if is_depthwise(nodes[name])])
    weighed = [name for name in products if is_product(nodes[name]) and reads_probabilities(nodes[name])]
    add("products with probabilities", sorted(weighed, key=place.__getitem__))
    for piece in pieces:
        add(f"{' '.join(nodes[name].op_type for name in piece[:4])} of {_shape(nodes[piece[0]].outputs[0])}", piece)
    for name in sorted(products, key=place.__getitem__):
        node = nodes[name]
        depth = "depthwise " if is_depthwise(node) else ""
        add(f"{depth}{node.op_type} {_shape(node.inputs[1])} of {_shape(node.outputs[0])}", [name])

    def price(names: Sequence[str]) -> float:
        entries = [counted[name] for name in names if name in counted]
        return sum(entry.macs / 4 + entry.bytes_read + entry.bytes_written for entry in entries)

    distinct: dict[frozenset[str], tuple[str, list[str]]] = {}
    for kind, names in found.items():
        if names:
            distinct.setdefault(frozenset(names), (kind, names))
    return sorted(distinct.values(), key=lambda pair: -price(pair[1]))


def _shape(value: ir.Value | None) -> str:
    return "?" if value is None or value.shape is None else "x".join(map(str, value.shape))
