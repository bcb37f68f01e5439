"""Recipe `int8` with `target="openvino"` against OpenVINO's own quantizer (NNCF) on OpenVINO's own runtime.

    python -m benchmarks.openvino_int8          # all models; makes an environment of its own, which needs the network
    python -m benchmarks.openvino_int8 resnet50 vit-s
    python -m benchmarks.openvino_int8 --quick  # ResNet-20 or MobileNetV2 alone

`onnxruntime-openvino` takes the place of `onnxruntime`, so graphopt, NNCF and OpenVINO live in a virtual environment in
the folder of caches (`benchmarks/openvino_worker.py` is what runs there), and every session in a process of its own.
They are timed in turns, by the CPU time of their processes, one thread, batch 1. NNCF calibrates on the same made-up
inputs, with its preset for transformers where products dominate; graphopt is data-free. Float files on both runtimes
run beside them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.int8 import CIFAR_MODELS, MODELS
from benchmarks.kept import kept
from benchmarks.models import CACHE, exported
from benchmarks.results import Column, Goal, Results, Row, progress, ratio, read_options
from benchmarks.rivals import quantizers_for
from graphopt.inputs.probes import probe_feeds
from graphopt.ir.load import read
from graphopt.ir.timing import Speed

PACKAGES = ("onnxruntime-openvino", "openvino", "nncf")
QUICK_MODELS = ("mobilenetv2", *CIFAR_MODELS)[-2:-1]
OURS, RIVAL, FLOAT = "graphopt, ORT with OpenVINO", "NNCF, OpenVINO", "fp32, ORT with OpenVINO"
NEAR = 0.95
"""How near to OpenVINO's own speed graphopt's is to be."""
ROOT = Path(__file__).resolve().parents[1]
CALIBRATION_SAMPLES, ROUNDS = 8, 21


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/openvino_int8.json`."""
    options = read_options("openvino_int8", __doc__, arguments, models=MODELS, quick_models=QUICK_MODELS, seconds=20.0)
    results = Results("openvino_int8", "int8 for OpenVINO: graphopt against NNCF", options.command, options.complete)
    python = environment()
    for name in options.models:
        rows = kept("openvino_int8", (name, options.seconds), lambda: list(measure(name, python, options.seconds)))  # noqa: B023
        results.rows += rows
        results.goals += goals(name, rows)
    results.show_and_write(COLUMNS)


def environment() -> Path:
    """The interpreter of the environment, which is made where there is none."""
    folder = CACHE / f"openvino-python{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        progress(f"making an environment with {', '.join(PACKAGES)}")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, str(ROOT)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "onnxruntime", "graphopt"], check=True
        )
        subprocess.run([*pip, "--force-reinstall", "--no-deps", PACKAGES[0]], check=True)
        subprocess.run([*pip, *PACKAGES[1:]], check=True)
        done.touch()
    return python


def measure(name: str, python: Path, seconds: float) -> Iterator[Row]:
    """A row for each tool."""
    source = exported(name)
    is_transformer = any(not way.for_convolutions for way in quantizers_for(source))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, feeds in enumerate(probe_feeds(read(source), count=CALIBRATION_SAMPLES)):
            np.savez(folder / f"feeds{number}.npz", allow_pickle=False, **feeds)
        progress(f"{name}: graphopt and NNCF")
        made = {
            OURS: _call(python, folder, "graphopt", source, folder / "graphopt.onnx"),
            RIVAL: _call(python, folder, "transformer" if is_transformer else "nncf", source, folder / "nncf.xml"),
        }
        wanted = {OURS: ("onnxruntime", folder / "graphopt.onnx"), RIVAL: ("openvino", folder / "nncf.xml")}
        wanted |= {FLOAT: ("onnxruntime", source), "fp32, OpenVINO": ("openvino", source)}
        wanted |= {"graphopt, OpenVINO": ("openvino", folder / "graphopt.onnx")}
        progress(f"{name}: timing")
        wanted = {tool: one for tool, one in wanted.items() if "failure" not in made.get(tool, {}) and one[1].exists()}
        speeds, failures = _timed(python, folder, wanted, seconds)
        for tool in dict.fromkeys((OURS, RIVAL, *wanted)):
            row = {"model": name, "tool": tool, **made.get(tool, {})}
            row |= {"ours_over_it": vars(speeds[tool])} if tool in speeds else {}
            yield row | ({"failure": failures[tool]} if tool in failures else {})


def _call(python: Path, folder: Path, *arguments: str | Path) -> Row:
    """Let the worker write a file; what it says of it, or why it failed."""
    command = _command(python, folder, *arguments)
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"failure": _last_error(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def _last_error(text: str) -> str:
    """The line of a traceback that says what was wrong."""
    lines = [line for line in text.strip().splitlines() if line and not line.startswith(" ")]
    return next((line for line in reversed(lines) if "Error" in line), "the worker ended")[:300]


def _command(python: Path, folder: Path, *arguments: str | Path) -> list[str]:
    return [str(python), "-m", "benchmarks.openvino_worker", str(folder), *map(str, arguments)]


def _timed(
    python: Path, folder: Path, wanted: Mapping[str, tuple[str, Path]], seconds: float
) -> tuple[dict[str, Speed], dict[str, str]]:
    """How many times graphopt's is as fast as each, nothing without graphopt's; and what could not be opened."""
    servers: dict[str, Server] = {}
    failures: dict[str, str] = {}
    rounds: list[dict[str, float]] = []
    try:
        for tool, (runtime, path) in wanted.items():
            try:
                servers[tool] = Server(_command(python, folder, "serve", runtime, path))
            except RuntimeError as error:
                failures[tool] = str(error)
        if OURS in servers:
            once = {tool: server.run(3) for tool, server in servers.items()}
            runs = max(1, round(seconds / ROUNDS / sum(once.values())))
            rounds = [{tool: server.run(runs) for tool, server in servers.items()} for _ in range(ROUNDS)]
    finally:
        for server in servers.values():
            server.close()
    found: dict[str, Speed] = {}
    for tool in servers if rounds else ():
        low, median, high = np.quantile([one[tool] / one[OURS] for one in rounds], (0.25, 0.5, 0.75))
        found[tool] = Speed(median=float(median), low=float(low), high=float(high))
    return found, failures


class Server:
    """A process that holds one session and runs it when asked."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        self._read()

    def run(self, times: int) -> float:
        """CPU seconds of one of so many runs."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{times}\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError(_last_error(errors))
        return line

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def goals(name: str, rows: Sequence[Row]) -> Iterator[Goal]:
    """Not slower than OpenVINO's own by more than 5 %, nor than float; none where the provider cannot read the file."""
    speeds = {row["tool"]: row["ours_over_it"] for row in rows if "ours_over_it" in row}
    for rival, least in ((RIVAL, NEAR), (FLOAT, 1.0)):
        if rival in speeds:
            claim = f"{name}: at least {least} times the speed of {rival}"
            yield Goal(claim, ratio(speeds[rival]), speeds[rival]["median"] >= least)


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("tool", lambda row: row["tool"]),
    ("graphopt x it", lambda row: ratio(row["ours_over_it"]) if "ours_over_it" in row else "-"),
    ("MB", lambda row: f"{row['megabytes']:.1f}" if "megabytes" in row else ""),
    ("tool s", lambda row: f"{row['seconds']:.1f}" if "seconds" in row else ""),
    ("versions", lambda row: row.get("failure", row.get("version", ""))[:70]),
)


if __name__ == "__main__":
    main()
