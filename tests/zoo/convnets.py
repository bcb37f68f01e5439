"""Classifiers by convolution: every way in which channels were coupled from VGG to RegNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import conv_bn, image
from tests.zoo.entry import Entry


def classifier(width: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class PaddedResidual(nn.Module):
    """Option A of He et al. 2015: the shortcut is subsampled, and padded with channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs)
        self.stride, self.before = stride, (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))
        return F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut)


class Residual(nn.Module):
    """A branch of any kind, and a shortcut that is a projection where shapes change (option B)."""

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def basic(inputs: int, outputs: int, stride: int = 1) -> Residual:
    return Residual(
        nn.Sequential(conv_bn(inputs, outputs, 3, stride), nn.ReLU(), conv_bn(outputs, outputs)),
        inputs, outputs, stride,
    )  # fmt: skip


def bottleneck(inputs: int, middle: int, outputs: int, stride: int = 1, groups: int = 1) -> Residual:
    return Residual(
        nn.Sequential(
            conv_bn(inputs, middle, 1), nn.ReLU(), conv_bn(middle, middle, 3, stride, groups), nn.ReLU(),
            conv_bn(middle, outputs, 1),
        ),
        inputs, outputs, stride,
    )  # fmt: skip


def resnet_padded() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 12), nn.ReLU(), PaddedResidual(12, 12, 1), PaddedResidual(12, 21, 2), PaddedResidual(21, 21, 1),
        classifier(21),
    )  # fmt: skip


def resnet_projected() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 12, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), basic(12, 12), basic(12, 20, 2), basic(20, 20),
        classifier(20),
    )  # fmt: skip


def resnet_bottleneck() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 14), nn.ReLU(), bottleneck(14, 8, 24), bottleneck(24, 10, 24), bottleneck(24, 12, 36, 2),
        bottleneck(36, 9, 36), classifier(36),
    )  # fmt: skip


def resnext() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 14), nn.ReLU(), bottleneck(14, 12, 20, groups=3), bottleneck(20, 12, 20, groups=3),
        bottleneck(20, 16, 28, 2, groups=4), classifier(28),
    )  # fmt: skip


def mobilenet_v1() -> nn.Module:
    def separable(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            conv_bn(inputs, inputs, 3, stride, inputs), nn.ReLU6(), conv_bn(inputs, outputs, 1), nn.ReLU6()
        )

    return nn.Sequential(
        conv_bn(3, 12), nn.ReLU6(), separable(12, 20, 1), separable(20, 28, 2), separable(28, 36, 1), classifier(36)
    )


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise, grouped 1 x 1 (Zhang et al. 2018); concatenates where it strides."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, groups: int = 3) -> None:
        super().__init__()
        self.first = conv_bn(inputs, middle, 1, groups=groups)
        self.depthwise = conv_bn(middle, middle, 3, stride, middle)
        self.last = conv_bn(middle, outputs - inputs if stride > 1 else outputs, 1, groups=groups)
        self.stride, self.groups = stride, groups

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.depthwise(shuffle(F.relu(self.first(x)), self.groups)))
        if self.stride > 1:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], dim=1))
        return F.relu(x + y)


def shufflenet_v1() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 12), nn.ReLU(), ShuffleUnit(12, 18, 12, 1), ShuffleUnit(12, 9, 30, 2), ShuffleUnit(30, 9, 30, 1),
        classifier(30),
    )  # fmt: skip


