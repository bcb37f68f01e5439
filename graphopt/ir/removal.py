"""Removing channels, and the masked reference that removal is held against.

Removal slices initializers along their labelled axes, lets the `repair` column of the op table rewrite attributes
and size operands, infers every shape anew at all probes and compares it with what the labels say. There is no code
for any layer type here. The model that is passed in never changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.errors import InvalidGraphError, SelectionError
from graphopt.ir.channel_analysis import ChannelAnalysis, nodes_below
from graphopt.ir.channels import ChannelGroups, Selection, channel_groups
from graphopt.ir.ops.channels.quant import zero_point_of
from graphopt.ir.ops.flow import OpaqueError, RepairSite
from graphopt.ir.propagate import Facts, Propagation, propagate
from graphopt.ir.rewrite import Rewriter, discard_if_unread
from graphopt.ir.statistics import BATCHNORM_STATISTICS


def remove_channels(
    model: ir.Model,
    selection: Selection,
    *,
    groups: ChannelGroups | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ir.Model:
    """A new model without the selected units; equal to `mask_channels` of the same selection for exact groups.

    Args:
        model: a model in canonical form; it is not changed.
        selection: name of a group (or the group) to the indices of the units that go.
        groups: what `channel_groups(model)` returned, where the caller has it (or gave it a table); computed otherwise.
        sizes: as for `channel_groups`, where `groups` is not given.

    Returns:
        A new canonical model. Tensors that lost nothing are shared with `model`.

    Raises:
        SelectionError: an unknown group, a unit that does not exist, a group that cannot be pruned, or a selection
            that would leave nothing on some axis.
        InvalidGraphError: the model is not in canonical form, or the pruned graph does not have the shapes that the
            labels predict (then nothing is returned).

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,1] y)
        ...     <float[2,3] a = {1,2,3,4,5,6}, float[3,1] b = {1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }''')
        >>> from graphopt.ir.load import load
        >>> smaller = remove_channels(load(model), {"mlp hidden of a": [1]})
        >>> {name: list(value.shape) for name, value in smaller.graph.initializers.items()}
        {'a': [2, 2], 'b': [2, 1]}
    """
    groups = _groups_of(model, groups, sizes)
    removed = groups.atoms(selection)
    result = model.clone()
    _Removal(model, result, groups, removed).run()
    return result


def mask_channels(
    model: ir.Model,
    selection: Selection,
    *,
    groups: ChannelGroups | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ir.Model:
    """A new model of the same size in which everything that the selected units own is 0: the reference of removal.

    Integer weights get their zero point, which stands for 0. Scales, zero points, indices and the divisor of a weight
    norm (0 / 0) keep their values.

    Arguments, errors and example: as `remove_channels`.
    """
    groups = _groups_of(model, groups, sizes)
    removed = groups.atoms(selection)
    result = model.clone()
    for old, new in _pairs_of_initializers(model, result):
        if old in groups.analysis.spared or old.const_value is None:
            continue
        masks = [groups.units.kept(old, axis, removed) for axis in range(len(groups.analysis.state.tracks[old]))]
        if any(mask is not None for mask in masks):
            _replace(new, _masked(old, masks))
    return result


def _groups_of(model: ir.Model, groups: ChannelGroups | None, sizes: Mapping[str, int] | None) -> ChannelGroups:
    if groups is None:
        return channel_groups(model, sizes=sizes)
    if not isinstance(groups, ChannelGroups):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SelectionError(f"a {type(groups).__name__} is not what channel_groups returns", help="pass that as it is")
    if groups.analysis.model is not model:
        raise SelectionError(
            "the groups are those of another model", help="pass channel_groups of this very model, or no groups"
        )
    return groups


def _masked(value: ir.Value, masks: Sequence[np.ndarray | None]) -> np.ndarray:
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    fill = zero_point_of(value, array)
    for axis, mask in enumerate(masks):
        if mask is not None:
            index = [slice(None)] * array.ndim
            gone = np.flatnonzero(~mask)
            array[(*index[:axis], gone)] = fill[(*index[:axis], gone)]
    return array


def _replace(value: ir.Value, array: np.ndarray) -> None:
    tensor = value.const_value
    assert tensor is not None
    value.const_value = ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=value.name)
    value.shape = ir.Shape(array.shape)


def _pairs_of_initializers(old: ir.Model, new: ir.Model) -> Iterable[tuple[ir.Value, ir.Value]]:
    return [(value, new.graph.initializers[name]) for name, value in old.graph.initializers.items()]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether numbers that were computed from sizes are the same, up to the rounding of floats."""
    return np.allclose(a, b, rtol=1e-5, atol=0) if a.dtype.kind == "f" else np.array_equal(a, b)


class _Removal:
    """One removal: slices weights, walks the old and the new graph together, repairs, verifies."""

    def __init__(self, old: ir.Model, new: ir.Model, groups: ChannelGroups, removed: np.ndarray) -> None:
        self.old, self.new, self.groups, self.removed = old, new, groups, removed
        self.analysis: ChannelAnalysis = groups.analysis
        self.rewriter = Rewriter(new)
        self._interface = {*new.graph.inputs, *new.graph.outputs}
        self._opaque = {node for node, _ in self.analysis.opaque}
        self._sized: set[tuple[ir.Node, int]] = set()
        self._masks: dict[ir.Value, tuple[np.ndarray | None, ...] | None] = {}
        self._original = dict(zip(nodes_below(new.graph), nodes_below(old.graph), strict=True))
        self._propagation: Propagation | None = None
        self._values = [pair for a, b in self._original.items() for pair in zip(b.outputs, a.outputs, strict=True)]
        for a, b in zip(old.graphs(), new.graphs(), strict=True):
            self._values += zip(a.inputs, b.inputs, strict=True) if a is not old.graph else ()

    def run(self) -> None:
        for old, new in self._values:
            self._shrink(old, new)
            self._cut_statistics(old, new)
        for old, new in _pairs_of_initializers(self.old, self.new):
            masks = self.kept(old)
            if masks is not None and any(mask is not None for mask in masks) and old.const_value is not None:
                array = old.const_value.numpy()
                for axis, mask in enumerate(masks):
                    array = array if mask is None else np.compress(mask, array, axis=axis)
                _replace(new, array)
        for probe, sizes in enumerate(self.analysis.sizes):
            before = self._before if probe == 0 else None
            self._verify(propagate(self.new, sizes, table=self.analysis.table, before=before), probe)

    def _shrink(self, old: ir.Value, new: ir.Value) -> None:
        """Write the shape that the labels predict; a run-time dimension that lost channels becomes anonymous."""
        masks = self.kept(old)
        if masks is None or new.shape is None or new in self._interface:
            return
        new.shape = ir.Shape(
            dimension if mask is None else int(mask.sum()) if isinstance(dimension, int) else None
            for dimension, mask in zip(new.shape, masks, strict=True)
        )

    def _cut_statistics(self, old: ir.Value, new: ir.Value) -> None:
        """What training has left about the channels of a value goes with them; all of it where it does not fit."""
        statistics, masks = old.meta.get(BATCHNORM_STATISTICS), self.kept(old)
        if statistics is None or masks is None or len(masks) < 2 or masks[1] is None:
            return
        mask = masks[1]
        if all(array.shape == mask.shape for array in statistics):
            new.meta[BATCHNORM_STATISTICS] = tuple(array[mask] for array in statistics)
        else:
            del new.meta[BATCHNORM_STATISTICS]

    # What stays ---------------------------------------------------------------------------------------------

    def kept(self, value: ir.Value) -> tuple[np.ndarray | None, ...] | None:
        """For each axis of a value of the old graph what stays, None where all does; None where it has no axes."""
        if value not in self._masks:
            tracks = self.analysis.state.tracks.get(value)
            self._masks[value] = (
                None
                if tracks is None
                else tuple(self.groups.units.kept(value, axis, self.removed) for axis in range(len(tracks)))
            )
        return self._masks[value]

    # Repair -------------------------------------------------------------------------------------------------

    @property
    def _facts(self) -> Facts:
        """What is known of the new graph so far."""
        assert self._propagation is not None
        return self._propagation.facts

    def _before(self, node: ir.Node, propagation: Propagation) -> None:
        """Repair a node once the shapes before it are known."""
        self._propagation = propagation
        original = self._original[node]
        try:
            self._repair(node, original)
        except OpaqueError as error:
            raise InvalidGraphError(
                f"the channels cannot be removed: {error}", where=f"{original.op_type} {original.name}"
            ) from error

    def _repair(self, node: ir.Node, original: ir.Node) -> None:
        row = None if original in self._opaque else self.analysis.row(original)
        if row is not None and row.repair is not None and self._touched(original):
            attributes = {
                name: self.groups.units.kept_of(axis, self.removed)
                for name, axis in self.analysis.state.attributes.get(original, {}).items()
            }
            row.repair(RepairSite(node, original, self.kept, attributes, self.analysis.constant, self))
        self._restore_numbers(node, original)

    def _touched(self, original: ir.Node) -> bool:
        for value in (*original.inputs, *original.outputs):
            masks = None if value is None else self.kept(value)
            if masks is not None and any(mask is not None for mask in masks):
                return True
        axes = self.analysis.state.attributes.get(original, {}).values()
        if any(self.groups.units.kept_of(axis, self.removed) is not None for axis in axes):
            return True
        sizes = self.analysis.facts[0].sizes
        return any(value in sizes for value in original.inputs if value is not None)

    def _changed_numbers(
        self, node: ir.Node, original: ir.Node, old_facts: Facts, facts: Facts
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Operands that enter the data, were computed from sizes alone, and are others now: index, before, now."""
        if all(value in old_facts.constants and value not in old_facts.from_weights for value in original.outputs):
            return  # arithmetic on sizes: what comes of it is looked at where it is used
        for index, value in enumerate(original.inputs):
            if value is None or value not in old_facts.sizes or value in old_facts.from_weights:
                continue
            before, now = old_facts.constants.get(value), facts.constant(node.inputs[index])
            if before is None or now is None or (node, index) in self._sized:
                continue
            for axis, mask in enumerate(self.kept(value) or ()):
                before = before if mask is None else np.compress(mask, before, axis=axis)
            if before.shape != now.shape or not _equal(before, now):
                yield index, before, now

    def _restore_numbers(self, node: ir.Node, original: ir.Node) -> None:
        """A number that was computed from a size and enters the data stays what it was in the masked model."""
        for index, before, now in self._changed_numbers(node, original, self.analysis.facts[0], self._facts):
            if before.shape == now.shape:
                pairs = zip(before.reshape(-1).tolist(), now.reshape(-1).tolist(), strict=True)
                for element, (wanted, current) in enumerate(pairs):
                    if wanted != current:
                        self._rescale(node, index, element, wanted, current)

    # OperandEditor ------------------------------------------------------------------------------------------

    def length(self, value: ir.Value, axis: int) -> int | None:
        """Number of coordinates before the removal."""
        shape = self.analysis.facts[0].shape(value)
        return None if shape is None else shape[axis]

    def element(self, value: ir.Value, element: int) -> int | None:
        """An element of a size operand in the first probe, before the removal."""
        found = self.analysis.facts[0].constant(value)
        return None if found is None else int(found.reshape(-1)[element])

    def replace(self, node: ir.Node, index: int, array: np.ndarray) -> None:
        """Make input `index` of `node` this constant."""
        self._sized.add((node, index))
        name = f"{node.name}.{index}"
        old = node.inputs[index] if index < len(node.inputs) else None
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        tensor = ir.Tensor(np.array(array, order="C"), name=name)
        node.replace_input_with(index, self._initializer(name, tensor))
        if old is not None:
            discard_if_unread(old)

    def _initializer(self, name: str, tensor: ir.Tensor) -> ir.Value:
        value = self.rewriter.initializer(self.new.graph, name, tensor)
        assert self._propagation is not None
        self._propagation.initializer(value)
        return value

    def resize(self, node: ir.Node, original: ir.Node, index: int, element: int, before: int, after: int) -> None:
        """One element of a size operand was computed for `before` coordinates, of which `after` stay."""
        old_value, operand = original.inputs[index], node.inputs[index]
        if old_value is None or operand is None:
            return
        self._sized.add((node, index))
        old = self.analysis.facts[0].constant(old_value)
        now = self._facts.constant(operand)
        if old is None:
            raise OpaqueError(f"input {index} is not known, and an axis that it sizes lost channels")
        if int(old.reshape(-1)[element]) != before:
            return  # 0, -1 and 1 leave the axis as it is
        current = before if now is None else int(now.reshape(-1)[element])
        if current == after:
            return
        static = old_value not in self.analysis.facts[0].constants or not bool(
            self.analysis.elements_that_vary(old_value)[element]
        )
        if static:
            self.write(node, index, element, after)
        else:
            self._rescale(node, index, element, after, current)

    def write(self, node: ir.Node, index: int, element: int, number: int) -> None:
        """Put a number into a size operand: into the constant that it is, the piece of the Concat, else by Where."""
        operand = node.inputs[index]
        assert operand is not None
        if operand.const_value is not None:
            array = operand.const_value.numpy().copy()
            array.reshape(-1)[element] = number
            self.replace(node, index, array)
            return
        if self._write_piece(node, index, element, number):
            return
        length = int(self._facts.shapes[operand][0])
        chosen = np.arange(length) == element
        dtype = self._dtype(operand)
        mask = self._initializer(f"{node.name}.{index}.mask", ir.Tensor(chosen))
        value = self._initializer(f"{node.name}.{index}.size", ir.Tensor(np.array([number], dtype)))
        self._insert(node, index, "Where", [mask, value, operand])

    def _write_piece(self, node: ir.Node, index: int, element: int, number: int) -> bool:
        operand = node.inputs[index]
        producer = None if operand is None else operand.producer()
        if producer is None or producer.op_type != "Concat" or producer.domain != "":
            return False
        pieces = list(producer.inputs)
        position = element
        for number_of_piece, piece in enumerate(pieces):
            shape = self._facts.shape(piece)
            if piece is None or shape is None or len(shape) != 1:
                return False
            if position < shape[0]:
                if piece.const_value is None:
                    return False
                array = piece.const_value.numpy().copy()
                array[position] = number
                pieces[number_of_piece] = self._initializer(f"{piece.name}.kept", ir.Tensor(array))
                self._insert(node, index, "Concat", pieces, axis=0)
                return True
            position -= shape[0]
        return False

    def _rescale(self, node: ir.Node, index: int, element: int, wanted: float, current: float) -> None:
        """Multiply one element by wanted / current; for whole numbers without rounding, at every run-time size."""
        operand = node.inputs[index]
        assert operand is not None
        shape, dtype = self._facts.shapes[operand], self._dtype(operand)
        if not current or not wanted:
            raise OpaqueError(f"input {index} is computed from sizes, and {current} cannot be scaled to {wanted}")
        steps: list[tuple[str, float]] = [("Mul", wanted / current)]
        if dtype.kind in "iu":
            divisor = math.gcd(int(wanted), int(current))
            steps = [("Mul", int(wanted) // divisor), ("Div", int(current) // divisor)]
        for op_type, factor in steps:
            if factor != 1:
                array = np.ones(shape, dtype)
                array.reshape(-1)[element] = factor
                other = self._initializer(f"{node.name}.{index}.{op_type.lower()}", ir.Tensor(array))
                self._insert(node, index, op_type, [node.inputs[index], other])

    def _dtype(self, value: ir.Value) -> np.dtype:
        constant = self._facts.constant(value)
        return np.dtype(np.int64) if constant is None else constant.dtype

    def gather_first(self, node: ir.Node, axis: int, indices: np.ndarray) -> None:
        """Put a Gather before the first input of `node`."""
        chosen = self._initializer(f"{node.name}.kept", ir.Tensor(np.asarray(indices, np.int64)))
        self._insert(node, 0, "Gather", [node.inputs[0], chosen], axis=axis)

    def _insert(
        self, node: ir.Node, index: int, op_type: str, inputs: Sequence[ir.Value | None], **attributes: int
    ) -> None:
        """A new node whose result `node` reads as input `index`."""
        base = f"{node.name}.{index}"
        result = ir.Value(name=self.rewriter.unique_name(f"{base}.{op_type.lower()}"))
        inserted = ir.node(op_type, list(inputs), attributes=attributes, outputs=[result])
        inserted.name = self.rewriter.unique_name(f"{base}.{op_type}")
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_before(node, inserted)
        old = node.inputs[index]
        node.replace_input_with(index, result)
        if old is not None and old.producer() is None:
            discard_if_unread(old)
        assert self._propagation is not None
        self._propagation.node(inserted)
        dtype, shape = self._facts.dtypes.get(result), self._facts.shape(result)
        if op_type != "Gather" and dtype is not None and shape is not None:
            result.type, result.shape = ir.TensorType(dtype), ir.Shape(shape)

    def _check_reshape(self, node: ir.Node, facts: Facts) -> None:
        """onnx infers the target of a Reshape as it is written, whether or not the elements are as many."""
        if node.op_type != "Reshape" or node.domain != "":
            return
        data, result = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
        if data is not None and result is not None and math.prod(data) != math.prod(result):
            raise InvalidGraphError(
                f"the pruned graph reshapes {list(data)} to {list(result)}",
                where=f"{node.op_type} {node.name}",
                help="this is a defect of graphopt: please report the model and the selection",
            )

    # Verification -------------------------------------------------------------------------------------------

    def _verify(self, facts: Facts, probe: int) -> None:
        """Every shape is what the labels say; dimensions of run-time length in proportion."""
        old_facts = self.analysis.facts[probe]
        for old, new in self._values:
            masks, shape, before = self.kept(old), facts.shape(new), old_facts.shape(old)
            if masks is None or before is None or (not new.uses() and not new.is_graph_output()):
                continue
            expected = tuple(
                size if mask is None else size * int(mask.sum()) // len(mask)
                for size, mask in zip(before, masks, strict=True)
            )
            if shape != expected:
                producer = old.producer()
                raise InvalidGraphError(
                    f"the pruned graph gives {old.name!r} the shape {shape}, and its labels say {expected}",
                    where=f"{producer.op_type} {producer.name}" if producer is not None else None,
                    help="this is a defect of graphopt: please report the model and the selection",
                )
        for node, original in self._original.items():
            self._check_reshape(node, facts)
            for index, before, now in self._changed_numbers(node, original, old_facts, facts):
                raise InvalidGraphError(
                    f"input {index} is computed from sizes that lost channels: {now.tolist()}, where the masked model "
                    f"has {before.tolist()}",
                    where=f"{original.op_type} {original.name}",
                    help="keep the channels around this node",
                )
        for node, message in facts.conflicts:
            if probe == 0 and not any(node.name == other.name for other, _ in old_facts.conflicts):
                raise InvalidGraphError(f"the pruned graph contradicts itself: {message}", where=node.name)
