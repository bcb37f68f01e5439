"""Shapes of every value, with names for run-time dimensions that the symbols of the inputs explain.

With numbers in place of symbols, shape inference loses nothing (`graphopt.ir.propagate`); the way back from numbers
to symbols is interpolation. A dimension that is a sum of products of distinct symbols, such as `batch*sequence` or
`past + sequence`, is determined by its size at the corners of a box: each symbol that it depends on at its first
size or at twice that. A probe off the corners then confirms or refutes it: rounding (a strided convolution, a padded
window) is no such polynomial, and its dimension stays anonymous.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.ir.dimensions import evaluate, polynomial, symbolic_dimensions
from graphopt.ir.inference import Inference
from graphopt.ir.ops.row import OpTable
from graphopt.ir.propagate import Facts, propagate

_MOST_SYMBOLS = 4
"""Input symbols that are varied one by one; dimensions that depend on others stay anonymous."""
_MOST_FACTORS = 3
"""Symbols that one dimension may depend on: 2 to that power probes settle it."""
_FIRST_SIZES = (8, 64, 224)
"""Elements of a symbol that nobody gave a size, in the order of trying: below the maxima of models (positions of a
tiny transformer), then what networks for images accept."""
_SPAN = 8
"""How many times smaller and larger than the first size the outer votes are."""
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@dataclass
class Probes:
    """What is true about a model at several sizes of its symbolic input dimensions.

    Each probe is one propagation, made when it is first asked for.

    Attributes:
        model: the model; as long as probes are asked for it must not change.
        sizes: elements of each symbol that the model is known to accept; 8, 64 or 224 where not given. Symbols that are
            expressions of others (`2*batch`) follow them.
        table: op rows, the default table where None.
    """

    model: ir.Model
    sizes: Mapping[str, int] | None = None
    table: OpTable | None = None
    _made: dict[frozenset[tuple[str, int]], Facts] = field(default_factory=dict[frozenset[tuple[str, int]], Facts])

    def __post_init__(self) -> None:
        self._inference = Inference(self.model.opset_imports, self.model.ir_version)
        self.symbols = symbolic_dimensions(self.model)
        self.base = self._first_sizes()

    def _first_sizes(self) -> dict[str, int]:
        """The given sizes, and for the other symbols the first of a few at which every node has a shape."""
        given = dict(self.sizes or {})
        fewest: tuple[int, dict[str, int]] | None = None
        for size in _FIRST_SIZES if any(name not in given for name in self.symbols) else _FIRST_SIZES[:1]:
            sizes = self._follow({**given, **{name: given.get(name, size) for name in self.symbols}})
            facts = self.at(sizes)
            empty = sum(any(size <= 0 for size in shape) for shape in facts.shapes.values())
            missing = len(facts.conflicts) + len(facts.unknown) + empty
            if fewest is None or missing < fewest[0]:
                fewest = missing, sizes
            if not missing:
                break
        assert fewest is not None
        return fewest[1]

    @property
    def first(self) -> Facts:
        """Every symbol at its first size."""
        return self.at(self.base)

    @property
    def second(self) -> Facts:
        """Every symbol at twice its first size."""
        return self.at(self.doubled(self.base.keys()))

    def doubled(self, names: Set[str]) -> dict[str, int]:
        """The first sizes, those of `names` twice as large."""
        return self._follow({name: size * (1 + (name in names)) for name, size in self.base.items()})

    def only(self, name: str, size: int) -> dict[str, int]:
        """The first sizes, but for that of one symbol."""
        return self._follow({**self.base, name: size})

    def at(self, sizes: Mapping[str, int]) -> Facts:
        """What is true at these sizes of all symbols."""
        key = frozenset(sizes.items())
        if key not in self._made:
            self._made[key] = propagate(self.model, sizes, table=self.table, inference=self._inference)
        return self._made[key]

    def off_corners(self) -> dict[str, int] | None:
        """Sizes that are no corner of the box, as far as the model accepts such: one more, or three times as many."""
        for candidate in (
            {name: size + 1 for name, size in self.base.items()},
            {name: size * 3 for name, size in self.base.items()},
        ):
            sizes = self._follow(candidate)
            facts = self.at(sizes)
            if len(facts.conflicts) <= len(self.first.conflicts) and len(facts.unknown) <= len(self.first.unknown):
                return sizes
        return None

    def vote_sizes(self) -> list[dict[str, int]]:
        """Sizes of the symbols at which probes must agree before something counts as static.

        The first sizes and twice those; sizes that are no multiples; much smaller ones, because a model that was
        exported at its maximum clamps everything above; much larger ones, because windows round everything below up.
        """
        found = [self.base, self.doubled(self.base.keys())]
        if not self.symbols:
            return found
        other = self.off_corners()
        smaller = {name: max(size // _SPAN, min(size, 2)) for name, size in self.base.items()}
        larger = {name: size * _SPAN + 1 for name, size in self.base.items()}
        return [*found, *([] if other is None else [other]), self._follow(smaller), self._follow(larger)]

    def votes(self) -> list[Facts]:
        """What is true at each of `vote_sizes`."""
        return [self.at(sizes) for sizes in self.vote_sizes()]

    def _follow(self, sizes: dict[str, int]) -> dict[str, int]:
        """Symbols that are expressions of others get the size that these give them."""
        free = {name: size for name, size in sizes.items() if _IDENTIFIER.fullmatch(name)}
        derived = {name: evaluate(name, free) for name in sizes if name not in free}
        return sizes | {name: size for name, size in derived.items() if size is not None and size > 0}


def infer_shapes(model: ir.Model, sizes: Mapping[str, int] | None = None) -> Facts:
    """Write a shape on every value but the interface: numbers where all probes agree, else symbols.

    A run-time dimension is written as the polynomial in the input symbols that all probes confirm; failing that as
    the symbol that the model declares, unless a probe refutes it; else it is anonymous.

    Args:
        model: a model whose nodes are sorted; changed in place.
        sizes: elements of the symbolic input dimensions that the model is known to accept, by name.

    Returns:
        What the first probe knows about the graph.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[b,s,4] x, float[b,p,4] c)
        ...     => (float[u,v,w] y) <int64[2] flat = {-1, 4}> { t = Concat<axis=1>(c, x) r = Reshape(x, flat)
        ...     n = Relu(r) y = Relu(t) }''')
        >>> _ = infer_shapes(model)
        >>> {node.op_type: str(node.outputs[0].shape) for node in list(model.graph)[:2]}
        {'Concat': '[b,p + s,4]', 'Reshape': '[b*s,4]'}
    """
    probes = Probes(model, sizes)
    namer, votes = _Namer(probes), probes.votes()
    for graph in model.graphs():
        if graph is not model.graph:
            for value in graph.inputs:
                _write_shape(value, votes, namer)
        for node in graph:
            for value in node.outputs:
                _write_shape(value, votes, namer)
    return probes.first


def _write_shape(value: ir.Value, votes: Sequence[Facts], namer: _Namer) -> None:
    first, second = votes[:2]
    if value in first.dtypes and value.dtype is None:
        value.dtype = first.dtypes[value]
    a, b = first.shape(value), second.shape(value)
    if a is None or b is None or len(a) != len(b) or value.is_graph_output():
        return
    known = [shape for shape in (facts.shape(value) for facts in votes) if shape is not None and len(shape) == len(a)]
    declared = value.shape if value.shape is not None and len(value.shape) == len(a) else None
    dimensions: list[int | str | None] = []
    for axis, size in enumerate(a):
        if all(shape[axis] == size for shape in known):
            dimensions.append(size)
            continue
        old = None if declared is None else declared[axis]
        dimensions.append(namer.name(value, axis, None if old is None or isinstance(old, int) else old.value))
    value.shape = ir.Shape(dimensions)


class _Namer:
    """Finds the polynomial behind a run-time dimension."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._symbols = [name for name in probes.symbols if _IDENTIFIER.fullmatch(name)][:_MOST_SYMBOLS]
        self._checks: list[dict[str, int]] | None = None

    def name(self, value: ir.Value, axis: int, declared: str | None) -> str | None:
        """Text for the dimension `axis` of `value`; `declared` is what the model says it is."""
        if self._checks is None:
            self._checks = [self._probes.doubled(self._probes.base.keys())]
            other = self._probes.off_corners()
            self._checks += [] if other is None else [other]
        fitted = self._fit(value, axis) if len(self._checks) > 1 else None
        for text in (fitted, declared):
            if text is not None and all(self._holds(text, value, axis, sizes) for sizes in self._checks):
                return text
        return None

    def _holds(self, text: str, value: ir.Value, axis: int, sizes: Mapping[str, int]) -> bool:
        expected = evaluate(text, sizes)
        return expected is None or expected == self._size(value, axis, sizes)

    def _size(self, value: ir.Value, axis: int, sizes: Mapping[str, int]) -> int | None:
        shape = self._probes.at(sizes).shape(value)
        return None if shape is None or axis >= len(shape) else shape[axis]

    def _fit(self, value: ir.Value, axis: int) -> str | None:
        """The polynomial through the corners, None where its coefficients are not whole or a corner is unknown."""

        def corner(*names: str) -> int | None:
            return self._size(value, axis, self._probes.doubled(set(names)))

        support = [name for name in self._symbols if corner(name) != corner()]
        if not 0 < len(support) <= _MOST_FACTORS:
            return None
        corners = [
            corner(*itertools.compress(support, chosen))
            for chosen in itertools.product((False, True), repeat=len(support))
        ]
        if None in corners:
            return None
        # f(n) = a + b s on s = n, 2 n: a = 2 f(n) - f(2 n) and b n = f(2 n) - f(n), along each axis of the box.
        scaled = np.array(corners, dtype=np.int64).reshape((2,) * len(support))
        for symbol_axis in range(len(support)):
            scaled = np.moveaxis(np.tensordot([[2, -1], [-1, 1]], scaled, (1, symbol_axis)), 0, symbol_axis)
        terms: list[tuple[tuple[str, ...], int]] = []
        for index in np.ndindex(scaled.shape):
            names = tuple(itertools.compress(support, index))
            coefficient, rest = divmod(int(scaled[index]), math.prod(self._probes.base[name] for name in names))
            if rest:
                return None
            terms.append((names, coefficient))
        text = polynomial(tuple(terms))
        return text if isinstance(text, str) else None
