"""Images, volumes and sounds that come out as they went in: encoders and decoders, super-resolution, generators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import conv_bn, image
from tests.zoo.entry import Entry


class AtrousPyramid(nn.Module):
    """DeepLab: dilated convolutions and pooled features side by side, resized (Chen et al. 2017)."""

    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU(), conv_bn(12, 20), nn.ReLU())
        self.one = conv_bn(20, width, 1)
        self.dilated = nn.ModuleList(nn.Conv2d(20, width + d, 3, padding=d, dilation=d) for d in (2, 3))
        self.pooled = nn.Conv2d(20, 9, 1)
        self.project, self.head = conv_bn(3 * width + 5 + 9, 18, 1), nn.Conv2d(18, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        pooled = F.interpolate(
            F.relu(self.pooled(F.adaptive_avg_pool2d(y, 1))), size=y.shape[-2:], mode="bilinear", align_corners=False
        )
        parts = [F.relu(self.one(y)), *(F.relu(conv(y)) for conv in self.dilated), pooled]
        y = self.head(F.relu(self.project(torch.cat(parts, dim=1))))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Enhanced(nn.Module):
    """EDSR: residual blocks without normalization, a scale on each branch, a long skip, pixel shuffle."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.45, 0.44, 0.40]).reshape(1, 3, 1, 1), requires_grad=False)
        self.head, self.tail = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, middle, 3, padding=1), nn.ReLU(), nn.Conv2d(middle, width, 3, padding=1))
            for middle in (14, 24)
        )
        self.up = nn.Sequential(nn.Conv2d(width, 44, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(11, 3, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image - self.mean)
        y = x
        for block in self.blocks:
            y = y + block(y) * 0.1
        return self.up(x + self.tail(y)) + self.mean


class SubPixel(nn.Module):
    """ESPCN: three convolutions, tanh, pixel shuffle by three."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 20, 5, padding=2), nn.Tanh(), nn.Conv2d(20, 14, 3, padding=1), nn.Tanh(),
            nn.Conv2d(14, 9, 3, padding=1), nn.PixelShuffle(3),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


class Distillation(nn.Module):
    """IMDN: each convolution keeps some channels and passes the rest on; contrast-aware attention (Hui et al. 2019)."""

    def __init__(self, width: int = 20, kept: int = 6) -> None:
        super().__init__()
        self.stem, self.kept, self.rest = nn.Conv2d(3, width, 3, padding=1), kept, width - kept
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(self.rest, width, 3, padding=1)
        self.third = nn.Conv2d(self.rest, kept, 3, padding=1)
        self.attention = nn.Sequential(nn.Conv2d(3 * kept, 5, 1), nn.ReLU(), nn.Conv2d(5, 3 * kept, 1), nn.Sigmoid())
        self.last, self.up = nn.Conv2d(3 * kept, width, 1), nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        a, rest = F.leaky_relu(self.first(x), 0.05).split([self.kept, self.rest], dim=1)
        b, rest = F.leaky_relu(self.second(rest), 0.05).split([self.kept, self.rest], dim=1)
        y = torch.cat([a, b, self.third(rest)], dim=1)
        mean = y.mean(dim=(2, 3), keepdim=True)
        contrast = (y - mean).pow(2).mean(dim=(2, 3), keepdim=True).sqrt() + mean
        return F.pixel_shuffle(self.up(x + self.last(y * self.attention(contrast))), 2)


class SpaceToDepth(nn.Module):
    """Pixels become channels, are convolved, and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), conv_bn(20, 14)
        self.third, self.last = conv_bn(14 * 4, 20), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.pixel_unshuffle(F.relu(self.first(x)), 2)))
        return self.last(F.pixel_shuffle(F.interpolate(F.relu(self.third(F.pixel_unshuffle(y, 2))), scale_factor=2), 2))


