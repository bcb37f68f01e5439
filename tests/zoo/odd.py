"""What no textbook network has, and graphs in the wild do: shared weights, odd outputs, channels in odd places."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import conv_bn, image
from tests.zoo.entry import Entry


class SharedThrice(nn.Module):
    """One convolution used three times on one stream, its BatchNorm only twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = conv_bn(3, 12), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.conv(x)))
        x = x + F.relu(self.norm(self.conv(x)))
        return self.last(F.relu(self.conv(x)))


class ConvAndLinear(nn.Module):
    """One weight in a 1 x 1 convolution and, reshaped, in a linear layer on another input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.vector = conv_bn(3, 12), nn.Linear(6, 12)
        self.conv, self.head = nn.Conv2d(12, 20, 1), nn.Linear(20, 7)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        seen = F.relu(self.conv(F.relu(self.stem(x)))).mean(dim=(2, 3))
        return self.head(seen + F.linear(F.relu(self.vector(code)), self.conv.weight.reshape(20, 12), self.conv.bias))


class TiedAutoencoder(nn.Module):
    """The decoder uses the encoder's weights: transposed in a linear layer, as they are in a ConvTranspose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.code = nn.Conv2d(3, 12, 4, 4), nn.Linear(12 * 16, 20)
        self.bias, self.last = nn.Parameter(torch.randn(12 * 16)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.code(F.relu(self.conv(x)).flatten(1)))
        y = F.relu(F.linear(code, self.code.weight.T, self.bias)).reshape(-1, 12, 4, 4)
        return F.conv_transpose2d(y, self.conv.weight, self.last, stride=4)


class ParameterOutput(nn.Module):
    """Learned embeddings that are used and also handed out as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.prompts, self.head = nn.Linear(8, 14), nn.Parameter(torch.randn(5, 14)), nn.Linear(14, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(F.relu(self.stem(x))) @ self.head(self.prompts).T, self.prompts


class TwoOutputs(nn.Module):
    """A stream that is an output half-way, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, 12), conv_bn(12, 20, 3, 2), conv_bn(20, 20)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.second(F.relu(self.first(x))))
        return features, self.head((features + self.third(features)).mean(dim=(2, 3)))


class NestedOutputs(nn.Module):
    """Outputs in dicts and lists, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mask, self.scores = conv_bn(3, 14), nn.Conv2d(14, 4, 1), nn.Linear(14, 6)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = F.relu(self.body(x))
        mask = self.mask(y)
        return {"masks": [mask, mask.argmax(dim=1)], "scores": {"raw": self.scores(y.mean(dim=(2, 3)))}}


class Conditional(nn.Module):
    """torch.cond: each branch has weights of its own, both read one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(8, 20), nn.Linear(20, 14), nn.Linear(20, 14)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = torch.cond(
            x.mean() > 0.3, lambda value: F.relu(self.left(value)), lambda value: torch.tanh(self.right(value)), (x,)
        )
        return self.head(y)


class ScalarsOnly(nn.Module):
    """No channels anywhere: scalar parameters, and the mean of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x * self.scale + self.shift)
        return y, y.mean()


class AnySize(nn.Module):
    """Any batch, height and width; pooled for a head, resized to the size of the input for a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 12, 3, 2), conv_bn(12, 20, 3, 2)
        self.mask, self.head = nn.Conv2d(20, 4, 1), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.head(y.mean(dim=(2, 3))), F.interpolate(self.mask(y), size=x.shape[-2:], mode="nearest")


class WordBag(nn.Module):
    """Embeddings gathered and summed; a second table weighs each word; a third is averaged without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.book, self.weights, self.bag = nn.Embedding(100, 14), nn.Embedding(100, 1), nn.Embedding(100, 10)
        self.norm, self.head = nn.BatchNorm1d(24), nn.Linear(24, 5)

    def forward(self, words: Tensor) -> Tensor:
        summed = (self.book(words) * torch.sigmoid(self.weights(words))).sum(dim=1)
        real = (words > 9).float()[:, :, None]
        averaged = (self.bag(words) * real).sum(dim=1) / real.sum(dim=1).clamp(min=1.0)
        return self.head(F.relu(self.norm(torch.cat([summed, averaged], dim=1))))


class BatchConcat(nn.Module):
    """Two images become one batch, go through one body, and are taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(conv_bn(3, 12), nn.ReLU(), conv_bn(12, 20, 3, 2)), nn.Linear(40, 6)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        both = F.relu(self.body(torch.cat([first, second], dim=0))).mean(dim=(2, 3))
        a, b = both[:2], both[2:]
        return self.head(torch.cat([a, (a - b).abs()], dim=1))


class InputResidual(nn.Module):
    """The stream starts at the input and ends at the output: its channels are not ours to change."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_bn(12, middle), nn.ReLU(), nn.Conv2d(middle, 12, 3, padding=1)) for middle in (20, 14)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class ChannelsLast(nn.Module):
    """Images and features with channels last, normalized by constants per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv_bn(3, 12), nn.LayerNorm(12)
        self.second, self.head = conv_bn(12, 20, 3, 2), nn.Linear(20, 6)
        self.register_buffer("middle", torch.tensor([0.48, 0.45, 0.41]))

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.first(((image - self.middle) / 0.22).permute(0, 3, 1, 2)))
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(F.relu(self.second(x)).permute(0, 2, 3, 1).mean(dim=(1, 2)))


