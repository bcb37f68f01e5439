"""Linear layers over what are no channels of an image: windows, places, points, nodes, codes, features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import conv_bn, image
from tests.zoo.entry import Entry


class WindowAttention(nn.Module):
    """Swin as in torchvision: fused projection, relative position bias by index, mask of a cyclic shift."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.side, self.window, self.shift = heads, side, window, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        distance = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("index", (distance[0] * (2 * window - 1) + distance[1]).flatten())
        region = torch.zeros(side, side)
        for count, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else ()):
            region[rows] += count * 3
            region[:, rows] += count
        region = self.windows(region.reshape(1, side, side, 1)).squeeze(-1)
        self.register_buffer("mask", (region[:, None, :] != region[:, :, None]).float()[:, None] * -100.0)

    def windows(self, x: Tensor) -> Tensor:
        n, count, window = x.shape[0], self.side // self.window, self.window
        x = x.reshape(n, count, window, count, window, x.shape[3]).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n * count * count, window * window, -1)

    def forward(self, x: Tensor) -> Tensor:
        n, side, width, window = x.shape[0], self.side, x.shape[3], self.window
        count = (side // window) ** 2
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        y = self.windows(x)
        q, k, v = self.qkv(y).reshape(n * count, window**2, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index].reshape(window**2, window**2, -1).permute(2, 0, 1)
        if self.shift:
            scores = scores.reshape(n, count, self.heads, window**2, window**2) + self.mask
            scores = scores.reshape(n * count, self.heads, window**2, window**2)
        y = self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(n * count, window**2, width))
        y = y.reshape(n, side // window, side // window, window, window, width).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(n, side, side, width)
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y


class WindowBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, side, window, shift)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours concatenated along channels, then reduced."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, dim=-1)))


class SwinTiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 18, 4, 4), nn.LayerNorm(18)
        self.first = nn.Sequential(WindowBlock(18, 40, 3, 8, 4, 0), WindowBlock(18, 44, 3, 8, 4, 2))
        self.merge, self.second = PatchMerging(18, 30), WindowBlock(30, 52, 5, 4, 4, 0)
        self.last, self.head = nn.LayerNorm(30), nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.merge(self.first(self.norm(self.patch(x).permute(0, 2, 3, 1)))))
        return self.head(self.last(x).permute(0, 3, 1, 2).mean(dim=(2, 3)))


class SpatialLinear(nn.Module):
    """Linear layers over rows, over columns and over all pixels of a feature map (ViP, gMLP)."""

    def __init__(self, width: int = 20, side: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, width, 3, 2), nn.ReLU())
        self.rows, self.columns, self.channels = nn.Linear(side, 11), nn.Linear(side, 13), nn.Conv2d(width, 14, 1)
        self.pixels, self.head = nn.Linear(11 * 13, 9), nn.Linear(14 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.columns(self.rows(self.stem(x).transpose(2, 3)).transpose(2, 3))
        return self.head(self.pixels(F.relu(self.channels(F.relu(x))).flatten(2)).flatten(1))


class ConvMixer(nn.Module):
    """Residual depthwise convolutions, GELU before BatchNorm (Trockman and Kolter 2022)."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.BatchNorm2d(width))
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 5, padding="same", groups=width), nn.GELU(), nn.BatchNorm2d(width)
        )
        self.pointwise = nn.Sequential(nn.Conv2d(width, 14, 1), nn.GELU(), nn.BatchNorm2d(14))
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.pointwise(x + self.depthwise(x)).mean(dim=(2, 3)))


class Capsules(nn.Module):
    """Capsules: channels become vectors, each with its own matrix for every class, routed twice."""

    def __init__(self, size: int = 6, kinds: int = 5, classes: int = 4, out: int = 7, places: int = 16) -> None:
        super().__init__()
        self.stem, self.primary = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU()), nn.Conv2d(12, kinds * size, 3, 2, 1)
        self.weight = nn.Parameter(torch.randn(kinds * places, classes, size, out) * 0.3)
        self.size, self.kinds, self.classes = size, kinds, classes

    def squash(self, x: Tensor) -> Tensor:
        square = x.pow(2).sum(dim=-1, keepdim=True)
        return x * square / (1 + square) / (square + 1e-8).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(self.stem(x))
        n = x.shape[0]
        u = self.squash(x.reshape(n, self.kinds, self.size, -1).permute(0, 1, 3, 2).reshape(n, -1, self.size))
        votes = torch.einsum("nis,icso->nico", u, self.weight)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(2):
            v = self.squash((logits.softmax(dim=2)[..., None] * votes).sum(dim=1))
            logits = logits + (votes * v[:, None]).sum(dim=-1)
        return v


class Quantizer(nn.Module):
    """VQ-VAE: the nearest code of a book replaces the features of each pixel."""

    def __init__(self, width: int = 14, codes: int = 18) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, width, 1))
        self.book = nn.Embedding(codes, width)
        self.decode = nn.Sequential(nn.ConvTranspose2d(width, 10, 4, 2, 1), nn.ReLU(), nn.Conv2d(10, 3, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x).permute(0, 2, 3, 1)
        book = self.book.weight
        distance = z.pow(2).sum(dim=-1, keepdim=True) - 2 * z @ book.T + book.pow(2).sum(dim=1)
        codes = distance.argmin(dim=-1)
        return self.decode(self.book(codes).permute(0, 3, 1, 2)), codes


class Vlad(nn.Module):
    """NetVLAD: residuals to centres, weighted by a softmax over centres, normalized twice, projected."""

    def __init__(self, width: int = 14, centres: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, width, 1))
        self.assign, self.centres = nn.Conv2d(width, centres, 1), nn.Parameter(torch.randn(centres, width))
        self.head = nn.Linear(centres * width, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.body(x), dim=1)
        weights = self.assign(x).flatten(2).softmax(dim=1)
        residual = x.flatten(2)[:, None] - self.centres[None, :, :, None]
        vlad = F.normalize((residual * weights[:, :, None]).sum(dim=-1), dim=2)
        return self.head(F.normalize(vlad.flatten(1), dim=1))


class Points(nn.Module):
    """PointNet: shared 1-d convolutions, a predicted matrix that mixes features, maximum over points."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, width, 1), nn.Conv1d(width, 20, 1)
        self.norm, self.twist = nn.BatchNorm1d(width), nn.Linear(16, width * width)
        self.look, self.head = nn.Conv1d(width, 16, 1), nn.Linear(20, 5)
        self.width = width

    def forward(self, points: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(points)))
        matrix = self.twist(F.relu(self.look(x)).amax(dim=2)).reshape(-1, self.width, self.width)
        x = torch.bmm((matrix + torch.eye(self.width)).transpose(1, 2), x)
        return self.head(F.relu(self.second(x)).amax(dim=2))


