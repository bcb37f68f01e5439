"""Detection, tracking and matching: pyramids, heads shared over levels, activations that serve as weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import conv_bn, image
from tests.zoo.entry import Entry


class Backbone(nn.Module):
    """Features of three levels."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, c = widths
        self.stem, self.second, self.third = conv_bn(3, a, 3, 2), conv_bn(a, b, 3, 2), conv_bn(b, c, 3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = F.relu(self.stem(x))
        b = F.relu(self.second(a))
        return a, b, F.relu(self.third(b))


class Pyramid(nn.Module):
    """Lateral 1 x 1 convolutions summed from the top down, all levels of one width (Lin et al. 2017)."""

    def __init__(self, widths: tuple[int, int, int] = (12, 20, 28), width: int = 14) -> None:
        super().__init__()
        self.backbone = Backbone(widths)
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b, c = (lateral(level) for lateral, level in zip(self.lateral, self.backbone(x), strict=True))
        b = b + F.interpolate(c, scale_factor=2.0, mode="nearest")
        a = a + F.interpolate(b, size=a.shape[-2:], mode="nearest")
        return {
            f"level{index}": smooth(y) for index, (smooth, y) in enumerate(zip(self.smooth, (a, b, c), strict=True))
        }


class RetinaHead(nn.Module):
    """Two towers shared over all levels of a pyramid, anchors and classes in one axis of channels."""

    def __init__(self, width: int = 14, anchors: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.pyramid, self.classes = Pyramid(), classes
        self.score = nn.Sequential(
            nn.Conv2d(width, 18, 3, padding=1), nn.GroupNorm(3, 18), nn.ReLU(),
            nn.Conv2d(18, anchors * classes, 3, padding=1),
        )  # fmt: skip
        self.box = nn.Sequential(
            nn.Conv2d(width, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, anchors * 4, 3, padding=1)
        )

    def flat(self, x: Tensor, size: int) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c // size, size, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = list(self.pyramid(x).values())
        scores = torch.cat([self.flat(self.score(level), self.classes) for level in levels], dim=1)
        return torch.sigmoid(scores), torch.cat([self.flat(self.box(level), 4) for level in levels], dim=1)


class SingleShot(nn.Module):
    """SSD: heads of different widths on each level, moved last, reshaped and concatenated; one level normalized."""

    def __init__(self, widths: tuple[int, int, int] = (12, 20, 28), classes: int = 6) -> None:
        super().__init__()
        self.backbone, self.scale, self.classes = Backbone(widths), nn.Parameter(torch.rand(1, 12, 1, 1) + 5.0), classes
        anchors = (4, 6, 3)
        self.score = nn.ModuleList(
            nn.Conv2d(w, a * classes, 3, padding=1) for w, a in zip(widths, anchors, strict=True)
        )
        self.box = nn.ModuleList(nn.Conv2d(w, a * 4, 3, padding=1) for w, a in zip(widths, anchors, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = self.backbone(x)
        a = F.normalize(a, dim=1) * self.scale
        scores, boxes = [], []
        for level, score, box in zip((a, b, c), self.score, self.box, strict=True):
            scores.append(score(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.classes))
            boxes.append(box(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
        return torch.cat(scores, dim=1).softmax(dim=-1), torch.cat(boxes, dim=1)


class ConvSilu(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv_bn(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x))


class FasterStage(nn.Module):
    """C2f of YOLOv8: chunk in two, a chain of bottlenecks, everything concatenated."""

    def __init__(self, inputs: int, outputs: int, middle: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.last = ConvSilu(inputs, 2 * middle), ConvSilu((2 + depth) * middle, outputs)
        self.chain = nn.ModuleList(
            nn.Sequential(ConvSilu(middle, middle, 3), ConvSilu(middle, middle, 3)) for _ in range(depth)
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, dim=1))
        for block in self.chain:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.last(torch.cat(parts, dim=1))


class PartialStage(nn.Module):
    """Cross stage partial (YOLOv5): two 1 x 1 convolutions read the input, one of them goes through a bottleneck."""

    def __init__(self, inputs: int, outputs: int, middle: int) -> None:
        super().__init__()
        self.left, self.right = ConvSilu(inputs, middle), ConvSilu(inputs, middle + 3)
        self.block = nn.Sequential(ConvSilu(middle, middle - 2), ConvSilu(middle - 2, middle, 3))
        self.last = ConvSilu(2 * middle + 3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x)
        return self.last(torch.cat([y + self.block(y), self.right(x)], dim=1))


class PoolPyramid(nn.Module):
    """SPPF: a chain of poolings, concatenated."""

    def __init__(self, inputs: int, outputs: int, middle: int) -> None:
        super().__init__()
        self.first, self.last = ConvSilu(inputs, middle), ConvSilu(4 * middle, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, dim=1))


class DistributionHead(nn.Module):
    """A box side is the mean of a softmax over bins (DFL); a 1 x 1 convolution with fixed weights takes the mean."""

    def __init__(self, width: int, middle: int, bins: int, classes: int) -> None:
        super().__init__()
        self.box = nn.Sequential(ConvSilu(width, middle, 3), nn.Conv2d(middle, 4 * bins, 1))
        self.score = nn.Sequential(ConvSilu(width, middle + 1, 3), nn.Conv2d(middle + 1, classes, 1))
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.box(x), self.score(x)], dim=1).flatten(2)


class Yolo(nn.Module):
    """Backbone, upsampling neck and heads on two levels, decoded as in YOLOv8."""

    def __init__(self, stage: type[nn.Module], extra: tuple[object, ...], bins: int = 6, classes: int = 7) -> None:
        super().__init__()
        self.stem = ConvSilu(3, 12, 3, 2)
        self.low, self.down = stage(12, 20, 9, *extra), ConvSilu(20, 22, 3, 2)
        self.high, self.pool = stage(22, 28, 10, *extra), PoolPyramid(28, 24, 7)
        self.neck = stage(20 + 24, 18, 8, *extra)
        self.heads = nn.ModuleList([DistributionHead(18, 11, bins, classes), DistributionHead(24, 13, bins, classes)])
        self.bins, self.classes = bins, classes
        self.register_buffer("project", torch.arange(bins, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(self.stem(x))
        high = self.pool(self.high(self.down(low)))
        neck = self.neck(torch.cat([F.interpolate(high, scale_factor=2.0, mode="nearest"), low], dim=1))
        found = torch.cat([head(level) for head, level in zip(self.heads, (neck, high), strict=True)], dim=2)
        boxes, scores = found.split([4 * self.bins, self.classes], dim=1)
        n, _, count = boxes.shape
        sides = boxes.reshape(n, 4, self.bins, count).transpose(1, 2).softmax(dim=1)
        sides = F.conv2d(sides, self.project.reshape(1, self.bins, 1, 1)).reshape(n, 4, count)
        first, second = sides.chunk(2, dim=1)
        return torch.cat([(second - first) / 2, first + second], dim=1), torch.sigmoid(scores)


class DistanceHead(nn.Module):
    """GFL in miniature: softmax over bins, then a MatMul with the bins."""

    def __init__(self, bins: int = 7) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU(), conv_bn(12, 20), nn.ReLU())
        self.box, self.bins = nn.Conv2d(20, 4 * bins, 1), bins
        self.register_buffer("project", torch.linspace(0.0, 3.0, bins))

    def forward(self, x: Tensor) -> Tensor:
        y = self.box(self.body(x)).permute(0, 2, 3, 1)
        return y.reshape(x.shape[0], -1, 4, self.bins).softmax(dim=-1).matmul(self.project)


class HighResolution(nn.Module):
    """HRNet in miniature: two resolutions side by side, each gets the sum of both, twice."""

    def __init__(self, fine: int = 12, coarse: int = 20) -> None:
        super().__init__()
        self.stem, self.split = conv_bn(3, fine, 3, 2), conv_bn(fine, coarse, 3, 2)
        self.fine = nn.ModuleList(conv_bn(fine, fine) for _ in range(2))
        self.coarse = nn.ModuleList(conv_bn(coarse, coarse) for _ in range(2))
        self.up = nn.ModuleList(conv_bn(coarse, fine, 1) for _ in range(2))
        self.down = nn.ModuleList(conv_bn(fine, coarse, 3, 2) for _ in range(2))
        self.head = nn.Conv2d(fine + coarse, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.stem(x))
        b = F.relu(self.split(a))
        for fine, coarse, up, down in zip(self.fine, self.coarse, self.up, self.down, strict=True):
            a, b = F.relu(a + fine(a)), F.relu(b + coarse(b))
            risen = F.interpolate(up(b), scale_factor=2.0, mode="bilinear", align_corners=False)
            a, b = F.relu(a + risen), F.relu(b + down(a))
        return self.head(torch.cat([a, F.interpolate(b, scale_factor=2.0, mode="nearest")], dim=1))


class Siamese(nn.Module):
    """SiamFC: features of the template are the weight of a convolution over features of the search image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU(), conv_bn(12, 20), nn.ReLU(), nn.Conv2d(20, 14, 1))

    def forward(self, template: Tensor, search: Tensor) -> Tensor:
        return F.conv2d(self.body(search), self.body(template)) * 0.01


class DepthwiseSiamese(nn.Module):
    """SiamRPN++: every channel of the template correlates with its own channel, batch folded into groups."""

    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU())
        self.kernel, self.search = conv_bn(12, width), conv_bn(12, width)
        self.head = nn.Sequential(conv_bn(width, 18, 1), nn.ReLU(), nn.Conv2d(18, 10, 1))

    def forward(self, template: Tensor, search: Tensor) -> Tensor:
        kernel, found = self.kernel(self.body(template)), self.search(self.body(search))
        n, c, h, w = kernel.shape
        y = F.conv2d(found.reshape(1, n * c, *found.shape[2:]), kernel.reshape(n * c, 1, h, w), groups=n * c)
        return self.head(y.reshape(n, c, y.shape[2], y.shape[3]) * 0.1)


class DeformableConv(nn.Module):
    """Deformable convolution by grid_sample: one sample of all channels for each place of the kernel."""

    def __init__(self, inputs: int = 12, outputs: int = 20, side: int = 8) -> None:
        super().__init__()
        self.stem, self.offset = conv_bn(3, inputs, 3, 2), nn.Conv2d(inputs, 18, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 9) * 0.1)
        self.norm, self.head = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, 5, 1)
        axis = torch.linspace(-1.0, 1.0, side)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1))
        places = torch.tensor([-1.0, 0.0, 1.0]) * 2.0 / (side - 1)
        self.register_buffer("places", torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1).reshape(9, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        n, _, h, w = x.shape
        offset = torch.tanh(self.offset(x)).reshape(n, 9, 2, h, w).permute(1, 0, 3, 4, 2) * 0.2
        samples = [
            F.grid_sample(x, self.grid + self.places[place] + offset[place], align_corners=True) for place in range(9)
        ]
        y = torch.einsum("kncp,ock->nop", torch.stack([sample.flatten(2) for sample in samples]), self.weight)
        return self.head(F.relu(self.norm(y.reshape(n, -1, h, w))))


class RecurrentFlow(nn.Module):
    """RAFT in miniature: all pairs of features, looked up by grid_sample, a convolutional GRU run twice."""

    def __init__(self, width: int = 20, hidden: int = 12, context: int = 9, radius: int = 1, side: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 14, 3, 2), nn.ReLU(), nn.Conv2d(14, width, 1))
        self.context = nn.Sequential(conv_bn(3, 14, 3, 2), nn.ReLU(), nn.Conv2d(14, hidden + context, 1))
        seen, self.hidden, self.side = (2 * radius + 1) ** 2, hidden, side
        self.motion = nn.Sequential(nn.Conv2d(seen + 2, 16, 3, padding=1), nn.ReLU())
        inputs = hidden + context + 16
        self.update, self.reset = nn.Conv2d(inputs, hidden, 3, padding=1), nn.Conv2d(inputs, hidden, 3, padding=1)
        self.propose = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.flow = nn.Sequential(nn.Conv2d(hidden, 18, 3, padding=1), nn.ReLU(), nn.Conv2d(18, 2, 3, padding=1))
        axis = torch.arange(side, dtype=torch.float32)
        self.register_buffer("pixels", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=0)[None])
        around = torch.arange(-radius, radius + 1, dtype=torch.float32)
        self.register_buffer("around", torch.stack(torch.meshgrid(around, around, indexing="xy"), dim=-1)[None])

    def look_up(self, volume: Tensor, flow: Tensor) -> Tensor:
        n, side = flow.shape[0], self.side
        centres = (self.pixels + flow).permute(0, 2, 3, 1).reshape(n * side * side, 1, 1, 2)
        places = (centres + self.around) * (2.0 / (side - 1)) - 1.0
        seen = F.grid_sample(volume.reshape(n * side * side, 1, side, side), places, align_corners=True)
        return seen.reshape(n, side, side, -1).permute(0, 3, 1, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.features(first).flatten(2), self.features(second).flatten(2)
        volume = torch.matmul(a.transpose(1, 2), b) / a.shape[1] ** 0.5
        hidden, context = self.context(first).split([self.hidden, 9], dim=1)
        hidden, context = torch.tanh(hidden), F.relu(context)
        flow = torch.zeros_like(self.pixels).expand(a.shape[0], -1, -1, -1)
        for _ in range(2):
            motion = self.motion(torch.cat([self.look_up(volume, flow), flow], dim=1))
            inputs = torch.cat([context, motion], dim=1)
            both = torch.cat([hidden, inputs], dim=1)
            update, reset = torch.sigmoid(self.update(both)), torch.sigmoid(self.reset(both))
            proposal = torch.tanh(self.propose(torch.cat([reset * hidden, inputs], dim=1)))
            hidden = (1 - update) * hidden + update * proposal
            flow = flow + self.flow(hidden)
        return flow


class CentrePoints(nn.Module):
    """CenterNet in miniature: heatmap peaks by max pooling, TopK, sizes gathered at the peaks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU(), conv_bn(12, 20), nn.ReLU())
        self.heat = nn.Sequential(nn.Conv2d(20, 14, 3, padding=1), nn.ReLU(), nn.Conv2d(14, 1, 1))
        self.size = nn.Sequential(nn.Conv2d(20, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 3, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        heat = torch.sigmoid(self.heat(x))
        peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()
        scores, places = peaks.flatten(1).topk(4, dim=1)
        sizes = self.size(x).flatten(2)
        return scores, sizes.gather(2, places[:, None].expand(-1, sizes.shape[1], -1))


def template_and_search(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 3, 8, 8), torch.randn(batch, 3, 16, 16)


BATCH = ({0: "batch"},)
ENTRIES = {
    "fpn": Entry(Pyramid, image(), "levels of one width summed from the top down, three outputs", BATCH),
    "retinanet": Entry(RetinaHead, image(), "heads shared over levels, anchors times classes as channels"),
    "ssd": Entry(
        SingleShot, image(), "heads moved last, reshaped, concatenated; L2 normalization over channels", BATCH
    ),
    "yolo-c2f": Entry(lambda: Yolo(FasterStage, (2, True)), image(), "chunk, chain, concatenation; box bins decoded"),
    "yolo-csp": Entry(lambda: Yolo(PartialStage, ()), image(), "cross stage partial blocks, SPPF, any batch", BATCH),
    "dfl-head": Entry(DistanceHead, image(16), "softmax over bins of a box side, MatMul with constants", BATCH),
    "hrnet": Entry(HighResolution, image(), "two resolutions that are added to each other", BATCH),
    "siamese": Entry(Siamese, lambda: template_and_search(1), "activation as the weight of a convolution, body shared"),
    "siamese-depthwise": Entry(
        DepthwiseSiamese, lambda: template_and_search(2), "activation as the weight of a depthwise convolution"
    ),
    "deformable-grid": Entry(DeformableConv, image(16), "deformable convolution by GridSample and Einsum"),
    "raft": Entry(
        RecurrentFlow,
        lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)),
        "MatMul of two features, lookup by GridSample, convolutional GRU used twice",
    ),
    "centre-points": Entry(CentrePoints, image(16), "TopK and gather at places that depend on data", BATCH),
}
