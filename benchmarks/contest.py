"""How much faster one model file is than others: sessions on the files, in turns, in this process, several times over.

Each rival meets the subject in pairs (`graphopt.ir.timing.interleave` on two sessions: A B B A A B ...), so
that both find the caches equally warm. With three or more sessions in one round the ones at its ends would run twice
in a row, which alone is worth 3 to 5 % on MobileNetV2. All files are opened anew for each of several openings: where
the allocator happens to put the weights moves a session by a few percent for its whole life, and an opening draws
that lot again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.inputs.probes import probe_feeds
from graphopt.ir.compare import compare_outputs
from graphopt.ir.load import read
from graphopt.ir.session import Session, providers, session_options
from graphopt.ir.timing import Benchmark, Speed, interleave

BEYOND_NOISE = 1.03
"""A rival is faster only from this ratio on, and where three quarters of the rounds of every opening agree."""


@dataclass(frozen=True)
class Contest:
    """One subject against its rivals.

    Attributes:
        subject: name of the subject.
        pairs: by rival, one `Benchmark` of (subject, rival) an opening.
        load_seconds: by model, the median time over the openings to open a session on its file.
        errors: by model, largest output error relative to the output's scale against the reference file.
        threads: intra-op threads of all sessions.
    """

    subject: str
    pairs: Mapping[str, tuple[Benchmark, ...]]
    load_seconds: Mapping[str, float]
    errors: Mapping[str, float]
    threads: int = 1

    def speed_over(self, rival: str) -> Speed:
        """How many times faster the subject is than a rival: medians over the openings of median and quartiles."""
        speeds = [pair.speeds[1] for pair in self.pairs[rival]]
        return Speed(
            1 / statistics.median(speed.median for speed in speeds),
            1 / statistics.median(speed.high for speed in speeds),
            1 / statistics.median(speed.low for speed in speeds),
        )

    def rival_speed(self, rival: str, over: str) -> float:
        """How many times faster one rival is than another, by way of the subject that both met."""
        return self.speed_over(over).median / self.speed_over(rival).median

    def is_beaten_by(self, rival: str) -> bool:
        """Whether a rival is faster than the subject beyond noise."""
        agree = all(pair.speeds[1].low > 1.0 for pair in self.pairs[rival])
        return agree and self.speed_over(rival).median < 1 / BEYOND_NOISE

    def to_json(self) -> dict[str, Any]:
        """Plain data: each rival's figures, with the subject's speed over it in every opening."""
        rivals = {
            name: {
                "subject_is_faster": vars(self.speed_over(name)),
                "subject_is_faster_by_opening": [1 / pair.speeds[1].median for pair in pairs],
                "subject_ms": statistics.median(pair.latencies[0].median for pair in pairs),
                "rival_ms": statistics.median(pair.latencies[1].median for pair in pairs),
                "rounds": sum(pair.rounds for pair in pairs),
                "faster_beyond_noise": self.is_beaten_by(name),
            }
            for name, pairs in self.pairs.items()
        }
        return {
            "subject": self.subject,
            "threads": self.threads,
            "clock": "CPU time of the calling thread" if self.threads == 1 else "wall",
            "rivals": rivals,
            "load_seconds": dict(self.load_seconds),
            "errors": dict(self.errors),
        }


def contest(
    files: Mapping[str, Path],
    *,
    reference: Path,
    seconds: float,
    openings: int = 3,
    feeds: Mapping[str, np.ndarray] | None = None,
    threads: int = 1,
) -> Contest:
    """Time the first file against each of the others.

    Args:
        files: name to ONNX file; the first is the subject. All have the same inputs and outputs.
        reference: file whose outputs, with onnxruntime's own optimisations disabled, are right.
        seconds: how long to time each pair, all openings together.
        openings: how often all sessions are opened anew.
        feeds: one set of inputs; a fixed probe where not given.
        threads: intra-op threads; with more than one the clock is the wall's, which needs a quiet machine.

    Raises:
        onnxruntime.capi.onnxruntime_pybind11_state.Fail and its like: onnxruntime cannot open a file.
    """
    subject, *rivals = files
    inputs = probe_feeds(read(reference))[0] if feeds is None else feeds
    pairs: dict[str, list[Benchmark]] = {name: [] for name in rivals}
    loads: dict[str, list[float]] = {name: [] for name in files}
    sessions: dict[str, Session] = {}
    for opening in range(openings):
        sessions.clear()
        for name in list(files)[:: 1 if opening % 2 == 0 else -1]:
            start = time.perf_counter()
            sessions[name] = open_file(files[name], threads=threads)
            loads[name].append(time.perf_counter() - start)
        for name in rivals:
            pairs[name].append(
                interleave(
                    [sessions[subject], sessions[name]],
                    inputs,
                    names=(subject, name),
                    seconds=seconds / openings,
                    threads=threads,
                    target="cpu",
                )
            )
    expected = open_file(reference, optimized=False).run_feeds(inputs)
    return Contest(
        subject,
        {name: tuple(found) for name, found in pairs.items()},
        {name: statistics.median(times) for name, times in loads.items()},
        {name: compare_outputs(expected, session.run_feeds(inputs)) for name, session in sessions.items()},
        threads,
    )


def open_file(path: Path, *, optimized: bool = True, threads: int = 1) -> Session:
    """A session on a file exactly as it is; `optimized=False` disables onnxruntime's own optimisations."""
    options = session_options(threads=threads, optimized=optimized)
    return Session(str(path), options, providers=providers("cpu"))


def node_count(path: Path) -> int:
    """Nodes of the main graph of a file."""
    return len(onnx.load(path, load_external_data=False).graph.node)
