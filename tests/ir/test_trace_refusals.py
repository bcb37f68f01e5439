"""`trace`: what is refused, and what the error says of it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from graphopt.errors import DataError, TraceError  # noqa: E402
from graphopt.ir.trace import trace  # noqa: E402

pytestmark = pytest.mark.torch


def test_data_dependent_control_flow_names_the_line():
    class Branch(nn.Module):
        def forward(self, x):
            if x.sum() > 0:  # the guilty line
                return x + 1
            return x - 1

    with pytest.raises(TraceError, match="depends on the values") as caught:
        trace(Branch(), torch.ones(3))
    assert "test_trace_refusals.py" in str(caught.value.where)
    assert "if x.sum() > 0:" in str(caught.value.where)
    assert "torch.where" in str(caught.value.help)


def test_an_operator_without_onnx_form_is_named():
    @torch.library.custom_op("graphopt_test::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @mystery.register_fake
    def _(x):
        return torch.empty_like(x)

    class Custom(nn.Module):
        def forward(self, x):
            return mystery(x)

    with pytest.raises(TraceError, match="graphopt_test") as caught:
        trace(Custom(), torch.ones(3))
    assert "graphopt.load" in str(caught.value.help)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        (None, None, "there are none"),
        ((), None, "hold no tensor"),
        (("text",), None, "hold no tensor"),
        ((torch.ones(2, 5),), None, "the module itself fails on these example inputs: RuntimeError"),
        ((torch.ones(2, 4, dtype=torch.int64),), None, "the module itself fails"),
        ((torch.ones(2, 4), torch.ones(1)), None, "takes 2 positional arguments but 3 were given"),
        ((torch.ones(2, 4),), {"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_example_inputs(args, kwargs, reason):
    with pytest.raises(DataError, match=reason) as caught:
        trace(nn.Linear(4, 3), args, kwargs)
    assert caught.value.help


@pytest.mark.parametrize(
    "shapes",
    [{"nonsense": {0: "n"}}, ({0: "n"}, None), {"input": {7: "n"}}, {"input": ["n"]}, {"input": {0: 1.5}}, 3],
)
def test_dynamic_shapes_that_do_not_fit(shapes):
    with pytest.raises(DataError, match="dynamic_shapes does not fit"):
        trace(nn.Linear(4, 3), torch.ones(2, 4), dynamic_shapes=shapes)


@pytest.mark.parametrize("source", ["model.onnx", None, torch.ones(1), nn.Linear])
def test_what_is_no_module(source):
    with pytest.raises(DataError, match="cannot trace"):
        trace(source, torch.ones(1))
