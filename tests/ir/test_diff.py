from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from graphopt.ir import weight_pairs
from graphopt.ir.diff import diff
from graphopt.ir.text import from_text, node_text

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def graph(
    body: str, inputs: str = "float[1,2,4,4] x", outputs: str = "float[1,2,4,4] y", weights: str = ""
) -> ir.Model:
    return from_text(f"{HEAD} net ({inputs}) => ({outputs}) {f'<{weights}>' if weights else ''} {{ {body} }}")


def residual(blocks: int, folded: bool) -> ir.Model:
    """Residual blocks of Conv, BatchNormalization, Relu; folded: without BatchNormalization, under the same names."""
    lines, weights, last = [], [], "x"
    for i in range(blocks):
        kernel = ", ".join(str(i + j / 8) for j in range(36))
        pads = "<pads = [1,1,1,1], strides = [1,1]>"
        if folded:
            weights += [f"float[2,2,3,3] fw{i} = {{{kernel}}}", f"float[2] fb{i} = {{{i}.5, 1}}"]
            lines.append(f"n{i} = Conv {pads} ({last}, fw{i}, fb{i})")
        else:
            weights.append(f"float[2,2,3,3] w{i} = {{{kernel.replace('.', '.0')}}}")
            weights += [f"float[2] {k}{i} = {{{i}.25, {j}}}" for j, k in enumerate("gbmv")]
            lines += [f"c{i} = Conv {pads} ({last}, w{i})", f"n{i} = BatchNormalization (c{i}, g{i}, b{i}, m{i}, v{i})"]
        lines += [f"r{i} = Relu(n{i})", f"a{i} = Add(r{i}, {last})"]
        last = f"a{i}"
    return graph(" ".join([*lines, f"y = Sigmoid({last})"]), weights=", ".join(weights))


def rename(model: ir.Model, prefix: str = "other_") -> ir.Model:
    """A clone with new names for all inner values, nodes and weights."""
    model = model.clone()
    interface = {*model.graph.inputs, *model.graph.outputs}
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = f"{prefix}node{index}"
        for value in node.outputs:
            if value not in interface and not value.is_graph_output():
                value.name = f"{prefix}{index}"
    weights = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for index, value in enumerate(weights):
        value.name = f"{prefix}w{index}"
        model.graph.register_initializer(value)
    return model


FOLDED = """\
   nodes    13 -> 10        BatchNormalization 3 -> 0
   weights  132 -> 114      bytes 528 -> 456      tensors -15 +6 ~0

   @@ c0 @@
 -   %c0 = Conv(%x, %w0) {pads=[1,1,1,1], strides=[1,1]}
 -   %n0 = BatchNormalization(%c0, %g0, %b0, %m0, %v0)
 +   %n0 = Conv(%x, %fw0, %fb0) {pads=[1,1,1,1], strides=[1,1]}
   ... 2 more of the same shape"""


def test_equal_shapes_collapse() -> None:
    assert str(diff(residual(3, False), residual(3, True))) == FOLDED


def test_hunks_do_not_need_names() -> None:
    found = diff(residual(6, False), rename(residual(6, True)))
    assert [len(group) for group in found.groups] == [6]
    assert [(len(h.removed), len(h.added)) for h in found.hunks] == [(2, 1)] * 6
    assert "%a0" in found.text(full=True)


def test_full_text_shows_every_hunk() -> None:
    text = diff(residual(3, False), residual(3, True)).text(full=True)
    assert text.count("@@ c") == 3
    assert "more of the same shape" not in text


@pytest.mark.parametrize("blocks", [1, 4])
def test_renames_are_no_difference(blocks: int) -> None:
    model = residual(blocks, False)
    found = diff(model, rename(model))
    assert not found, str(found)
    assert "no difference" in str(found)


def test_shifted_names_do_not_mislead() -> None:
    """A fresh export numbers its values anew, so that one name means something else on each side."""
    a = graph("v1 = Relu(x) v2 = Sigmoid(v1) v3 = Relu(v2) y = Tanh(v3)")
    b = graph("v1 = Abs(x) v2 = Relu(v1) v3 = Sigmoid(v2) v4 = Relu(v3) y = Tanh(v4)")
    (hunk,) = diff(a, b).hunks
    assert not hunk.removed
    assert [node.op_type for node in hunk.added] == ["Abs"]


def test_order_of_nodes_and_weights_is_no_difference() -> None:
    a, b = residual(3, False), residual(3, False)
    for node in reversed(list(b.graph)):
        b.graph.remove(node)
        b.graph.append(node)
    weights = list(b.graph.initializers.items())
    b.graph.initializers.clear()
    for _, value in reversed(weights):
        b.graph.register_initializer(value)
    assert not diff(a, b), str(diff(a, b))


