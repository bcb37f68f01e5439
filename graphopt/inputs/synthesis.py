"""Gradient descent on the inputs of a lifted model. torch is imported here; nothing imports this before it is needed.

The inputs that move are optimised in units of their start: x = mean + std * z, with the mean and standard deviation
of all of the start, so that one learning rate fits images of any range. All samples of a group are moved together:
BatchNormalization statistics are those of the whole group, over several runs where the model's batch is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from graphopt.errors import InvalidGraphError, LiftError
from graphopt.inputs.batches import ProbeBatches, SampleCounter
from graphopt.inputs.synthetic import Aim, Movable, Report, Statistic, Synthesis, UnavailableError
from graphopt.ir.lift import lift
from graphopt.ir.lifted import LiftedModule

_MOST_FAILURES = 5
"""How often a loss that is not finite sends the descent back to the best inputs, at half the learning rate."""
_LEAST_PART = 1e-3
"""Floor under a measured standard deviation, in parts of the recorded one: its square root has no slope at 0."""

_CLEARLY_BETTER = 0.5
"""How small the statistic term of another range of images must be, in parts of the standardised ones', to be taken."""

Feeds = dict[str, np.ndarray]


def synthesize(
    model: ir.Model,
    start: ProbeBatches,
    movables: Sequence[Movable],
    aim: Aim,
    settings: Synthesis,
    *,
    together: int,
    threads: int,
    seed: int,
    device: str,
    progress: Report | None,
) -> list[Feeds]:
    """Move probes until the model takes them for its training data; see `graphopt.inputs.synthetic.Synthetic.feeds`.

    Args:
        model: canonical; it is not changed.
        start: where the descent starts from.
        movables: the inputs that move.
        aim: what they are moved towards.
        settings: how.
        together: how many samples share statistics and memory.
        threads: of torch, 0 for its own default.
        seed: of the classes drawn, and of random operators in the graph.
        device: of torch; the CPU where there is none of that name.
        progress: called after each step.

    Returns:
        The batches of `start`, moved: as many, of the same shapes and types. For each group those with the lowest loss
        of all steps are returned, the start itself included.

    Raises:
        UnavailableError: the model cannot be lifted, does not run in torch, its loss is not finite on the start, or
            does not depend on the inputs.

    Example:
        >>> from graphopt import load
        >>> from graphopt.inputs.synthetic import Synthetic
        >>> model = load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) =>
        ...     (float[n,2] y) <float[2,2] w = {1, 0, 0, 1}> { y = MatMul(x, w) }'''))
        >>> x = Synthetic().feeds(model, samples=4)[0]["x"]
        >>> x.shape, x.dtype
        ((4, 2), dtype('float32'))
    """
    groups = _groups(model, start, together)
    with _settled(threads, seed):
        network = _network(model, aim, device)
        done: list[Feeds] = []
        first = 0
        batches = [feeds for feeds, _ in groups[0]]
        joins = _joins(network, batches)
        convention = _convention(network, [_joined(batches)] if joins else batches, movables, settings)
        for number, group in enumerate(groups):
            samples = sum(count for _, count in group)
            targets = _targets(aim.classes, first, samples, seed)
            batches = [_fed(feeds, movables, convention) for feeds, _ in group]
            descent = _Descent(network, [_joined(batches)] if joins else batches, samples, movables, targets, settings)

            def report(step: int, number: int = number) -> None:
                if progress is not None:
                    progress(number * settings.steps + step, len(groups) * settings.steps, "synthetic inputs")

            moved = descent.run(report)
            done += _parted(moved[0], batches) if joins else moved
            first += samples
    return done