class SplitUnit(nn.Module):
    """ShuffleNet v2 as in torchvision: half of the channels pass by, then all are shuffled with static sizes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, read = outputs // 2, inputs if stride > 1 else outputs // 2
        self.left = nn.Sequential(conv_bn(read, read, 3, stride, read), conv_bn(read, half, 1), nn.ReLU())
        self.right = nn.Sequential(
            conv_bn(read, half, 1), nn.ReLU(), conv_bn(half, half, 3, stride, half), conv_bn(half, half, 1), nn.ReLU()
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            return shuffle(torch.cat([self.left(x), self.right(x)], dim=1), 2)
        a, b = x.chunk(2, dim=1)
        return shuffle(torch.cat([a, self.right(b)], dim=1), 2)


def shufflenet_v2() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 12, 3, 2), nn.ReLU(), SplitUnit(12, 20, 2), SplitUnit(20, 20, 1), SplitUnit(20, 28, 2),
        SplitUnit(28, 28, 1), conv_bn(28, 34, 1), nn.ReLU(), classifier(34),
    )  # fmt: skip


class Excite(nn.Module):
    """Squeeze-and-excitation between convolutions."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def regnet() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int, group_width: int, squeezed: int) -> nn.Module:
        grouped = conv_bn(outputs, outputs, 3, stride, outputs // group_width)
        return Residual(
            nn.Sequential(
                conv_bn(inputs, outputs, 1), nn.ReLU(), grouped, nn.ReLU(), Excite(outputs, squeezed),
                conv_bn(outputs, outputs, 1),
            ),
            inputs, outputs, stride,
        )  # fmt: skip

    return nn.Sequential(
        conv_bn(3, 14), nn.ReLU(), block(14, 20, 2, 4, 3), block(20, 20, 1, 4, 5), block(20, 30, 2, 6, 5),
        classifier(30),
    )  # fmt: skip


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 20, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20 * 16, 36), nn.ReLU(), nn.Dropout(0.5), nn.Linear(36, 10),
    )  # fmt: skip


class Fire(nn.Module):
    """Squeeze, then two expansions side by side (Iandola et al. 2016)."""

    def __init__(self, inputs: int, squeezed: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.narrow, self.wide = nn.Conv2d(squeezed, narrow, 1), nn.Conv2d(squeezed, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.narrow(x)), F.relu(self.wide(x))], dim=1)


def squeezenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 14, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(14, 6, 12, 10),
        Fire(22, 8, 12, 16), nn.Conv2d(28, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Ghost(nn.Module):
    """Half of the channels by convolution, the others by a depthwise one of these, cut to size (Han et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, ratio: int) -> None:
        super().__init__()
        made = -(-outputs // ratio)
        self.primary = conv_bn(inputs, made, 1)
        self.cheap = conv_bn(made, made * (ratio - 1), 3, groups=made)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.primary(x))
        return torch.cat([x, F.relu(self.cheap(x))], dim=1)[:, : self.outputs]


class GhostBottleneck(nn.Module):
    def __init__(self, width: int, middle: int) -> None:
        super().__init__()
        self.first, self.last = Ghost(width, middle, 2), Ghost(middle, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.first(x))


def ghostnet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 13), nn.ReLU(), GhostBottleneck(13, 22), GhostBottleneck(13, 25), classifier(13))


class Hierarchy(nn.Module):
    """Res2Net: channels split in four, each part convolved after the one before is added."""

    def __init__(self, width: int, part: int) -> None:
        super().__init__()
        self.first, self.last = conv_bn(width, 4 * part, 1), conv_bn(4 * part, width, 1)
        self.convs, self.part = nn.ModuleList(conv_bn(part, part) for _ in range(3)), part

    def forward(self, x: Tensor) -> Tensor:
        parts = list(torch.split(F.relu(self.first(x)), self.part, dim=1))
        for index, conv in enumerate(self.convs):
            parts[index + 1] = F.relu(conv(parts[index + 1] + parts[index] if index else parts[1]))
        return F.relu(x + self.last(torch.cat(parts, dim=1)))


class DualPath(nn.Module):
    """DPN: some outputs are added to the stream, the others are concatenated to it (Chen et al. 2017)."""

    def __init__(self, inputs: int, middle: int, added: int, grown: int) -> None:
        super().__init__()
        self.norm, self.first = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, middle, 1, bias=False)
        self.last, self.added = conv_bn(middle, added + grown), added

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(F.relu(self.first(F.relu(self.norm(x)))))
        a = self.added
        return torch.cat([x[:, :a] + y[:, :a], x[:, a:], y[:, a:]], dim=1)


class SplitAttention(nn.Module):
    """ResNeSt: grouped convolution makes two candidates, a softmax over these for each channel."""

    def __init__(self, width: int, outputs: int, squeezed: int) -> None:
        super().__init__()
        self.conv = conv_bn(width, 2 * outputs, 3, groups=2)
        self.down, self.up = conv_bn(outputs, squeezed, 1), nn.Conv2d(squeezed, 2 * outputs, 1)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).reshape(x.shape[0], 2, self.outputs, *x.shape[2:])
        weights = self.up(F.relu(self.down(F.adaptive_avg_pool2d(y.sum(dim=1), 1))))
        return (y * weights.reshape(-1, 2, self.outputs, 1, 1).softmax(dim=1)).sum(dim=1)


class LocalResponse(nn.Module):
    """AlexNet in miniature: normalization over neighbouring channels, then a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 5, padding=2), nn.Conv2d(12, 20, 3, padding=1, groups=2)
        self.norm, self.head = nn.LocalResponseNorm(5, alpha=0.1, beta=0.75, k=2.0), classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.max_pool2d(self.norm(F.relu(self.conv1(x))), 2))))