class GraphConv(nn.Module):
    """Graph convolution: MatMul with an adjacency matrix between linear layers; graph attention by broadcast sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 20), nn.Linear(20, 14), nn.Linear(14, 4)
        self.source, self.target = nn.Linear(14, 1), nn.Linear(14, 1)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(adjacency @ self.first(nodes))
        x = self.second(x)
        scores = F.leaky_relu(self.source(x) + self.target(x).transpose(1, 2), 0.2)
        return self.head(F.elu((scores + (1 - adjacency) * -10.0).softmax(dim=-1) @ x))


class Radiance(nn.Module):
    """NeRF: sines and cosines concatenated, the input concatenated again half-way, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(21, 20), nn.Linear(41, 28), nn.Linear(28, 18)
        self.density, self.colour = nn.Linear(28, 1), nn.Linear(18 + 3, 3)

    def forward(self, place: Tensor, direction: Tensor) -> Tensor:
        waves = [place] + [wave(place * 2.0**power) for power in range(3) for wave in (torch.sin, torch.cos)]
        code = torch.cat(waves, dim=-1)
        x = F.relu(self.second(torch.cat([F.relu(self.first(code)), code], dim=-1)))
        colour = self.colour(torch.cat([self.third(x), direction], dim=-1))
        return torch.cat([torch.sigmoid(colour), F.softplus(self.density(x))], dim=-1)


class Interactions(nn.Module):
    """DLRM: embeddings and dense features of one width, all dot products between them, concatenated."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.books = nn.ModuleList(nn.Embedding(100, width) for _ in range(3))
        self.dense = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 14), nn.ReLU(), nn.Linear(14, 1))
        rows, columns = torch.tril_indices(4, 4, offset=-1)
        self.register_buffer("pairs", rows * 4 + columns)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.dense(dense)
        features = torch.stack([x, *(book(sparse[:, index]) for index, book in enumerate(self.books))], dim=1)
        products = (features @ features.transpose(1, 2)).flatten(1)
        return torch.sigmoid(self.top(torch.cat([x, products.index_select(1, self.pairs)], dim=1)))


class CouplingFlow(nn.Module):
    """RealNVP: half of the channels scale and shift the other half, halves swap, an invertible 1 x 1 convolution."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        half = width // 2
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Conv2d(half, middle, 3, padding=1), nn.ReLU(), nn.Conv2d(middle, width, 3, padding=1))
            for middle in (14, 20)
        )
        self.mix = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, 2)
        for net in self.nets:
            a, b = x.chunk(2, dim=1)
            scale, shift = net(a).chunk(2, dim=1)
            x = torch.cat([b * torch.exp(torch.tanh(scale)) + shift, a], dim=1)
        return self.mix(x)


def graph() -> tuple[Tensor, ...]:
    return torch.randn(2, 9, 7), (torch.rand(2, 9, 9) > 0.6).float()


BATCH = {0: "batch"}
ENTRIES = {
    "swin-t": Entry(
        SwinTiny, image(), "windows, fused projection, bias by index, patch merging by strided slices", (BATCH,)
    ),
    "spatial-linear": Entry(SpatialLinear, image(16), "linear layers over rows, columns and pixels", (BATCH,)),
    "conv-mixer": Entry(
        ConvMixer, image(), "residual depthwise convolution, BatchNorm behind the activation", (BATCH,)
    ),
    "capsules": Entry(Capsules, image(16), "channels become vectors with a matrix each, routed twice", (BATCH,)),
    "vector-quantizer": Entry(Quantizer, image(16), "code book read by MatMul and by Gather", (BATCH,)),
    "net-vlad": Entry(Vlad, image(16), "outer broadcast of channels and centres, flattened", (BATCH,)),
    "point-net": Entry(
        Points, lambda: (torch.randn(2, 3, 24),), "predicted matrix mixes channels", ({0: "batch", 2: "points"},)
    ),
    "graph-conv": Entry(
        GraphConv, graph, "MatMul with adjacency, scores of pairs by broadcast", ({0: "batch"}, {0: "batch"})
    ),
    "nerf": Entry(
        Radiance, lambda: (torch.randn(8, 3), torch.randn(8, 3)), "input concatenated again half-way", (BATCH, BATCH)
    ),
    "dlrm": Entry(
        Interactions,
        lambda: (torch.randn(4, 6), torch.randint(0, 100, (4, 3))),
        "embeddings stacked, all dot products",
        (BATCH, BATCH),
    ),
    "coupling-flow": Entry(
        CouplingFlow, image(16), "halves scale each other and swap, width bound to the input", (BATCH,)
    ),
}
