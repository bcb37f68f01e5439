"""Scale migration: the same function to the last bit, outliers gone where a node is there to take them up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import DataError, GraphoptError
from graphopt.ir.fingerprint import fingerprint
from graphopt.ir.origin import remember_origin
from graphopt.ir.session import open_session
from graphopt.passes import Context, MigrateScales, Quantize

WIDTH = 16


def block(outlier: float, *, normalisation: str = "LayerNormalization") -> ir.Model:
    """Attention and a gated MLP, each behind a normalisation whose scale has outliers that the weights undo."""
    second = ", e0" if normalisation == "LayerNormalization" else ""
    text = f"""<ir_version: 10, opset_import: ["": 23]>
        g (float[n,6,16] x, float[16] g0, float[16] e0, float[16,16] q, float[16,16] k, float[16,16] v, float[16,16] o,
           float[16] g1, float[16,32] gate, float[16,32] up, float[32,16] down) => (float[n,6,16] y) {{
          m = {normalisation}(x, g0{second}) a = MatMul(m, q) b = MatMul(m, k) c = MatMul(m, v)
          t = Attention <q_num_heads = 2, kv_num_heads = 2> (a, b, c) u = MatMul(t, o) r = Add(x, u)
          z = {normalisation}(r, g1) h = MatMul(z, gate) s = Sigmoid(h) w = Mul(h, s) i = MatMul(z, up)
          p = Mul(w, i) l = MatMul(p, down) y = Add(r, l)
        }}"""
    model = ir.from_onnx_text(text)
    generator = np.random.default_rng(0)
    spread = np.where(np.arange(WIDTH) % 8 == 3, outlier, 1.0)
    for value in list(model.graph.inputs[1:]):
        shape = value.shape.numpy()
        array = np.ones(shape) if len(shape) == 1 else generator.standard_normal(shape) / np.sqrt(shape[0])
        if value.name == "e0":
            array = 0.1 * generator.standard_normal(shape)
        if value.name in ("g0", "g1", "e0"):
            array = array * spread
        if value.name in ("q", "k", "v", "gate", "up"):
            array = array / spread[:, None]
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    return graphopt.load(ir.to_proto(model))


def data(count: int = 4) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.standard_normal((8, 6, WIDTH)).astype(np.float32)} for _ in range(count)]


def outputs(model: ir.Model) -> np.ndarray:
    session = open_session(model, optimized=False)
    return np.concatenate([session.run_feeds(one)[0] for one in data()])


def error(model: ir.Model, quantized: ir.Model) -> float:
    exact, found = outputs(model), outputs(quantized)
    return float(np.sqrt(np.mean((exact - found) ** 2) / np.mean(exact**2)))


def lost(model: ir.Model, migrated: ir.Model, bits: int = 8) -> float:
    quantized = migrated.clone()
    Quantize(bits=bits, search=False).rewrite(quantized, Context(calibration=data()))
    return error(model, quantized)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"bits": 6, "weight_bits": 4}, {"source": "probes"}])
def test_no_bit_changes(options: dict) -> None:
    model = block(64.0)
    changed = model.clone()
    MigrateScales(**options).rewrite(changed, Context(calibration=data()))
    assert fingerprint(changed) != fingerprint(model)
    assert np.array_equal(outputs(model), outputs(changed))


@pytest.mark.parametrize("normalisation", ["LayerNormalization", "RMSNormalization"])
def test_outliers_go_where_the_normalisation_can_take_them(normalisation: str) -> None:
    model = block(64.0, normalisation=normalisation)
    migrated = model.clone()
    MigrateScales().rewrite(migrated, Context(calibration=data()))
    assert lost(model, migrated) < 0.2 * lost(model, model)


def test_without_outliers_it_does_no_harm() -> None:
    model = block(1.0)
    migrated = model.clone()
    MigrateScales().rewrite(migrated, Context(calibration=data()))
    assert lost(model, migrated) < 1.2 * lost(model, model)


def test_made_up_inputs_serve_too() -> None:
    model = block(64.0)
    migrated, context = model.clone(), Context()
    MigrateScales().rewrite(migrated, context)
    assert any("inputs from probes" in remark.why for remark in context.remarks)
    assert lost(model, migrated) < 0.2 * lost(model, model)


def test_values_and_up_projections_take_part() -> None:
    """The output projection is balanced through the value projection, the down projection through the up projection."""
    model = block(1.0)
    for name, axis in (("v", 1), ("up", 1), ("o", 0), ("down", 0)):
        array = model.graph.initializers[name].const_value.numpy().copy()
        spread = np.where(np.arange(array.shape[axis]) % 8 == 5, 64.0, 1.0)
        array = array * spread if axis == 1 else array / spread[:, None]
        model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
    migrated = model.clone()
    MigrateScales().rewrite(migrated, Context(calibration=data()))
    for name in ("v", "up"):
        columns = np.abs(migrated.graph.initializers[name].const_value.numpy()).max(axis=0)
        assert columns.max() / np.median(columns) < 32
    assert lost(model, migrated) < 0.5 * lost(model, model)


def test_it_says_what_it_cannot_reach() -> None:
    model = graphopt.load(ir.to_proto(ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 21]>
        g (float[n,2] x) => (float[n,2] y) <float[2,2] a = {1, 2, 3, 4}, float[2,2] b = {1, 2, 3, 4}>
        { h = MatMul(x, a) s = Softplus(h) y = MatMul(s, b) }""")))  # fmt: skip
    context = Context()
    MigrateScales().rewrite(model, context)
    assert [remark.why.split(" (")[0] for remark in context.remarks] == [
        "it is a graph input",
        "Softplus does not pass a factor on",
    ]


def test_infinite_inputs_are_declined() -> None:
    model = block(64.0)
    bad = [{"x": np.full((2, 6, WIDTH), np.inf, np.float32)}]
    before, context = fingerprint(model), Context(calibration=bad)
    MigrateScales().rewrite(model, context)
    assert fingerprint(model) == before
    assert any("NaN or infinity" in remark.why for remark in context.remarks)


def test_a_damaged_graph_is_left_alone() -> None:
    model = block(64.0)
    remember_origin(model)
    before, context = fingerprint(model), Context()
    MigrateScales().rewrite(model, context)
    assert fingerprint(model) == before
    assert "damaged" in context.remarks[-1].why


def test_one_sample_and_zeros_are_enough_not_to_fail() -> None:
    model = block(64.0)
    MigrateScales().rewrite(model, Context(calibration=[{"x": np.zeros((1, 6, WIDTH), np.float32)}]))
    assert all(np.isfinite(value.const_value.numpy()).all() for value in model.graph.initializers.values())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"bits": 9}, "bits is 9"),
        ({"weight_bits": 1}, "weight_bits is 1"),
        ({"source": "rain"}, "unknown source"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    with pytest.raises(GraphoptError, match=match):
        MigrateScales(**options)


def test_calibration_must_be_there_when_asked_for() -> None:
    with pytest.raises(DataError):
        MigrateScales(source="calibration").rewrite(block(64.0), Context())
