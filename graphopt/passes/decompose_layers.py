"""The layers of a graph that may be taken apart, and what their inputs are like."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.factorizations import Factor, Layer, Metric, layer_of
from graphopt.inputs.moments import SecondMoments
from graphopt.ir.affine import batchnorm_affine
from graphopt.ir.linear import LINEAR_OPS, Linear
from graphopt.ir.linear_rows import linear_rows
from graphopt.ir.pieces import Pieces
from graphopt.ir.propagate import Facts
from graphopt.ir.quantized_linear import QuantizedLinear, linear_view_at
from graphopt.ir.rewrite import DeclinedError, is_op, sole_consumer

ROWS_A_COLUMN, ROWS = 4, 8192
"""How many patches are looked at for each input of an output, and beyond: enough for the second moments."""
MOST_COLUMNS = 6144
"""Inputs of an output up to which second moments are kept: 300 MB of them."""
_IN_MEMORY = 1024
"""Inputs of an output beyond which moments wait in a temporary file."""
_SMALLEST_SCALE = 1e-3
"""A channel that a normalisation scales to nothing counts so much of the largest at least."""


@dataclass(frozen=True, eq=False)
class Site:
    """A weight and the operators that read it, all in the same way.

    Attributes:
        name: of the first operator.
        linears: the operators.
        layer: what they compute, with the sizes that costs are counted at.
        scale: float64 [M], by how much a BatchNormalization behind multiplies each output: so errors count.
    """

    name: str
    linears: tuple[Linear, ...]
    layer: Layer
    scale: np.ndarray

    @property
    def linear(self) -> Linear:
        """The first operator."""
        return self.linears[0]

    @property
    def weight(self) -> ir.Value:
        """The initializer."""
        value = self.linear.node.inputs[self.linear.weight_index]
        assert value is not None
        return value

    @property
    def scaled(self) -> Layer:
        """The layer with the BatchNormalization behind it."""
        return self.layer.scaled(self.scale)

    def unscaled(self, factors: Sequence[Factor]) -> tuple[Factor, ...]:
        """Factors of `scaled` as those of the layer itself."""
        last = factors[-1]
        scale = self.scale.reshape(-1, *[1] * (last.weight.ndim - 1))
        return (*factors[:-1], Factor(last.shape, last.weight / scale))


@dataclass(frozen=True)
class Refusal:
    """A weight that stays as it is.

    Attributes:
        node: name of the operator that reads it.
        weight: name of the weight.
        reason: why, one clause.
    """

    node: str
    weight: str
    reason: str


def find_sites(model: ir.Model, keep: Sequence[str], facts: Facts) -> tuple[list[Site], list[Refusal]]:
    """Split the weights of linear operators into those that may be taken apart and those that stay.

    Args:
        model: canonical.
        keep: shell patterns of names of nodes and weights that stay.
        facts: shapes, from which costs are counted.

    Raises:
        GraphoptError: a pattern matches nothing.
    """
    sites: list[Site] = []
    refused: list[Refusal] = []
    matched: set[str] = set()
    seen: set[ir.Value] = set()
    for node in model.graph:
        if not is_op(node, *LINEAR_OPS):
            continue
        weights = [value for value in node.inputs[:2] if value is not None and value.is_initializer()]
        weight = weights[0] if weights else None
        if weight is not None and weight in seen:
            continue
        name, weight_name = node.name or node.outputs[0].name or "", (weight.name or "") if weight is not None else ""
        found = [pattern for pattern in keep for one in (name, weight_name) if _matches(one, pattern)]
        matched.update(found)
        try:
            linear = linear_view_at(node)
            if linear is None:
                if _is_computed(node):
                    raise DeclinedError("its weight is computed of constants: run fold-constants first")
                continue
            if found:
                raise DeclinedError(f"keep has {found[0]!r}")
            linears = _readers(linear)
            seen.update(weights)
            sites.append(Site(name, linears, _layer(linears, facts), _output_scale(linear)))
        except DeclinedError as refusal:
            refused.append(Refusal(name, weight_name, refusal.why))
    _check_keep(model, keep, matched)
    return sites, refused


def _is_computed(node: ir.Node) -> bool:
    """Whether an operand is computed of constants alone: a turned weight, say."""
    makers = [value.producer() for value in node.inputs[:2] if value is not None]
    return any(
        maker is not None and maker.inputs and all(value is None or value.is_initializer() for value in maker.inputs)
        for maker in makers
    )


def inner_operators(model: ir.Model) -> Iterator[ir.Node]:
    """The linear operators of subgraphs."""
    for graph in model.graphs():
        if graph is not model.graph:
            yield from (node for node in graph if is_op(node, *LINEAR_OPS))


def _readers(linear: Linear) -> tuple[Linear, ...]:
    """All operators that read the weight of one. Raises `DeclinedError` where they differ."""
    if isinstance(linear, QuantizedLinear):
        raise DeclinedError("its weight is stored as integers: decompose before quantizing, or dequantize first")
    weight = linear.node.inputs[linear.weight_index]
    assert weight is not None
    if not weight.is_initializer() or weight.is_graph_output():
        raise DeclinedError("its weight is also an output of the graph" if weight.is_graph_output() else "no weight")
    found: list[Linear] = []
    for use in weight.uses():
        node = use.node
        alike = is_op(node, linear.node.op_type) and use.idx == linear.weight_index
        if not alike or node.graph is not linear.node.graph or not _same_attributes(node, linear.node):
            raise DeclinedError(f"its weight is read by {node.op_type} {node.name!r} in another way too")
        other = linear_view_at(node)
        if other is None or isinstance(other, QuantizedLinear):
            raise DeclinedError(f"its weight is read by {node.op_type} {node.name!r} in another way too")
        found.append(other)
    order = {node: place for place, node in enumerate(linear.node.graph or ())}
    return tuple(sorted(found, key=lambda one: order[one.node]))


def _same_attributes(first: ir.Node, second: ir.Node) -> bool:
    return {name: str(one.value) for name, one in first.attributes.items()} == {
        name: str(one.value) for name, one in second.attributes.items()
    }


def _has_bias(linear: Linear) -> bool:
    if is_op(linear.node, "MatMul"):
        return linear.bias_node is not None
    return len(linear.node.inputs) > 2 and linear.node.inputs[2] is not None


def _layer(linears: Sequence[Linear], facts: Facts) -> Layer:
    linear = linears[0]
    if "output_shape" in linear.node.attributes:
        raise DeclinedError("its output_shape decides the padding")
    if linear.kernel and linear.rank != len(linear.kernel) + 2:
        raise DeclinedError("its data has another rank than its weight")
    try:
        layer = layer_of(linear, facts.shape(linear.data), facts.shape(linear.node.outputs[0]))
    except GraphoptError as error:
        raise DeclinedError(error.what) from error
    if not layer.weight.any():
        raise DeclinedError("its weight is 0 throughout")
    return Layer(
        layer.weight, layer.groups, layer.before, layer.after, layer.rows * len(linears), transposed=layer.transposed
    )


def _output_scale(linear: Linear) -> np.ndarray:
    """What a BatchNormalization right behind multiplies each output by, relative to the largest."""
    reader = sole_consumer(linear.result)
    if not is_op(reader, "BatchNormalization"):
        return np.ones(linear.out_channels)
    assert reader is not None
    try:
        scale = np.abs(batchnorm_affine(reader)[0])
    except DeclinedError:
        return np.ones(linear.out_channels)
    largest = float(scale.max(initial=0.0))
    fits = len(scale) == linear.out_channels and np.isfinite(largest) and largest > 0
    return np.maximum(scale / largest, _SMALLEST_SCALE) if fits else np.ones(linear.out_channels)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _check_keep(model: ir.Model, keep: Sequence[str], matched: set[str]) -> None:
    names = {node.name or "" for node in model.graph} | set(model.graph.initializers)
    for pattern in keep:
        if pattern not in matched and not any(_matches(name, pattern) for name in names):
            raise GraphoptError(
                f"keep has {pattern!r}, and no weight or node is called so",
                where="keep",
                help="`graphopt inspect` lists the names",
            )


@dataclass
class Metrics:
    """The metric of each layer, measured when it is first asked for and kept until this object goes.

    Attributes:
        model: the graph as it is before anything is taken apart; it must not change in the meantime.
        batches: inputs; None gives the identity for all.
        centred: whether biases take up the mean.
        threads: of onnxruntime.
        notes: what could not be measured: name of the layer and why.
    """

    model: ir.Model
    batches: Iterable[Mapping[str, np.ndarray]] | None
    centred: bool = True
    threads: int = 1
    notes: dict[str, str] = field(default_factory=dict[str, str])
    _pieces: Pieces | None = field(default=None, init=False, repr=False)
    _known: dict[str, Metric | Path] = field(default_factory=dict[str, "Metric | Path"], init=False, repr=False)
    _means: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray], init=False, repr=False)
    _shifted: set[str] = field(default_factory=set[str], init=False, repr=False)
    _last: tuple[object, SecondMoments] | None = field(default=None, init=False, repr=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False, repr=False)

    def of(self, site: Site) -> Metric:
        """The metric of a layer; sites are to be asked for in graph order when they are first asked for."""
        known = self._known.get(site.name)
        if known is None:
            known = self._measured(site)
            self._keep(site.name, known)
        if isinstance(known, Path):
            with np.load(known) as stored:
                return Metric(stored["matrices"], stored["mean"])
        return known

    def of_linear(self, site: Site, linear: Linear) -> np.ndarray:
        """Mean of the patches of one operator of several with the same weight: float64 [G, K]."""
        mean = self.of(site).mean
        return self._means.get(linear.node.name or "", mean) if self.centred else mean

    def new_biases(self, site: Site) -> int:
        """How many numbers biases take that operators of a site do not have yet and get to make up for the mean."""
        if site.name not in self._shifted:
            return 0
        return sum(linear.out_channels for linear in site.linears if not _has_bias(linear))

    def _keep(self, name: str, metric: Metric) -> None:
        self._known[name] = metric
        if self.centred and metric.mean.any():
            self._shifted.add(name)
        if metric.matrices is None or metric.matrices.shape[-1] <= _IN_MEMORY:
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        path = Path(self._folder.name) / f"{len(self._known)}.npz"
        np.savez(path, matrices=metric.matrices, mean=metric.mean)
        self._known[name] = path

    def _measured(self, site: Site) -> Metric:
        layer = site.layer
        plain = Metric.identity(layer.groups, layer.columns)
        if self.batches is None:
            return plain
        if layer.columns > MOST_COLUMNS:
            self.notes[site.name] = f"{layer.columns} inputs of an output are too many for their second moments"
            return plain
        try:
            total: SecondMoments | None = None
            for linear in site.linears:
                moments = self._moments(linear)
                if len(site.linears) > 1 and moments.is_usable:
                    self._means[linear.node.name or ""] = moments.inputs / moments.count
                total = moments if total is None else total.plus(moments)
            assert total is not None
        except DeclinedError as refusal:
            self.notes[site.name] = refusal.why
            return plain
        found = Metric.of(total, centred=self.centred)
        if found is None:
            self.notes[site.name] = "what it reads is nothing, or not finite"
        return plain if found is None else found

    def _moments(self, linear: Linear) -> SecondMoments:
        """Second moments of the patches of one operator."""
        rows = linear_rows(linear)
        geometry = (rows.strides, rows.dilations, rows.begins, rows.ends, rows.spread, rows.groups)
        key = (linear.data, linear.kernel, linear.in_axis, geometry)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if self._pieces is None:
            assert self.batches is not None
            self._pieces = Pieces(self.model, [dict(feeds) for feeds in self.batches], threads=self.threads)
        pieces = self._pieces
        pieces.compute([linear.data])
        arrays = [np.asarray(pieces.array(linear.data, batch), np.float32) for batch in range(pieces.batches)]
        counts = [rows.count(array) for array in arrays]
        share = (ROWS_A_COLUMN * rows.columns + ROWS) / max(sum(counts), 1)
        random = np.random.default_rng(0)
        moments = SecondMoments.empty(rows.groups, rows.columns, 0)
        for array, count in zip(arrays, counts, strict=True):
            some = min(count, max(1, int(count * share)))
            chosen = None if share >= 1 else np.sort(random.choice(count, some, replace=False))
            patches = rows.patches(array, chosen)
            with np.errstate(over="ignore", invalid="ignore"):  # looked at by `is_usable`
                moments.add(patches, np.zeros((patches.shape[1], 0), np.float32))
        pieces.release([linear.data])
        self._last = key, moments
        return moments
