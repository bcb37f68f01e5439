"""Recurrent networks in miniature: the operators LSTM, GRU and RNN, cells unrolled, and gates without products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.blocks import conv_bn, tokens
from tests.zoo.entry import Entry


def vivid(module: nn.Module) -> nn.Module:
    """The module with weights twice as large: fresh ones hardly show their inputs at the outputs."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(2.0)
    return module


class Labeller(nn.Module):
    """A recurrent network and a head on each of its outputs."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrent, self.head = vivid(recurrent), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


class Pyramid(nn.Module):
    """Recurrent networks of unlike kinds in a row, each twice as wide as its states where it is bidirectional."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.head = vivid(nn.ModuleList(parts)), nn.Linear(2 * parts[-1].hidden_size, 5)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x, _ = part(x)
        return self.head(torch.cat([x[:, -1], x.mean(dim=1)], dim=-1))


class FinalStates(nn.Module):
    """Of a bidirectional LSTM only the last states are read: both directions of h, and c."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = vivid(nn.LSTM(9, 14, num_layers=2, bidirectional=True, batch_first=True))
        self.hidden, self.cell = nn.Linear(28, 6), nn.Linear(28, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, (h, c) = self.lstm(x)
        return self.hidden(torch.cat([h[-2], h[-1]], dim=-1)), self.cell(torch.cat([c[-2], c[-1]], dim=-1)).tanh()


class ProjectedStates(nn.Module):
    """The first states are linear in a context (as in captioning); output and last states are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.cell, self.enter = nn.Linear(7, 14), nn.Linear(7, 14), nn.Linear(9, 11)
        self.lstm, self.head = nn.LSTM(11, 14, batch_first=True), nn.Linear(14, 5)

    def forward(self, x: Tensor, context: Tensor) -> dict[str, Tensor]:
        first = self.hidden(context).tanh().unsqueeze(0), self.cell(context).unsqueeze(0)
        y, (h, c) = self.lstm(F.relu(self.enter(x)), first)
        return {"output": self.head(y), "hidden": h, "cell": c}


