"""A loop of the user's own with Hugging Face accelerate: two processes, one lowered graph."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

pytestmark = [pytest.mark.torch, pytest.mark.slow]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "06_accelerate.py"


def test_two_processes_train_and_one_lowers() -> None:
    """accelerate's own launcher starts one process on CPUs whatever it is asked for, torch's starts two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, EXAMPLE], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("trained in 2 process(es)") == 1
    found = {name: float(share) for name, share in re.findall(r"^(\S.*?) +([\d.]+)%$", run.stdout, re.MULTILINE)}
    assert found["half of the channels"] < 80
    assert found["recovered in int8"] > found["original"] - 4
