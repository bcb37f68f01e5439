"""Channels that weigh, select or make other channels: attention over channels, gates, computed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import conv_bn, image
from tests.zoo.entry import Entry


def classifier(width: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class SelectiveKernel(nn.Module):
    """Softmax over branches, for each channel (Li et al. 2019)."""

    def __init__(self, width: int = 20, squeezed: int = 7) -> None:
        super().__init__()
        self.stem, self.one = conv_bn(3, 12), conv_bn(12, width)
        self.two = nn.Sequential(
            nn.Conv2d(12, width, 3, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(width)
        )
        self.squeeze, self.choose = nn.Linear(width, squeezed), nn.Linear(squeezed, 2 * width)
        self.head, self.width = classifier(width), width

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branches = torch.stack([F.relu(self.one(x)), F.relu(self.two(x))], dim=1)
        pooled = F.relu(self.squeeze(branches.sum(dim=1).mean(dim=(2, 3))))
        weights = self.choose(pooled).reshape(-1, 2, self.width).softmax(dim=1)
        return self.head((branches * weights[:, :, :, None, None]).sum(dim=1))


class ConvolutionalAttention(nn.Module):
    """CBAM: a shared MLP over mean and maximum of pixels, then a convolution over mean and maximum of channels."""

    def __init__(self, width: int = 20, squeezed: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12), nn.ReLU(), conv_bn(12, width), nn.ReLU())
        self.mlp = nn.Sequential(nn.Conv2d(width, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, width, 1))
        self.spatial, self.head = nn.Conv2d(2, 1, 7, padding=3), classifier(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(x.amax(dim=(2, 3), keepdim=True)))
        seen = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return self.head(x * torch.sigmoid(self.spatial(seen)))


class EfficientAttention(nn.Module):
    """ECA: a 1-d convolution along the axis of channels."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12), nn.ReLU(), conv_bn(12, width), nn.ReLU())
        self.along, self.head = nn.Conv1d(1, 1, 3, padding=1, bias=False), classifier(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        pooled = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        return self.head(x * torch.sigmoid(self.along(pooled)).transpose(-1, -2).unsqueeze(-1))


class CoordinateAttention(nn.Module):
    """Rows and columns pooled, concatenated along pixels, split again; one gate for each (Hou et al. 2021)."""

    def __init__(self, width: int = 20, squeezed: int = 7) -> None:
        super().__init__()
        self.body, self.squeeze = nn.Sequential(conv_bn(3, width), nn.ReLU()), conv_bn(width, squeezed, 1)
        self.rows, self.columns = nn.Conv2d(squeezed, width, 1), nn.Conv2d(squeezed, width, 1)
        self.head = classifier(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        pooled = torch.cat([x.mean(dim=3, keepdim=True), x.mean(dim=2, keepdim=True).transpose(2, 3)], dim=2)
        rows, columns = F.hardswish(self.squeeze(pooled)).split([x.shape[2], x.shape[3]], dim=2)
        return self.head(x * torch.sigmoid(self.rows(rows)) * torch.sigmoid(self.columns(columns.transpose(2, 3))))


class NonLocal(nn.Module):
    """Attention between pixels by 1 x 1 convolutions (Wang et al. 2018)."""

    def __init__(self, width: int = 20, key: int = 9, value: int = 13) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, width, 3, 2), nn.ReLU())
        self.theta, self.phi = nn.Conv2d(width, key, 1), nn.Conv2d(width, key, 1)
        self.g, self.out, self.head = nn.Conv2d(width, value, 1), conv_bn(value, width, 1), classifier(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scores = (self.theta(x).flatten(2).transpose(1, 2) @ self.phi(x).flatten(2)).softmax(dim=-1)
        y = (scores @ self.g(x).flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.out(y.reshape(y.shape[0], y.shape[1], x.shape[2], x.shape[3])))


class GlobalContext(nn.Module):
    """One attention map for all channels, then a bottleneck with LayerNorm (Cao et al. 2019)."""

    def __init__(self, width: int = 20, squeezed: int = 6) -> None:
        super().__init__()
        self.stem, self.mask = nn.Sequential(conv_bn(3, width), nn.ReLU()), nn.Conv2d(width, 1, 1)
        self.down, self.norm = nn.Conv2d(width, squeezed, 1), nn.LayerNorm([squeezed, 1, 1])
        self.up, self.head = nn.Conv2d(squeezed, width, 1), classifier(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = self.mask(x).flatten(2).softmax(dim=-1)
        context = (x.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)
        return self.head(x + self.up(F.relu(self.norm(self.down(context)))))


class GatedLinearUnit(nn.Module):
    """F.glu: one convolution makes values and gates, halved along channels (Dauphin et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 28, 3, padding=1), nn.BatchNorm2d(14), conv_bn(14, 40)
        self.up, self.down, self.head = nn.Linear(20, 36), nn.Linear(18, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.conv2(self.norm(F.glu(self.conv1(x), dim=1))), dim=1)
        value, gate = self.up(x.permute(0, 2, 3, 1)).chunk(2, dim=-1)
        return self.head(self.down(value * F.gelu(gate)))


class GatedConv(nn.Module):
    """Values and gates by two convolutions, as in inpainting (Yu et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(4, 12, 1), (12, 20, 2), (20, 14, 1)]
        self.values = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in sizes)
        self.gates = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in sizes)
        self.last = nn.Conv2d(14, 3, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.cat([x, mask], dim=1)
        for value, gate in zip(self.values, self.gates, strict=True):
            y = F.elu(value(y)) * torch.sigmoid(gate(y))
        return torch.tanh(self.last(F.interpolate(y, scale_factor=2.0, mode="nearest")))


class CondConv(nn.Module):
    """Kernels mixed per sample from experts, run as one grouped convolution (Yang et al. 2019)."""

    def __init__(self, inputs: int = 12, outputs: int = 20, experts: int = 3) -> None:
        super().__init__()
        self.stem, self.route = nn.Sequential(conv_bn(3, inputs), nn.ReLU()), nn.Linear(inputs, experts)
        self.experts = nn.Parameter(torch.randn(experts, outputs, inputs, 3, 3) * 0.1)
        self.norm, self.head = nn.BatchNorm2d(outputs), classifier(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        weights = torch.sigmoid(self.route(x.mean(dim=(2, 3)))) @ self.experts.flatten(1)
        y = F.conv2d(x.reshape(1, n * c, h, w), weights.reshape(-1, c, 3, 3), padding=1, groups=n)
        return self.head(F.relu(self.norm(y.reshape(n, -1, h, w))))


class MixedLinear(nn.Module):
    """Experts mixed per sample by einsum: every expert computes, a gate weighs (dense mixture of experts)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(8, 20), nn.Linear(20, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 20, 28) * 0.2), nn.Parameter(torch.randn(3, 28, 20) * 0.2)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        hidden = F.relu(torch.einsum("bi,eio->beo", x, self.up))
        made = torch.einsum("beo,eoi->bei", hidden, self.down)
        return self.head(x + torch.einsum("bei,be->bi", made, self.gate(x).softmax(dim=-1)))


class NormalizedWeights(nn.Module):
    """Weight normalization written out, v / |v| * g, and the parametrization of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.v1, self.g1, self.b1 = (
            nn.Parameter(torch.randn(12, 3, 3, 3)), nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.randn(12))
        )  # fmt: skip
        self.conv2 = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 20, 3, padding=1))
        self.head = classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        length = self.v1.flatten(1).norm(dim=1).reshape(12, 1, 1, 1)
        x = F.relu(F.conv2d(x, self.v1 / length * self.g1.reshape(12, 1, 1, 1), self.b1, padding=1))
        return self.head(F.relu(self.conv2(x)))