def res2net() -> nn.Module:
    return nn.Sequential(conv_bn(3, 14), nn.ReLU(), Hierarchy(14, 6), Hierarchy(14, 5), classifier(14))


def dual_path() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 18), nn.ReLU(), DualPath(18, 10, 14, 3), DualPath(21, 11, 14, 5), nn.BatchNorm2d(26), nn.ReLU(),
        classifier(26),
    )  # fmt: skip


def resnest() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 12), nn.ReLU(), SplitAttention(12, 20, 7), conv_bn(20, 14), nn.ReLU(), classifier(14)
    )


def prelu_net() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 12), nn.PReLU(12), nn.Conv2d(12, 20, 3, padding=1), nn.PReLU(20), conv_bn(20, 14), nn.PReLU(1),
        classifier(14),
    )  # fmt: skip


BATCH = ({0: "batch"},)
ENTRIES = {
    "resnet-padded-shortcut": Entry(resnet_padded, image(16), "shortcut subsampled and padded with channels", BATCH),
    "resnet-projected-shortcut": Entry(resnet_projected, image(), "shortcut by convolution, pooled stem", BATCH),
    "resnet-bottleneck": Entry(resnet_bottleneck, image(16), "one stream of channels through several blocks", BATCH),
    "resnext": Entry(resnext, image(16), "grouped convolution inside a bottleneck", BATCH),
    "mobilenet-v1": Entry(mobilenet_v1, image(16), "depthwise convolution reads and writes the same channels", BATCH),
    "shufflenet-v1": Entry(shufflenet_v1, image(16), "grouped 1 x 1, shuffle, residual or concatenation", BATCH),
    "shufflenet-v2": Entry(shufflenet_v2, image(), "channel split, concatenation and shuffle, static sizes"),
    "regnet": Entry(regnet, image(16), "grouped convolution by group width, squeeze-and-excitation", BATCH),
    "vgg": Entry(vgg, image(16), "flattened channels and pixels into a linear layer", BATCH),
    "squeezenet": Entry(squeezenet, image(), "expansions concatenated, convolution as classifier", BATCH),
    "ghostnet": Entry(ghostnet, image(16), "concatenation with a depthwise of itself, cut to size, residual", BATCH),
    "res2net": Entry(res2net, image(16), "split in four, a chain over the parts, concatenated, residual", BATCH),
    "dual-path": Entry(dual_path, image(16), "part of the stream is added to, part is concatenated", BATCH),
    "resnest": Entry(resnest, image(16), "two candidates in one axis of channels, softmax over them", BATCH),
    "local-response": Entry(
        LocalResponse, image(16), "local response over neighbouring channels, by pooling along them", BATCH
    ),
    "prelu": Entry(prelu_net, image(16), "one slope per channel, one slope for all", BATCH),
}
