"""Float values beside the integer ones of a quantized graph, built in graph order; what the rules of operators share.

Each integer value q that stands for s (q - z) gets a float value `real` beside it: what it would be had nothing been
rounded. Where a float value is made from integers, readers then read the float one, and the integers die.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import (
    DeclinedError,
    Rewriter,
    constant,
    constant_tensor,
    discard_if_dead,
    discard_if_unread,
    is_op,
    rank,
)
from graphopt.passes.dequantize_values import Parameters, derived, read_parameters

_NEVER_NEGATIVE = frozenset(
    {"Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs", "Exp", "Sqrt", "Softplus", "ReduceL1", "ReduceL2"}
)
_KEEPS_SIGN = frozenset({
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Add", "Mul", "Reshape", "Transpose",
    "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Pad", "DepthToSpace", "SpaceToDepth", "Expand",
    "Tile", "Identity", "Dropout", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "Cast", "Div", "Max", "Min",
})  # fmt: skip
MOVES = frozenset({
    "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Resize", "Reshape", "Transpose", "Flatten", "Squeeze",
    "Unsqueeze", "Slice", "Split", "DepthToSpace", "SpaceToDepth", "Expand", "Gather", "GatherElements", "GatherND",
    "Tile", "Identity", "TopK", "ArgMax", "ArgMin", "Compress", "ReverseSequence", "Upsample",
})  # fmt: skip
"""Standard operators that select or reorder the elements of input 0, or compare them with each other."""
_BOUND_ERROR = 1e-6
"""How near the upper end of a quantizer lies to a whole number where that number was the bound of a Clip."""
_LARGEST_BOUND = 16


@dataclass(frozen=True, eq=False)
class Quantity:
    """What an integer value stands for.

    Attributes:
        real: the float value, s (q - z) but for rounding.
        parameters: s and z.
    """

    real: ir.Value
    parameters: Parameters


@dataclass(frozen=True, eq=False)
class Dynamic:
    """An integer value that DynamicQuantizeLinear made: its scale is known at run time only.

    Attributes:
        real: the float value that was quantized.
        scale: its scale.
        zero: its zero point.
    """

    real: ir.Value
    scale: ir.Value
    zero: ir.Value


class Builder:
    """One dequantization of one model.

    Attributes:
        rewriter: of the model.
        quantities: what integer values stand for.
        dynamic: the integers of DynamicQuantizeLinear.
        keep_ranges: whether every quantizer's saturation is kept, not only that which stands for an activation.
    """

    def __init__(self, model: ir.Model, *, keep_ranges: bool) -> None:
        self.model = model
        self.rewriter = Rewriter(model)
        self.keep_ranges = keep_ranges
        self.quantities: dict[ir.Value, Quantity] = {}
        self.dynamic: dict[ir.Value, Dynamic] = {}
        self.made: list[ir.Node] = []
        self._folded: dict[tuple[object, ...], ir.Value] = {}
        self._limited: dict[tuple[ir.Value, float, float], ir.Value] = {}

    # Reading.

    def operand(
        self,
        node: ir.Node,
        index: int,
        scale: int,
        zero: int,
        *,
        axis: int = 1,
    ) -> ir.Value:
        """The float value that an integer operand of a node stands for, given where its scale and zero point are.

        Raises:
            DeclinedError: its parameters are not constant, or it has none that a float could be told from.
        """
        value = operand_of(node, index)
        if value is None:
            raise DeclinedError(f"it lacks input {index}", node)
        made_by = self.dynamic.get(value)
        if made_by is not None:
            if operand_of(node, scale) is made_by.scale and operand_of(node, zero) is made_by.zero:
                return made_by.real
            raise DeclinedError("it reads integers of DynamicQuantizeLinear with another scale", node)
        parameters = read_parameters(operand_of(node, scale), operand_of(node, zero), value.dtype, axis=axis)
        return self.real(value, parameters, node)

    def real(self, value: ir.Value, parameters: Parameters, before: ir.Node) -> ir.Value:
        """The float value that integers stand for when they are read with these parameters."""
        found = self.known(value, parameters, before)
        return self._standard_dequantize(value, parameters, before) if found is None else found

    def known(self, value: ir.Value, parameters: Parameters, before: ir.Node) -> ir.Value | None:
        """As `real`, None where nothing is known of the integers."""
        if constant_tensor(value) is not None:
            return self.folded(value, parameters)
        quantity = self.quantities.get(value)
        if quantity is None:
            return self._moved_constant(value, parameters, before)
        if quantity.parameters.equals(parameters):
            return quantity.real
        return self._reread(quantity, parameters, before)

    def _moved_constant(self, value: ir.Value, parameters: Parameters, before: ir.Node) -> ir.Value | None:
        """Integers picked or moved out of a constant (rows of an embedding) before their scale is known."""
        chain: list[ir.Node] = []
        source = value
        while constant_tensor(source) is None:
            node = source.producer()
            if node is None or not is_op(node, *MOVES) or len(node.outputs) > 1 or node.inputs[0] is None:
                return None
            chain.insert(0, node)
            source = node.inputs[0]
        if parameters.axis is not None:
            parameters = _before_gather(parameters, chain, source, value)
        real = self.folded(source, parameters)
        for step in chain:
            attributes = list(step.attributes.values())
            real = self.emit(
                before,
                step.op_type,
                [real, *step.inputs[1:]],
                like=step.outputs[0],
                dtype=real.dtype,
                attributes=attributes,
            )
        return real

    def folded(self, value: ir.Value, parameters: Parameters) -> ir.Value:
        """A float initializer of constant integers; the same one for the same integers and parameters.

        Raises:
            DeclinedError: the scales do not fit the integers.
        """
        stored = constant_tensor(value)
        assert stored is not None
        p = parameters
        key = (value, p.scale.tobytes(), p.zero.tobytes(), p.axis, p.block, p.floats)
        found = self._folded.get(key)
        if found is None:
            p.check(tensor_shape(stored))
            tensor = derived(stored, p.real, p.floats)
            found = self.rewriter.initializer(self.model.graph, stem(value), tensor)
            self._folded[key] = found
        return found

    def weight(self, like: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """A new float initializer named after the integers that it replaces."""
        return self.rewriter.initializer(self.model.graph, stem(like), tensor)

    def _reread(self, quantity: Quantity, parameters: Parameters, before: ir.Node) -> ir.Value:
        """The same integers in other units: s' (q - z') = s' / s x + s' (z - z')."""
        old, new = quantity.parameters, parameters
        if old.axis is not None or new.axis is not None:
            raise DeclinedError("its integers are read with other scales for each channel than they were made with")
        if not old.scale > 0:
            raise DeclinedError("it has a scale that is not above 0")
        result = quantity.real
        factor = np.float64(new.scale) / np.float64(old.scale)
        offset = np.float64(new.scale) * (int(old.zero) - int(new.zero))
        for op_type, number, neutral in (("Mul", factor, 1.0), ("Add", offset, 0.0)):
            if number != neutral:
                other = self.scalar(float(number), result.dtype or new.floats, f"{result.name}.{op_type.lower()}")
                result = self.emit(before, op_type, [result, other], like=result)
        return result

    def _standard_dequantize(self, value: ir.Value, parameters: Parameters, before: ir.Node) -> ir.Value:
        """DequantizeLinear of integers that come from elsewhere (an input of the model, a table look-up)."""
        p = parameters
        if p.block:
            raise DeclinedError(f"nothing is known of its integers {value.name!r}, and their scales are in blocks")
        scale = self.constant(p.scale, p.floats, f"{value.name}.scale")
        zero = self.constant(p.zero, p.integers, f"{value.name}.zero_point")
        attributes = {} if p.axis is None else {"axis": p.axis}
        return self.emit(
            before, "DequantizeLinear", [value, scale, zero], like=value, dtype=p.floats, attributes=attributes
        )

    # Writing.

    def emit(
        self,
        before: ir.Node,
        op_type: str,
        operands: Sequence[ir.Value | None],
        *,
        like: ir.Value,
        dtype: ir.DataType | None = None,
        attributes: Mapping[str, object] | Sequence[ir.Attr] | None = None,
        shaped: bool = True,
        domain: str = "",
    ) -> ir.Value:
        """The only result of a new node in front of `before`: of `dtype`, or that of `like`, and of its shape."""
        return self.emit_several(
            before, op_type, operands, like=[like], dtypes=[dtype], attributes=attributes, shaped=shaped, domain=domain
        )[0]

    def emit_several(
        self,
        before: ir.Node,
        op_type: str,
        operands: Sequence[ir.Value | None],
        *,
        like: Sequence[ir.Value],
        dtypes: Sequence[ir.DataType | None],
        attributes: Mapping[str, object] | Sequence[ir.Attr] | None = None,
        shaped: bool = True,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """The results of a new node in front of `before`, one for each value in `like`."""
        results: list[ir.Value] = []
        for value, dtype in zip(like, dtypes, strict=True):
            base = stem(value)
            made = ir.Value(name=self.rewriter.unique_name(base if base != value.name else f"{base}_{op_type.lower()}"))
            known = dtype or value.dtype
            if known is not None:
                made.dtype = known
            if shaped:
                made.shape = value.shape
            results.append(made)
        if isinstance(attributes, Sequence):
            listed = list(attributes)
        else:
            listed = [ir.convenience.convert_attribute(name, value) for name, value in (attributes or {}).items()]  # type: ignore[arg-type]
        operands = list(operands)
        while operands and operands[-1] is None:
            operands.pop()
        node = ir.Node(domain, op_type, operands, listed, outputs=results)
        node.name = self.rewriter.unique_name(before.name or results[0].name or op_type)
        assert isinstance(before.graph, ir.Graph)
        before.graph.insert_before(before, node)
        self.made.append(node)
        return results

    def constant(self, array: np.ndarray, dtype: ir.DataType, name: str) -> ir.Value:
        """A new initializer of the main graph, which subgraphs see too."""
        return self.rewriter.initializer(self.model.graph, name, ir.Tensor(array.astype(dtype.numpy()), dtype=dtype))

    def scalar(self, number: float, dtype: ir.DataType, name: str) -> ir.Value:
        """A new float scalar."""
        return self.constant(np.asarray(number), dtype, name)

    def publish(self, node: ir.Node, value: ir.Value, real: ir.Value, scale: int, zero: int, *, axis: int = 1) -> None:
        """Remember what an integer result of a node stands for, given where its scale and zero point are."""
        parameters = read_parameters(operand_of(node, scale), operand_of(node, zero), value.dtype, axis=axis)
        self.quantize(node, value, real, parameters)

    def quantize(self, node: ir.Node, value: ir.Value, real: ir.Value, parameters: Parameters) -> None:
        """Remember what an integer value stands for; the saturation of its quantizer is kept where it matters."""
        self.quantities[value] = Quantity(self.limited(real, parameters, node), parameters)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of the float value `old` read `new`, through an Identity where names forbid more."""
        producer = old.producer()
        assert producer is not None
        if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
            new = self.emit(producer, "Cast", [new], like=old, attributes={"to": int(old.dtype)})
        if not self.rewriter.bypass(old, new):
            self.rewriter.bypass(old, self.emit(producer, "Identity", [new], like=old))

    # The saturation of quantizers.

    def limited(self, real: ir.Value, parameters: Parameters, before: ir.Node) -> ir.Value:
        """`real` behind the Relu or Clip that the saturation of its quantizer stands for.

        One end at zero is an activation that was left to the quantizer, unless nothing beyond zero can come; then
        the other end is kept where it is a whole number, as the bound of Relu6 is. With `keep_ranges` both ends are
        kept always.
        """
        low, high = parameters.range()
        if constant_tensor(real) is not None or parameters.block or not np.isfinite(low).all():
            return real
        if self.keep_ranges:
            return self._clipped(real, low, high, parameters, before)
        if real.is_graph_input():
            return real
        if not low.any() and can_be_negative(real):
            whole = np.rint(high)
            bound = high.size == 1 and 0 < whole <= _LARGEST_BOUND and abs(high - whole) <= _BOUND_ERROR * whole
            return self._clipped(real, low, np.asarray(whole if bound else np.inf), parameters, before)
        if not high.any():
            return self._clipped(real, np.asarray(-np.inf), high, parameters, before)
        return real

    def _clipped(
        self, real: ir.Value, low: np.ndarray, high: np.ndarray, parameters: Parameters, before: ir.Node
    ) -> ir.Value:
        if parameters.axis is not None:
            return self._clipped_by_channel(real, low, high, parameters, before)
        ends = float(np.max(low)), float(np.min(high))
        key = (real, *ends)
        if key not in self._limited:
            made = real
            dtype = real.dtype or parameters.floats
            if ends == (0.0, float("inf")):
                made = self.emit(before, "Relu", [real], like=real)
            elif not _within(real, *ends):
                bounds = [
                    None if np.isinf(end) else self.scalar(end, dtype, f"{stem(real)}.{name}")
                    for name, end in zip(("low", "high"), ends, strict=True)
                ]
                made = self.emit(before, "Clip", [real, *bounds], like=real)
            self._limited[key] = made
        return self._limited[key]

    def _clipped_by_channel(
        self, real: ir.Value, low: np.ndarray, high: np.ndarray, parameters: Parameters, before: ir.Node
    ) -> ir.Value:
        if not np.any(low) and not np.isfinite(high).any():
            return self.emit(before, "Relu", [real], like=real)
        of_rank = rank(real)
        if of_rank is None:
            raise DeclinedError("it has a scale for each channel, and its rank is not known")
        assert parameters.axis is not None
        shape = [1] * of_rank
        shape[parameters.axis] = -1
        result = real
        for op_type, ends in (("Max", low), ("Min", high)):
            ends = np.broadcast_to(ends, parameters.scale.shape)
            if np.isfinite(ends).all():
                bound = self.constant(
                    ends.reshape(shape), real.dtype or parameters.floats, f"{stem(real)}.{op_type.lower()}"
                )
                result = self.emit(before, op_type, [result, bound], like=real)
        return result

    # The end.

    def finish(self) -> None:
        """Make integers that something still reads from their floats, and remove what nothing reads."""
        made = set(self.made)
        for node in reversed(list(self.model.graph.all_nodes())):
            if node not in made:
                discard_if_dead(node)
        for value, quantity in self.quantities.items():
            producer = value.producer()
            if producer is None or producer.graph is None or is_op(producer, "QuantizeLinear"):
                continue
            if value.uses() or value.is_graph_output():
                self._quantize_again(value, quantity, producer)
        for node in reversed(self.made):
            discard_if_dead(node)
        for graph in self.model.graphs():
            for value in tuple(graph.initializers.values()):
                discard_if_unread(value)

    def _quantize_again(self, value: ir.Value, quantity: Quantity, producer: ir.Node) -> None:
        p = quantity.parameters
        scale = self.constant(p.scale, p.floats, f"{value.name}.scale")
        zero = self.constant(p.zero, p.integers, f"{value.name}.zero_point")
        attributes = {} if p.axis is None else {"axis": p.axis}
        quantized = self.emit(
            producer,
            "QuantizeLinear",
            [quantity.real, scale, zero],
            like=value,
            dtype=p.integers,
            attributes=attributes,
        )
        self.rewriter.supersede(value, quantized)


Rule = Callable[[Builder, ir.Node], None]
"""How one operator becomes float; raises `DeclinedError` before it has changed what others read."""


def stem(value: ir.Value) -> str:
    """The name of a value without what quantizers append to it."""
    name = value.name or "value"
    for ending in ("_quantized", ".quantized", "_QuantizeLinear_Output", "_DequantizeLinear_Output", "_Q8G32", "_Q4"):
        name = name.removesuffix(ending) or name
    return name


def can_be_negative(value: ir.Value, depth: int = 12) -> bool:
    """Whether a float value may hold numbers below zero, as far as the operators before it tell."""
    array = constant(value)
    if array is not None:
        return bool(array.size and np.min(array) < 0)
    node = value.producer()
    if node is None or depth == 0:
        return True
    if is_op(node, *_NEVER_NEGATIVE):
        return False
    if is_op(node, "Clip"):
        low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if low is not None and float(low.reshape(())) >= 0:
            return False
    data = node.inputs if is_op(node, "Add", "Mul", "Concat", "Div", "Max", "Min") else node.inputs[:1]
    if not is_op(node, *_KEEPS_SIGN, "Clip"):
        return True
    return any(operand is None or can_be_negative(operand, depth - 1) for operand in data)


def _before_gather(parameters: Parameters, chain: Sequence[ir.Node], table: ir.Value, rows: ir.Value) -> Parameters:
    """Parameters by channel of rows that a Gather picked, as they are along the axes of the table."""
    p, node, stored, gathered = parameters, chain[-1], constant_tensor(table), rank(rows)
    assert p.axis is not None
    assert stored is not None
    axis = node.attributes.get("axis")
    if len(chain) != 1 or not is_op(node, "Gather") or p.block or (axis is not None and axis.as_int()):
        raise DeclinedError("its integers are moved, and have a scale for each channel", node)
    if p.axis >= 0 and gathered is None:
        raise DeclinedError("the rank of its integers is not known", node)
    position = p.axis - gathered if p.axis >= 0 and gathered is not None else p.axis
    if position + len(tensor_shape(stored)) < 1:
        raise DeclinedError("its scales differ along the rows that are picked", node)
    return Parameters(p.scale, p.zero, position, 0, p.integers, p.floats)


def _within(value: ir.Value, low: float, high: float) -> bool:
    """Whether a Clip in front of the value already keeps it within these ends."""
    node = value.producer()
    if not is_op(node, "Clip"):
        return False
    assert node is not None
    ends = [constant(node.inputs[index]) if index < len(node.inputs) else None for index in (1, 2)]
    least, most = (
        default if end is None else float(end.reshape(())) for end, default in zip(ends, (-np.inf, np.inf), strict=True)
    )
    return least >= low and most <= high


def operand_of(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index` of a node, None where it has none."""
    return node.inputs[index] if index < len(node.inputs) else None
