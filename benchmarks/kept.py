"""What long benchmarks have measured, kept in the folder of caches: a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import graphopt
from benchmarks.models import CACHE
from graphopt.inputs.machine import machine_key
from graphopt.inputs.measurements import Measurements
from graphopt.inputs.store import storage_key


def kept(benchmark: str, parts: Sequence[object], measure: Callable[[], Any]) -> Any:
    """What `measure` returns, plain data, or what it did return before, with this very code on such a machine.

    Args:
        benchmark: its name.
        parts: all that the measurement depends on besides; their `repr` counts.
        measure: measures.
    """
    store = Measurements(CACHE)
    key = storage_key(benchmark, (*parts, code_digest(), *machine_key("cpu")))
    known = store.read(key)
    if known is None:
        known = measure()
        store.write(key, benchmark, known)
    return known


@cache
def code_digest() -> str:
    """A digest of the package: figures of other code are none of this one."""
    found = hashlib.sha256()
    for file in sorted(Path(graphopt.__file__).parent.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()
