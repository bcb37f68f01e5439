"""The graph of channel groups: where edges lead, and that DOT and SVG say the same and can be read."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import networkx
import pydot
import pytest

import graphopt
from graphopt.export.group_graph import group_graph, to_dot
from graphopt.export.group_picture import picture
from tests.zoo.models import zoo_model

SVG = "{http://www.w3.org/2000/svg}"
AWKWARD = 'heads of "a<b>\\N: &c\x07é'


def graph_of(name: str) -> networkx.DiGraph[str]:
    return group_graph(graphopt.channel_groups(zoo_model(name)))


def made_up(*edges: tuple[str, str]) -> networkx.DiGraph[str]:
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for name in dict.fromkeys(itertools.chain.from_iterable(edges)):
        graph.add_node(name, role="channels", units=8, parameters=1234, prunable=True, exact=True, state="exact")
    for a, b in edges:
        graph.add_edge(a, b, relation="weights", weights=(f"{a}.weight",), parameters=7)
    return graph


def with_weight(graph: networkx.DiGraph[str], weight: str) -> set[tuple[str, str]]:
    """Roles at both ends of the edges of a weight."""
    role = graph.nodes
    return {(role[a]["role"], role[b]["role"]) for a, b, weights in graph.edges(data="weights") if weight in weights}


def test_edges_lead_from_inputs_to_outputs_of_weights() -> None:
    graph = graph_of("vit")
    assert with_weight(graph, "layers.0.mlp.0.weight") == {("residual stream", "mlp hidden")}
    assert with_weight(graph, "layers.0.mlp.2.weight") == {("mlp hidden", "residual stream")}
    assert with_weight(graph, "layers.1.attention.q.weight") == {
        ("residual stream", "heads"),
        ("residual stream", "head width"),
    }
    assert with_weight(graph, "layers.1.attention.o.weight") == {
        ("heads", "residual stream"),
        ("value width", "residual stream"),
    }
    relations = {relation for *_, relation in graph.edges(data="relation")}
    assert relations == {"weights", "factor"}


def test_a_recurrence_is_a_loop_and_an_embedding_leads_from_its_rows() -> None:
    graph = graph_of("recurrent")
    assert "lstm.weight_hh_l0" in itertools.chain.from_iterable(
        graph.edges[loop]["weights"] for loop in networkx.selfloop_edges(graph)
    )
    assert with_weight(graph, "head.weight") == {("hidden units", "channels")}
    assert with_weight(graph_of("bert"), "tokens.weight") == {("rows", "residual stream")}


def test_parameters_of_an_edge_are_those_between_the_groups() -> None:
    graph = graph_of("unet")
    into_last = [about["parameters"] for *_, about in graph.edges(data=True) if "last.weight" in about["weights"]]
    assert into_last == [16, 16], "each half of the concatenation feeds half of the last layer"
    assert graph.edges["first.0", "up"]["relation"] == "beside"


@pytest.mark.parametrize("name", ["resnet", "llama", "recurrent", "densenet", "max-unpool", "scalars-only"])
def test_dot_and_svg_have_every_group_and_edge(name: str) -> None:
    graph = graph_of(name)
    (parsed,) = pydot.graph_from_dot_data(to_dot(graph))
    assert len([node for node in parsed.get_nodes() if node.get_name().startswith("group")]) == len(graph)
    assert len(parsed.get_edges()) == graph.number_of_edges()
    drawing = ElementTree.fromstring(picture(graph))
    titles = [title.text or "" for title in drawing.iter(f"{SVG}title")]
    assert all(any(title.startswith(f"{group}: ") for title in titles) for group in graph)
    for a, b, relation in graph.edges(data="relation"):
        assert relation != "weights" or any(f"{a} -> {b}: " in title for title in titles)


def test_awkward_names_are_escaped() -> None:
    graph = made_up((AWKWARD, "b"), ("b", AWKWARD))
    drawing = ElementTree.fromstring(picture(graph))
    assert any((title.text or "").startswith('heads of "a<b>\\N: &c?é') for title in drawing.iter(f"{SVG}title"))
    (parsed,) = pydot.graph_from_dot_data(to_dot(graph))
    labels = [node.get_label() for node in parsed.get_nodes() if node.get_name() == "group0"]
    assert labels == ['"heads of \\"a<b>\\\\N: &c\x07é\\n8 units, exact"']


HUB = [edge for index in range(60) for edge in (("hub", f"spoke {index}"), (f"spoke {index}", "hub"))]
CHAIN = [(f"layer {index}", f"layer {index + 1}") for index in range(30)]
BLOCKS = [
    edge
    for stage in range(12)
    for edge in (
        (f"stream {stage}", f"branch {stage}"),
        (f"branch {stage}", f"stream {stage + 1}"),
        (f"stream {stage}", f"stream {stage + 1}"),
        (f"stream {stage}", f"side {stage}"),
        (f"side {stage}", f"stream {stage}"),
    )
]


@pytest.mark.parametrize("edges", [HUB, CHAIN, BLOCKS, [*HUB, *CHAIN]], ids=["hub", "chain", "blocks", "both"])
def test_boxes_do_not_overlap_and_the_picture_fits_on_a_desk(edges: list[tuple[str, str]]) -> None:
    drawing = ElementTree.fromstring(picture(made_up(*edges)))
    width, height = float(drawing.attrib["width"]), float(drawing.attrib["height"])
    assert max(width, height) < 4000
    boxes = [
        [float(box.attrib[side]) for side in ("x", "y", "width", "height")]
        for box in drawing.iterfind(f"{SVG}g/{SVG}rect")
    ]
    assert len(boxes) == len({name for edge in edges for name in edge})
    for x, y, across, down in boxes:
        assert 0 <= x <= x + across <= width
        assert 0 <= y <= y + down <= height
    for (x, y, across, down), (u, v, other, lower) in itertools.combinations(boxes, 2):
        assert x + across <= u or u + other <= x or y + down <= v or v + lower <= y


def test_long_names_keep_what_they_are_and_their_end() -> None:
    name = "heads of model." + "block." * 12 + "7.attention"
    drawing = ElementTree.fromstring(picture(made_up((name, "b"))))
    shown = [text.text or "" for text in drawing.iter(f"{SVG}text")]
    assert any(text.startswith("heads of \u2026") and text.endswith("7.attention") for text in shown)
