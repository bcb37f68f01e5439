"""What `benchmarks.datafree` was asked to reach, held against its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.datafree_sections import BASELINE, STRATEGIES
from benchmarks.datafree_setting import BEST_FREE, FREE, IMAGES, WITH_IMAGES
from benchmarks.datafree_transformer import COMPENSATIONS
from benchmarks.results import Goal, Row

RESNET20, RESNET56 = "ResNet-20", "ResNet-56"
FREE_LIMITS = {(RESNET20, 0.3): 4.5, (RESNET20, 0.5): 10.0, (RESNET56, 0.3): 1.2, (RESNET56, 0.5): 4.0}
IMAGES_LIMITS = {(RESNET20, 0.3): 3.5, (RESNET20, 0.5): 8.0, (RESNET56, 0.3): 1.0, (RESNET56, 0.5): 3.0}
FOLDED_LIMITS = {(RESNET20, 0.3): 7.0, (RESNET20, 0.5): 20.0, (RESNET56, 0.3): 2.0, (RESNET56, 0.5): 8.0}
BITS_LIMIT = 3.0
RECOVERY_LIMITS = {RESNET20: 3.0, RESNET56: 2.0}
"""Points that may be lost, of top-1 accuracy."""
FASTER_FROM = 0.2
DROP_SHARE = 0.5
PROBES_SECONDS, SYNTHETIC_SECONDS, AGAIN_SHARE = 60.0, 900.0, 0.5
MODEL_COPIES, MOMENTS_COPIES, FIXED_MEGABYTES = 4.0, 6.0, 1000.0
"""What the run may hold beside the loaded model: files, second moments of the largest layer, and activations."""


def goals(rows: Sequence[Row]) -> list[Goal]:
    """One goal a claim for which there are rows."""
    forms = chosen(rows, section="forms")
    return [
        *_limited("data-free", chosen(forms, variant=BEST_FREE.name), FREE_LIMITS),
        *_limited(f"{IMAGES} unlabelled images", chosen(forms, variant=WITH_IMAGES.name), IMAGES_LIMITS),
        *_faster(chosen(forms, variant="rounded")),
        *_folded(chosen(rows, section="folded", variant=BEST_FREE.name)),
        *_bits(chosen(rows, section="bits", ratio=0.3, weight_bits=6, bits=6)),
        *_allocation(chosen(rows, section="allocation")),
        *_recovery(chosen(rows, section="recovery", variant="recovered")),
        *_transformer(chosen(rows, section="transformer")),
        *_cost(chosen(rows, section="cost")),
    ]


def chosen(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows in which these entries are so."""
    return [row for row in rows if all(row.get(key) == entry for key, entry in wanted.items())]


def _points(row: Row) -> str:
    return f"{row['lost']:.2f} points ({row['top1'] + row['lost']:.2f} to {row['top1']:.2f} %)"


def _limited(what: str, rows: Sequence[Row], limits: dict[tuple[str, float], float]) -> Iterator[Goal]:
    for row in rows:
        limit = limits.get((row["model"], row["ratio"]))
        if limit is not None:
            claim = f"{row['model']}, {row['ratio']:.0%} of the inner channels, {what}: at most {limit:g} points lost"
            yield Goal(claim, _points(row), row["lost"] <= limit)


def _faster(rows: Sequence[Row]) -> Iterator[Goal]:
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in chosen(rows, model=model) if row["ratio"] >= FASTER_FROM]
        measured = ", ".join(f"{row['speed']['median']:.2f} at {row['ratio']:.0%}" for row in found)
        claim = f"{model}: faster in onnxruntime at every ratio from {FASTER_FROM:.0%}, widths rounded"
        yield Goal(claim, measured, all(row["speed"]["median"] > 1 for row in found))


def _folded(rows: Sequence[Row]) -> Iterator[Goal]:
    """The better of the two cuts is not taken: what counts is what a user gets, the cut by the file's own filters."""
    for row in chosen(rows, cut="own L2"):
        limit = FOLDED_LIMITS.get((row["model"], row["ratio"]))
        if limit is None:
            continue
        same = chosen(rows, cut="same units", model=row["model"], ratio=row["ratio"])
        beside = f"; {same[0]['lost']:.2f} with the units of the net with BatchNormalization" if same else ""
        claim = (
            f"{row['model']}, BatchNormalization folded, {row['ratio']:.0%}, data-free: at most {limit:g} points lost"
        )
        yield Goal(claim, _points(row) + beside, row["lost"] <= limit)