class KernelPrediction(nn.Module):
    """Every pixel gets its own kernel, applied to its unfolded neighbourhood (Mildenhall et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12), nn.ReLU(), conv_bn(12, 20), nn.ReLU())
        self.kernels, self.values, self.last = nn.Conv2d(20, 9, 1), nn.Conv2d(20, 14, 1), nn.Conv2d(14, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        n, _, h, w = y.shape
        kernels = self.kernels(y).reshape(n, 9, h * w).softmax(dim=1)
        patches = F.unfold(self.values(y), 3, padding=1).reshape(n, 14, 9, h * w)
        return self.last(torch.einsum("nckp,nkp->ncp", patches, kernels).reshape(n, 14, h, w))


class Generator(nn.Module):
    """U-shaped generator with InstanceNorm; AdaIN takes scale and shift of each channel from a style vector."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 12, 4, 2, 1), nn.Conv2d(12, 20, 4, 2, 1)
        self.norm1, self.norm2 = nn.InstanceNorm2d(12, affine=True), nn.InstanceNorm2d(20)
        self.style, self.middle = nn.Linear(6, 2 * 20), nn.Conv2d(20, 20, 3, padding=1)
        self.up1, self.up2 = nn.ConvTranspose2d(20, 14, 4, 2, 1), nn.ConvTranspose2d(26, 3, 4, 2, 1)
        self.norm3 = nn.InstanceNorm2d(14, affine=True)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        a = F.leaky_relu(self.norm1(self.down1(x)), 0.2)
        b = F.leaky_relu(self.down2(a), 0.2)
        scale, shift = self.style(style)[:, :, None, None].chunk(2, dim=1)
        b = b + F.relu((1 + scale) * self.norm2(self.middle(b)) + shift)
        c = F.relu(self.norm3(self.up1(b)))
        return torch.tanh(self.up2(torch.cat([c, a], dim=1)))


class ModulatedConv(nn.Module):
    """StyleGAN2: the weight is scaled per input channel by a style, and normalized per output channel."""

    def __init__(self, inputs: int = 12, outputs: int = 20) -> None:
        super().__init__()
        self.stem, self.style = conv_bn(3, inputs), nn.Linear(6, inputs)
        self.weight, self.last = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3)), nn.Conv2d(outputs, 3, 1)
        self.bias = nn.Parameter(torch.randn(outputs, 1, 1))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        n, c, h, w = x.shape
        weight = self.weight * (self.style(style) + 1.0).reshape(n, 1, c, 1, 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.reshape(1, n * c, h, w), weight.reshape(-1, c, 3, 3), padding=1, groups=n)
        return self.last(F.leaky_relu(y.reshape(n, -1, h, w) + self.bias, 0.2))


class GroupNormUNet(nn.Module):
    """Diffusion U-Net in miniature: GroupNorm, SiLU, a time embedding added to channels, skips concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 18), nn.SiLU())
        self.stem, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 20, 3, 2, 1)
        self.norm1, self.conv1, self.emb1 = nn.GroupNorm(4, 12), nn.Conv2d(12, 12, 3, padding=1), nn.Linear(18, 12)
        self.norm2, self.conv2, self.emb2 = nn.GroupNorm(4, 20), nn.Conv2d(20, 24, 3, padding=1), nn.Linear(18, 24)
        self.norm3, self.conv3 = nn.GroupNorm(6, 24), nn.Conv2d(24, 20, 3, padding=1)
        self.up, self.norm4 = nn.Conv2d(20, 16, 3, padding=1), nn.GroupNorm(7, 28)
        self.last = nn.Conv2d(28, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = self.time(time)
        x = self.stem(x)
        skip = x + self.conv1(F.silu(self.norm1(x))) + self.emb1(t)[:, :, None, None]
        y = self.down(skip)
        h = self.conv2(F.silu(self.norm2(y))) + self.emb2(t)[:, :, None, None]
        y = y + self.conv3(F.silu(self.norm3(h)))
        y = self.up(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        return self.last(F.silu(self.norm4(torch.cat([y, skip], dim=1))))


class Waves(nn.Module):
    """WaveNet: causal dilated convolutions, tanh times sigmoid, residual and skip by 1 x 1 convolutions."""

    def __init__(self, width: int = 14, middle: int = 10, skip: int = 18) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv1d(1, width, 1), middle
        self.dilated = nn.ModuleList(nn.Conv1d(width, 2 * middle, 2, dilation=2**i) for i in range(3))
        self.residual = nn.ModuleList(nn.Conv1d(middle, width, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(middle, skip, 1) for _ in range(3))
        self.out1, self.out2 = nn.Conv1d(skip, 12, 1), nn.Conv1d(12, 5, 1)

    def forward(self, sound: Tensor) -> Tensor:
        x, total = self.stem(sound), 0
        for index, (dilated, residual, skip) in enumerate(zip(self.dilated, self.residual, self.skip, strict=True)):
            y = dilated(F.pad(x, (2**index, 0)))
            y = torch.tanh(y[:, : self.middle]) * torch.sigmoid(y[:, self.middle :])
            total, x = total + skip(y), x + residual(y)
        return self.out2(F.relu(self.out1(F.relu(total))))


class VolumeUNet(nn.Module):
    """3-d U-Net: strided convolution down, ConvTranspose up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv3d(2, 10, 3, padding=1), nn.BatchNorm3d(10)
        self.down, self.norm2 = nn.Conv3d(10, 14, 3, 2, 1), nn.BatchNorm3d(14)
        self.up, self.norm3 = nn.ConvTranspose3d(14, 12, 2, 2), nn.InstanceNorm3d(12, affine=True)
        self.last = nn.Conv3d(22, 4, 1)

    def forward(self, volume: Tensor) -> Tensor:
        skip = F.relu(self.norm1(self.first(volume)))
        y = F.relu(self.norm3(self.up(F.relu(self.norm2(self.down(skip))))))
        return self.last(torch.cat([skip, y], dim=1)).softmax(dim=1)


