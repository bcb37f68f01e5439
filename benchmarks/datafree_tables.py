"""The rows of `benchmarks.datafree` as tables, on the terminal and in Markdown, and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.datafree_sections import BASELINE, MACS
from benchmarks.datafree_setting import IMAGES
from benchmarks.datafree_verdict import chosen
from benchmarks.results import Row, progress, ratio

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it shows.
        head: headings of the columns.
        body: one list of cells a row, as long as the head.
    """

    title: str
    head: list[str]
    body: list[list[str]]

    def print(self, console: Console) -> None:
        """On the terminal."""
        console.print(self.title, style="bold", soft_wrap=True)
        shown = RichTable(box=None, pad_edge=False, header_style="bold")
        for index, heading in enumerate(self.head):
            shown.add_column(heading, justify="right" if index else "left")
        for cells in self.body:
            shown.add_row(*map(Text, cells))
        console.print(shown)
        console.print()

    def markdown(self) -> str:
        """For the documents."""
        lines = [self.head, ["---"] * len(self.head), *self.body]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Whatever there are rows for, in the order of the sections."""
    for model in dict.fromkeys(row["model"] for row in chosen(rows, section="forms")):
        own = chosen(rows, section="forms", model=model)
        yield _pivot(f"{_title(model, own)}: cut by L2, uniform", own, lambda row: row["variant"], "ratio")
        yield _sizes(f"{model}: what is left, and how fast", own)
    for model in dict.fromkeys(row["model"] for row in chosen(rows, section="folded")):
        own = chosen(rows, section="folded", model=model)
        title = f"{_title(model, own)}: BatchNormalization folded"
        yield _pivot(title, own, lambda row: f"{row['variant']} ({row.get('cut', '')})", "ratio")
    for model in dict.fromkeys(row["model"] for row in chosen(rows, section="bits")):
        own = chosen(rows, section="bits", model=model)
        title = f"{_title(model, own)}: data-free, then fewer bits (W weights, A activations)"
        yield _pivot(title, own, _bits_name, "ratio")
    for model in dict.fromkeys(row["model"] for row in chosen(rows, section="allocation")):
        own = chosen(rows, section="allocation", model=model)
        title = f"{_title(model, own)}: share of the MACs that is left"
        yield _pivot(title, own, lambda row: f"{row['variant']} ({_inputs(row)})", "target")
    for section, columns in LISTS.items():
        own = chosen(rows, section=section)
        if own:
            yield Table(section, [name for name, _ in columns], [[cell(row) for _, cell in columns] for row in own])


def _title(model: str, rows: Sequence[Row]) -> str:
    return f"{model}, top-1 % of {rows[0]['test_images']} images (float {rows[0]['top1']:.2f})"


def _bits_name(row: Row) -> str:
    return f"W{row['weight_bits']}A{row['bits']}{', rebuilt' if 'rebuilt' in row['variant'] else ''}"


def _inputs(row: Row) -> str:
    return "data-free" if row["inputs"] == "free" else f"{IMAGES} images"


def _pivot(title: str, rows: Sequence[Row], name: Cell, across: str) -> Table:
    """Names down, values of `across` across, top-1 in the cells."""
    cut = [row for row in rows if across in row]
    values = sorted({row[across] for row in cut}, reverse=across == "target")
    cells: dict[str, dict[float, str]] = {}
    for row in cut:
        cells.setdefault(name(row), {})[row[across]] = f"{row['top1']:.2f}"
    head = ["", *(f"{value:.0%}" for value in values)]
    return Table(title, head, [[key, *(found.get(value, "") for value in values)] for key, found in cells.items()])


def _sizes(title: str, rows: Sequence[Row]) -> Table:
    """Parameters and MACs of the cuts and of the rounded cuts, and the speed of the latter."""
    whole = rows[0]
    head = ["cut", "parameters", "MACs", "rounded: parameters", "MACs", "speed over float", "ms"]
    first = [*_counts(whole), *_counts(whole), "1.00", ""]
    rounded = chosen(rows, variant="rounded")
    if rounded:
        first[-1] = f"{rounded[0]['float_ms']['median']:.3f}"
    body = [["float", *first]]
    for row in rounded:
        plain = [one for one in chosen(rows, ratio=row["ratio"]) if one is not row]
        counts = _counts(plain[0]) if plain else ["", ""]
        timed = [ratio(row["speed"]), f"{row['latency_ms']['median']:.3f}"]
        body.append([f"{row['ratio']:.0%}", *counts, *_counts(row), *timed])
    return Table(title, head, body)


def _counts(row: Row) -> list[str]:
    return [f"{row['parameters'] / 1e3:,.0f} k", f"{row['macs'] / 1e6:,.1f} M"]


_COMMON: tuple[tuple[str, Cell], ...] = (
    ("model", lambda row: row["model"]),
    ("variant", lambda row: row["variant"]),
)
_TOP1: tuple[tuple[str, Cell], ...] = (
    ("top-1 %", lambda row: f"{row['top1']:.2f}"),
    ("lost", lambda row: f"{row['lost']:.2f}"),
    ("parameters", lambda row: _counts(row)[0]),
    ("MACs", lambda row: _counts(row)[1]),
    ("s", lambda row: f"{row['seconds']:.0f}" if "seconds" in row else ""),
)


def _figure(key: str, scale: float) -> Cell:
    return lambda row: f"{row[key] / scale:.1f}" if key in row else "-"


LISTS: dict[str, tuple[tuple[str, Cell], ...]] = {
    "recovery": (*_COMMON, *_TOP1, ("steps", lambda row: str(row.get("steps", "")))),
    "transformer": (*_COMMON, *_TOP1),
    "cost": (
        *_COMMON,
        ("s", _figure("seconds", 1)),
        ("again s", _figure("again_seconds", 1)),
        ("MB with the model", _figure("loaded_bytes", 1e6)),
        ("peak MB", _figure("peak_bytes", 1e6)),
        ("largest moments MB", _figure("moments_bytes", 1e6)),
        ("", lambda row: row.get("failure", "")[:60]),
    ),
}
"""Sections whose rows are shown one by one."""


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Accuracy over MACs: one panel a network and source of inputs, one line a strategy; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        progress("no plot: matplotlib is not installed")
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graphopt"
    from matplotlib import pyplot

    measured = [row for row in rows if "target" in row]
    panels = dict.fromkeys((row["model"], _inputs(row)) for row in measured)
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axes, (model, inputs) in zip(grid[0], panels, strict=True):
        own = [row for row in measured if row["model"] == model and _inputs(row) == inputs]
        for name, points in curves(own).items():
            style = {"color": "black", "linestyle": "--"} if name == BASELINE else {}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        whole = chosen(rows, model=model, variant="float")[0]["top1"]
        axes.axhline(whole, color="tab:gray", linewidth=0.8)
        axes.set_title(f"{model}, {inputs}", fontsize=10)
        axes.set_xlim(1.02, min(MACS) - 0.02)
        axes.set_xlabel("share of the MACs that is left")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("top-1 %, no training")
    grid[0][-1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def curves(rows: Sequence[Row]) -> Mapping[str, list[tuple[float, float]]]:
    """Strategy to the points (share of the MACs, top-1) of its line, most MACs first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append((row["macs_share"], row["top1"]))
    return {name: sorted(points, reverse=True) for name, points in found.items()}
