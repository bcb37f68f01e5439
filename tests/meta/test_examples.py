"""The examples run, and print what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMISES = {
    "01_optimize_a_module.py": ["total:", "batch 7: largest difference"],
    "02_see_what_changed.py": ["--- fold-batchnorm", "nodes    5 -> 2"],
    "03_your_own_pass.py": ["exact, tolerance None: rolled back", "lossy, tolerance 0.5: applied"],
    "04_channels.py": ["heads of key", "must stay: graph output 'output'", "batch 7: cut against masked"],
    "05_recover.py": ["recovered "],
    "06_accelerate.py": ["recovered in int8"],
    "07_prune_a_cnn.py": [
        "3.first  channels  32     16",
        "cut against masked: ",
        "prune only  accuracy",
        "64 images   accuracy",
        "-> f32[16,16,3,3]",
    ],
    "08_prune_a_transformer.py": [
        "heads of layers.0       heads       8      4",
        "500 images       accuracy",
        "f32[32] -> f32[16]",
    ],
    "09_quantization_aware.py": [
        "int8 without data",
        "int4 trained",
        "the trained graph has the operators of the untrained one: True",
        "note train quantized: error of the outputs",
    ],
}


def test_every_example_is_listed() -> None:
    assert sorted(PROMISES) == sorted(file.name for file in EXAMPLES.glob("*.py"))
    assert all(name in (EXAMPLES.parent / "README.md").read_text() for name in PROMISES)


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted(PROMISES))
def test_example(name: str) -> None:
    run = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for promise in PROMISES[name]:
        assert promise in run.stdout