class VideoMix(nn.Module):
    """TSM: a part of the channels is shifted in time; batch and time share an axis."""

    def __init__(self, frames: int = 4) -> None:
        super().__init__()
        self.frames, self.first, self.second = frames, conv_bn(3, 12), conv_bn(12, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, video: Tensor) -> Tensor:
        n, t, c, h, w = video.shape
        x = F.relu(self.first(video.reshape(n * t, c, h, w)))
        y = x.reshape(n, t, 12, h, w)
        later = F.pad(y[:, :-1, :3], (0, 0, 0, 0, 0, 0, 1, 0))
        sooner = F.pad(y[:, 1:, 3:6], (0, 0, 0, 0, 0, 0, 0, 1))
        x = torch.cat([later, sooner, y[:, :, 6:]], dim=2).reshape(n * t, 12, h, w)
        return self.head(F.relu(self.second(x)).mean(dim=(2, 3)).reshape(n, t, 20).mean(dim=1))


def image_and_vector(side: int, size: int) -> tuple[Tensor, ...]:
    return torch.randn(2, 3, side, side), torch.randn(2, size)


BATCH = {0: "batch"}
SIDES = {2: "height", 3: "width"}
ENTRIES = {
    "deeplab": Entry(AtrousPyramid, image(16), "dilated and pooled branches of different widths, Resize", (BATCH,)),
    "edsr": Entry(Enhanced, image(16), "residual stream from the first convolution to the pixel shuffle", (SIDES,)),
    "espcn": Entry(SubPixel, image(16, 1), "pixel shuffle by three right at the output", (BATCH | SIDES,)),
    "imdn": Entry(Distillation, image(16), "channel split into kept and passed on, concatenated", (SIDES,)),
    "space-to-depth": Entry(SpaceToDepth, image(16), "pixels become channels and back", (BATCH,)),
    "kernel-prediction": Entry(KernelPrediction, image(8), "unfold, and a kernel for each pixel by Einsum"),
    "generator": Entry(
        Generator,
        lambda: image_and_vector(16, 6),
        "InstanceNorm, AdaIN from a linear layer, skip concatenated",
        (BATCH, BATCH),
    ),
    "modulated-conv": Entry(ModulatedConv, lambda: image_and_vector(8, 6), "weight scaled by a style for each sample"),
    "unet-groupnorm": Entry(
        GroupNormUNet,
        lambda: image_and_vector(16, 8),
        "GroupNorm over a concatenation, time added to channels",
        (BATCH, BATCH),
    ),
    "wavenet": Entry(
        Waves, lambda: (torch.randn(2, 1, 24),), "1-d, gates by slices, residual and skip", ({2: "time"},)
    ),
    "unet-3d": Entry(VolumeUNet, lambda: (torch.randn(2, 2, 4, 8, 8),), "3-d convolution and ConvTranspose", (BATCH,)),
    "temporal-shift": Entry(VideoMix, lambda: (torch.randn(2, 4, 3, 8, 8),), "part of the channels shifted in time"),
}
