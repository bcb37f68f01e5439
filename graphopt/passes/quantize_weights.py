"""The plan of `Quantize(form="weights")`: weights of products and tables as integers, everything computed in floats.

    y = x (s (q - z))    with one scale s, and zero point z, for each block of inputs of each output

Nothing is measured but the weights themselves, so no data is needed; with `rounding="error-feedback"` inputs say which
errors matter (GPTQ, Frantar et al. 2022). The plan holds the rule, not the scales: they are 4 bytes for every block,
hundreds of MB for a large network, and follow from the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.rewrite import rank
from graphopt.passes.contract import Context
from graphopt.passes.quantize_blocks import Grid
from graphopt.passes.quantize_placement import node_name
from graphopt.passes.quantize_plan import OperatorPlan, QuantizePlan
from graphopt.passes.quantize_weight_kernels import ACCURACY_LEVELS, can_be_lifted, is_right, level_errors
from graphopt.passes.quantize_weight_sites import BLOCK_SIZES, WeightSite, reaches_product, weight_names, weight_sites
from graphopt.passes.quantize_weights_apply import is_packable, storage_opset

ROUNDINGS = ("nearest", "error-feedback")
"""How weights become integers."""


@dataclass(frozen=True)
class WeightOptions:
    """How weights become integers.

    Attributes:
        bits: width of the integers, 2 to 8.
        block_size: how many inputs share a scale, one of `BLOCK_SIZES`; 0 for one scale an output.
        symmetric: signed integers without zero points; else unsigned ones with a zero point for each scale.
        rounding: one of `ROUNDINGS`.
        contrib: com.microsoft operators instead of DequantizeLinear.
        accuracy_level: of these operators, one of `ACCURACY_LEVELS`.
        exclude: shell patterns of node names, weight names or operator types that stay float.

    Raises:
        GraphoptError: an option has no such value, or two contradict each other.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    rounding: str = "nearest"
    contrib: bool = False
    accuracy_level: int = 4
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block_size not in (0, *BLOCK_SIZES):
            raise GraphoptError(
                f"block_size is {self.block_size!r}, onnxruntime has kernels for {', '.join(map(str, BLOCK_SIZES))}",
                help="take one of them, or 0 for one scale an output",
            )
        if self.rounding not in ROUNDINGS:
            raise GraphoptError(f"unknown rounding {self.rounding!r}", help=f"one of {', '.join(ROUNDINGS)}")
        if self.contrib and not self.block_size:
            raise GraphoptError("contrib operators have their scales in blocks", help="give a block_size")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise GraphoptError(
                f"accuracy_level is {self.accuracy_level!r}",
                help=f"one of {', '.join(map(str, ACCURACY_LEVELS))}; without contrib the session sets it",
            )

    @property
    def grid(self) -> Grid:
        """The integers."""
        return Grid(self.bits, self.symmetric, self.block_size)


def plan_weights(model: ir.Model, options: WeightOptions, context: Context) -> QuantizePlan:
    """Decide which weights become integers, and how each is stored; nothing changes, and one weight is read at a time.

    Args:
        model: canonical.
        options: how.
        context: hears the remarks.

    Returns:
        One tensor for each weight, without its scales, which follow from the weight.
    """
    opset = _reachable_opset(model, options)
    tensors: dict[str, TensorPlan] = {}
    operators: list[OperatorPlan] = []
    reasons: dict[str, str | None] = {}
    for node, site in weight_sites(model).items():
        reason = _excluded(node, options.exclude) or (site if isinstance(site, str) else _misread(site, options))
        if reason is None and isinstance(site, WeightSite):
            name = site.stored.name or ""
            if name not in reasons:
                planned = _tensor(site, options, opset)
                reasons[name] = planned if isinstance(planned, str) else None
                if isinstance(planned, TensorPlan):
                    tensors[name] = planned
                site.release()
            reason = reasons[name]
        form = "float" if reason is not None else "table" if _is_table(site) else "weights"
        width = None if reason is not None else options.bits
        operators.append(OperatorPlan(node_name(node), node.op_type, form, reason or "", width))
    operators, tensors = _together(model, operators, tensors)
    plan = QuantizePlan(tuple(tensors.values()), tuple(operators))
    _remark(plan, options, context)
    return plan


def _is_table(site: WeightSite | str) -> bool:
    return isinstance(site, WeightSite) and site.is_table