class WordModel(nn.Module):
    """Embedding, LSTM as wide as the embedding, decoder tied to it; a shortcut around the recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm, self.norm = nn.Embedding(100, 24), nn.LSTM(24, 24, batch_first=True), nn.LayerNorm(24)
        self.bias = nn.Parameter(torch.zeros(100))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        return F.linear(self.norm(x + self.lstm(x)[0]), self.tokens.weight, self.bias)


class Cells(nn.Module):
    """nn.LSTMCell and nn.GRUCell, unrolled over a static length: gates by slices of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(9, 14), nn.GRUCell(14, 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, c, state = x.new_zeros(x.shape[0], 14), x.new_zeros(x.shape[0], 14), x.new_zeros(x.shape[0], 11)
        for time in range(x.shape[1]):
            h, c = self.lstm(x[:, time], (h, c))
            state = self.gru(h, state)
        return self.head(state)


class ConvLSTM(nn.Module):
    """A convolution of input and state makes the four gates (Shi et al. 2015); unrolled over a static length."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.gates, self.head = 10, nn.Conv2d(3 + 10, 4 * 10, 3, padding=1), nn.Conv2d(10, 2, 1)
        self.peephole = nn.Parameter(torch.randn(3, 10, 1, 1))

    def forward(self, frames: Tensor) -> Tensor:
        h = c = frames.new_zeros(frames.shape[0], self.width, *frames.shape[3:])
        for time in range(frames.shape[1]):
            enter, forget, change, leave = self.gates(torch.cat([frames[:, time], h], dim=1)).chunk(4, dim=1)
            keep = torch.sigmoid(forget + self.peephole[0] * c) * c
            c = keep + torch.sigmoid(enter + self.peephole[1] * c) * change.tanh()
            h = torch.sigmoid(leave + self.peephole[2] * c) * c.tanh()
        return self.head(h)


class ConvGRU(nn.Module):
    """A convolutional GRU as in optical flow (Teed and Deng 2020): gates from concatenated state and input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.context = conv_bn(3, 12), nn.Conv2d(3, 10, 3, padding=1)
        self.update, self.reset, self.change = (nn.Conv2d(10 + 12, 10, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(10, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x, h = F.relu(self.stem(image)), self.context(image).tanh()
        for _ in range(3):
            both = torch.cat([h, x], dim=1)
            update, reset = torch.sigmoid(self.update(both)), torch.sigmoid(self.reset(both))
            h = (1.0 - update) * h + update * self.change(torch.cat([reset * h, x], dim=1)).tanh()
        return self.head(h)


class Translator(nn.Module):
    """A bidirectional GRU reads; a GRU cell writes, with additive attention to what was read (Bahdanau et al. 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(100, 9), nn.Embedding(100, 8)
        self.encoder, self.bridge = nn.GRU(9, 12, bidirectional=True, batch_first=True), nn.Linear(12, 14)
        self.keys, self.query = nn.Linear(24, 10), nn.Linear(14, 10, bias=False)
        self.score = nn.Linear(10, 1, bias=False)
        self.cell, self.head = nn.GRUCell(8 + 24, 14), nn.Linear(14 + 24, 100)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read, last = self.encoder(self.source(source))
        keys, state, outputs = self.keys(read), self.bridge(last[1]).tanh(), []
        words = self.target(target)
        for time in range(target.shape[1]):
            scores = self.score(torch.tanh(keys + self.query(state).unsqueeze(1))).softmax(dim=1)
            context = torch.bmm(scores.transpose(1, 2), read).squeeze(1)
            state = self.cell(torch.cat([words[:, time], context], dim=-1), state)
            outputs.append(self.head(torch.cat([state, context], dim=-1)))
        return torch.stack(outputs, dim=1)


class DotAttention(nn.Module):
    """A GRU reads, another one writes from its last state, dot-product attention between them (Luong et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(100, 9), nn.Embedding(100, 8)
        self.encoder, self.decoder = nn.GRU(9, 14, batch_first=True), nn.GRU(8, 14, num_layers=1, batch_first=True)
        self.combine, self.head = nn.Linear(28, 12), nn.Linear(12, 100)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read, last = self.encoder(self.source(source))
        written, _ = self.decoder(self.target(target), last)
        shares = torch.bmm(written, read.transpose(1, 2)).softmax(dim=-1)
        return self.head(self.combine(torch.cat([torch.bmm(shares, read), written], dim=-1)).tanh())


class SimpleUnit(nn.Module):
    """SRU: one product for gates and change, a recurrence by elements, and a highway (Lei et al. 2018)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.gates = hidden, nn.Linear(width, 4 * hidden)
        self.forget, self.reset = nn.Parameter(torch.randn(hidden)), nn.Parameter(torch.randn(hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        change, forgets, resets, skip = self.gates(x).split(self.hidden, dim=-1)
        c, outputs = torch.zeros_like(change[:, 0]), []
        for time in range(x.shape[1]):
            forget = torch.sigmoid(forgets[:, time] + self.forget * c)
            reset = torch.sigmoid(resets[:, time] + self.reset * c)
            c = forget * c + (1.0 - forget) * change[:, time]
            outputs.append(reset * c + (1.0 - reset) * skip[:, time])
        return torch.stack(outputs, dim=1), c


class QuasiRecurrent(nn.Module):
    """QRNN: gates from a causal convolution over time, pooled by a recurrence (Bradbury et al. 2016)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Conv1d(width, 3 * hidden, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        change, forget, leave = self.gates(F.pad(x.transpose(1, 2), (1, 0))).chunk(3, dim=1)
        change, forget, leave = change.tanh(), forget.sigmoid(), leave.sigmoid()
        c, outputs = torch.zeros_like(change[..., 0]), []
        for time in range(x.shape[1]):
            c = forget[..., time] * c + (1.0 - forget[..., time]) * change[..., time]
            outputs.append(leave[..., time] * c)
        return torch.stack(outputs, dim=1), c


class MinimalGated(nn.Module):
    """minGRU in parallel: states by cumulative sums of logarithms instead of a recurrence (Feng et al. 2024)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.change = nn.Linear(width, hidden), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(x)
        kept = torch.cumsum(-F.softplus(gate), dim=1)
        added = -F.softplus(-gate) + torch.log(F.softplus(self.change(x)) + 0.1)
        states = torch.exp(kept) * torch.cumsum(torch.exp(added - kept), dim=1)
        return states, states[:, -1]


class Crnn(nn.Module):
    """Convolutions, height folded into channels, a bidirectional LSTM along the width, a head per column (CRNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(1, 8), nn.ReLU(), nn.MaxPool2d(2), conv_bn(8, 12), nn.ReLU(), nn.MaxPool2d((2, 1)),
        )  # fmt: skip
        self.lstm, self.head = nn.LSTM(12 * 4, 14, bidirectional=True), nn.Linear(28, 11)

    def forward(self, image: Tensor) -> Tensor:
        x = self.body(image).flatten(1, 2).permute(2, 0, 1)
        return self.head(self.lstm(x)[0]).log_softmax(dim=-1)


class DeepSpeech(nn.Module):
    """Spectrogram, convolution, GRUs with BatchNorm between them over folded time, directions summed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = conv_bn(1, 4, 3, 2), nn.ModuleList([nn.BatchNorm1d(32), nn.BatchNorm1d(14)])
        self.parts = nn.ModuleList(
            [nn.GRU(32, 14, bidirectional=True, batch_first=True), nn.GRU(14, 12, bidirectional=True, batch_first=True)]
        )
        self.head = nn.Linear(12, 11, bias=False)

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = F.hardtanh(self.conv(spectrogram), 0.0, 20.0)
        x = x.permute(0, 3, 1, 2).flatten(2)
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = norm(x.flatten(0, 1)).view_as(x)
            y, _ = part(x)
            x = y.view(y.shape[0], y.shape[1], 2, -1).sum(dim=2)
        return self.head(x)


class Tagger(nn.Module):
    """Words and their characters: embeddings joined, a bidirectional LSTM, a head of two layers (tagger)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.characters = nn.Embedding(100, 10), nn.Embedding(100, 6)
        self.conv, self.lstm = nn.Conv1d(6, 8, 3, padding=1), nn.LSTM(18, 12, bidirectional=True, batch_first=True)
        self.hidden, self.head = nn.Linear(24, 13), nn.Linear(13, 5)

    def forward(self, words: Tensor, characters: Tensor) -> Tensor:
        batch, count, letters = characters.shape
        spelled = self.characters(characters).reshape(batch * count, letters, 6).transpose(1, 2)
        spelled = self.conv(spelled).amax(dim=2).reshape(batch, count, 8)
        y, _ = self.lstm(torch.cat([self.words(words), spelled], dim=-1))
        return self.head(self.hidden(y).tanh())


def series(length: int = 10, width: int = 9) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, length, width),)


BATCH = ({0: "batch"},)
SERIES = ({0: "batch", 1: "sequence"},)

ENTRIES: dict[str, Entry] = {
    "lstm-one-layer": Entry(
        lambda: Labeller(nn.LSTM(9, 14, batch_first=True), 14), series(), "one LSTM, every output read", SERIES
    ),
    "lstm-two-layers": Entry(
        lambda: Labeller(nn.LSTM(9, 14, num_layers=2, batch_first=True), 14), series(), "LSTM on LSTM", SERIES
    ),
    "lstm-bidirectional": Entry(
        lambda: Labeller(nn.LSTM(9, 14, num_layers=2, bidirectional=True, batch_first=True), 28), series(),
        "two bidirectional LSTMs, directions concatenated in between", SERIES,
    ),
    "lstm-time-first": Entry(
        lambda: Labeller(nn.LSTM(9, 14, bias=False), 14), series(), "time before batch, no biases",
        ({0: "sequence", 1: "batch"},),
    ),
    "lstm-final-states": Entry(FinalStates, series(), "last hidden and cell states of both directions", BATCH),
    "lstm-projected-states": Entry(
        ProjectedStates, lambda: (torch.randn(2, 10, 9), torch.randn(2, 7)), "first states linear in a context",
        (SERIES[0], BATCH[0]),
    ),
    "lstm-tied": Entry(WordModel, tokens, "states as wide as a tied embedding, shortcut around the LSTM", SERIES),
    "gru": Entry(lambda: Labeller(nn.GRU(9, 14, batch_first=True), 14), series(), "one GRU", SERIES),
    "gru-bidirectional": Entry(
        lambda: Labeller(nn.GRU(9, 14, num_layers=2, bidirectional=True, batch_first=True), 28), series(),
        "two bidirectional GRUs", SERIES,
    ),
    "rnn-tanh": Entry(
        lambda: Labeller(nn.RNN(9, 14, num_layers=2, batch_first=True), 14), series(), "plain RNN, two layers", SERIES
    ),
    "rnn-relu": Entry(
        lambda: Labeller(nn.RNN(9, 14, nonlinearity="relu", bidirectional=True, batch_first=True), 28), series(),
        "plain bidirectional RNN with ReLU", SERIES,
    ),
    "recurrent-pyramid": Entry(
        lambda: Pyramid(
            nn.LSTM(9, 12, bidirectional=True, batch_first=True), nn.GRU(24, 14, batch_first=True),
            nn.RNN(14, 11, batch_first=True),
        ),
        series(), "LSTM, GRU and RNN in a row; last and mean output", SERIES,
    ),
    "recurrent-cells": Entry(lambda: vivid(Cells()), series(5), "LSTMCell and GRUCell unrolled", BATCH),
    "conv-lstm": Entry(ConvLSTM, lambda: (torch.randn(2, 4, 3, 8, 8),), "gates by one convolution, peepholes", BATCH),
    "conv-gru": Entry(ConvGRU, lambda: (torch.randn(2, 3, 8, 8),), "state and input concatenated, gates", BATCH),
    "seq2seq-additive": Entry(
        Translator, lambda: (torch.randint(0, 100, (2, 12)), torch.randint(0, 100, (2, 4))),
        "GRU cell with additive attention to a bidirectional GRU", (SERIES[0], BATCH[0]),
    ),
    "seq2seq-dot": Entry(
        DotAttention, lambda: (torch.randint(0, 100, (2, 12)), torch.randint(0, 100, (2, 7))),
        "last state into the decoder, dot-product attention between states", (SERIES[0], {0: "batch", 1: "target"}),
    ),
    "sru": Entry(
        lambda: Labeller(SimpleUnit(9, 14), 14), series(6), "gates of one product, recurrence by elements", BATCH
    ),
    "qrnn": Entry(
        lambda: Labeller(QuasiRecurrent(9, 14), 14), series(6), "gates of a convolution, recurrence by elements", BATCH
    ),
    "min-gru": Entry(
        lambda: Labeller(MinimalGated(9, 14), 14), series(), "recurrence as cumulative sums of logarithms", SERIES
    ),
    "crnn": Entry(
        Crnn, lambda: (torch.randn(2, 1, 16, 24),), "height folded into channels before a bidirectional LSTM",
        BATCH,
    ),
    "deep-speech": Entry(
        DeepSpeech, lambda: (torch.randn(2, 1, 16, 20),), "BatchNorm between GRUs, directions summed", BATCH
    ),
    "tagger": Entry(
        Tagger, lambda: (torch.randint(0, 100, (2, 12)), torch.randint(0, 100, (2, 12, 5))),
        "convolved characters joined to words, bidirectional LSTM", (SERIES[0], SERIES[0]),
    ),
}  # fmt: skip
