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
        made = [
            _call(python, folder, "graphopt", source, folder / "graphopt.onnx"),
            _call(python, folder, "transformer" if is_transformer else "nncf", source, folder / "nncf.xml"),
        ]
        wanted = {OURS: ("onnxruntime", folder / "graphopt.onnx"), RIVAL: ("openvino", folder / "nncf.xml")}
        wanted |= {FLOAT: ("onnxruntime", source), "fp32, OpenVINO": ("openvino", source)}
        wanted |= {"graphopt, OpenVINO": ("openvino", folder / "graphopt.onnx")}
        progress(f"{name}: timing")
        speeds = _timed(python, folder, wanted, seconds)
        for tool, speed in speeds.items():
            own = {OURS: made[0], RIVAL: made[1]}.get(tool, {})
            yield {"model": name, "tool": tool, "ours_over_it": vars(speed), **own}


def _call(python: Path, folder: Path, *arguments: str | Path) -> Row:
    """Let the worker write a file; what it says of it."""
    done = subprocess.run(_command(python, folder, *arguments), check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def _command(python: Path, folder: Path, *arguments: str | Path) -> list[str]:
    return [str(python), "-m", "benchmarks.openvino_worker", str(folder), *map(str, arguments)]


def _timed(python: Path, folder: Path, wanted: Mapping[str, tuple[str, Path]], seconds: float) -> dict[str, Speed]:
    """How many times the first is as fast as each."""
    servers: dict[str, Server] = {}
    try:
        for tool, (runtime, path) in wanted.items():
            servers[tool] = Server(_command(python, folder, "serve", runtime, path))
        once = {tool: server.run(3) for tool, server in servers.items()}
        runs = max(1, round(seconds / ROUNDS / sum(once.values())))
        rounds = [{tool: server.run(runs) for tool, server in servers.items()} for _ in range(ROUNDS)]
    finally:
        for server in servers.values():
            server.close()
    first = next(iter(wanted))
    found: dict[str, Speed] = {}
    for tool in wanted:
        low, median, high = np.quantile([one[tool] / one[first] for one in rounds], (0.25, 0.5, 0.75))
        found[tool] = Speed(median=float(median), low=float(low), high=float(high))
    return found


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
            raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else "the worker ended")
        return line

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def goals(name: str, rows: Sequence[Row]) -> Iterator[Goal]:
    """Not slower than OpenVINO's own by more than 5 %, nor than float."""
    speeds = {row["tool"]: row["ours_over_it"] for row in rows}
    for rival, least in ((RIVAL, NEAR), (FLOAT, 1.0)):
        claim = f"{name}: at least {least} times the speed of {rival}"
        yield Goal(claim, ratio(speeds[rival]), speeds[rival]["median"] >= least)


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("tool", lambda row: row["tool"]),
    ("graphopt x it", lambda row: ratio(row["ours_over_it"])),
    ("MB", lambda row: f"{row['megabytes']:.1f}" if "megabytes" in row else ""),
    ("tool s", lambda row: f"{row['seconds']:.1f}" if "seconds" in row else ""),
    ("versions", lambda row: row.get("version", "")),
)


if __name__ == "__main__":
    main()
