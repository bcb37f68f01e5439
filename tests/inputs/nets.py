"""A model whose BatchNormalizations have seen data that is not standard."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

import graphopt
from graphopt.ir.session import open_session


def built(interface: str, body: str, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """A canonical model from ONNX text: `interface` is `(inputs) => (outputs)`, weights become float initializers."""
    inputs, outputs = (part.strip().removeprefix("(").removesuffix(")") for part in interface.split("=>"))
    stated = [f"float[{', '.join(map(str, weight.shape))}] {name}" for name, weight in weights.items()]
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]> g ({", ".join([inputs, *stated])}) => ({outputs}) {{ {body} }}'
    )
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name or ""].astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    return graphopt.load(model)


def conv_net(batch: str = "n", *, normalized: bool = True, mean: float = 0.5, std: float = 2.0) -> ir.Model:
    """Two Convs, with BatchNormalization where asked for, global mean and 5 classes; float[batch, 3, 12, 12].

    The statistics are those of the net on noise of this mean and deviation: what standard probes do not give.
    """
    generator = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "w1": generator.standard_normal((8, 3, 3, 3)) / 5,
        "w2": generator.standard_normal((8, 8, 3, 3)) / 8,
        "w3": generator.standard_normal((8, 5)),
    }
    norm = "n{0} = BatchNormalization(c{0}, gamma{0}, beta{0}, mean{0}, var{0}) r{0} = Relu(n{0})"
    behind = norm if normalized else "r{0} = Relu(c{0})"
    body = (
        f"c1 = Conv<pads = [1, 1, 1, 1]>(x, w1) {behind.format(1)} c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2) "
        f"{behind.format(2)} p = GlobalAveragePool(r2) f = Flatten(p) y = MatMul(f, w3)"
    )
    interface = f"(float[{batch}, 3, 12, 12] x) => (float[{batch}, 5] y)"
    if not normalized:
        return built(interface, body, weights)
    for layer in (1, 2):
        weights |= {f"gamma{layer}": np.linspace(0.5, 2.0, 8), f"beta{layer}": np.linspace(-1.0, 1.0, 8)}
        weights |= {f"mean{layer}": np.zeros(8), f"var{layer}": np.ones(8)}
    noise = (mean + std * generator.standard_normal((64, 3, 12, 12))).astype(np.float32)
    for layer in (1, 2):
        free = built(interface.replace("[1,", "[n,"), body, weights)
        (seen,) = open_session(free, optimized=False, extra_outputs=[f"c{layer}"]).run([f"c{layer}"], {"x": noise})
        weights |= {f"mean{layer}": seen.mean(axis=(0, 2, 3)), f"var{layer}": seen.var(axis=(0, 2, 3))}
    return built(interface, body, weights)
