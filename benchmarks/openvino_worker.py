"""What `benchmarks.openvino_int8` runs in its own environment: quantizers, and sessions that are timed.

    python -m benchmarks.openvino_worker FOLDER graphopt|nncf|transformer SOURCE TARGET
    python -m benchmarks.openvino_worker FOLDER serve onnxruntime|openvino MODEL

FOLDER holds inputs, feeds0.npz and so on. A quantizer prints one line of JSON; `serve` prints the CPU seconds of one
run for each number of runs that it reads.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, np.ndarray]


def main(arguments: Sequence[str]) -> None:
    """Do what the arguments say."""
    folder, command, *rest = arguments
    feeds = [dict(np.load(path)) for path in sorted(Path(folder).glob("feeds*.npz"))]
    if command == "serve":
        _serve(_session(rest[0], rest[1], feeds[0]))
        return
    source, target = map(Path, rest)
    start = time.perf_counter()
    version = _graphopt(source, target) if command == "graphopt" else _nncf(source, target, feeds, command)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in target.parent.glob(f"{target.stem}.*"))
    print(json.dumps({"seconds": seconds, "megabytes": size / 1e6, "version": version}))


def _graphopt(source: Path, target: Path) -> str:
    import onnxruntime

    import graphopt

    graphopt.optimize(source, recipe="int8", target="openvino", quiet=True).save(target)
    return f"onnxruntime-openvino {onnxruntime.__version__}"


def _nncf(source: Path, target: Path, feeds: Sequence[Feeds], kind: str) -> str:
    import nncf  # pyright: ignore[reportMissingImports]
    import openvino  # pyright: ignore[reportMissingImports]

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino.Core().read_model(source)
    options: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER} if kind == "transformer" else {}
    quantized = nncf.quantize(model, nncf.Dataset(list(feeds)), subset_size=len(feeds), **options)
    openvino.save_model(quantized, target)
    return f"openvino {openvino.__version__.split('-')[0]}, nncf {nncf.__version__}"


def _session(runtime: str, path: str, feeds: Feeds) -> Callable[[], object]:
    if runtime == "openvino":
        import openvino  # pyright: ignore[reportMissingImports]

        options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        core = openvino.Core()
        request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
        return lambda: request.infer(feeds)
    from graphopt.ir.load import read
    from graphopt.ir.session import open_session

    session = open_session(read(path), target="openvino", threads=1)
    return lambda: session.run_feeds(feeds)


def _serve(run: Callable[[], object]) -> None:
    for _ in range(3):
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        times = int(line)
        start = time.process_time()
        for _ in range(times):
            run()
        print((time.process_time() - start) / times, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
