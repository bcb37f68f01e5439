"""Small nets for the tests of quantization, and how they are quantized and compared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.export.verify import compare
from graphopt.ir.compare import QUANTIZATION_TOLERANCE
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context, Pass
from graphopt.passes.quantize import Quantize

WEIGHTS = Quantize(form="weights", weight_bits=4)
HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def weighted(signature: str, body: str, **weights: tuple[int, ...]) -> ir.Model:
    """A model from ONNX text whose free names `weights` are random initializers of these shapes."""
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    inputs, outputs = signature.split("=>")
    text = f"g ({inputs.strip()}{', ' if declared else ''}{declared}) => ({outputs.strip()}) {{ {body} }}"
    model = ir.from_onnx_text(f"{HEAD} {text}")
    generator = np.random.default_rng(3)
    values = {value.name: value for value in model.graph.inputs}
    for name, shape in weights.items():
        fan_in = max(int(np.prod(shape[1:])), 1) if len(shape) > 1 else 4
        model.graph.inputs.remove(values[name])
        values[name].const_value = ir.tensor(
            (generator.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32), name=name
        )
        model.graph.register_initializer(values[name])
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def set_weight(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)


def feeds(count: int = 4, shape: tuple[int, ...] = (1, 3, 16, 16), name: str = "x") -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(7)
    return [{name: generator.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def quantized(model: ir.Model, options: Pass | None = None, context: Context | None = None) -> ir.Model:
    result = model.clone()
    (options or Quantize()).run(result, context or Context())
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return result


def fused(model: ir.Model, tmp_path: Path) -> Counter[str]:
    """Operators of the graph that onnxruntime really runs."""
    path = tmp_path / "fused.onnx"
    open_session(model, optimized_model_path=str(path))
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference, of the norm of what was expected."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def assert_close(model: ir.Model, other: ir.Model, data: list[dict[str, np.ndarray]]) -> None:
    assert compare(model, other, data).rms_error < QUANTIZATION_TOLERANCE


def tiny() -> ir.Model:
    return weighted(
        "float[n,3,16,16] x => float[n,5] y",
        "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p)"
        " y = Gemm<transB=1>(f, v, d)",
        w=(8, 3, 3, 3),
        b=(8,),
        v=(5, 8),
        d=(5,),
    )


RESIDUAL = weighted(
    "float[n,3,16,16] x => float[n,4] y",
    """a = Conv<pads=[1,1,1,1]>(x, w0, b0) a1 = Relu(a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a1)
       c = Conv<pads=[1,1,1,1]>(m, w1, b1) c1 = Relu(c) d = Conv<pads=[1,1,1,1]>(c1, w2, b2)
       s = Add(d, m) s1 = Relu(s) p = GlobalAveragePool(s1) f = Flatten(p) y = Gemm<transB=1>(f, v)""",
    w0=(16, 3, 3, 3), b0=(16,), w1=(16, 16, 3, 3), b1=(16,), w2=(16, 16, 3, 3), b2=(16,), v=(4, 16),
)  # fmt: skip
MOBILE = weighted(
    "float[n,3,16,16] x => float[n,4] y",
    """lo = Constant<value_float=0.0>() hi = Constant<value_float=6.0>()
       a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w0) a1 = Clip(a, lo, hi)
       e = Conv(a1, w1) e1 = Clip(e, lo, hi) d = Conv<pads=[1,1,1,1], group=32>(e1, w2, b2) d1 = Clip(d, lo, hi)
       o = Conv(d1, w3) s = Sum(o, a1) g = GlobalAveragePool(s) p = Flatten(g)
       y = Gemm<transB=1>(p, v)""",
    w0=(16, 3, 3, 3), w1=(32, 16, 1, 1), w2=(32, 1, 3, 3), b2=(32,), w3=(16, 32, 1, 1), v=(4, 16),
)  # fmt: skip
INCEPTION = weighted(
    "float[n,3,16,16] x => float[n,4,16,16] y",
    """a = Conv(x, w0) a1 = Relu(a) b = Conv(a1, w1) b1 = Relu(b) c = Conv<pads=[1,1,1,1]>(a1, w2) c1 = Relu(c)
       q = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a1) q1 = Conv(q, w3)
       m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a1) k = Concat<axis=1>(b1, c1, q1, m) y = Conv(k, w4)""",
    w0=(16, 3, 1, 1), w1=(16, 16, 1, 1), w2=(16, 16, 3, 3), w3=(16, 16, 1, 1), w4=(4, 64, 1, 1),
)  # fmt: skip
UNET = weighted(
    "float[n,3,16,16] x => float[n,2,16,16] y",
    """a = Conv<pads=[1,1,1,1]>(x, w0) a1 = Relu(a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a1)
       b = Conv<pads=[1,1,1,1]>(m, w1) b1 = Relu(b) u = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(b1, t, tb)
       k = Concat<axis=1>(a1, u) z = Conv<pads=[1,1,1,1]>(k, w2) z1 = LeakyRelu<alpha=0.1>(z) y = Conv(z1, w3)""",
    w0=(16, 3, 3, 3), w1=(32, 16, 3, 3), t=(32, 16, 2, 2), tb=(16,), w2=(16, 32, 3, 3), w3=(2, 16, 1, 1),
)  # fmt: skip
GATED = weighted(
    "float[n,3,16,16] x => float[n,4,16,16] y",
    """a = Conv(x, w0) g = Sigmoid(a) s = Mul(a, g) p = GlobalAveragePool(s) e = Conv(p, w1) e1 = Relu(e)
       f = Conv(e1, w2) h = Sigmoid(f) q = Mul(s, h) y = Conv(q, w3)""",
    w0=(16, 3, 1, 1), w1=(4, 16, 1, 1), w2=(16, 4, 1, 1), w3=(4, 16, 1, 1),
)  # fmt: skip


def canonical_constants(model: ir.Model) -> ir.Model:
    """Constant nodes as initializers, as the canonical form has them."""
    model = model.clone()
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


TRANSFORMER = weighted(
    "float[n,6,32] x => float[n,6,32] y",
    """l = LayerNormalization<axis=-1>(x, g) q = MatMul(l, wq) q1 = Add(q, bq) k = MatMul(l, wk) k1 = Add(k, bk)
       kt = Transpose<perm=[0,2,1]>(k1) s = MatMul(q1, kt) p = Softmax(s) v = MatMul(l, wv) o = MatMul(p, v)
       h = Gelu(o) z = MatMul(h, wo) y = Add(x, z)""",
    g=(32,), wq=(32, 32), bq=(32,), wk=(32, 32), bk=(32,), wv=(32, 32), wo=(32, 32),
)  # fmt: skip
