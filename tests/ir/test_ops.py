from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime.capi.onnxruntime_pybind11_state as onnxruntime_state
import pytest
from one_node import one_node_model, site_of

from graphopt.errors import GraphoptError
from graphopt.ir.ops import default_table
from graphopt.ir.ops.families import MICROSOFT, unary
from graphopt.ir.ops.markdown import table_as_markdown
from graphopt.ir.ops.row import OpRow, OpTable

TABLE = default_table()
ROOT = Path(__file__).parents[2]
STANDARD = {
    (schema.name, schema.since_version): schema
    for schema in onnx.defs.get_all_schemas_with_history()
    if schema.domain == ""
}
CONTRIBUTED = {
    schema.name: schema for schema in onnxruntime_state.get_all_operator_schema() if schema.domain == MICROSOFT
}
LIGHT_MODELS = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx"))
NAMED_QUANTIZATION = re.compile(r"(?i)(_(scale|zero_point)|^scales|^zero_points|^absmax|^scale(_?[A-Z]))$")


@pytest.mark.parametrize(("name", "version"), sorted(STANDARD))
def test_every_standard_operator_of_every_version_has_a_row(name: str, version: int) -> None:
    assert TABLE.row("", name, version) is not None


@pytest.mark.parametrize("path", LIGHT_MODELS, ids=lambda path: path.stem)
def test_every_operator_of_the_light_models_has_a_cost(path: Path) -> None:
    model = onnx.load(path)
    for node in model.graph.node:
        row = TABLE.row(node.domain, node.op_type, model.opset_import[0].version)
        assert row is not None
        assert row.cost is not None


def test_only_spectra_and_determinants_of_the_standard_domain_have_no_known_cost() -> None:
    assert {row.op_type for row in TABLE if row.cost is None} == {"DFT", "STFT", "Det"}


def test_two_rows_for_one_operator_and_version_are_refused() -> None:
    with pytest.raises(GraphoptError, match=r"two rows for ai\.onnx::Relu since version 1"):
        OpTable([*unary("Relu"), OpRow("Relu")])


def test_a_row_is_found_by_its_version_and_a_copy_replaces_it() -> None:
    table = OpTable([OpRow("Warp"), OpRow("Warp", since=9, structural=(1,))])
    assert table.row("ai.onnx", "Warp", 8) == OpRow("Warp")
    assert table.row("", "Warp", 21).structural == (1,)  # type: ignore[union-attr]
    assert table.row("com.acme", "Warp", 21) is None
    copy = table.with_rows([OpRow("Warp", since=9, structural=(2,))])
    assert copy.row("", "Warp", 9).structural == (2,)  # type: ignore[union-attr]
    assert table.row("", "Warp", 9).structural == (1,)  # type: ignore[union-attr]
    assert len(copy) == 2


def input_names(row: OpRow) -> list[str] | None:
    """Names of the inputs by the newest schema; None for an op that neither onnx nor onnxruntime declares."""
    if row.domain:
        return [parameter.name for parameter in CONTRIBUTED[row.op_type].inputs]
    versions = [version for name, version in STANDARD if name == row.op_type]
    if not versions:
        return None
    return [parameter.name for parameter in STANDARD[row.op_type, max(versions)].inputs]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.domain}::{row.op_type}")
def test_structural_and_quantization_inputs_exist_and_are_told_apart(row: OpRow) -> None:
    names = input_names(row)
    if names is None:
        assert row.op_type == "SimplifiedLayerNormalization"  # declared by onnxruntime in the standard domain
        return
    assert not set(row.structural) & set(row.quantization)
    if row.op_type == "QLinearConcat":  # variadic: Y_scale, Y_zero_point, then (tensor, scale, zero point) triples
        assert {0, 1, 3, 4, 6, 7} <= set(row.quantization)
        assert not {2, 5, 8} & set(row.quantization)
        return
    assert all(index < len(names) for index in (*row.structural, *row.quantization))
    assert {names[index] for index in row.quantization} == {
        name for index, name in enumerate(names) if NAMED_QUANTIZATION.search(name) and index not in row.structural
    }


STRUCTURAL = {
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "ReduceMean": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Split": (1,),
    "TopK": (1,),
    "Gather": (),
    "Conv": (),
}


@pytest.mark.parametrize("name", STRUCTURAL)
def test_structural_inputs_of_the_shape_ops(name: str) -> None:
    assert TABLE.row("", name, 21).structural == STRUCTURAL[name]  # type: ignore[union-attr]


def test_structural_inputs_of_the_standard_domain_are_integers_flags_or_scales() -> None:
    """A structural input that could be float is one of a few; anything else would be a weight that nobody cuts."""
    floats: set[tuple[str, str]] = set()
    for row in TABLE:
        versions = [version for name, version in STANDARD if name == row.op_type and row.domain == ""]
        if not versions:
            continue
        schema = STANDARD[row.op_type, max(versions)]
        for index in row.structural:
            if any("float" in kind for kind in schema.inputs[index].types):
                floats.add((row.op_type, schema.inputs[index].name))
    assert floats == {
        ("CastLike", "target_type"),
        ("Dropout", "ratio"),
        ("MelWeightMatrix", "lower_edge_hertz"),
        ("MelWeightMatrix", "upper_edge_hertz"),
        ("NonMaxSuppression", "iou_threshold"),
        ("NonMaxSuppression", "score_threshold"),
        ("OneHot", "depth"),
        ("Range", "start"),
        ("Range", "limit"),
        ("Range", "delta"),
        ("Resize", "roi"),
        ("Resize", "scales"),
        ("Upsample", "scales"),
    }


@pytest.mark.parametrize("row", [row for row in TABLE if row.domain], ids=lambda row: row.op_type)
def test_element_types_of_contributed_operators_are_those_that_onnxruntime_declares(row: OpRow) -> None:
    if row.op_type not in CONTRIBUTED:
        pytest.skip("this onnxruntime does not have it")
    schema = CONTRIBUTED[row.op_type]
    output = schema.outputs[0]
    if isinstance(row.element_type, ir.DataType):
        assert f"tensor({row.element_type.name.lower()})" in output.types
    else:
        source = schema.inputs[row.element_type]
        if row.op_type == "GridSample":  # declares integers too, for an output that is float
            source = output
        assert source.typeStr == output.typeStr or set(source.types) <= set(output.types)


def test_an_element_type_follows_the_deciding_input() -> None:
    floats, codes = np.zeros((2, 2), np.float32), np.zeros((2, 2), np.uint8)
    site = site_of(one_node_model("MatMulIntegerToFloat", [codes, codes, floats, floats]), [codes] * 4)
    assert TABLE.row(MICROSOFT, "MatMulIntegerToFloat", 1).output_element_type(site.node) == ir.DataType.FLOAT  # type: ignore[union-attr]
    assert TABLE.row(MICROSOFT, "QGemm", 1).output_element_type(site.node) == ir.DataType.FLOAT  # type: ignore[union-attr]
    assert TABLE.row(MICROSOFT, "Gelu", 1).output_element_type(site.node) == ir.DataType.UINT8  # type: ignore[union-attr]


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs/ops.md").read_text() == table_as_markdown(), "run: python -m graphopt.ir.ops > docs/ops.md"
