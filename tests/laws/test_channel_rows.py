"""The slice law: what a `channels` rule of the op table says is what onnxruntime computes.

Cutting the operands of an operator along channels that the rule calls the same, and repairing the node, gives the
result of the masked operator without the channels that the rule says are gone: value by value, for every exact
group. Whether a group is called inexact for a reason, and whether something can be pruned at all, is asked as well.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import graphopt
from graphopt.errors import GraphoptError, SelectionError
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.ir.ops import default_table
from graphopt.ir.session import open_session
from tests.laws.channel_cases import Case, Cases, case, const, data
from tests.laws.channel_cases_elementwise import ELEMENTWISE, NEWEST
from tests.laws.channel_cases_layout import LAYOUT
from tests.laws.channel_cases_linear import LINEAR
from tests.laws.channel_cases_norm import NORMS

pytestmark = pytest.mark.filterwarnings("ignore")  # masked cases divide by zero on purpose

TOLERANCE = 1e-4
_SHOWN, _ATTEMPTS = 3, 3
MOST_ALONE = 8
"""Groups of a case that are also removed each by itself."""
OLD_KERNELS = {"Bernoulli", "GlobalLpPool", "MaxRoiPool", "RandomNormalLike", "RandomUniformLike", "RoiAlign"}
"""Operators whose newest version onnxruntime does not have."""
CASES: Cases = {
    operator: [
        replace(spec, opset=NEWEST) if spec.opset == 21 and index % 2 and operator not in OLD_KERNELS else spec
        for index, spec in enumerate(specs)
    ]
    for operator, specs in {**LINEAR, **NORMS, **ELEMENTWISE, **LAYOUT}.items()
}
"""By operator, every other configuration at the newest opset of onnxruntime."""
ROWS = {f"{row.domain}::{row.op_type}" if row.domain else row.op_type: row for row in default_table() if row.channels}
NOT_RUN = {
    "Scatter": "left the standard at opset 11, and a model is lifted to 18",
    "Upsample": "left the standard at opset 10, and a model is lifted to 18",
    "SimplifiedLayerNormalization": "onnx's checker, which loading asks, does not know it",
    "com.microsoft::BiasAdd": "onnxruntime has no kernel for the CPU",
    "com.microsoft::TorchEmbedding": "onnxruntime has no kernel for the CPU",
}
"""Rows with a rule that no configuration stands for."""
MARKING = {
    "Conv", "ConvTranspose", "DeformConv", "ConvInteger", "QLinearConv", "MatMul", "Gemm", "Einsum", "MatMulInteger",
    "QLinearMatMul", "Attention", "LinearAttention", "LayerNormalization", "RMSNormalization", "GroupNormalization",
    "MeanVarianceNormalization", "LRN", "LpNormalization", "com.microsoft::SkipLayerNormalization",
    "com.microsoft::SkipSimplifiedLayerNormalization", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "DynamicQuantizeLinear",
    "Reciprocal", "Log", "Acosh", "Div", "Pow",
}  # fmt: skip
"""Operators whose rule may call groups inexact: a configuration of each must do so, and rightly."""
DISSOLVED = {"Constant", "Identity", "Dropout"}
"""Operators that loading removes, so that no rule is asked."""


@dataclass
class Findings:
    """What one case shows.

    Attributes:
        problems: each a sentence that begins with the case.
        marked: operators that called a group inexact, and whether removing it did differ from masking it.
        operators: operators that the loaded model has.
        pruned: units that were removed from exact groups.
    """

    spec: Case
    problems: list[str] = field(default_factory=list)
    marked: list[tuple[str, bool]] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)
    pruned: int = 0

    def wrong(self, what: str) -> None:
        """Note a breach of the law."""
        self.problems.append(f"{self.spec}: {what}")


class Law:
    """One case under the law."""

    def __init__(self, spec: Case) -> None:
        self.spec, self.found = spec, Findings(spec)
        self.random = np.random.default_rng(zlib.crc32(str(spec).encode()))
        self.model = graphopt.load(spec.proto)
        self.groups: ChannelGroups = graphopt.channel_groups(self.model)
        values = {value.name: value for node in self.model.graph for value in node.outputs}
        self.values = {name: value for name, value in values.items() if name and not value.is_graph_output()}
        self.before = self.run(self.model)

    def check(self) -> Findings:
        """Everything that is asked of a case."""
        self.found.operators = {
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes_of(self.model)
        }
        self.coverage()
        several = [group for group in self.groups if group.prunable and group.units > 1]
        exact = [group for group in several if group.exact]
        inexact = [group for group in several if not group.exact]
        if exact:
            self.exact({group.name: self.some(group) for group in exact}, "all exact groups")
        for group in exact[:MOST_ALONE] if len(exact) > 1 else ():
            self.exact({group.name: self.some(group)}, repr(group.name))
        for group in inexact:
            self.inexact(group)
        return self.found

    def coverage(self) -> None:
        """As much as the case promises can be pruned, and nothing where it says so."""
        exact = [group for group in self.groups if group.prunable and group.exact]
        if self.spec.why is not None:
            if any(group.prunable for group in self.groups):
                self.found.wrong(f"something can be pruned, yet {self.spec.why}")
            return
        if len(exact) < self.spec.groups:
            self.found.wrong(f"{len(exact)} exact groups can be pruned, not {self.spec.groups}: {list(self.groups)}")
        if self.spec.passes is not None:
            value = self.values[self.spec.results[0]]
            tracks = self.groups.analysis.state.tracks[value]
            free = tuple(axis for axis in range(len(tracks)) if self.groups.units.removable_share(value, axis) > 0)
            if free != self.spec.passes:
                self.found.wrong(f"axes {free} of the result can be pruned, not {self.spec.passes}")

    def some(self, group: ChannelGroup) -> list[int]:
        """A random choice of units, of which one stays."""
        count = int(self.random.integers(1, max(2, group.units)))
        return sorted(self.random.permutation(group.units)[:count].tolist())

    def exact(self, selection: Mapping[str, Sequence[int]], what: str) -> None:
        """Removing equals masking, at the outputs and at every value on the way."""
        selection = dict(selection)
        text = f"removing {what} {selection}"
        try:
            removed = self.removable(selection)
            if removed is None:
                self.found.wrong(f"{text}: the selection is refused")
                return
            cut = graphopt.remove_channels(self.model, selection, groups=self.groups)
            masked = graphopt.mask_channels(self.model, selection, groups=self.groups)
            wanted, found = self.run(masked), self.run(cut)
        except Exception as error:
            self.found.wrong(f"{text}: {type(error).__name__}: {str(error).splitlines()[0]}")
            return
        self.found.pruned += sum(map(len, selection.values()))
        outputs = [value.name or "" for value in self.model.graph.outputs]
        wrong = [*self.values_agree(removed, wanted, found), *self.agree(outputs, wanted, found)]
        wrong += [] if wrong else self.default_optimisation(cut, outputs, found)
        if wrong:
            self.found.wrong(f"{text}: {'; '.join(wrong[:_SHOWN])}")

    def removable(self, selection: dict[str, Sequence[int]]) -> np.ndarray | None:
        """The labels that go; groups of the selection that empty an axis together lose units until none does."""
        while True:
            try:
                return self.groups.atoms(selection)
            except SelectionError:
                largest = max(selection, key=lambda name: len(selection[name]))
                if len(selection[largest]) > 1:
                    selection[largest] = selection[largest][:-1]
                elif len(selection) > 1:
                    del selection[largest]
                else:
                    return None

    def agree(
        self, names: Iterable[str], wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
    ) -> Iterable[str]:
        """What differs at the outputs."""
        for name in names:
            why = difference(wanted[name], found[name])
            if why is not None:
                yield f"output {name}: {why}"

    def values_agree(
        self, removed: np.ndarray, wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
    ) -> Iterable[str]:
        """The slice law at each value, and what the rules say of zeros."""
        analysis = self.groups.analysis
        for name, value in self.values.items():
            tracks = analysis.state.tracks.get(value)
            if tracks is None or name not in found or value in analysis.facts[0].sizes:
                continue  # sizes are repaired where they are used
            left = wanted[name]
            for axis, track in enumerate(tracks):
                kept = self.groups.units.kept(value, axis, removed)
                if kept is None:
                    continue
                kept = np.resize(kept, left.shape[axis])
                gone = np.compress(~kept, wanted[name], axis=axis)
                if not finite(gone):
                    yield f"{name} is not finite at the masked coordinates of axis {axis}"
                elif track.zero and gone.dtype.kind == "f" and np.any(gone):
                    yield f"{name} counts as 0 where masked along axis {axis}, and is not"
                left = np.compress(kept, left, axis=axis)
            why = difference(left, found[name], slack=1 if left.dtype in (np.int8, np.uint8) else 0)
            if why is not None:
                yield f"value {name}: {why}"

    def default_optimisation(
        self, cut: ir.Model, outputs: Sequence[str], found: Mapping[str, np.ndarray]
    ) -> Iterable[str]:
        """Whether the smaller model loads and runs the same as onnxruntime optimises it.

        Products with a dequantized weight are only run: onnxruntime makes them products of integers, which round.
        """
        if self.spec.reference:
            return []
        try:
            optimised = open_session(cut).run_feeds(self.spec.feeds())
        except GraphoptError as error:
            return [f"optimised: {error}"]
        if "DequantizeLinear" in self.found.operators:
            return []
        return [f"optimised: {why}" for why in self.agree(outputs, found, dict(zip(outputs, optimised, strict=True)))]

    def inexact(self, group: ChannelGroup) -> None:
        """Removing works; whether it ever differs is noted for the operator that is blamed."""
        names = [value.name or "" for value in self.model.graph.outputs]
        differs = False
        for _ in range(_ATTEMPTS):
            selection = {group.name: self.some(group)}
            text = f"removing {group.name!r}, which is inexact, {selection[group.name]}"
            try:
                if self.removable(selection) is None:
                    self.found.wrong(f"{text}: the selection is refused")
                    return
                cut = graphopt.remove_channels(self.model, selection, groups=self.groups)
                masked = graphopt.mask_channels(self.model, selection, groups=self.groups)
                wanted, found = self.run(masked), self.run(cut)
            except Exception as error:
                self.found.wrong(f"{text}: {type(error).__name__}: {str(error).splitlines()[0]}")
                return
            differs = any(self.agree(names, wanted, found))
            if differs:
                break
        assert group.inexact_reason is not None
        self.found.marked.append((group.inexact_reason.split()[0], differs))

    def run(self, model: ir.Model) -> dict[str, np.ndarray]:
        """Outputs and values on the way, as the graph is written."""
        feeds = self.spec.feeds()
        if self.spec.reference:
            proto = ir.to_proto(model)
            names = [*self.values, *(value.name for value in proto.graph.output)]
            arrays = ReferenceEvaluator(proto).run(names, feeds)
            return dict(zip(names, map(np.asarray, arrays), strict=True))
        session = open_session(model, optimized=False, extra_outputs=self.values)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run_feeds(feeds), strict=True))


def nodes_of(model: ir.Model) -> Iterable[ir.Node]:
    return (node for graph in model.graphs() for node in graph)


def finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def difference(wanted: np.ndarray, found: np.ndarray, slack: int = 0) -> str | None:
    """Where two arrays part, None where they agree."""
    if wanted.shape != found.shape:
        return f"the shapes are {wanted.shape} masked and {found.shape} removed"
    if not finite(wanted):
        return "the masked one is not finite"
    if wanted.dtype.kind in "biu":
        off = np.abs(wanted.astype(np.float64) - found.astype(np.float64))
        return None if not off.size or off.max() <= slack else f"integers differ by {off.max():g}"
    off = np.abs(wanted.astype(np.float64) - found.astype(np.float64))
    scale = np.abs(wanted).max(initial=1e-3)
    if not off.size or off.max() <= TOLERANCE * scale:
        return None
    return f"they differ by {off.max():.3g} at a scale of {scale:.3g}"


def test_every_row_with_a_rule_has_a_configuration_or_a_reason() -> None:
    assert set(CASES) | set(NOT_RUN) == set(ROWS)
    assert not set(CASES) & set(NOT_RUN)


@pytest.mark.parametrize("operator", CASES)
def test_cutting_equals_masking(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")  # onnxruntime: some operators are newer
    findings = [examined(spec) for spec in CASES[operator]]
    problems = [problem for found in findings for problem in found.problems]
    if operator not in DISSOLVED:
        problems += [f"{operator}: loading removes it"] if not any(operator in f.operators for f in findings) else []
    problems += unneeded(operator, findings)
    assert not problems, "\n".join(problems)


def examined(spec: Case) -> Findings:
    """The case under the law; a crash is a finding as well."""
    try:
        return Law(spec).check()
    except Exception as error:
        found = Findings(spec)
        found.wrong(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return found


def unneeded(operator: str, findings: Sequence[Findings]) -> list[str]:
    """Marks of the operator itself that no configuration needs, and marks that no configuration asks for."""
    marked = [differs for found in findings for blamed, differs in found.marked if blamed == operator.split("::")[-1]]
    if marked and not any(marked):
        return [f"{operator}: groups are called inexact, and none of them is"]
    return [f"{operator}: nothing is called inexact"] if operator in MARKING and not marked else []


def test_a_unit_that_is_alone_in_its_group_can_go_where_its_axis_keeps_others() -> None:
    """One of five rows is not read: it is a group of its own, and is either no prunable group or can go."""
    spec = case("y = Slice(a, s, e)", a=data(5, 6), s=const([1]), e=const([5]))
    model = graphopt.load(spec.proto)
    groups = graphopt.channel_groups(model)
    alone = [group for group in groups if group.units == 1 and group.prunable]
    for group in alone:
        smaller = graphopt.remove_channels(model, {group.name: [0]}, groups=groups)
        np.testing.assert_allclose(
            open_session(smaller).run_feeds(spec.feeds())[0], open_session(model).run_feeds(spec.feeds())[0], rtol=1e-5
        )
