"""MACs of exported networks against torch's own count of the module, which shares no code with ours."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.ir.cost import cost

torch = pytest.importorskip("torch")
# The exporter of torch 2.13 trips over deprecations of its own.
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning")]


def residual_network() -> Any:
    """A stem, a strided block with a grouped and a depthwise convolution, an upsampling, and a classifier."""
    nn = torch.nn

    class Network(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.shortcut = nn.Conv2d(8, 8, 1, stride=2)
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.head = nn.Linear(4, 10)

        def forward(self, x: Any) -> Any:
            x = self.stem(x).relu()
            x = self.depthwise(self.grouped(x)).relu() + self.shortcut(x)
            return self.head(self.up(x).mean((2, 3)))

    return Network(), torch.randn(2, 3, 16, 16)


def vision_transformer() -> Any:
    """Patches, one encoder layer with attention written out, an einsum and a classifier."""
    nn = torch.nn

    class Network(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, stride=4)
            self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            self.mix = nn.Parameter(torch.randn(16, 10))

        def forward(self, x: Any) -> Any:
            x = self.patches(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
            x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
            return torch.einsum("bc,ck->bk", (x + self.mlp(x)).mean(1), self.mix)

    return Network(), torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("network", [residual_network, vision_transformer])
def test_macs_are_half_the_flops_that_torch_counts(network: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module, example = network()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(example)
    program = torch.onnx.export(module, (example,), dynamo=True, optimize=True, verbose=False)
    found = cost(program.model)
    assert found.unknown == ()
    assert found.macs == counter.get_total_flops() // 2 > 0
    # A scalar that the module's code holds, such as the scale of the scores, is an initializer like any other.
    scalars = [value for value in program.model.graph.initializers.values() if value.shape.rank() == 0]
    scalars = [value for value in scalars if value.dtype.is_floating_point()]
    trained = sum(parameter.numel() for parameter in module.parameters())
    assert found.parameters == trained + len(scalars)
