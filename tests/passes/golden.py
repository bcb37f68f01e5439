"""Golden cases: graphs as text with seeded weights, and the checks that hold for every exact pass."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.ir.compare import within_exact
from graphopt.ir.fingerprint import fingerprint
from graphopt.ir.session import open_session
from graphopt.passes import ALL_PASSES
from graphopt.passes.contract import Context, Pass, Remark

_SECTION = re.compile(r"^-- (\w+)(.*)$", re.MULTILINE)


@dataclasses.dataclass
class Case:
    """One golden file: sections `-- before`, `-- after`, `-- remarks`, and options behind `-- options`."""

    path: Path
    sections: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Case:
        text = path.read_text()
        parts = _SECTION.split(text)[1:]
        return cls(path, {name: body.strip("\n") for name, _, body in zip(*[iter(parts)] * 3, strict=True)})

    def write(self, after: str, remarks: str) -> None:
        kept = {name: body for name, body in self.sections.items() if name in ("story", "options", "before")}
        sections = {**kept, "after": after, "remarks": remarks}
        self.path.write_text("\n".join(f"-- {name}\n{body}".rstrip() for name, body in sections.items()) + "\n")


def find_pass(name: str) -> type[Pass]:
    """The pass class called `name`."""
    return ALL_PASSES[name]


def parse(text: str, inputs: Collection[str] | None = None) -> ir.Model:
    """ONNX text to a model: inputs called `w_...` become seeded random weights (`w_var...`: positive).

    Where `inputs` are given, every input besides these becomes a weight.
    """
    proto = onnx.parser.parse_model(text)
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    model = ir.from_proto(proto)
    for value in list(model.graph.inputs):
        assert value.name is not None
        if value.name in inputs if inputs is not None else not value.name.startswith("w_"):
            continue
        model.graph.inputs.remove(value)
        assert value.shape is not None
        assert value.dtype is not None
        random = np.random.default_rng(zlib.crc32(value.name.encode()))
        array = random.standard_normal(value.shape.numpy())
        if value.name.startswith("w_var"):
            array = np.abs(array) + 0.5
        value.const_value = ir.Tensor(array.astype(value.dtype.numpy()), dtype=value.dtype, name=value.name)
        model.graph.register_initializer(value)
    return model


def docstring_blocks(pass_type: type[Pass]) -> tuple[str, str]:
    """The ONNX texts under `Before::` and `After::` in the docstring of a pass."""
    doc = textwrap.dedent("    " + (pass_type.__doc__ or ""))
    found = re.search(r"Before::\n\n(.*?)\n\s*After::\n\n(.*)", doc, re.DOTALL)
    assert found, f"{pass_type.__name__} has no Before/After blocks in its docstring"
    return textwrap.dedent(found[1]).strip(), textwrap.dedent(found[2]).strip()


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    """Seeded inputs; run-time dimensions are 3."""
    random = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [dim if isinstance(dim, int) else 3 for dim in value.shape]
        array = random.standard_normal(shape) * (1 if value.dtype.is_floating_point() else 4)
        found[value.name or ""] = np.asarray(array).astype(value.dtype.numpy())
    return found


def interface(model: ir.Model) -> object:
    """Everything about inputs and outputs that no pass may change."""
    return [
        [(value.name, value.dtype, str(value.shape)) for value in values]
        for values in (model.graph.inputs, model.graph.outputs)
    ]


def apply_exact(pass_: Pass, model: ir.Model) -> tuple[ir.Model, list[Remark]]:
    """Run a pass on a clone and check the laws of exact passes. Returns the clone and the remarks.

    The clone shares the tensors with the original: a weight written in place shows as a wrong reference.
    """
    inputs = feeds(model)
    expected = open_session(model, optimized=False).run(None, inputs)
    changed = model.clone()
    context = Context()
    pass_.run(changed, context)
    onnx.checker.check_model(ir.to_proto(changed), full_check=True)
    assert interface(changed) == interface(model), "the interface changed"
    again = open_session(model, optimized=False).run(None, inputs)
    for first, second in zip(expected, again, strict=True):
        np.testing.assert_array_equal(first, second, "the original changed with its clone")
    # onnxruntime's own fusions break some graphs (Pad into a pool with ceil_mode): then the original fails as well.
    trusted = within_exact(expected, open_session(model).run(None, inputs))
    for optimized in (False, True) if trusted else (False,):
        found = open_session(changed, optimized=optimized).run(None, inputs)
        assert within_exact(expected, found), f"the outputs differ, onnxruntime optimized={optimized}"
    before = fingerprint(changed)
    pass_.run(changed, Context())
    assert fingerprint(changed) == before, "the second run changed the graph again"
    return changed, context.remarks
