"""Every architecture of the zoo: products are put down to products, and nothing is left over."""

from __future__ import annotations

import pytest

from graphopt.latency.attribution import all_nodes
from graphopt.latency.kernels import profile_kernels
from tests.zoo.models import QUICK, zoo_feeds, zoo_model

PRODUCTS = ("Conv", "MatMul", "Gemm", "Attention", "Einsum", "LSTM", "GRU", "RNN")


def is_product(operator: str) -> bool:
    return any(name in operator for name in PRODUCTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_products_belong_to_products(name: str) -> None:
    model = zoo_model(name)
    (found,) = profile_kernels(model, zoo_feeds(model), seconds=0.01)
    operators = dict(zip(found.names, (node.op_type for node, _ in all_nodes(model.graph)), strict=True))
    assert sum(found.by_node().values()) == pytest.approx(found.microseconds)
    assert {node for kernel in found.kernels for node in kernel.nodes} | set(found.without_kernel) == set(found.names)
    for kernel in found.kernels:
        assert kernel.node in operators
        if kernel.nodes and is_product(kernel.operator):
            scaling = "group=" in kernel.attributes and operators[kernel.nodes[0]] in ("BatchNormalization", "Mul")
            assert is_product(operators[kernel.nodes[0]]) or scaling, kernel  # onnxruntime makes depthwise ones of them
    main = {kernel.nodes[0] for kernel in found.kernels if kernel.nodes}
    for node, macs in zip(found.names, found.macs, strict=True):
        if operators[node] in ("Conv", "Gemm") and macs:
            assert node in main, f"{node} is in no kernel of its own"
