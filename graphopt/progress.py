"""Progress of a long run on the terminal; silent elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from graphopt.export.report import Step


class Progress:
    """A progress bar on standard error that disappears when done. Nothing is shown off a terminal or when quiet."""

    def __init__(self, *, quiet: bool, total: int) -> None:
        console = Console(file=sys.stderr)
        self._shown = not quiet and console.is_terminal
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._shown,
        )
        self._task = self._bar.add_task("", total=total)
        self._started = False
        self._name = ""

    def start(self, name: str) -> None:
        """Say what runs now; what ran before is done."""
        if self._started:
            self._bar.advance(self._task)
        self._started = True
        self._name = name
        self._bar.update(self._task, description=name)

    def detail(self, done: int, total: int, text: str) -> None:
        """Say how far what runs now has come, `done` of `total` parts of `text`; nothing counts as done."""
        self._bar.update(self._task, description=f"{self._name}: {text} {done}/{total}")

    def finish(self, step: Step) -> None:
        """Keep a step that was rolled back on the screen."""
        if self._shown and step.reason is not None:
            self._bar.console.print(f"{step.name} {step.status}: {step.reason}", highlight=False)

    def __enter__(self) -> Progress:
        if self._shown:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bar.stop()
