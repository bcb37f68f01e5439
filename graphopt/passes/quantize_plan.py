"""What a quantization decided, as data: printable, JSON both ways, replayable on the same model (design.md D5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.ir.quantizer import TensorPlan
from graphopt.passes.contract import Context

FORMS = ("static", "integer", "folded", "dynamic", "weights", "table", "float")
"""How an operator runs, see `OperatorPlan`."""
KEPT = "kept in float to stay within the budget"
"""How the reason begins of what a search for mixed precision keeps in float."""


@dataclass(frozen=True)
class Overrides:
    """What is decided for single operators, whatever the options of the pass say; the default decides nothing.

    Attributes:
        kept_float: operators that stay float, by node name, with the reason.
        widened: names of the nodes whose weights, inputs and outputs have 8 bits where the options ask for fewer.
    """

    kept_float: Mapping[str, str] = field(default_factory=dict[str, str])
    widened: frozenset[str] = frozenset()


@dataclass(frozen=True)
class OperatorPlan:
    """How one operator runs.

    Attributes:
        node: its name.
        op_type: its operator.
        form: "static" (between DequantizeLinear and QuantizeLinear, an int8 kernel of onnxruntime), "integer" (on
            the integers themselves, exact), "folded" (a Relu or Clip that the saturation of the quantizer before it
            already does), "dynamic" (DynamicQuantizeLinear and MatMulInteger), "weights" (its weight alone is
            stored as integers), "table" (rows of an embedding of integers) or "float" (declined).
        reason: why it was declined, or raised to more bits than were asked for; empty otherwise.
        weight_bits: width of its weight; None where it has none, or stays float.

    Raises:
        GraphoptError: there is no such form.
    """

    node: str
    op_type: str
    form: str
    reason: str = ""
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise GraphoptError(
                f"unknown form {self.form!r} of an operator", where=self.node, help=f"forms are {', '.join(FORMS)}"
            )


@dataclass(frozen=True)
class QuantizePlan:
    """Every decision of one `Quantize.plan`: apply it with `Quantize.apply`, store it with `to_json`.

    Attributes:
        tensors: how each quantized tensor becomes integers, in graph order.
        operators: how each linear operator, and each operator that was or could have been quantized, runs.
    """

    tensors: tuple[TensorPlan, ...] = ()
    operators: tuple[OperatorPlan, ...] = ()

    @property
    def static(self) -> bool:
        """Whether any operator runs on integers throughout."""
        return any(operator.form in ("static", "integer", "folded") for operator in self.operators)

    @property
    def weights_alone(self) -> bool:
        """Whether nothing but weights becomes integers, each in a storage of its own."""
        return all(operator.form in ("weights", "table", "float") for operator in self.operators) and all(
            tensor.storage for tensor in self.tensors
        )

    def forms(self) -> dict[str, int]:
        """Number of operators by form."""
        return dict(Counter(operator.form for operator in self.operators))

    def sources(self) -> dict[str, int]:
        """Number of activations by source of their range."""
        return dict(Counter(tensor.source for tensor in self.tensors if tensor.role == "activation"))

    def with_tensors(self, tensors: Iterable[TensorPlan]) -> QuantizePlan:
        """The same plan with other quantizers for some tensors, learned ones say; found by name and axis.

        Raises:
            GraphoptError: the plan has no such tensor.
        """
        known = {(tensor.name, tensor.axis): tensor for tensor in self.tensors}
        for tensor in tensors:
            if (tensor.name, tensor.axis) not in known:
                raise GraphoptError(
                    "the plan has no such tensor", where=tensor.name, help="keep names and axes of its own tensors"
                )
            known[tensor.name, tensor.axis] = tensor
        return replace(self, tensors=tuple(known.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` turns back into an equal plan."""
        return {
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "operators": [asdict(operator) for operator in self.operators],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizePlan:
        """The plan that `to_json` wrote, also after a round trip through text.

        Raises:
            GraphoptError: the data is no such plan.

        Example:
            >>> QuantizePlan.from_json(QuantizePlan().to_json()) == QuantizePlan()
            True
        """
        try:
            tensors = tuple(map(TensorPlan.from_json, data["tensors"]))
            return cls(tensors, tuple(OperatorPlan(**one) for one in data["operators"]))
        except (KeyError, TypeError, ValueError) as error:
            raise GraphoptError(
                f"not a quantization plan: {error}", help="pass what QuantizePlan.to_json wrote"
            ) from error

    def __str__(self) -> str:
        rows = [("tensor", "role", "bits", "axis", "scale", "zero point", "range from")]
        rows += [_tensor_row(tensor) for tensor in self.tensors]
        operators = [("operator", "type", "form", "weight bits", "why")]
        operators += [(o.node, o.op_type, o.form, str(o.weight_bits or "-"), o.reason) for o in self.operators]
        return f"{_table(rows)}\n\n{_table(operators)}"


def remark(plan: QuantizePlan, exclude: Sequence[str], context: Context) -> None:
    """Say what stays float and why, where ranges came from, and which patterns of `exclude` matched nothing."""
    for pattern in exclude:
        named = (name for operator in plan.operators for name in (operator.node, operator.op_type))
        cited = any(operator.reason == f"excluded by {pattern!r}" for operator in plan.operators)
        if not cited and not any(fnmatchcase(name, pattern) for name in named):
            context.missed("exclude", f"{pattern!r} matches nothing that could be quantized", "model")
    for operator in plan.operators:
        if operator.form == "float":
            why = KEPT if operator.reason.startswith(KEPT) else operator.reason  # one kind of remark, not one each
            context.missed(f"quantize {operator.op_type}", why, operator.node)
    sources = plan.sources()
    if sources:
        counted = ", ".join(f"{count} from {source}" for source, count in sorted(sources.items()))
        samples = getattr(context.calibration, "samples", None)
        counted += f" ({samples} samples)" if samples else ""
        context.note("quantize", f"ranges of {sum(sources.values())} activations: {counted}", "model")
    if not any(operator.form != "float" for operator in plan.operators):
        context.missed("quantize", "no operator has an int8 form here", "model")


def _tensor_row(tensor: TensorPlan) -> tuple[str, ...]:
    kind = f"{'int' if tensor.signed else 'uint'}{tensor.bits}{' symmetric' if tensor.symmetric else ''}"
    if tensor.storage and tensor.storage != kind.split()[0]:
        kind += f" in {tensor.storage}"
    axis = "-" if tensor.axis is None else str(tensor.axis)
    if tensor.block_size:
        axis += f" in blocks of {tensor.block_size}"
    if not tensor.scale:
        scale, zero = tensor.rounding if tensor.rounding != "nearest" else "least squares", "-"
    elif len(tensor.scale) == 1:
        scale, zero = f"{tensor.scale[0]:.4g}", str(tensor.zero_point[0])
    else:
        scale = f"{min(tensor.scale):.3g} .. {max(tensor.scale):.3g} ({len(tensor.scale)})"
        zero = str(tensor.zero_point[0]) if len(set(tensor.zero_point)) == 1 else "various"
    return tensor.name, tensor.role, kind, axis, scale, zero, tensor.source


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