def _bits(rows: Sequence[Row]) -> Iterator[Goal]:
    for row in chosen(rows, model=RESNET56, variant="quantized, rebuilt"):
        before = chosen(rows, model=RESNET56, variant="quantized")
        beside = f"; {before[0]['lost']:.2f} before it was rebuilt" if before else ""
        claim = (
            f"{RESNET56}, 30 % and 6 bits for weights and activations, data-free: at most {BITS_LIMIT:g} points lost"
        )
        yield Goal(claim, _points(row) + beside, row["lost"] <= BITS_LIMIT)


def _allocation(rows: Sequence[Row]) -> Iterator[Goal]:
    """For each network and source of inputs the strategy that is above uniform most often, then by most."""
    for model in dict.fromkeys(row["model"] for row in rows):
        for inputs in (FREE, "images"):
            found = chosen(rows, model=model, inputs=inputs)
            uniform = {row["target"]: row["top1"] for row in chosen(found, variant=BASELINE)}
            gains: dict[str, list[float]] = {}
            for name, *_ in STRATEGIES:
                own = {row["target"]: row["top1"] for row in chosen(found, variant=name)}
                if name != BASELINE and own and set(own) == set(uniform):
                    gains[name] = [own[target] - uniform[target] for target in sorted(uniform, reverse=True)]
            if not gains:
                continue
            best = max(gains, key=lambda name: (sum(gain > 0 for gain in gains[name]), sum(gains[name])))
            measured = ", ".join(f"{gain:+.2f}" for gain in gains[best])
            claim = f"{model}, {inputs}: accuracy over MACs above uniform L2 at every point"
            yield Goal(claim, f"{best}: {measured} points", min(gains[best]) > 0)


def _recovery(rows: Sequence[Row]) -> Iterator[Goal]:
    for row in rows:
        limit = RECOVERY_LIMITS[row["model"]]
        claim = (
            f"{row['model']}, half of the inner channels and one epoch without labels: at most {limit:g} points lost"
        )
        yield Goal(claim, f"{_points(row)}, {row['steps']} steps", row["lost"] <= limit)


def _transformer(rows: Sequence[Row]) -> Iterator[Goal]:
    alone = chosen(rows, variant=COMPENSATIONS[0][0])
    for row in chosen(rows, variant=COMPENSATIONS[-1][0]):
        bare = alone[0]["lost"]
        claim = f"{row['model']}, {row['ratio']:.0%} of heads and MLP, data-free: at most half of the drop without"
        yield Goal(claim, f"{row['lost']:.2f} of {bare:.2f} points", bare > 0 and row["lost"] <= DROP_SHARE * bare)


def _cost(rows: Sequence[Row]) -> Iterator[Goal]:
    for row in rows:
        source = row["variant"]
        limit = PROBES_SECONDS if source == "probes" else SYNTHETIC_SECONDS
        claim = f"{row['model']}, {row['ratio']:.0%} and rebuilt, {source}: under {limit:g} s"
        if "failure" in row:
            yield Goal(claim, row["failure"], False)
            continue
        yield Goal(claim, f"{row['seconds']:.1f} s", row["seconds"] < limit)
        if source == "synthetic":
            again, told = row["again_seconds"], row["progress_updates"]
            claim = f"{row['model']}, {source}: progress is shown, and the next call takes less than half"
            reached = told > 0 and again < AGAIN_SHARE * row["seconds"]
            yield Goal(claim, f"{again:.1f} s after {row['seconds']:.1f} s, {told} updates", reached)
            continue
        allowed = MODEL_COPIES * row["model_bytes"] + MOMENTS_COPIES * row["moments_bytes"]
        allowed = allowed / 1e6 + FIXED_MEGABYTES
        used = (row["peak_bytes"] - row["loaded_bytes"]) / 1e6
        claim = (
            f"{row['model']}, {source}: memory beside the loaded model under {MODEL_COPIES:g} files, "
            f"{MOMENTS_COPIES:g} of the largest second moments ({row['moments_bytes'] / 1e6:.0f} MB) "
            f"and {FIXED_MEGABYTES:g} MB"
        )
        yield Goal(claim, f"{used:.0f} of {allowed:.0f} MB", used < allowed)