class BilinearPooling(nn.Module):
    """Outer product of two feature vectors at every pixel, signed root, flattened (Lin et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = conv_bn(3, 12), conv_bn(3, 9), nn.Linear(12 * 9, 7)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.left(x)).flatten(2), F.relu(self.right(x)).flatten(2)
        outer = (a @ b.transpose(1, 2)).flatten(1) / a.shape[2]
        return self.head(F.normalize(outer.sign() * (outer.abs() + 1e-6).sqrt(), dim=1))


class ChannelOrder(nn.Module):
    """Operators to which the order of channels means something: a running sum, a roll, a sort."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, 12), conv_bn(12, 20), conv_bn(20, 14)
        self.head = nn.Linear(14, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x)).cumsum(dim=1) * 0.3
        x = torch.roll(F.relu(self.second(x)), 3, dims=1)
        return self.head(self.third(x).mean(dim=(2, 3)).sort(dim=1).values)


class LowRank(nn.Module):
    """Adapters: a frozen weight plus a product of two, in the graph; once merged in the weight, once beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 20), nn.Linear(20, 28), nn.Linear(28, 5)
        self.a1, self.b1 = nn.Parameter(torch.randn(3, 8) * 0.3), nn.Parameter(torch.randn(20, 3) * 0.3)
        self.a2, self.b2 = nn.Linear(20, 4, bias=False), nn.Linear(4, 28, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.first.weight + self.b1 @ self.a1 * 0.5, self.first.bias))
        return self.head(F.relu(self.second(x) + self.b2(self.a2(x)) * 0.5))


class RepeatedChannels(nn.Module):
    """Channels repeated as a whole, and each one repeated in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 10), conv_bn(20, 7)
        self.third, self.head = conv_bn(21, 14), nn.Linear(14, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x)).repeat(1, 2, 1, 1)))
        x = F.relu(self.third(x.repeat_interleave(3, dim=1)))
        return self.head(x.mean(dim=(2, 3)))


class StridedChannels(nn.Module):
    """Even and odd channels apart, one half in reverse order; only the first channels of another stream are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, 20), conv_bn(10, 14), conv_bn(10, 24)
        self.head = nn.Linear(14, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        a, b = F.relu(self.second(x[:, ::2])), F.relu(self.third(x[:, 1::2].flip(1)))
        return self.head((a * b[:, :14]).mean(dim=(2, 3)))


class MaskedChannels(nn.Module):
    """A stream that constants take channels out of, and that a select puts another stream into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, 20), conv_bn(20, 14), conv_bn(3, 14)
        self.head = nn.Linear(14, 6)
        self.register_buffer("mask", (torch.arange(20) % 3 > 0).float().reshape(1, 20, 1, 1))
        self.register_buffer("choice", (torch.arange(14) % 4 > 1).reshape(1, 14, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)) * self.mask)
        return self.head(F.relu(torch.where(self.choice, y, self.third(x))).mean(dim=(2, 3)))


BATCH = {0: "batch"}
ANY = {0: "batch", 2: "height", 3: "width"}
ENTRIES = {
    "shared-thrice": Entry(SharedThrice, image(16), "one convolution used three times", (BATCH,)),
    "conv-and-linear": Entry(
        ConvAndLinear,
        lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 6)),
        "one weight in Conv and in Gemm",
        (BATCH, BATCH),
    ),
    "tied-autoencoder": Entry(TiedAutoencoder, image(16), "weights used again, transposed", (BATCH,)),
    "parameter-output": Entry(ParameterOutput, lambda: (torch.randn(4, 8),), "a parameter is an output", (BATCH,)),
    "two-outputs": Entry(TwoOutputs, image(16), "features in the middle are an output", (BATCH,)),
    "nested-outputs": Entry(NestedOutputs, image(16), "outputs in a dict, one of integers", (BATCH,)),
    "torch-cond": Entry(Conditional, lambda: (torch.randn(4, 8),), "torch.cond with weights in both branches"),
    "scalars-only": Entry(ScalarsOnly, lambda: (torch.randn(2, 7),), "nothing but scalars", (BATCH,)),
    "any-size": Entry(AnySize, image(16), "dynamic batch, height and width", (ANY,)),
    "word-bag": Entry(
        WordBag,
        lambda: (torch.randint(0, 100, (2, 12)),),
        "Gather of embeddings and a reduction",
        ({0: "batch", 1: "sequence"},),
    ),
    "batch-concat": Entry(
        BatchConcat, lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)), "concatenation along the batch"
    ),
    "input-residual": Entry(
        InputResidual, image(8, 12), "stream from input to output, only inner widths free", (BATCH,)
    ),
    "channels-last": Entry(ChannelsLast, lambda: (torch.randn(2, 16, 16, 3),), "channels last in and out", (BATCH,)),
    "bilinear-pooling": Entry(BilinearPooling, image(16), "product of two widths flattened", (BATCH,)),
    "channel-order": Entry(ChannelOrder, image(16), "running sum, roll and sort along channels", (BATCH,)),
    "low-rank": Entry(LowRank, lambda: (torch.randn(4, 8),), "weight plus a product of two weights", (BATCH,)),
    "repeated-channels": Entry(RepeatedChannels, image(16), "channels tiled and repeated in place", (BATCH,)),
    "strided-channels": Entry(StridedChannels, image(16), "every other channel, in reverse, only the first", (BATCH,)),
    "masked-channels": Entry(MaskedChannels, image(16), "constants take channels out, Where mixes streams", (BATCH,)),
}
