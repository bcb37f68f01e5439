"""Which operators may compute on integers: what each loses, and where numbers are converted between the two kinds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

ON_INTEGERS = ("static", "integer")
"""Forms of operators that read and write integers; see `graphopt.passes.quantize_plan.FORMS`."""


@dataclass(frozen=True)
class Border:
    """A value that is converted where its maker and a reader compute in different kinds of numbers.

    Attributes:
        node: name of a node whose shapes tell how many elements it has.
        inwards: whether it is an input of that node, else an output.
        index: which.
        maker: name of the node that makes it, where that may write integers; None where it is always a float.
        readers: names of the nodes that may read integers.
        read_as_float: whether somebody else reads it, too.
        writes_both: whether the maker writes floats without another conversion, as products without a bias do.
    """

    node: str
    inwards: bool
    index: int
    maker: str | None
    readers: tuple[str, ...]
    read_as_float: bool
    writes_both: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """Names of the operators that decide about it."""
        return self.readers if self.maker is None else (self.maker, *self.readers)

    def conversions(self, chosen: Collection[str]) -> Iterator[bool]:
        """What is converted with these operators on integers: True where a value becomes integers, False where floats.

        Example:
            >>> border = Border("a", False, 0, "a", ("b",), False)
            >>> [list(border.conversions(chosen)) for chosen in ((), ("a",), ("b",), ("a", "b"))]
            [[], [False], [True], []]
        """
        by_integers = any(reader in chosen for reader in self.readers)
        by_floats = self.read_as_float or any(reader not in chosen for reader in self.readers)
        if self.maker in chosen:
            if by_floats and (by_integers or not self.writes_both):
                yield False
        elif by_integers:
            yield True


@dataclass(frozen=True)
class IntegerForms:
    """The operators of a model that may compute on integers.

    Attributes:
        losses: by name, what the outputs lose when this operator alone does: their relative squared error.
        borders: where values are converted.
        decided: names of those that are decided; the others follow what is around them, and are told apart because
            they cost something.
        form: how, see `graphopt.passes.quantize.Quantize.form`.
    """

    losses: Mapping[str, float] = field(default_factory=dict[str, float])
    borders: tuple[Border, ...] = ()
    decided: frozenset[str] = frozenset()
    form: str = "auto"


def find_borders(
    nodes: Sequence[ir.Node], forms: Mapping[str, str], outputs: Collection[ir.Value], known: Collection[str]
) -> list[Border]:
    """The values that may be converted.

    Args:
        nodes: all nodes of the main graph, named. Those of bodies read floats, whatever their names.
        forms: by name of the node how it computes once everything that may is on integers; "folded" is an activation
            that the quantizer before it does.
        outputs: of the graph; they are floats.
        known: names of nodes whose shapes are known; a value beside none of them is left out.
    """
    found: list[Border] = []
    main = set(nodes)
    for value in dict.fromkeys(value for node in nodes for value in (*node.inputs, *node.outputs)):
        if value is None or value.is_initializer() or value.dtype not in (None, ir.DataType.FLOAT):
            continue
        producer = value.producer()
        name = "" if producer is None else producer.name or ""
        if forms.get(name) == "folded":  # its maker's quantizer has done it
            continue
        ends = list(_seen_through(value, forms))
        readers = dict.fromkeys(node for end in ends for node in end.consumers())
        on_integers = tuple(
            node.name or "" for node in readers if node in main and forms.get(node.name or "") in ON_INTEGERS
        )
        maker = name if forms.get(name) in ON_INTEGERS else None
        place = _place(value, ends, main, known)
        if place is not None and (on_integers or maker):
            as_float = len(on_integers) < len(readers) or not {*ends}.isdisjoint(outputs)
            writes_both = producer is not None and producer.op_type in ("MatMul", "Gemm")
            found.append(Border(*place, maker, on_integers, as_float, writes_both))
    return found


def _seen_through(value: ir.Value, forms: Mapping[str, str]) -> Iterator[ir.Value]:
    """The value, or what an activation that is folded into its quantizer makes of it."""
    readers = value.consumers()
    if len(readers) == 1 and forms.get(readers[0].name or "") == "folded":
        yield from _seen_through(readers[0].outputs[0], forms)
    else:
        yield value


def _place(
    value: ir.Value, ends: Sequence[ir.Value], main: Collection[ir.Node], known: Collection[str]
) -> tuple[str, bool, int] | None:
    """A node that is known, whether the value is an input of it, and which."""
    producer = value.producer()
    if producer is not None and producer.name in known:
        return producer.name or "", False, producer.outputs.index(value)
    for end in ends:
        for use in end.uses():
            if use.node in main and use.node.name in known:
                return use.node.name or "", True, use.idx
    return None