class StandardizedConv(nn.Conv2d):
    """Weights of mean 0 and variance 1 per output channel (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        spread = self.weight.std(dim=(1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (spread + 1e-5), self.bias, self.stride, self.padding)


def standardized() -> nn.Module:
    return nn.Sequential(
        StandardizedConv(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(), StandardizedConv(12, 20, 3, 2, 1),
        nn.GroupNorm(5, 20), nn.ReLU(), classifier(20),
    )  # fmt: skip


class HyperConv(nn.Module):
    """The weight of a convolution is made by a linear layer from a code (Ha et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(5)), nn.Linear(5, 20 * 12 * 9)
        self.stem, self.head = nn.Sequential(conv_bn(3, 12), nn.ReLU()), classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.conv2d(self.stem(x), self.make(self.code).reshape(20, 12, 3, 3) * 0.2, padding=1)))


class DepthwiseMultiplier(nn.Module):
    """Depthwise convolution that writes two channels for each one it reads, and one that writes three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = conv_bn(3, 10), conv_bn(10, 20, 3, groups=10)
        self.middle, self.thrice = conv_bn(20, 8, 1), conv_bn(8, 24, 3, 2, groups=8)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(F.relu(self.twice(F.relu(self.stem(x))))))
        return self.head(F.relu(self.thrice(x)))


class GroupedTranspose(nn.Module):
    """ConvTranspose in groups: its weight has the outputs of one group on axis 1; a depthwise one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = conv_bn(3, 12, 3, 2), nn.ConvTranspose2d(12, 20, 4, 2, 1, groups=4)
        self.norm, self.smooth = nn.BatchNorm2d(20), nn.ConvTranspose2d(20, 20, 4, 2, 1, groups=20)
        self.last = nn.Conv2d(20, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.smooth(F.relu(self.norm(self.up(F.relu(self.stem(x))))))))


