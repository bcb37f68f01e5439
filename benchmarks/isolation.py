"""One measurement in a process of its own, with a time limit: what hangs or crashes ends as a row that says so."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.results import Row


class Isolation:
    """Processes forked from one that has imported what they need, so that each starts in milliseconds.

    Args:
        preload: modules that the server of the forks imports, missing ones are ignored. None: nothing is shared, each
            process starts as a new interpreter.
    """

    def __init__(self, preload: Sequence[str] | None = None) -> None:
        self._context: Any = multiprocessing.get_context("spawn" if preload is None else "forkserver")
        if preload is not None:
            self._context.set_forkserver_preload([__name__, *preload])

    def run(self, measure: Callable[[str], Row], name: str, seconds: float) -> Row:
        """`measure(name)`, or a row with a `failure` where it raises, dies, or takes longer than `seconds`."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_call, args=(sender, measure, name), daemon=True)
        process.start()
        sender.close()
        try:
            if not receiver.poll(seconds):
                return {"failure": f"no result after {seconds:g} s"}
            return receiver.recv()
        except EOFError:
            process.join()
            return {"failure": f"the process died with exit code {process.exitcode}"}
        finally:
            if process.is_alive():
                process.kill()
            process.join()
            receiver.close()


def _call(sender: Connection, measure: Callable[[str], Row], name: str) -> None:
    warnings.simplefilter("ignore")  # the libraries that are measured warn a lot
    try:
        row = measure(name)
    except Exception as error:
        row = {"failure": first_line(error)}
    sender.send(row)
    sender.close()


def first_line(error: BaseException) -> str:
    """Type and first line of an error, and where it happened where a graphopt error says so."""
    lines = str(error).strip().splitlines()
    where = getattr(error, "where", None)
    return f"{type(error).__name__}: {lines[0] if lines else ''}" + (f" (at {where})" if where else "")
