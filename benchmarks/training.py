"""What training on the lifted graph gives back: quantization to 4 and 2 bits, and half of the inner channels gone.

    python -m benchmarks.training               # needs ../shared/data; on the GPU where there is one

ResNet-20 on CIFAR-10, accuracy on the 10,000 test images by onnxruntime. Batches of 128 with the usual crops and
flips. The teacher is the float original, and nothing sees a label.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import graphopt
from benchmarks.kept import kept
from benchmarks.models import DATA, cifar10, cifar_resnet
from benchmarks.results import Column, Goal, Results, Row, progress, read_options, stopwatch
from graphopt.ir.session import open_session
from graphopt.passes import Context, Quantize
from graphopt.recover import Recovery
from graphopt.train_quantized import TrainQuantized

INPUT = "pixel_values"
BATCH, EPOCH = 128, 390
"""Images of a batch, and batches of one pass over the 50,000 training images."""
WIDTHS = ((4, 4), (2, 4))
"""Bits of weights and of activations; in the first and the last layer 8, of weights 7 where 8 saturate."""
VARIANTS = ("w4a4", "w2a4", "halved")
RECOVERED, FOLDED, FAST = 0.8, 0.1, 0.9
"""Share of the lost points that training must bring back, points that folding may change, and share of the speed of
int8 that a trained graph must have."""


class Images:
    """Training images, shuffled anew in every pass, cropped with a border of 4 and flipped."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.nn.functional.pad(torch.from_numpy(images), (4, 4, 4, 4))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches of 128 images [128, 3, 32, 32], the incomplete last one left out."""
        for chosen in torch.randperm(len(self.images)).split(BATCH):
            if len(chosen) < BATCH:
                return
            left, top = (torch.randint(0, 9, (BATCH, 1, 1, 1)) for _ in range(2))
            rows = (top + torch.arange(32).reshape(1, 1, 32, 1)).expand(-1, 3, -1, 40)
            columns = (left + torch.arange(32).reshape(1, 1, 1, 32)).expand(-1, 3, 32, -1)
            batch = self.images[chosen].gather(2, rows).gather(3, columns)
            yield torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, batch.flip(3), batch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/training.json`."""
    options = read_options("training", __doc__, arguments, models=VARIANTS, quick_models=VARIANTS)
    if not DATA.exists():
        sys.exit(f"the trained weights and the images are not here: {DATA}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    results = Results(
        "training", f"ResNet-20 on CIFAR-10, trained on the lifted graph ({named})", options.command, options.complete
    )
    training, test = cifar10("train"), cifar10("test")
    if options.quick:
        test = test[0][::20], test[1][::20]
    epoch = 6 if options.quick else EPOCH
    model = traced()
    results.rows.append({"variant": "float", "top1": accuracy(model, test), "steps": 0})
    for weight_bits, activation_bits in WIDTHS:
        if f"w{weight_bits}a{activation_bits}" not in options.models:
            continue
        widths = weight_bits, activation_bits
        results.rows += kept(
            "training",
            (device, len(test[1]), epoch, widths),
            lambda: quantized(model, training, test, *widths, 2 * epoch, device),  # noqa: B023
        )
    if "halved" in options.models:
        parts = (device, len(test[1]), epoch, "halved")
        results.rows += kept("training", parts, lambda: pruned(model, training, test, epoch, device))
    results.goals += goals(results.rows)
    results.show_and_write(COLUMNS)


def traced() -> ir.Model:
    """The trained network with a dynamic batch."""
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return graphopt.trace(cifar_resnet(20), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def quantized(
    model: ir.Model, training: Any, test: Any, weight_bits: int, activation_bits: int, steps: int, device: str
) -> list[Row]:
    """Two rows: quantized after training, and trained so; both are what the pass `quantize` writes."""
    name = f"W{weight_bits}A{activation_bits}"
    progress(name)
    folded = graphopt.optimize(model, recipe="exact", quiet=True).model
    shown = [{INPUT: training[0][start::50]} for start in range(2)]
    context = Context(calibration=shown)
    plan = TrainQuantized(bits=activation_bits, weight_bits=weight_bits).plan(folded, context)
    graph, quantizers = graphopt.fake_quantize(folded, plan)
    lifted = graphopt.lift(graph)
    lifted.attach("quantizers", quantizers)
    quantizers.prepare(lifted, [[torch.from_numpy(feeds[INPUT])] for feeds in shown])
    untrained = graphopt.lower(lifted, graph)
    graph, quantizers = graphopt.fake_quantize(folded, plan.with_tensors(quantizers.plan()))
    with stopwatch() as watch:
        recovery = graphopt.recover(
            graph,
            Images(training[0]),
            steps=steps,
            teacher=model,
            distillation="kl",
            temperature=4.0,
            insertions={"quantizers": quantizers},
            learning_rate=1e-3,
            warmup=steps // 20,
            device=device,
            quiet=True,
        )
    int8 = folded.clone()
    Quantize(search=False).run(int8, Context(calibration=shown))
    trained = _trained(f"{name} trained", recovery, test, steps, watch.seconds)
    return [
        {"variant": f"{name} after training", "top1": accuracy(untrained, test), "steps": 0},
        {**trained, **speeds(folded, int8, recovery.model, test[0])},
    ]


def speeds(folded: ir.Model, int8: ir.Model, trained: ir.Model, images: np.ndarray) -> Row:
    """How much faster one thread runs int8 and the trained graph than float, timed in turns on one image."""
    timed = graphopt.benchmark(folded, int8, trained, inputs={INPUT: images[:1]}, names=("float", "int8", "trained"))
    return {"int8_speed": timed.speeds[1].median, "speed": timed.speeds[2].median}


def pruned(model: ir.Model, training: Any, test: Any, steps: int, device: str) -> list[Row]:
    """Two rows: half of the channels inside every block removed at random, and then recovered.

    What every block puts out has the same channels as before, so it is matched with the teacher's too.
    """
    progress("half of the inner channels")
    generator = np.random.default_rng(0)
    groups = [group for group in graphopt.channel_groups(model) if group.prunable and "stream" not in group.name]
    selection = {group.name: generator.permutation(group.units)[: group.units // 2].tolist() for group in groups}
    small = graphopt.remove_channels(model, selection)
    streams = [node.outputs[0].name or "" for node in small.graph if node.op_type == "Relu" and _follows_add(node)]
    with stopwatch() as watch:
        recovery = graphopt.recover(
            small,
            Images(training[0]),
            steps=steps,
            teacher=model,
            match=streams,
            learning_rate=1e-2,
            device=device,
            quiet=True,
        )
    return [
        {"variant": f"{len(groups)} groups halved", "top1": accuracy(small, test), "steps": 0},
        _trained("halved, recovered", recovery, test, steps, watch.seconds),
    ]


def _follows_add(node: ir.Node) -> bool:
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    return producer is not None and producer.op_type == "Add"


def _trained(variant: str, recovery: Recovery, test: Any, steps: int, seconds: float) -> Row:
    row: Row = {"variant": variant, "top1": accuracy(recovery.model, test), "steps": steps, "seconds": seconds}
    module = recovery.module.cpu()
    images, labels = torch.from_numpy(test[0]), torch.from_numpy(test[1])
    with torch.no_grad():
        found = [module(chunk).argmax(1) for chunk in images.split(500)]
    row["torch_top1"] = 100 * float((torch.cat(found) == labels).float().mean())
    return row


def accuracy(model: ir.Model, test: tuple[np.ndarray, np.ndarray]) -> float:
    """Percent of the images whose largest logit is the label's, in onnxruntime as users run it."""
    session, (images, labels) = open_session(model, threads=0), test
    found = [
        session.run_feeds({INPUT: images[start : start + 500]})[0].argmax(1) for start in range(0, len(images), 500)
    ]
    return 100 * float(np.mean(np.concatenate(found) == labels))


def goals(rows: Sequence[Row]) -> list[Goal]:
    """What the issue asks for."""
    by_variant = {row["variant"]: row for row in rows}
    found: list[Goal] = []
    if "W4A4 trained" in by_variant:
        whole, before, trained = (by_variant[name]["top1"] for name in ("float", "W4A4 after training", "W4A4 trained"))
        share = (trained - before) / (whole - before)
        measured = f"{share:.0%} ({whole:.2f} to {before:.2f}, back to {trained:.2f} %)"
        found.append(Goal(f"W4A4: training brings back {RECOVERED:.0%} of what is lost", measured, share >= RECOVERED))
    for row in rows:
        if "torch_top1" in row:
            apart = abs(row["torch_top1"] - row["top1"])
            claim = f"{row['variant']}: torch and onnxruntime are at most {FOLDED} points apart"
            found.append(Goal(claim, f"{row['torch_top1']:.2f} and {row['top1']:.2f} %", apart <= FOLDED + 1e-9))
        if "speed" in row:
            measured = f"{row['speed']:.2f} and {row['int8_speed']:.2f} times float"
            claim = f"{row['variant']}: at least {FAST} times as fast as int8 without training"
            found.append(Goal(claim, measured, row["speed"] >= FAST * row["int8_speed"]))
    return found


COLUMNS: tuple[Column, ...] = (
    ("variant", lambda row: row["variant"]),
    ("top-1 %", lambda row: f"{row['top1']:.2f}"),
    ("in torch %", lambda row: f"{row['torch_top1']:.2f}" if "torch_top1" in row else ""),
    ("x float", lambda row: f"{row['speed']:.2f} (int8 {row['int8_speed']:.2f})" if "speed" in row else ""),
    ("steps", lambda row: str(row["steps"])),
    ("s", lambda row: f"{row['seconds']:.0f}" if "seconds" in row else ""),
)


if __name__ == "__main__":
    main()