def test_a_changed_weight_is_reported_without_a_hunk() -> None:
    a, b = residual(2, False), residual(2, False)
    weight = b.graph.initializers["w1"]
    array = weight.const_value.numpy().copy()
    array[0, 0, 0, 0] += np.abs(array).max() / 2
    weight.const_value = ir.tensor(array)
    found = diff(a, b)
    assert found
    assert not found.groups
    assert [pair.name for pair in found.weights_changed] == ["w1"]
    assert "%w1: f32[2,2,3,3], content differs by 0.5" in str(found)


def test_a_cut_weight_is_reported_with_both_shapes() -> None:
    a = graph("y = MatMul(x, w)", weights="float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}")
    b = graph("y = MatMul(x, w)", weights="float[4,2] w = {1,2,5,6,9,1,4,5}")
    found = diff(a, b)
    assert not found.groups
    assert "f32[4,4] -> f32[4,2]" in str(found)


def test_merged_equal_weights_leave_nodes_alone() -> None:
    two = "float[1] p = {3}, float[1] q = {3}"
    a = graph("h = Add(x, p) y = Mul(h, q)", weights=two)
    b = graph("h = Add(x, p) y = Mul(h, p)", weights="float[1] p = {3}")
    found = diff(a, b)
    assert not found.groups, str(found)
    assert [name for name, _ in found.weights_removed] == ["q"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": "float[N,2,4,4] x"}, "input %x: f32[1,2,4,4] -> f32[N,2,4,4]"),
        ({"outputs": "float16[1,2,4,4] y"}, "output %y: f32[1,2,4,4] -> f16[1,2,4,4]"),
        ({"inputs": "float[1,2,4,4] x, float[1] extra"}, "input %extra: f32[1] is new"),
        ({"body": "y = Relu(image)", "inputs": "float[1,2,4,4] image"}, "input %x is now called %image"),
        ({"body": "z = Relu(x)", "outputs": "float[1,2,4,4] z"}, "output %y is now called %z"),
    ],
)
def test_interface_changes_are_reported(change: dict[str, str], said: str) -> None:
    found = diff(graph("y = Relu(x)"), graph(**{"body": "y = Relu(x)", **change}))
    assert not found.groups, str(found)
    assert said in found.interface


def test_order_of_outputs_and_opset_are_interface() -> None:
    a = graph("y = Relu(x) z = Abs(x)", outputs="float[1] y, float[1] z")
    b = graph("y = Relu(x) z = Abs(x)", outputs="float[1] z, float[1] y")
    b.opset_imports[""] = 22
    assert diff(a, b).interface == ("outputs in another order: %z, %y", "opset 21 -> 22")


def test_swapped_outputs_are_found() -> None:
    a = graph("y = Relu(x) z = Abs(x)", outputs="float[1] y, float[1] z")
    b = graph("z = Relu(x) y = Abs(x)", outputs="float[1] y, float[1] z")
    assert len(diff(a, b).hunks) >= 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("h = Abs(x) k = Neg(x) y = Add(h, h)", "h = Abs(x) k = Neg(x) y = Add(h, k)"),
        ("h = Abs(x) y = Sub(h, x)", "h = Abs(x) y = Sub(x, h)"),
        ("y = LeakyRelu <alpha = 0.1> (x)", "y = LeakyRelu <alpha = 0.2> (x)"),
        ("y = Clip(x)", "k = Constant <value = float {1.0}> () y = Clip(x, k)"),
        ("y = Clip(x, , x)", "y = Clip(x, x)"),
        ("y = Constant <value = float[2] {1.0, 2.0}> ()", "y = Constant <value = float[2] {1.0, 2.5}> ()"),
    ],
)
def test_no_change_is_overlooked(before: str, after: str) -> None:
    assert diff(graph(before), graph(after)).hunks
    assert diff(graph(after), graph(before)).hunks


def test_readers_of_an_inserted_node_are_told() -> None:
    (hunk,) = diff(graph("h = Abs(x) y = Neg(h)"), graph("h = Abs(x) r = Relu(h) y = Neg(r)")).hunks
    assert [node_text(node) for node in hunk.added] == ["%r = Relu(%h)"]
    assert hunk.rewired == ("%y = Neg(%h -> %r)",)


def test_quantized_operands_leave_the_operator_in_place() -> None:
    weights = "float[2,2,1,1] w = {1,2,3,4}, float s = {0.5}, int8 z = {0}"
    a = graph("h = Conv(x, w) y = Relu(h)", weights="float[2,2,1,1] w = {1,2,3,4}")
    b = graph(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(wq, s, z) "
        "h = Conv(d, e) y = Relu(h)",
        weights=weights.replace("float[2,2,1,1] w", "int8[2,2,1,1] wq"),
    )
    found = diff(a, b)
    assert sorted([node.op_type for node in hunk.added] for hunk in found.hunks) == [
        ["DequantizeLinear"],
        ["QuantizeLinear", "DequantizeLinear"],
    ]
    assert not any(hunk.removed for hunk in found.hunks)


