"""Pruning without data, and with 512 unlabelled images: what each form of reconstruction keeps, on trained networks.

    python -m benchmarks.datafree                   # all sections, several hours on two cores; needs ../shared/data
    python -m benchmarks.datafree forms bits        # some of them; the figures of the others stay
    python -m benchmarks.datafree --quick           # functional, a minute or two

Sections: `forms` (every form on the same cut, 10 to 50 %, and the speed), `folded` (the same networks without
BatchNormalization), `bits` (8, 6 and 4 bits on top), `allocation` (accuracy over MACs, with a plot), `recovery` (an
epoch without labels), `transformer` (heads and MLP of a ViT), `cost` (seconds and memory on ResNet-50). No label of the
training images is read, and but for `recovery` no cut network is trained. A section that is done is kept at once, so
that a run that was stopped loses only the one it was at, and sections may run side by side.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import results as files
from benchmarks.datafree_cost import costs
from benchmarks.datafree_sections import allocations, bits, folded, forms, recovery
from benchmarks.datafree_setting import Setting
from benchmarks.datafree_tables import plot, tables
from benchmarks.datafree_transformer import transformer
from benchmarks.datafree_verdict import chosen, goals
from benchmarks.models import DATA
from benchmarks.results import Column, Results, Row, machine, progress, read_options, show_goals, stopwatch

NAME = "datafree"
SECTIONS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "forms": forms,
    "folded": folded,
    "bits": bits,
    "allocation": allocations,
    "recovery": recovery,
    "transformer": transformer,
    "cost": costs,
}
SECONDS = 12.0
"""How long models are timed in turns; a run with another time is not kept."""
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "img" / "pruning-curves.svg"
QUESTION = "channels cut out of trained networks and the rest rebuilt, without data and with unlabelled images"


@dataclass
class SectionResults(Results):
    """Results that are made of sections, each measured when it was.

    Attributes:
        sections: for each section that there are rows of, its date, command, machine and seconds.
    """

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As for all benchmarks, and where each section comes from."""
        return {**super().to_json(), "sections": self.sections}

    def take(self, document: Mapping[str, Any], wanted: Sequence[str]) -> None:
        """Take over sections of another run, those that are not here or are older here."""
        for name, source in document.get("sections", {}).items():
            if name in wanted and source["date"] > self.sections.get(name, {"date": ""})["date"]:
                self.put(name, source, chosen(document["rows"], section=name))

    def put(self, name: str, source: dict[str, Any], rows: Sequence[Row]) -> None:
        """Replace a section."""
        self.rows = [*(row for row in self.rows if row["section"] != name), *rows]
        self.rows.sort(key=lambda row: list(SECTIONS).index(row["section"]))
        self.sections[name] = source

    def show_and_write(self, columns: Sequence[Column] = ()) -> Path:
        """Print a table a section and the goals, write the JSON file, and the tables in Markdown beside it."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 160
        console.print(self.question, style="bold", soft_wrap=True)
        shown = list(tables(self.rows))
        for table in shown:
            table.print(console)
        show_goals(console, [vars(goal) for goal in self.goals])
        path = (files.FOLDER if self.complete else files.PARTIAL_FOLDER) / f"{self.name}.json"
        write(path, self.to_json())
        path.with_suffix(".md").write_text("\n\n".join(table.markdown() for table in shown) + "\n", encoding="utf-8")
        console.print(f"written to {path}\n", soft_wrap=True)
        return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/datafree.json`."""
    names = tuple(SECTIONS)
    options = read_options(NAME, __doc__, arguments, models=names, quick_models=names, seconds=SECONDS)
    if not DATA.exists():
        sys.exit(f"the trained weights and the images are not here: {DATA}")
    short = options.quick or options.seconds != SECONDS
    found = SectionResults(NAME, QUESTION, options.command, complete=False)
    others = [name for name in SECTIONS if name not in options.models]
    setting = Setting(options)
    for name in options.models:
        with stopwatch() as watch:
            rows = list(SECTIONS[name](setting))
        found.put(name, {"command": options.command, "date": now(), "seconds": watch.seconds, **_place()}, rows)
        progress(f"{name}: {len(rows)} rows in {watch.seconds:.0f} s")
        if not short:
            for document in kept():  # read anew: another process may have done another section meanwhile
                found.take(document, others)
            write(store(), found.to_json())
    found.goals = goals(found.rows)
    found.complete = not short and set(found.sections) == set(SECTIONS)
    if found.complete:
        found.command = f"python -m benchmarks.{NAME}"
    if "allocation" in found.sections:
        plot(chosen(found.rows, section="allocation"), files.PARTIAL_FOLDER / PICTURE.name if short else PICTURE)
    found.show_and_write()


def kept() -> Iterator[Mapping[str, Any]]:
    """Documents with sections of earlier runs at full length: the committed one, and what is not complete yet."""
    for path in (files.FOLDER / f"{NAME}.json", store()):
        if path.exists():
            yield json.loads(path.read_text(encoding="utf-8"))


def store() -> Path:
    """Where sections are kept until all are there."""
    return files.PARTIAL_FOLDER / f"{NAME}-sections.json"


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def now() -> str:
    """Date and time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _place() -> dict[str, Any]:
    found = machine()
    return {"processor": found["processor"], "cores": found["cores"], "load_average": found["load_average"]}


if __name__ == "__main__":
    main()