def _together(
    model: ir.Model, operators: list[OperatorPlan], tensors: dict[str, TensorPlan]
) -> tuple[list[OperatorPlan], dict[str, TensorPlan]]:
    """All readers of a weight read integers, or none: one that is excluded keeps it float for the others too."""
    torn: dict[str, str] = {}
    chosen = {operator.node: operator for operator in operators}
    sites = weight_sites(model)
    for node, site in sites.items():
        operator = chosen[node_name(node)]
        if isinstance(site, WeightSite) and operator.form == "float":
            torn.setdefault(site.stored.name or "", node_name(node))
    for node, site in sites.items():
        operator = chosen[node_name(node)]
        name = site.stored.name or "" if isinstance(site, WeightSite) else ""
        if operator.form != "float" and name in torn:
            why = f"its weight is read by {torn[name]!r} in float too"
            chosen[operator.node] = replace(operator, form="float", reason=why, weight_bits=None)
    return [chosen[operator.node] for operator in operators], {
        name: tensor for name, tensor in tensors.items() if name not in torn
    }


def _excluded(node: ir.Node, patterns: tuple[str, ...]) -> str | None:
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in weight_names(node)):
            return f"excluded by {pattern!r}"
    return None


def _misread(site: WeightSite, options: WeightOptions) -> str | None:
    if options.contrib or not site.is_table:
        return None
    picked = site.node.inputs[1]
    if picked is not None and rank(picked) == 0 and options.grid.blocks(site.shape[0]) == 1:
        return "it picks one row of one block, onnxruntime does not dequantize that; contrib=True or smaller blocks do"
    product = reaches_product(site.node.outputs[0])
    if product is None:
        return None
    return f"its rows go to {product.op_type} {node_name(product)!r}, which onnxruntime misreads; contrib=True works"


def _tensor(site: WeightSite, options: WeightOptions, opset: int) -> TensorPlan | str:
    """How a weight is stored, or why it stays float."""
    inputs, outputs = site.shape
    storage = _storage(site, options, opset)
    if storage is None:
        return f"opset {opset} has no DequantizeLinear in blocks, opset 21 has; contrib=True needs none"
    groups = options.grid.blocks(inputs)
    scales = groups * outputs * (site.dtype.itemsize + (0 if options.symmetric else storage.itemsize))
    if inputs * outputs * storage.itemsize + scales >= site.tensor.nbytes:
        return f"a matrix of {inputs} x {outputs} is no smaller as integers with their scales"
    if not site.is_finite():
        return "its weight holds NaN or infinity"
    axis = site.input_axis if options.block_size else 1 - site.input_axis
    return TensorPlan(
        site.stored.name or "",
        "weight",
        options.bits,
        options.symmetric,
        axis,
        (),
        (),
        "weights",
        block_size=options.block_size,
        storage=storage.name.lower(),
        rounding=options.rounding,
    )


def _storage(site: WeightSite, options: WeightOptions, opset: int) -> ir.DataType | None:
    """The narrowest type that the opset and onnxruntime have for a weight, None where there is none."""
    prefix = "INT" if options.symmetric else "UINT"
    for width in (2, 4, 8):
        storage = ir.DataType[f"{prefix}{width}"]
        if width < options.bits or (width < 8 and not is_packable(site, storage)):
            continue
        if not options.contrib and storage_opset(storage, options.block_size) > opset:
            continue
        if site.is_table or is_right(storage, options.block_size, site.dtype, site.shape[1]):
            return storage
    return None


def _reachable_opset(model: ir.Model, options: WeightOptions) -> int:
    """The opset that the model has, or that it can be lifted to where its storage needs a newer one."""
    opset = model.opset_imports.get("", 0)
    if options.contrib:
        return opset
    for width in (2, 4, 8):
        wanted = storage_opset(ir.DataType[f"UINT{width}"], options.block_size)
        if width >= options.bits and (wanted <= opset or can_be_lifted(model, wanted)):
            return max(opset, wanted)
    return opset


def _remark(plan: QuantizePlan, options: WeightOptions, context: Context) -> None:
    for operator in plan.operators:
        if operator.form == "float":
            context.missed(f"quantize weight of {operator.op_type}", operator.reason, operator.node)
    if not plan.tensors:
        context.missed("quantize", "no operator has a weight that can be stored as integers alone", "model")
        return
    storages = sorted({tensor.storage for tensor in plan.tensors})
    blocks = f"blocks of {options.block_size}" if options.block_size else "one scale an output"
    zero = "no zero points" if options.symmetric else "zero points"
    context.note(
        "quantize",
        f"{len(plan.tensors)} weights as {' and '.join(storages)}, {blocks}, {zero}; products in float",
        "model",
    )
    for storage in storages:
        kind = ir.DataType[storage.upper()]
        if kind.bitwidth > options.bits:
            context.note("quantize", f"{options.bits} bits are simulated: they are stored as {storage}", "model")
        if not options.contrib and any(operator.form == "weights" for operator in plan.operators):
            errors = ", ".join(
                f"{level}: {e:.1e}" for level, e in level_errors(kind, options.block_size, options.bits).items()
            )
            why = (
                "onnxruntime runs these products at the accuracy level of the session (session config "
                f"'session.qdq_matmulnbits_accuracy_level', 4 by default); relative error by level, measured: {errors}"
            )
            context.note("quantize", why, "model")
