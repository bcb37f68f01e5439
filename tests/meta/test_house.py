"""Tests about the code base: floors, imports, names, sizes, and that what the documents say is so."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graphopt
from graphopt.passes import ALL_PASSES
from graphopt.recipe import PASSES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "graphopt"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "graphopt.errors": 0,
    "graphopt.ir.ops": 0,
    "graphopt.ir": 1,
    "graphopt.inputs": 2,
    "graphopt.criteria": 2,
    "graphopt.search": 2,
    "graphopt.factorizations": 2,
    "graphopt.latency": 2,
    "graphopt.passes": 3,
    "graphopt.train": 3,
    "graphopt.export": 3,
}
"""Longest matching prefix wins; everything else stands on top, floor 4."""
ALLOWED_ASIDE = {("graphopt.export.report", "graphopt.passes.contract")}
"""The report shows remarks, whose record belongs to the contract of passes (ADR 0002)."""


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    fitting = [prefix for prefix in FLOORS if module == prefix or module.startswith(prefix + ".")]
    return max(fitting, key=len) if fitting else "graphopt"


def imports_of(file: Path) -> list[str]:
    """Modules of graphopt that a file imports, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return [name for name in found if name.split(".")[0] == "graphopt"]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_floors(file: Path) -> None:
    name = module_name(file)
    here = room(name)
    for imported in imports_of(file):
        there = room(imported)
        if (name, imported) in ALLOWED_ASIDE or here == there:
            continue
        assert FLOORS.get(there, 4) <= FLOORS.get(here, 4), f"{name} imports {imported} from a floor above"
        if FLOORS.get(here, 4) == 3:
            assert FLOORS.get(there, 4) < 3, f"{name} imports {imported} sideways"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_readable(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring.count("\n")
            assert length <= 60, f"{node.name} has {length} lines without its docstring"


def test_no_rooms_without_a_name() -> None:
    forbidden = {"utils", "helpers", "misc", "common", "base"}
    assert not [file for file in MODULES if file.stem in forbidden]


TORCH_ROOMS = ("graphopt.ir.ops.torch", "graphopt.train")
TORCH_FILES = {f"graphopt.ir.{name}" for name in ("lifted", "lift_graph", "lift_weights", "lower")} | {
    "graphopt.inputs.synthesis",
    "graphopt.criteria.lifted_gradients",
}
"""What imports torch when it is loaded; nothing else may, and nothing else may import these when it is loaded."""


def needs_torch(module: str) -> bool:
    return module in TORCH_FILES or any(module == prefix or module.startswith(prefix + ".") for prefix in TORCH_ROOMS)


def test_torch_is_imported_only_where_it_may_be() -> None:
    for file in MODULES:
        name = module_name(file)
        if needs_torch(name):
            continue
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            at_top = [entry for entry in names if entry.split(".")[0] == "torch" or needs_torch(entry)]
            assert not at_top, f"{name} imports {at_top[0]} when it is loaded: import it inside the function"


@pytest.mark.parametrize(
    "module",
    [
        "graphopt",
        "graphopt.cli",
        "graphopt.ir.trace",
        "graphopt.ir.lift",
        "graphopt.recover",
        "graphopt.train_quantized",
    ],
)
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_onnx_path_does_not_import_torch(tmp_path: Path) -> None:
    code = """
import sys, onnx_ir as ir, graphopt
model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }')
graphopt.optimize(model, quiet=True)
sys.exit('torch' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_public_names() -> None:
    assert sorted(graphopt.__all__) == graphopt.__all__
    for name in graphopt.__all__:
        assert getattr(graphopt, name).__doc__, f"graphopt.{name} has no docstring"


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_has_its_contract(name: str) -> None:
    kind = PASSES[name]
    assert kind.__module__ == f"graphopt.{'passes.' if name in ALL_PASSES else ''}{name.replace('-', '_')}"
    assert "Before" in (kind.__doc__ or "")
    assert "After" in (kind.__doc__ or "")
    assert hash(kind()) == hash(kind())
    assert kind() == kind()
    assert str(kind()) == name


def test_the_readme_names_every_pass_and_command() -> None:
    readme = (ROOT / "README.md").read_text() + (ROOT / "docs" / "passes.md").read_text()
    assert [name for name in PASSES if f"`{name}`" not in readme] == []
    for command in ("optimize", "plan", "profile", "inspect", "groups", "diff", "bench", "verify"):
        assert f"graphopt {command}" in readme


def test_docstring_examples_run() -> None:
    """Every `>>>` example of the package, torch ones included."""
    code = (
        "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--doctest-modules', 'graphopt']))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-4000:]
