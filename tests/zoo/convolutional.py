"""Convolutional networks in miniature."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import conv_bn, image
from tests.zoo.entry import Entry


class Residual(nn.Module):
    """Two convolutions and a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 16), nn.ReLU(), Residual(16, 16), Residual(16, 32, 2), Residual(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection (MobileNetV2 and V3)."""

    def __init__(self, width: int, activation: nn.Module, excite: bool) -> None:
        super().__init__()
        self.expand, self.depthwise = conv_bn(width, 4 * width, 1), conv_bn(4 * width, 4 * width, 3, 1, 4 * width)
        self.project, self.activation = conv_bn(4 * width, width, 1), activation
        self.excite = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(4 * width, width, 1),
                nn.ReLU(),
                nn.Conv2d(width, 4 * width, 1),
                nn.Hardsigmoid(),
            )
            if excite
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.depthwise(self.activation(self.expand(x))))
        if self.excite is not None:
            y = y * self.excite(y)
        return x + self.project(y)


class MobileNet(nn.Module):
    def __init__(self, activation: nn.Module, excite: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(3, 16, 3, 2),
            activation,
            InvertedResidual(16, activation, excite),
            InvertedResidual(16, activation, excite),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class ConvNeXt(nn.Module):
    """Depthwise 7 x 7, LayerNorm over channels, GELU MLP, layer scale (Liu et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.depthwise = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.scale = nn.Parameter(torch.full((16,), 0.5))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean(dim=(2, 3)))


class DenseNet(nn.Module):
    """BatchNorm before each convolution, every output concatenated (Huang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 8 * index) for index in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 8 * index, 8, 3, padding=1, bias=False) for index in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.AvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, dim=1)))))
        return self.transition(torch.cat(features, dim=1))


class Inception(nn.Module):
    """Parallel branches of different kernels, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn(3, 8, 1),
                conv_bn(3, 8, 3),
                conv_bn(3, 8, 5),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(3, 8, 1)),
            ]
        )
        self.head = nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.cat([branch(x) for branch in self.branches], dim=1)))


class RepVGG(nn.Module):
    """3 x 3, 1 x 1 and identity branches, each with BatchNorm, summed (Ding et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.three, self.one = conv_bn(3, 16, 3, 2), conv_bn(16, 16, 3), conv_bn(16, 16, 1)
        self.same, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.three(x) + self.one(x) + self.same(x)))


class UNet(nn.Module):
    """Down, up by ConvTranspose, skip by concatenation (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 8), conv_bn(8, 16, 3, 2)
        self.up, self.up_norm = nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.first(x))
        y = F.relu(self.up_norm(self.up(F.relu(self.second(skip)))))
        return torch.sigmoid(self.last(torch.cat([skip, y], dim=1)))


class PixelShuffle(nn.Module):
    """Super-resolution in miniature, any height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


class ChannelShuffle(nn.Module):
    """Grouped convolutions with a shuffle between them (Zhang et al. 2018), padded by a Pad node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv_bn(4, 16, 1, groups=2), nn.Conv2d(16, 16, 3, groups=4)
        self.pad = nn.ConstantPad2d(1, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        n, c, h, w = y.shape
        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(self.pad(y)) * 0.5 + 1.0


class Conv1d3d(nn.Module):
    """One-dimensional and three-dimensional convolutions, two inputs, two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv1d(4, 8, 5, 2), nn.BatchNorm1d(8)
        self.three, self.norm3 = nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4)
        self.last1, self.last3 = nn.Conv1d(8, 5, 1), nn.Conv3d(4, 3, 1)

    def forward(self, sound: Tensor, volume: Tensor) -> dict[str, Tensor]:
        sound, volume = self.norm1(self.one(sound)).tanh(), F.elu(self.norm3(self.three(volume)))
        return {"sound": self.last1(sound), "volume": self.last3(volume)}


ENTRIES = {
    "resnet": Entry(ResNet, image(), "residual adds, with and without a convolution in the shortcut", ({0: "batch"},)),
    "mobilenet-v2": Entry(
        lambda: MobileNet(nn.ReLU6(), False),
        image(),
        "depthwise convolution between expansion and projection",
        ({0: "batch"},),
    ),
    "mobilenet-v3": Entry(
        lambda: MobileNet(nn.Hardswish(), True), image(), "squeeze-and-excitation on a depthwise stream, HardSwish"
    ),
    "efficientnet": Entry(lambda: MobileNet(nn.SiLU(), True), image(), "squeeze-and-excitation, SiLU"),
    "convnext": Entry(ConvNeXt, image(), "LayerNorm and linear layers over channels moved last, layer scale"),
    "densenet": Entry(DenseNet, image(), "concatenation of all earlier outputs, BatchNorm first", ({0: "batch"},)),
    "inception": Entry(Inception, image(), "concatenation of parallel branches"),
    "repvgg": Entry(RepVGG, image(), "sum of parallel branches, one of them only BatchNorm"),
    "unet": Entry(UNet, image(), "ConvTranspose, skip by concatenation", ({0: "batch"},)),
    "pixel-shuffle": Entry(
        PixelShuffle, image(16), "channels that become pixels (DepthToSpace)", ({2: "height", 3: "width"},)
    ),
    "channel-shuffle": Entry(ChannelShuffle, image(16, 4), "shuffle between grouped convolutions of other group sizes"),
    "conv-1d-3d": Entry(
        Conv1d3d,
        lambda: (torch.randn(2, 4, 32), torch.randn(2, 2, 4, 8, 8)),
        "1-d and 3-d convolution, two inputs, outputs in a dict",
    ),
}
