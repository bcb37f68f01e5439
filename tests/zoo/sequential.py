"""Transformers and recurrent networks in miniature, and graphs with control flow."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import image, tokens
from tests.zoo.entry import Entry


class Attention(nn.Module):
    """Multi-head attention; grouped keys and values and rotary positions on request."""

    def __init__(self, width: int, heads: int, groups: int, *, rotary: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, groups * self.size)
        self.v, self.o = nn.Linear(width, groups * self.size), nn.Linear(width, width)
        self.rotary, self.causal = rotary, causal

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], heads, self.size).transpose(1, 2)

    def rotate(self, x: Tensor) -> Tensor:
        half = self.size // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.split(self.q(x), self.heads),
            self.split(self.k(x), self.groups),
            self.split(self.v(x), self.groups),
        )
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        repeat = self.heads // self.groups
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).reshape(x.shape))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with a GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(1, 1, 32))
        self.position = nn.Parameter(torch.randn(1, 17, 32))
        self.layers, self.norm = nn.Sequential(EncoderLayer(32, 4), EncoderLayer(32, 4)), nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


class Bert(nn.Module):
    """Token and position embeddings, post-norm layers, any batch and sequence length."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(100, 32), nn.Embedding(64, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
        self.head = nn.Linear(32, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1])[None]
        return self.head(self.layer(self.tokens(input_ids) + self.positions(positions)))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Llama(nn.Module):
    """Decoder with grouped queries, rotary positions, RMSNorm and a gated SiLU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm1, self.norm2 = nn.Embedding(100, 32), RMSNorm(32), RMSNorm(32)
        self.attention = Attention(32, 4, 2, rotary=True, causal=True)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x @ self.tokens.weight.T


class Swin(nn.Module):
    """Shifted windows: roll, window partition by reshape and transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.layer, self.head = nn.Conv2d(3, 32, 4, 4), EncoderLayer(32, 4), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.patch(x).permute(0, 2, 3, 1), (-2, -2), (1, 2))
        n = x.shape[0]
        windows = x.reshape(n, 2, 4, 2, 4, 32).transpose(2, 3).reshape(n * 4, 16, 32)
        return self.head(self.layer(windows).reshape(n, 64, 32).mean(dim=1))


class Recurrent(nn.Module):
    """A bidirectional LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, bidirectional=True, batch_first=True)
        self.gru, self.head = nn.GRU(32, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class Mlp(nn.Module):
    """Linear layers in a row, BatchNorm1d, constant affine, one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.shared = nn.Linear(16, 4), nn.Linear(4, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (x - 0.5) * 2.0
        x = self.norm(self.narrow(self.wide(x)))
        x = self.shared(F.relu(self.shared(x)))
        return self.head(x), x


ENTRIES = {
    "vit": Entry(ViT, image(), "patches by strided convolution, class token, attention heads", ({0: "batch"},)),
    "bert": Entry(Bert, tokens, "embeddings, post-norm attention of torch", ({0: "batch", 1: "sequence"},)),
    "llama": Entry(
        Llama, tokens, "grouped queries, rotary positions, gated MLP, tied output", ({0: "batch", 1: "sequence"},)
    ),
    "swin": Entry(Swin, image(), "shifted windows by roll, reshape and transpose"),
    "recurrent": Entry(Recurrent, lambda: (torch.randn(2, 10, 8),), "bidirectional LSTM, GRU", ({0: "batch"},)),
    "mlp": Entry(
        Mlp, lambda: (torch.randn(4, 16),), "linear layers, one of them used twice, two outputs", ({0: "batch"},)
    ),
}
