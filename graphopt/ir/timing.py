"""How fast models are beside each other: interleaved in one process, as ratios, with their spread.

A clock says little on a shared machine; two models timed in turns, A B A B, meet the same noise, and the ratio of
each pair of runs is what counts. With one thread the clock is the CPU time of the calling thread, which other
processes do not disturb; with more threads it is wall-clock time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.ir.session import Session

_LEAST_ROUNDS = 7
_MOST_ROUNDS = 2000
_SLOWER_RATIO = 1.03
"""A model is called slower only where the median ratio is above this and three quarters of the rounds agree."""


@dataclass(frozen=True)
class Latency:
    """Time of one run of a model, in milliseconds: median and quartiles over the rounds.

    Attributes:
        median: median, ms.
        low: first quartile, ms.
        high: third quartile, ms.
    """

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median: how noisy the measurement was."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Speed:
    """How many times faster than the first model: median and quartiles of the ratio, round by round."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Benchmark:
    """Several models timed in turns.

    Attributes:
        names: the models, in order.
        latencies: one `Latency` a model.
        speeds: one `Speed` a model, relative to the first one (which has 1).
        rounds: how often each model ran.
        threads: intra-op threads, 0 for onnxruntime's default.
        target: "cpu", "cuda" or "openvino".
    """

    names: tuple[str, ...]
    latencies: tuple[Latency, ...]
    speeds: tuple[Speed, ...]
    rounds: int
    threads: int
    target: str

    def is_slower(self, index: int = 1) -> bool:
        """Whether the model at `index` is slower than the first one, beyond what the noise explains."""
        speed = self.speeds[index]
        return speed.median < 1 / _SLOWER_RATIO and speed.high < 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data: milliseconds, ratios, and how they were measured."""
        return {
            "rounds": self.rounds,
            "threads": self.threads,
            "target": self.target,
            "models": [
                {"name": name, "latency_ms": vars(latency), "speed": vars(speed)}
                for name, latency, speed in zip(self.names, self.latencies, self.speeds, strict=True)
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.rounds} interleaved rounds, {self.threads or 'default'} threads, {self.target}"]
        for name, latency, speed in zip(self.names, self.latencies, self.speeds, strict=True):
            lines.append(
                f"  {name}: {latency.median:.3f} ms ({latency.low:.3f} to {latency.high:.3f}), "
                f"{speed.median:.2f} x ({speed.low:.2f} to {speed.high:.2f})"
            )
        return "\n".join(lines)


def interleave(
    sessions: Sequence[Session],
    feeds: Mapping[str, np.ndarray],
    *,
    names: Sequence[str],
    seconds: float,
    threads: int,
    target: str,
) -> Benchmark:
    """Time open sessions in turns; each round begins with the next one, so that no model always comes second."""
    clock = time.thread_time if threads == 1 and target == "cpu" else time.perf_counter
    for session in sessions:
        session.run_feeds(feeds)
        session.run_feeds(feeds)
    times: list[list[float]] = []
    deadline = time.perf_counter() + seconds
    while len(times) < _LEAST_ROUNDS or (time.perf_counter() < deadline and len(times) < _MOST_ROUNDS):
        row = [0.0] * len(sessions)
        for turn in range(len(sessions)):
            index = (turn + len(times)) % len(sessions)
            start = clock()
            sessions[index].run(None, feeds)  # type: ignore[arg-type]
            row[index] = clock() - start
        times.append(row)
    milliseconds = np.maximum(np.array(times), 1e-9) * 1e3
    ratios = milliseconds[:, :1] / milliseconds
    return Benchmark(
        tuple(names),
        tuple(Latency(*_quartiles(milliseconds[:, index])) for index in range(len(sessions))),
        tuple(Speed(*_quartiles(ratios[:, index])) for index in range(len(sessions))),
        rounds=len(times),
        threads=threads,
        target=target,
    )


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(median), float(low), float(high)
