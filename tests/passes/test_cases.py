"""Every golden case: the text that a pass prints, its remarks, and the laws of exact passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import Case, apply_exact, docstring_blocks, find_pass, parse

from graphopt.ir.text import print_graph

_CASES = sorted((Path(__file__).parent / "cases").glob("*/*.case"))
_PASSES = sorted({path.parent.name for path in _CASES})


@pytest.mark.parametrize("path", _CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_case(path: Path, request: pytest.FixtureRequest) -> None:
    case = Case.read(path)
    pass_type = find_pass(path.parent.name)
    options = eval(f"dict({case.sections.get('options', '')})")
    changed, remarks = apply_exact(pass_type(**options), parse(case.sections["before"]))
    after, remark_text = print_graph(changed), "\n".join(map(str, remarks))
    if request.config.getoption("--accept", default=False):
        case.write(after, remark_text)
        return
    assert after == case.sections.get("after")
    assert remark_text == case.sections.get("remarks")


@pytest.mark.parametrize("name", _PASSES)
def test_docstring_example_is_true(name: str) -> None:
    pass_type = find_pass(name)
    before, after = docstring_blocks(pass_type)
    model = parse(before)
    changed, _ = apply_exact(pass_type(), model)
    expected = parse(after, inputs={value.name or "" for value in model.graph.inputs})
    assert print_graph(changed) == print_graph(expected)


@pytest.mark.parametrize("name", _PASSES)
def test_cases_show_a_rewrite_and_a_refusal(name: str) -> None:
    cases = [Case.read(path) for path in _CASES if path.parent.name == name]
    assert any("missed" in case.sections["remarks"] for case in cases), "no case shows a refusal"
    assert any(print_graph(parse(case.sections["before"])) != case.sections["after"] for case in cases), (
        "no case shows a rewrite"
    )