def test_node_names_hold_operators_in_place_whose_outputs_were_renamed() -> None:
    """Relu folded into the ranges of a quantized Conv, which takes over the name of its output."""
    weights = "float[2,2,1,1] w = {1,2,3,4}, float[2,2,1,1] u = {4,3,2,1}"
    quantized = (
        "float s = {0.5}, uint8 o = {0}, int8 z = {0}, int8[2,2,1,1] wq = {1,2,3,4}, int8[2,2,1,1] uq = {4,3,2,1}"
    )
    a = graph("[one] c = Conv(x, w) r = Relu(c) [two] d = Conv(r, u) y = Relu(d)", weights=weights)
    b = graph(
        "e = DequantizeLinear(wq, s, z) f = DequantizeLinear(uq, s, z) [one] r = Conv(x, e) "
        "q = QuantizeLinear(r, s, o) p = DequantizeLinear(q, s, o) [two] y = Conv(p, f)",
        weights=quantized,
    )
    found = diff(a, b)
    assert "Conv" not in {node.op_type for hunk in found.hunks for node in (*hunk.removed, *hunk.added)}, str(found)


BRANCHES = """z = If (c) <then_branch = t () => (float[1] p) {{ p = Relu(h) }},
    else_branch = e () => (float[1] q) {{ o = Neg(h) q = {last} }}> y = Abs(z)"""


def test_bodies_are_compared() -> None:
    head = "h = Exp(x) "
    a = graph(head + BRANCHES.format(last="Abs(o)"), inputs="float[1] x, bool c")
    b = graph(head + BRANCHES.format(last="Sqrt(o)"), inputs="float[1] x, bool c")
    (hunk,) = diff(a, b).hunks
    assert hunk.scope == "%z.else_branch"
    assert [node.op_type for node in (*hunk.removed, *hunk.added)] == ["Abs", "Sqrt"]
    assert "in %z.else_branch @@" in str(diff(a, b))
    assert not diff(a, rename(a)), str(diff(a, rename(a)))


def test_bodies_of_other_owners_do_not_match() -> None:
    """The same body under the other condition is a change, although every node of it exists on both sides."""
    body = "<then_branch = t () => (float[1] p) {{ p = {} (x) }}, else_branch = e () => (float[1] q) {{ q = {} (x) }}>"
    a = graph("y = If (c) " + body.format("Relu", "Abs"), inputs="float[1] x, bool c")
    b = graph("y = If (c) " + body.format("Abs", "Relu"), inputs="float[1] x, bool c")
    assert len(diff(a, b).hunks) == 2


def test_json_is_plain_and_the_same_in_two_processes() -> None:
    found = diff(residual(3, False), residual(3, True)).to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["nodes"] == [13, 10]
    assert found["groups"][0]["count"] == 3
    assert [hunk["anchor"] for hunk in found["groups"][0]["hunks"]] == ["c0", "c1", "c2"]
    program = (
        "import json, hashlib; from tests.ir.test_diff import diff, residual, rename;"
        "d = diff(residual(5, False), rename(residual(5, True)));"
        "print(json.dumps(d.to_json()), d, hashlib.sha256(d.to_html().encode()).hexdigest())"
    )
    root = str(Path(__file__).parents[2])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_rich_prints_the_same_words_with_colour() -> None:
    found = diff(residual(3, False), residual(3, True))
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(found)
    assert "\x1b[31m -   %c0" in capture.get()
    plain = Console(width=200, color_system=None)
    with plain.capture() as capture:
        plain.print(found)
    assert capture.get().rstrip("\n") == str(found)


def test_shared_tensors_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Untouchable(ir.Tensor):
        def numpy(self) -> np.ndarray:
            raise AssertionError("read")

        tobytes = numpy

    a = graph("h = MatMul(x, w) y = Relu(h)", weights="float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}")
    a.graph.initializers["w"].const_value = Untouchable(np.zeros((4, 4), np.float32))
    b = a.clone()
    node = b.graph.node(1)
    node.op_type = "Abs"
    assert b.graph.initializers["w"].const_value is a.graph.initializers["w"].const_value
    monkeypatch.setattr(weight_pairs, "tensor_digest", lambda tensor: pytest.fail("hashed"))
    assert len(diff(a, b).hunks) == 1


# --- the page ---


