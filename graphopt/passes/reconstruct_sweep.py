"""One sweep over a damaged graph: each linear operator solved anew on what it reads now, in graph order.

    min over W, b:  E |z* - (s (W p + b) + t + o)|^2 + ridge

p are the patches that the operator reads in the damaged graph as rebuilt so far, z* is the value behind it in the graph
before, o another branch that is added, whose error is taken up too. Where a Relu follows, only the part of z* matters
that it lets through: z* is replaced by what is there already as long as both lie below 0, and the solve repeated.

Where W is stored as integers the solution is rounded in the metric of the patches (`reconstruct_rounding`), and b is
solved again for the rounded weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphopt.inputs.moments import SecondMoments, choose_ridge
from graphopt.ir.linear import LINEAR_OPS, Linear
from graphopt.ir.linear_rows import LinearRows, apply_rows, linear_rows
from graphopt.ir.origin import Origin
from graphopt.ir.pieces import Pieces
from graphopt.ir.quantized_linear import QuantizedLinear, linear_view_at
from graphopt.ir.rewrite import DeclinedError, Rewriter, is_op
from graphopt.passes.contract import Context
from graphopt.passes.fold_constants import FoldConstants
from graphopt.passes.reconstruct_rounding import beyond_clamp, prior_weight, round_solution
from graphopt.passes.reconstruct_sites import Path, Tail, damaged_values, path_to, read_inside, tails, target_rows

WHAT = "rebuild"
"""What remarks say was declined."""
ROWS_A_COLUMN, ROWS = 128, 8192
"""How many rows are looked at for each input of an output, and beyond; neighbouring rows say nearly the same."""
_ROWS_AT_ONCE = 4096
_FEWEST_ROWS = 8
"""Rows below which an operator is left as it is: not even a mean can be trusted."""


@dataclass(frozen=True)
class Effort:
    """How much is done at each operator.

    Attributes:
        ridge: smallest ridge, relative to the mean variance of an input.
        hinges: how often the target is adapted to what the following Relu or Clip cuts off.
        refits: how often the operator before is solved again too (`graphopt.passes.reconstruct_refit`).
        biases_alone: whether weights stay and only the mean is put right, which takes no second moments.
    """

    ridge: float = 1e-3
    hinges: int = 2
    refits: int = 3
    biases_alone: bool = False


@dataclass(frozen=True)
class Solved:
    """What became of one operator.

    Attributes:
        node: its name.
        before, after: mean square error of its target, before and after, relative to the variance of the target.
        ridge: what was used.
    """

    node: str
    before: float
    after: float
    ridge: float


@dataclass
class Site:
    """One linear operator with the rows of each batch.

    Attributes:
        rows: the operator as a product of matrices.
        tail: what should be right.
        damaged, reference: the two graphs.
        target: the namesake of the tail's value in the reference.
        origin: how values of the reference are cut.
        chosen: for each batch the rows that are looked at, None for all.
        ridge: with which the operator was solved.
    """

    rows: LinearRows
    tail: Tail
    damaged: Pieces
    reference: Pieces
    target: ir.Value
    origin: Origin
    chosen: list[np.ndarray | None] = field(default_factory=list["np.ndarray | None"])
    ridge: float = 0.0

    @property
    def linear(self) -> Linear:
        """The operator."""
        return self.rows.linear

    @property
    def reads(self) -> list[ir.Value]:
        """What has to be known of the damaged graph."""
        return [self.linear.data, *([] if self.tail.other is None else [self.tail.other])]

    def data(self, batch: int) -> np.ndarray:
        """What the operator reads now, in its own layout."""
        return np.asarray(self.damaged.array(self.linear.data, batch), np.float32)

    def patches(self, batch: int) -> np.ndarray:
        """What the operator reads now: [G, R, K], of the chosen rows."""
        return self.rows.patches(self.data(batch), self.chosen[batch])

    def wanted(self, batch: int) -> np.ndarray:
        """What the tail should be, in its own layout."""
        array = self.origin.cut(self.tail.value.name or "", self.reference.array(self.target, batch))
        return np.asarray(array, np.float32)

    def targets(self, batch: int, now: np.ndarray | None = None, chosen: np.ndarray | None = None) -> np.ndarray:
        """What the operator should make: [R, M], of the chosen rows.

        With `now`, what it makes now [R, M], the bounds are heeded.
        """
        chosen = self.chosen[batch] if chosen is None else chosen
        other = None if self.tail.other is None else self.damaged.array(self.tail.other, batch)
        rows = [None if array is None else self.rows.rows(array) for array in (self.wanted(batch), other)]
        wanted, added = [array if array is None or chosen is None else array[chosen] for array in rows]
        assert wanted is not None
        return target_rows(self.tail, wanted, added, now)

    def choose(self, most: int) -> None:
        """Look at `most` rows at most, the same share of each batch, drawn at random."""
        counts = [self.rows.count(self.data(batch)) for batch in range(self.damaged.batches)]
        share = most / max(sum(counts), 1)
        choice = np.random.default_rng(0).choice
        self.chosen = [
            None if share >= 1 else np.sort(choice(count, min(count, max(1, int(count * share))), replace=False))
            for count in counts
        ]

    @property
    def is_bounded(self) -> bool:
        """Whether a part of the target does not matter."""
        return bool(np.isfinite(self.tail.low) or np.isfinite(self.tail.high))


class Sweep:
    """Rebuilds the linear operators of a damaged graph in place."""

    def __init__(
        self,
        model: ir.Model,
        origin: Origin,
        batches: Iterable[Mapping[str, np.ndarray]],
        effort: Effort,
        context: Context,
        refit: Callable[[Site, Path, Sweep], None] | None = None,
    ) -> None:
        kept = [dict(feeds) for feeds in batches]
        self.model, self.origin, self.effort, self.context = model, origin, effort, context
        # onnxruntime's int8 kernels saturate on some machines, which no weight can make up for
        integers = any(is_op(node, "DequantizeLinear") for node in model.graph)
        self.damaged = Pieces(model, kept, threads=0, optimized=not integers)
        self.reference = Pieces(origin.model, kept, threads=0)
        self.rewriter = Rewriter(model)
        self.refit = refit
        self.solved: list[Solved] = []
        self._known = {value.name: value for node in origin.model.graph for value in node.outputs}

    def run(self) -> None:
        """Solve every operator that reads damaged values or has a rounded weight, in graph order."""
        damaged = damaged_values(self.model, self.origin)
        if any(_has_computed_weight(node) for node in self.model.graph):
            names = {value.name for value in damaged}
            FoldConstants().rewrite(self.model, Context())
            damaged = {value for value in _values(self.model) if value.name in names}
        for node in self.model.graph:
            if any(value in damaged and is_op(reader, *LINEAR_OPS) for value, reader in read_inside(node)):
                self.context.missed(WHAT, "operators inside of its subgraphs stay as they are", node)
        nodes = [node for node in self.model.graph if self._is_site(node, damaged)]
        waiting = set(nodes)
        for number, node in enumerate(nodes):
            if self.context.progress is not None:
                self.context.progress(number, len(nodes), f"rebuild {node.name}")
            try:
                self._rebuild(node, waiting)
            except DeclinedError as refusal:
                self.context.missed(WHAT, refusal.why, refusal.where or node)
            waiting.discard(node)

    def _is_site(self, node: ir.Node, damaged: set[ir.Value]) -> bool:
        """Whether the node is linear with a weight of its own and reads damaged values, its rounded weight included."""
        try:
            linear = linear_view_at(node)
        except DeclinedError as refusal:
            if not damaged.isdisjoint(value for value in node.inputs[:2] if value is not None):
                self.context.missed(WHAT, refusal.why, node)
            return False
        if linear is None:
            if is_op(node, "LSTM", "GRU", "RNN") and node.inputs[0] in damaged:
                self.context.missed(WHAT, "recurrent operators cannot take up what their inputs lost", node)
            if is_op(node, "MatMulInteger", "ConvInteger"):
                self.context.missed(WHAT, "its integers have no DequantizeLinear of their own", node)
            return False
        weight = linear.node.inputs[linear.weight_index]
        return linear.data in damaged or (isinstance(linear, QuantizedLinear) and weight in damaged)

    def _path(self, node: ir.Node) -> Path | None:
        """The way to the operator that made its channels, where some of them are gone and it may be solved again."""
        linear = linear_view_at(node)
        if linear is None or isinstance(linear, QuantizedLinear):
            return None
        if self.refit is None or not self.effort.refits or linear.data.name not in self.origin.kept:
            return None
        path = path_to(linear.data)
        if path is None or _shared(path.producer) or _shared(linear) or is_op(node, "ConvTranspose"):
            return None
        return path

    def _rebuild(self, node: ir.Node, waiting: set[ir.Node]) -> None:
        linear = linear_view_at(node)
        assert linear is not None
        if _shared(linear):
            raise DeclinedError("its weight is read by other operators too", node)
        site, path = self._site(linear, waiting), self._path(node)
        if path is not None:
            self.damaged.hold([path.producer.data])  # nothing but this operator needs what the producer makes
        self.reference.compute([site.target])
        self.damaged.compute(site.reads)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at, and declined
                self._check(site)
                site.choose(ROWS_A_COLUMN * site.rows.columns + ROWS)
                if self.effort.biases_alone:
                    self._correct_bias(site)
                    return
                self.solve(site)
                if path is not None and self.refit is not None:
                    self.refit(site, path, self)
        finally:
            self.damaged.release([*site.reads, *([path.producer.data] if path is not None else [])])
            self.reference.release([site.target])

    def _site(self, linear: Linear, waiting: set[ir.Node]) -> Site:
        """The operator with the farthest target that can be known now."""
        rows = linear_rows(linear)
        for tail in tails(linear, self.origin):
            if beyond_clamp(linear.result, tail.value, self._known):
                continue
            if tail.other is not None and self.damaged.pending(tail.other) & waiting - {linear.node}:
                continue  # the other branch is not rebuilt yet, and will take up what this one leaves
            return Site(rows, tail, self.damaged, self.reference, self._known[tail.value.name], self.origin)
        is_new = linear.result.name not in self._known  # the inner layer of a chain that a pass has put in
        why = "it is new in the graph, and nothing says what it should make" if is_new else "what it made is not known"
        raise DeclinedError(why, linear.node)

    def _check(self, site: Site) -> None:
        linear, wanted = site.linear, site.wanted(0)
        other = None if site.tail.other is None else self.damaged.array(site.tail.other, 0)
        if wanted.ndim != (linear.rank or wanted.ndim) or (other is not None and other.shape != wanted.shape):
            raise DeclinedError("what it made before has another shape", linear.node)
        channels = wanted.shape[linear.out_axis]
        if channels != linear.out_channels:
            raise DeclinedError(f"it makes {linear.out_channels} channels and made {channels}", linear.node)
        if len(site.rows.rows(wanted)) != site.rows.count(site.data(0)):
            raise DeclinedError("what it made before has other positions", linear.node)

    def _correct_bias(self, site: Site) -> None:
        """Put the mean of one operator right: b = E[T - W p], T again where bounds say what does not matter."""
        linear = site.linear
        if isinstance(linear, QuantizedLinear) and not linear.has_bias:
            raise DeclinedError("there is no place for a bias behind a quantized MatMul", linear.node)
        bias = linear.bias()
        mean, before, scale = self._residual(site, bias)
        for _ in range(self.effort.hinges if site.is_bounded else 0):
            mean, _, _ = self._residual(site, mean)
        _, after, _ = self._residual(site, mean)
        if not after < before:
            mean, after = bias, before
        elif isinstance(linear, QuantizedLinear):
            linear.store_integers(self.rewriter, linear.integers(), linear.scales, mean)
        else:
            self._look_again(site, self.store(linear, linear.weight(), mean))
        self.solved.append(Solved(linear.node.name or "", before / scale, after / scale, np.inf))

    def _residual(self, site: Site, bias: np.ndarray) -> tuple[np.ndarray, float, float]:
        """With the targets of a bias [M]: E[T - W p], the mean square error, and the variance of the targets."""
        weight, channels = site.rows.weight(), site.linear.out_channels
        count, missing, squares, sums, energy = 0, np.zeros(channels), 0.0, np.zeros(channels), 0.0
        for batch in range(self.damaged.batches):
            product = apply_rows(site.patches(batch), weight)
            now = product + bias.astype(np.float32)
            targets = site.targets(batch, now if site.is_bounded else None)
            count += len(targets)
            missing += (targets - product).sum(axis=0, dtype=np.float64)
            squares += float(np.square(targets - now).sum(dtype=np.float64))
            sums += targets.sum(axis=0, dtype=np.float64)
            energy += float(np.square(targets).sum(dtype=np.float64))
        if not count or not np.isfinite([squares, energy]).all():
            raise DeclinedError("what it reads, or is to make, is nothing or not finite", site.linear.node)
        variance = energy / count - float(np.square(sums / count).sum())
        return missing / count, squares / count, variance if variance > 0 else 1.0

    def solve(self, site: Site) -> None:
        """Solve one operator and write its weight back."""
        linear, rows = site.linear, site.rows
        now = rows.weight(), linear.bias()
        prior = now[0]
        if isinstance(linear, QuantizedLinear):
            prior = rows.by_group(prior_weight(linear, self.origin, self._namesake(linear, site)))
        halves = (self._moments(site, 0), self._moments(site, 1)) if self.damaged.batches > 1 else None
        both = self._moments(site, None) if halves is None else halves[0].plus(halves[1])
        if not both.is_usable:
            raise DeclinedError("what it reads, or is to make, is nothing or not finite", linear.node)
        if (both.count < _FEWEST_ROWS or not both.varies) and not isinstance(linear, QuantizedLinear):
            raise DeclinedError(f"{both.count} rows that hardly differ say too little: give more samples", linear.node)
        ridge = self.effort.ridge if halves is None else choose_ridge(halves, prior, self.effort.ridge)
        if halves is None and both.count < 20 * rows.columns:
            ridge = max(ridge, 1.0)  # one small batch: nothing to check a solution on
        site.ridge = ridge
        first, adapted = both, both
        weight, bias = both.solve(prior, ridge)
        solution = weight, bias
        for _ in range(self.effort.hinges if site.is_bounded else 0):
            adapted = both.with_targets_of(self._moments(site, None, (weight, bias)))
            weight, bias = adapted.solve(prior if not np.isfinite(ridge) else weight, ridge)
        if isinstance(linear, QuantizedLinear):
            solution = self._round(site, linear, now, (weight, bias), adapted, ridge)
        else:
            self._look_again(site, self.store(linear, rows.as_weight(weight), bias))
        variance = float((first.energy - np.square(first.targets) / first.count).sum() / first.count)
        scale = variance or 1.0
        before, after = first.error(*now), first.error(*solution)
        self.solved.append(Solved(linear.node.name or "", max(before, 0.0) / scale, max(after, 0.0) / scale, ridge))

    def _round(
        self,
        site: Site,
        linear: QuantizedLinear,
        now: tuple[np.ndarray, np.ndarray],
        solution: tuple[np.ndarray, np.ndarray],
        moments: SecondMoments,
        ridge: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Store the integers nearest to a solution, or a new bias alone where that leaves a smaller error."""
        rounded = round_solution(linear, *solution, moments, ridge)
        candidates = [
            (weight, self._settled_bias(site, moments, weight, bias))
            for weight, bias in ((rounded.weight(), moments.bias(rounded.weight())), now)
        ]
        errors = [self._error(site, moments, *candidate) for candidate in (*candidates, now)]
        best = int(np.argmin(errors))
        if best == 0:
            linear.store_integers(
                self.rewriter, site.rows.as_weight(rounded.integers), rounded.scales, candidates[0][1]
            )
        elif best == 1:
            linear.store_integers(self.rewriter, linear.integers(), linear.scales, candidates[1][1])
        return (*candidates, now)[best]

    def _settled_bias(self, site: Site, moments: SecondMoments, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """The bias of a weight whose targets heed the bounds."""
        if not site.is_bounded or not self.effort.hinges:
            return moments.bias(weight)
        return moments.with_targets_of(self._moments(site, None, (weight, bias))).bias(weight)

    def _error(self, site: Site, moments: SecondMoments, weight: np.ndarray, bias: np.ndarray) -> float:
        """The mean square error that counts: with the targets that a weight and bias have."""
        if site.is_bounded:
            moments = moments.with_targets_of(self._moments(site, None, (weight, bias)))
        return moments.error(weight, bias)

    def _namesake(self, linear: Linear, site: Site) -> str:
        """What the origin calls the operator's own result."""
        name = linear.result.name or ""
        return name if name in self._known else site.tail.value.name or ""

    def _moments(self, site: Site, half: int | None, now: tuple[np.ndarray, np.ndarray] | None = None) -> SecondMoments:
        """Moments over all batches, or over every second one; with `now` = (weight, bias) only of the targets."""
        rows = site.rows
        moments = SecondMoments.empty(rows.groups, rows.columns, site.linear.out_channels // rows.groups)
        patches: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        batches = [batch for batch in range(self.damaged.batches) if half is None or batch % 2 == half]
        for batch in batches:
            read = site.patches(batch)
            patches.append(read)
            targets.append(site.targets(batch, None if now is None else apply_rows(read, *now)))
            # products of few rows cost as much as adding them up: batches of single samples are joined first
            if batch == batches[-1] or sum(map(len, targets)) >= max(rows.columns, _ROWS_AT_ONCE):
                moments.add(np.concatenate(patches, axis=1), np.concatenate(targets), inner=now is None)
                patches, targets = [], []
        if isinstance(site.linear, QuantizedLinear) and not site.linear.has_bias:
            # without a bias the line goes through the origin: the same sums with all means 0
            moments = replace(moments, inputs=0 * moments.inputs, targets=0 * moments.targets)
        return moments

    def store(self, linear: Linear, weight: np.ndarray, bias: np.ndarray) -> ir.Value:
        """Write a weight [M, C / G, *kernel] and bias [M] back; returns the result, which an Add may now make."""
        return linear.store(self.rewriter, weight, bias)

    def _look_again(self, site: Site, result: ir.Value) -> None:
        """Bring the views of a site up to date where a MatMul got an Add for its bias."""
        before = site.linear.result
        if result is before:
            return
        linear = linear_view_at(site.linear.node)
        assert linear is not None
        site.rows = linear_rows(linear)
        if site.tail.value is before:
            site.tail = replace(site.tail, value=result)


def _has_computed_weight(node: ir.Node) -> bool:
    """Whether a linear operator reads what is computed of constants alone: a turned weight, say."""
    if not is_op(node, *LINEAR_OPS):
        return False
    makers = [value.producer() for value in node.inputs[:2] if value is not None]
    return any(
        maker is not None
        and not is_op(maker, "DequantizeLinear")
        and all(value is None or value.is_initializer() for value in maker.inputs)
        for maker in makers
    )


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _shared(linear: Linear) -> bool:
    """Whether anything else reads the operator's weight."""
    values = [linear.node.inputs[linear.weight_index]]
    if isinstance(linear, QuantizedLinear):
        values.append(linear.weights.node.inputs[0])
    return any(value is not None and len(value.uses()) != 1 for value in values)