def _groups(model: ir.Model, start: ProbeBatches, together: int) -> list[list[tuple[Feeds, int]]]:
    """Batches with their number of samples, in groups of about equal size and at most `together` samples."""
    count = SampleCounter(model)
    counted = [(feeds, count({name: array.shape for name, array in feeds.items()})) for feeds in start]
    rounds = -(-sum(samples for _, samples in counted) // together)
    size = -(-len(counted) // rounds)
    while (
        size > 1 and max(sum(s for _, s in counted[at : at + size]) for at in range(0, len(counted), size)) > together
    ):
        size -= 1
    return [counted[at : at + size] for at in range(0, len(counted), size)]


def _joins(network: _Network, batches: Sequence[Feeds]) -> bool:
    """Whether several batches may run as one, even where the model's batch is fixed: tried on two of them.

    A lifted graph whose batch is fixed runs with any other unless a constant shape says otherwise, many times faster
    than one by one.
    """
    pair = batches[:2]
    if len(pair) < 2 or any(len({array.shape[:1] for array in feeds.values()} | {()}) != 2 for feeds in pair):
        return False
    try:
        with torch.no_grad():
            apart = [network.run(feeds) for feeds in pair]
            joined = network.run(_joined(pair))
            return all(_same(one, torch.cat(parts)) for one, *parts in zip(joined, *apart, strict=True))
    except (RuntimeError, ValueError, TypeError, IndexError, LiftError):
        return False


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def _joined(batches: Sequence[Feeds]) -> Feeds:
    return {name: np.concatenate([feeds[name] for feeds in batches]) for name in batches[0]}


def _parted(feeds: Feeds, batches: Sequence[Feeds]) -> list[Feeds]:
    """What `_joined` put together, in parts as large as those of `batches`."""
    sizes = [len(next(iter(part.values()))) for part in batches]
    ends = np.cumsum([0, *sizes])
    return [{name: array[ends[i] : ends[i + 1]].copy() for name, array in feeds.items()} for i in range(len(sizes))]


def _convention(
    network: _Network, batches: Sequence[Feeds], movables: Sequence[Movable], settings: Synthesis
) -> tuple[float, float] | None:
    """Mean and deviation of images that the statistics fit best, None for the start as it is."""
    if not network.statistics or not settings.statistic_weight or not any(movable.rangeless for movable in movables):
        return None

    def loss(convention: tuple[float, float] | None) -> float:
        with torch.no_grad():
            results = [network.run(_fed(feeds, movables, convention)) for feeds in batches]
            found = float(network.statistic_loss(results))
        return found if np.isfinite(found) else float("inf")

    try:
        plain = loss(None)
        losses = {convention: loss(convention) for convention in settings.conventions}
    except (RuntimeError, ValueError, TypeError, IndexError, LiftError):
        return None  # the descent says what is wrong
    best = min(losses, key=lambda convention: losses[convention], default=None)
    return best if best is not None and losses[best] < _CLEARLY_BETTER * plain else None


def _fed(feeds: Feeds, movables: Sequence[Movable], convention: tuple[float, float] | None) -> Feeds:
    """Standardised images as a pipeline would feed them; everything else as it is."""
    if convention is None:
        return feeds
    mean, std = convention
    moved = {m.name: (feeds[m.name] * std + mean).astype(feeds[m.name].dtype) for m in movables if m.rangeless}
    return {**feeds, **moved}


def _targets(classes: int, first: int, samples: int, seed: int) -> torch.Tensor:
    """The class of each sample, int64 [samples]: all classes in a random order, again and again."""
    if classes == 0:
        return torch.zeros(0, dtype=torch.int64)
    order = np.random.default_rng(seed).permutation(classes)
    return torch.from_numpy(order[np.arange(first, first + samples) % classes])


@contextmanager
def _settled(threads: int, seed: int) -> Generator[None, None, None]:
    """A number of threads and a random state of torch's own; both are as before afterwards."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        try:
            if threads:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class _Network:
    """A lifted model that returns what the loss reads.

    Attributes:
        module: returns the model's outputs, then the values of `statistics`, then the logits.
        outputs: number of the model's own outputs.
        statistics: layers with their recorded mean and standard deviation.
        logits: whether class logits are returned last.
    """

    module: LiftedModule
    outputs: int
    statistics: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    logits: bool

    def run(self, feeds: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        results = self.module.forward(*self.module.tensors(feeds))  # not called: FX prints what a trial run raises
        return results if isinstance(results, tuple) else (results,)

    def statistic_loss(self, results: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        """Mean over layers of how far their statistics over all `results` are from the recorded ones."""
        taps = [[result[self.outputs + layer] for result in results] for layer in range(len(self.statistics))]
        layers = [_statistic_loss(tap, *known) for tap, known in zip(taps, self.statistics, strict=True)]
        return torch.stack(layers).mean()


def _network(model: ir.Model, aim: Aim, device: str) -> _Network:
    try:
        module = lift(model)
    except (LiftError, InvalidGraphError) as error:
        raise UnavailableError(f"the model cannot be lifted: {error.what}", where=error.where) from error
    module.requires_grad_(requires_grad=False)
    if module.dtype.itemsize < 4:
        module = module.to(torch.float32)
    try:
        module = module.to(device)
    except (RuntimeError, AssertionError):  # torch without that device
        module = module.to("cpu")
    statistics = [statistic for statistic in aim.statistics if _is_lifted(module, statistic.value)]
    logits = aim.logits is not None and _is_lifted(module, aim.logits)
    tapped = module.with_outputs([*(statistic.value for statistic in statistics), *([aim.logits] if logits else [])])  # type: ignore[list-item]

    def tensors(statistic: Statistic) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.from_numpy(np.float32(part)).to(module.device) for part in (statistic.mean, statistic.std))  # type: ignore[return-value]

    return _Network(tapped, len(module.interface.outputs), tuple(map(tensors, statistics)), logits)


def _is_lifted(module: LiftedModule, value: str) -> bool:
    try:
        module.node_of(value)
    except LiftError:
        return False
    return True


class _Descent:
    """One group of batches and where they are."""

    def __init__(
        self,
        network: _Network,
        batches: Sequence[Feeds],
        samples: int,
        movables: Sequence[Movable],
        targets: torch.Tensor,
        settings: Synthesis,
    ) -> None:
        self.network = network
        self.batches = batches
        self.samples = samples
        self.movables = {movable.name: movable for movable in movables}
        self.targets = targets.to(network.module.device)
        self.settings = settings
        self.shifts: dict[str, tuple[float, float]] = {}
        self.start: list[dict[str, torch.Tensor]] = [{} for _ in batches]
        for name in self.movables:
            arrays = [feeds[name].astype(np.float64) for feeds in batches]
            mean = float(np.mean([array.mean() for array in arrays]))
            std = float(np.sqrt(np.mean([np.square(array - mean).mean() for array in arrays])))
            self.shifts[name] = mean, std if std > 0 else 1.0
            for state, array in zip(self.start, arrays, strict=True):
                unit = torch.from_numpy(np.float32((array - mean) / self.shifts[name][1]))
                state[name] = unit.to(network.module.device)
        self.state = [{name: unit.clone().requires_grad_() for name, unit in state.items()} for state in self.start]

    def run(self, report: Any) -> list[Feeds]:
        """Descend; returns the best batches."""
        best, best_loss, rate, failures = self._copy(), float("inf"), 1.0, 0
        optimizer = self._optimizer()
        for step in range(self.settings.steps):
            loss = self._guarded_loss()
            value = float(loss.detach())
            if not np.isfinite(value):
                failures += 1
                if best_loss == float("inf"):
                    raise UnavailableError("the model's outputs on made-up inputs are not finite")
                if failures > _MOST_FAILURES:
                    break
                self._restore(best)
                optimizer, rate = self._optimizer(), rate / 2
                report(step + 1)
                continue
            if value < best_loss:
                best, best_loss = self._copy(), value
            self._differentiate(loss, first=step == 0)
            left = (1.0 + math.cos(math.pi * step / self.settings.steps)) / 2.0
            for group in optimizer.param_groups:
                fall = self.settings.final_rate + (1.0 - self.settings.final_rate) * left
                group["lr"] = self.settings.learning_rate * rate * fall
            optimizer.step()
            self._keep_in_range()
            report(step + 1)
        with torch.no_grad():
            last = float(self._guarded_loss())
        return self._arrays(self._copy() if last < best_loss or self.settings.steps == 0 else best)

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([unit for state in self.state for unit in state.values()], lr=0.0)

    def _copy(self) -> list[dict[str, torch.Tensor]]:
        return [{name: unit.detach().clone() for name, unit in state.items()} for state in self.state]

    def _restore(self, kept: Sequence[Mapping[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for state, old in zip(self.state, kept, strict=True):
                for name, unit in state.items():
                    unit.copy_(old[name])

    def _keep_in_range(self) -> None:
        with torch.no_grad():
            for state in self.state:
                for name, unit in state.items():
                    mean, std = self.shifts[name]
                    unit.clamp_((self.movables[name].low - mean) / std, (self.movables[name].high - mean) / std)

    def _differentiate(self, loss: torch.Tensor, *, first: bool) -> None:
        """Gradients of the loss, without what is not finite.

        Raises:
            UnavailableError: there is none at the start: the outputs do not depend smoothly on the inputs.
        """
        units = [unit for state in self.state for unit in state.values()]
        gradients = torch.autograd.grad(loss, units, allow_unused=True) if loss.requires_grad else [None] * len(units)
        for unit, gradient in zip(units, gradients, strict=True):
            unit.grad = torch.zeros_like(unit) if gradient is None else torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
        if first and not any(bool(unit.grad.any()) for unit in units if unit.grad is not None):
            raise UnavailableError("the model's outputs have no gradient with respect to its inputs")

    def _guarded_loss(self) -> torch.Tensor:
        """`_loss`; what a model from anywhere raises in torch becomes a reason."""
        try:
            return self._loss()
        except (RuntimeError, ValueError, TypeError, IndexError, LiftError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise UnavailableError(f"the lifted model does not run: {text[0]}") from error

    def _loss(self) -> torch.Tensor:
        settings, network = self.settings, self.network
        results: list[tuple[torch.Tensor, ...]] = []
        for feeds, state in zip(self.batches, self.state, strict=True):
            moved = {name: self._values(name, unit) for name, unit in state.items()}
            results.append(network.run({**feeds, **moved}))
        aims: list[torch.Tensor] = []
        if settings.statistic_weight and network.statistics:
            aims.append(settings.statistic_weight * network.statistic_loss(results))
        logits = torch.cat([result[-1] for result in results]) if network.logits else None
        if logits is not None and logits.ndim == 2 and len(logits) == self.samples:
            if settings.confidence_weight:
                confidence = functional.cross_entropy(logits.float() / settings.temperature, self.targets)
                aims.append(settings.confidence_weight * confidence)
        elif settings.diversity_weight:
            likeness = _likeness([result[: network.outputs] for result in results], self.samples)
            aims += [] if likeness is None else [settings.diversity_weight * likeness]
        if not aims:
            raise UnavailableError("nothing is known to move its inputs towards: no statistics, no output by sample")
        return torch.stack(aims).sum() + self._smoothness()

    def _values(self, name: str, unit: torch.Tensor) -> torch.Tensor:
        """The input itself, in its range to the last bit; the gradient is that of the unclipped one."""
        mean, std = self.shifts[name]
        values = unit * std + mean
        low, high = self.movables[name].low, self.movables[name].high
        return values + (values.detach().clamp(low, high) - values.detach())

    def _smoothness(self) -> torch.Tensor:
        """Total variation and the change of channel means, mean over batches and inputs."""
        terms: list[torch.Tensor] = []
        for state, start in zip(self.state, self.start, strict=True):
            for name, unit in state.items():
                movable = self.movables[name]
                if self.settings.variation_weight and movable.axes:
                    steps = [unit.diff(dim=axis).abs().mean() for axis in movable.axes if unit.shape[axis] > 1]
                    if steps:
                        terms.append(self.settings.variation_weight * torch.stack(steps).sum())
                if self.settings.mean_weight and movable.axes:
                    change = (unit - start[name]).mean(dim=movable.axes).square().mean()
                    terms.append(self.settings.mean_weight * change)
        return torch.stack(terms).sum() / (len(self.state) * len(self.movables)) if terms else torch.zeros(())

    def _arrays(self, state: Sequence[Mapping[str, torch.Tensor]]) -> list[Feeds]:
        done: list[Feeds] = []
        for feeds, units in zip(self.batches, state, strict=True):
            made = dict(feeds)
            for name, unit in units.items():
                mean, std = self.shifts[name]
                array = unit.double().cpu().numpy() * std + mean
                made[name] = np.clip(array, self.movables[name].low, self.movables[name].high).astype(feeds[name].dtype)
            done.append(made)
        return done


def _statistic_loss(taps: Sequence[torch.Tensor], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """How far the mean and deviation of each channel over all taps are from the recorded ones; see `Synthesis`."""
    if any(tap.ndim < 2 or tap.shape[1] != len(mean) for tap in taps):
        return torch.zeros((), device=mean.device)
    total = torch.zeros_like(mean)
    squares = torch.zeros_like(mean)
    count = 0
    for tap in taps:
        # In units of the recorded statistics, so that squares of large means do not cancel.
        unit = (tap.float().movedim(1, -1).reshape(-1, len(mean)) - mean) / std
        total = total + unit.sum(dim=0)
        squares = squares + unit.square().sum(dim=0)
        count += len(unit)
    average = total / count
    loss = average.square().mean()
    if count > 1:
        variance = (squares / count - average.square()).clamp_min(0.0)
        loss = loss + ((variance + _LEAST_PART**2).sqrt() - 1.0).square().mean()
    return loss


def _likeness(results: Sequence[Sequence[torch.Tensor]], samples: int) -> torch.Tensor | None:
    """Mean squared correlation between the outputs of two samples, in [0, 1]; None where no output tells samples apart.

    Outputs are centred over the samples: what all of them share says nothing.
    """
    terms: list[torch.Tensor] = []
    for outputs in zip(*results, strict=True):
        if not all(output.ndim > 1 and output.is_floating_point() for output in outputs):
            continue
        if len({output.shape[1:] for output in outputs}) != 1 or sum(map(len, outputs)) != samples or samples < 2:
            continue
        rows = torch.cat([output.flatten(start_dim=1) for output in outputs]).float()
        if rows.shape[1] < 2:
            continue
        rows = functional.normalize(rows - rows.mean(dim=0), dim=1, eps=1e-6)
        products = (rows @ rows.T).square()
        terms.append((products.sum() - products.diagonal().sum()) / (samples * (samples - 1)))
    return torch.stack(terms).mean() if terms else None