class StaticShuffle(nn.Module):
    """A channel shuffle by reshape and transpose with constant sizes, and one by a constant index."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv_bn(3, 12), conv_bn(12, 20, 3, groups=4), classifier(20)
        self.register_buffer("order", torch.randperm(20))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x)).reshape(2, 3, 4, 16, 16).permute(0, 2, 1, 3, 4).reshape(2, 12, 16, 16)
        return self.head(F.relu(self.second(x))[:, self.order])


class GroupedHead(nn.Module):
    """Grouped linear layers by batched MatMul: reshape into groups, one matrix for each, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = nn.Linear(8, 24), nn.Parameter(torch.randn(4, 6, 5) * 0.4)
        self.norm, self.head = nn.BatchNorm1d(20), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        groups = F.relu(self.stem(x)).reshape(-1, 4, 6).transpose(0, 1)
        return self.head(F.relu(self.norm(torch.bmm(groups, self.weight).transpose(0, 1).reshape(-1, 20))))


class Maxout(nn.Module):
    """Channels compete in threes (Goodfellow et al. 2013)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv_bn(3, 36), classifier(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(y.reshape(y.shape[0], 12, 3, y.shape[2], y.shape[3]).amax(dim=2))


def vector() -> tuple[Tensor, ...]:
    return (torch.randn(4, 8),)


def image_and_mask() -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 16, 16), (torch.rand(2, 1, 16, 16) > 0.5).float()


BATCH = ({0: "batch"},)
ENTRIES = {
    "selective-kernel": Entry(SelectiveKernel, image(16), "softmax over stacked branches for each channel", BATCH),
    "cbam": Entry(ConvolutionalAttention, image(16), "shared MLP over pooled channels, mean over channels", BATCH),
    "eca": Entry(EfficientAttention, image(16), "1-d convolution along the axis of channels", BATCH),
    "coordinate-attention": Entry(
        CoordinateAttention, image(16), "gates by rows and by columns, shared squeeze", BATCH
    ),
    "non-local": Entry(NonLocal, image(16), "attention between pixels, 1 x 1 convolutions as keys and values", BATCH),
    "global-context": Entry(GlobalContext, image(16), "MatMul of channels with one attention map", BATCH),
    "glu": Entry(GatedLinearUnit, image(16), "halves of one convolution multiplied (F.glu, GeGLU by chunk)", BATCH),
    "gated-conv": Entry(GatedConv, image_and_mask, "two convolutions multiplied, inputs concatenated"),
    "cond-conv": Entry(CondConv, image(16), "weights mixed per sample, batch folded into groups"),
    "mixed-linear": Entry(MixedLinear, vector, "dense mixture of experts by einsum", BATCH),
    "weight-norm": Entry(NormalizedWeights, image(16), "weights computed as v / |v| * g", BATCH),
    "weight-standardized": Entry(standardized, image(16), "weights standardized in the graph, GroupNorm", BATCH),
    "hyper-conv": Entry(HyperConv, image(16), "weight made by a linear layer from a learned code", BATCH),
    "depthwise-multiplier": Entry(DepthwiseMultiplier, image(16), "depthwise of two and three times its input", BATCH),
    "grouped-transpose": Entry(GroupedTranspose, image(16), "ConvTranspose in groups and depthwise", BATCH),
    "static-shuffle": Entry(StaticShuffle, image(16), "shuffle with constant sizes, and by index (GatherND)"),
    "grouped-linear": Entry(GroupedHead, vector, "batched MatMul over groups of channels", BATCH),
    "maxout": Entry(Maxout, image(16), "maximum over threes of channels", BATCH),
}