class Checker(HTMLParser):
    """Every tag is closed in order; no script of the model's making; nothing comes from elsewhere."""

    VOID = frozenset({"meta", "input", "path", "circle", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            assert not name.startswith("on"), f"handler {name}"
            assert name not in ("src", "srcset")
            assert not (value or "").startswith(("http", "//", "javascript"))
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert checker.scripts == 1
    return checker


def test_page_is_well_formed_and_complete() -> None:
    found = diff(residual(12, False), residual(12, True))
    page = found.to_html()
    ids = checked(page).ids
    assert {f"h{index}" for index in range(12)} <= set(ids)
    assert page.count('class="cell out"') == 24
    assert page.count('class="cell in"') == 12
    assert checked(diff(residual(2, True), residual(2, True)).to_html())


def test_page_escapes_what_models_say() -> None:
    evil = '"><script>alert(1)</script>&'
    a = residual(2, False)
    for node in a.graph:
        node.name = evil + (node.name or "")
    b = residual(2, True)
    for model in (a, b):
        for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
            value.name = f"{evil}{value.name}"
        for node in model.graph:
            node.op_type += evil
            for value in node.outputs:
                value.name = f"{evil}{value.name}"
            node.attributes.add(ir.AttrString("mode", evil))
            node.domain = evil
    b.graph.inputs[0].shape = ir.Shape([evil, 2, 4, 4])
    page = diff(a, b).to_html(title=evil)
    checker = checked(page)
    assert "<script>alert" not in page
    assert any("<script>alert(1)" in text for text in checker.text), "it is shown, as text"


def test_new_constants_stand_where_they_are_read() -> None:
    a = graph("h = Abs(x) g = Exp(h) y = Clip(g)")
    b = graph("k = Constant <value = float {1.0}> () h = Abs(x) g = Exp(h) y = Clip(g, k)")
    lines = re.findall(r'data-line="([^"]*)"', diff(a, b).to_html())
    assert [line.split("(")[0] for line in lines if "%k = " in line or "= Exp" in line][-1] == "%k = Constant"


def test_long_unchanged_runs_fold() -> None:
    names = ["x", *(f"v{i}" for i in range(40)), "y"]
    chain = " ".join(f"{after} = Relu({before})" for before, after in pairwise(names))
    page = diff(graph(chain), graph(chain.replace("v5 = Relu", "v5 = Abs"))).to_html()
    assert "unchanged" in page
    assert page.count('<details class="run"') == 1
    checked(page)


def test_a_thousand_nodes_are_fast() -> None:
    a, b = residual(200, False), residual(200, True)
    start = time.process_time()
    found = diff(a, b)
    found.to_html()
    assert time.process_time() - start < 4, "about 0.4 s on the machine this was written on"
    assert [len(group) for group in found.groups] == [200]


# --- laws ---


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    """A random graph of up to 9 nodes over two inputs and two weights; every value without a reader is an output."""
    values = ["x", "z", "w", "v"]
    lines: list[str] = []
    for index in range(draw(st.integers(1, 9))):
        op = draw(st.sampled_from(["Relu", "Abs", "Neg", "Add", "Sub", "Mul"]))
        arity = 1 if op in ("Relu", "Abs", "Neg") else 2
        operands = [draw(st.sampled_from(values)) for _ in range(arity)]
        lines.append(f"t{index} = {op}({', '.join(operands)})")
        values.append(f"t{index}")
    read = {name for line in lines for name in line.split("(")[1].rstrip(")").split(", ")}
    outputs = [name for name in values[4:] if name not in read]
    return graph(
        " ".join(lines),
        inputs="float[2] x, float[2] z",
        outputs=", ".join(f"float[2] {name}" for name in outputs),
        weights="float[2] w = {1, 2}, float[2] v = {3, 4}",
    )


@given(graphs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_graph_does_not_differ_from_itself(model: ir.Model, random: object) -> None:
    assert not diff(model, model)
    renamed = rename(model)
    nodes = list(renamed.graph)
    random.shuffle(nodes)  # type: ignore[attr-defined]
    for node in nodes:
        renamed.graph.remove(node)
        renamed.graph.append(node)
    found = diff(model, renamed)
    assert not found, str(found)


@given(graphs(), st.data())
@settings(max_examples=120, deadline=None)
def test_exactly_the_inserted_node_is_listed(model: ir.Model, data: st.DataObject) -> None:
    other = rename(model) if data.draw(st.booleans()) else model.clone()
    nodes = list(other.graph)
    node = nodes[data.draw(st.integers(0, len(nodes) - 1))]
    slot = data.draw(st.integers(0, len(node.inputs) - 1))
    new = ir.node("Softplus", [node.inputs[slot]])
    node.replace_input_with(slot, new.outputs[0])
    other.graph.insert_before(node, new)
    for a, b, added in ((model, other, True), (other, model, False)):
        found = diff(a, b)
        (hunk,) = found.hunks
        listed, none = (hunk.added, hunk.removed) if added else (hunk.removed, hunk.added)
        assert [n.op_type for n in listed] == ["Softplus"], str(found)
        assert not none
