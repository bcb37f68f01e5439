"""One model of the zoo, pruned by Torch-Pruning as its README prunes a network, and held against the masked module.

Layers that produce outputs are found along the autograd graph and ignored. Besides the README's call there are those
of its transformer examples, with `num_heads` for the projections beside which a module says how many heads they have.
Which elements stay is read from ids in `.grad`, which Torch-Pruning cuts together with the parameters.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import lcm
from typing import Any

import numpy as np

from benchmarks.channel_cuts import RATIO, TOLERANCE
from benchmarks.isolation import first_line
from benchmarks.results import Row
from graphopt.ir.compare import compare_outputs
from tests.zoo.models import FILES

OUTCOMES = (
    "not a torch module",
    "takes too long",
    "raises",
    "nothing pruned",
    "forward fails",
    "output shape changes",
    "differs from masked",
    "no masked reference",
    "equals masked",
)
"""From worst to best; the last three run with fewer parameters and outputs of the same shape."""
RUNS = OUTCOMES[6:]
README = "README"
VARIANTS: dict[str, dict[str, Any]] = {
    README: {},
    "head widths": {"prune_head_dims": True},
    "whole heads": {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": RATIO},
    "no attention": {"prune_num_heads": False, "prune_head_dims": False},
}
"""Calls that are tried, the best outcome counts; the options are those of calls that are told the numbers of heads."""
_LARGEST_ID = 2**24
_HEADS = ("num_heads", "heads", "num_attention_heads", "n_head", "n_heads")
_FEWER_HEADS = ("num_key_value_heads", "groups", "num_kv_heads")
_PROJECTIONS = {
    *("q", "k", "v", "qkv", "kv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "qkv_proj"),
    *("q_lin", "k_lin", "v_lin", "query_proj", "key_proj", "value_proj", "query_key_value"),
}


def measure(variant: str, random: bool, name: str) -> Row:
    """One call of `VARIANTS`: what became of it, parameters before and after, the error against the masked module."""
    import torch
    import torch_pruning

    torch.set_num_threads(1)
    built = prepared(name)
    if built is None:
        return {"outcome": OUTCOMES[0]}
    module, inputs = built
    heads = heads_of(module)
    widths = {layer: layer.out_features // number for layer, number in heads.items()}
    multiple = multiple_of_heads(module)
    row: Row = {"parameters_before": count(module)}
    options = {"num_heads": heads, "round_to": multiple if multiple > 1 else None} if VARIANTS[variant] else {}
    importance = torch_pruning.importance.GroupMagnitudeImportance, torch_pruning.importance.RandomImportance
    number_elements(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pruner = torch_pruning.pruner.BasePruner(
                module,
                inputs,
                importance=importance[random](),
                pruning_ratio=RATIO,
                ignored_layers=output_layers(module, inputs),
                **{"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, **options, **VARIANTS[variant]},
            )
            row["groups"] = row["normalised_groups"] = 0
            for group in pruner.step(interactive=True):
                row["groups"] += 1
                row["normalised_groups"] += any(_is_norm(dependency.target.module) for dependency, _ in group)
                group.prune()
        except Exception as error:
            return row | {"outcome": "raises", "failure": first_line(error)}
        row["parameters"] = count(module)
        if row["parameters"] >= row["parameters_before"]:
            return row | {"outcome": "nothing pruned"}
        if variant == "whole heads":
            update_heads(module, widths)
        try:
            with torch.no_grad():
                after = outputs(module, inputs)
        except Exception as error:
            return row | {"outcome": "forward fails", "failure": first_line(error)}
    return row | _compared(name, module, inputs, after)


def has_heads(name: str) -> Row:
    """Whether there are numbers of heads to tell: then calls with options may do better."""
    built = prepared(name)
    return {"has_heads": built is not None and (bool(heads_of(built[0])) or multiple_of_heads(built[0]) > 1)}


def prepared(name: str) -> tuple[Any, tuple[Any, ...]] | None:
    """The torch module and its example inputs, always the same ones; None for what is a graph already."""
    import torch

    from tests.zoo import entry as zoo

    module = next(file for file, names in FILES.items() if name in names)
    entry = importlib.import_module(f"tests.zoo.{module}").ENTRIES[name]
    torch.manual_seed(0)
    built = entry.build()
    if not isinstance(built, torch.nn.Module):
        return None
    for prepare in (zoo._strengthen, zoo._fill_statistics, zoo._spread_constants):
        prepare(built)
    return built.eval(), entry.inputs()


def number_elements(module: Any) -> None:
    """Put the position of each element into the gradient of its parameter."""
    import torch

    for parameter in module.parameters():
        if parameter.numel() < _LARGEST_ID and parameter.dtype in (torch.float32, torch.float64):
            parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape)


def _compared(name: str, pruned: Any, inputs: tuple[Any, ...], after: list[np.ndarray]) -> Row:
    import torch

    original, _ = prepared(name) or (None, ())
    untie(original)
    with torch.no_grad():
        before = outputs(original, inputs)
        if [array.shape for array in before] != [array.shape for array in after]:
            shapes = [list(array.shape) for array in before], [list(array.shape) for array in after]
            return {"outcome": "output shape changes", "failure": f"{shapes[0]} became {shapes[1]}"}
        if not mask(original, pruned):
            return {"outcome": "no masked reference"}
        masked = outputs(original, inputs)
    error = compare_outputs(masked, after)
    found: Row = {"error": error, "effect": compare_outputs(before, masked)}
    if error <= TOLERANCE:
        return found | {"outcome": "equals masked"}
    return found | {"outcome": "differs from masked", "failure": f"differs from the masked module by {error:.1e}"}


def untie(module: Any) -> None:
    """Give each use of a shared parameter a copy of its own, as Torch-Pruning cuts each use on its own."""
    import torch

    seen: set[int] = set()
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(part, name, torch.nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def mask(original: Any, pruned: Any) -> bool:
    """Zero what is gone from the parameters; False where a parameter shrank and carries no ids."""
    kept = dict(pruned.named_parameters(remove_duplicate=False))
    for name, parameter in original.named_parameters(remove_duplicate=False):
        smaller = kept.get(name)
        if smaller is None or (smaller.grad is None and smaller.shape != parameter.shape):
            return False
        if smaller.grad is not None and smaller.numel() < parameter.numel():
            keep = parameter.new_zeros(parameter.numel())
            keep[smaller.grad.flatten().long()] = 1
            parameter.mul_(keep.reshape(parameter.shape))
    return True


def output_layers(module: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Layers with weights from which the outputs come without another such layer in between: they must keep theirs.

    Where the autograd graph cannot be had so (torch.cond refuses hooks), all layers as wide as an output.
    """
    import torch

    try:
        return _layers_before_outputs(module, inputs)
    except torch._dynamo.exc.TorchDynamoException:
        widths = {size for array in outputs(module, inputs) for size in array.shape}
        sizes = ((part, getattr(part, "out_features", getattr(part, "out_channels", 0))) for part in module.modules())
        return [part for part, size in sizes if size in widths]


def _layers_before_outputs(module: Any, inputs: tuple[Any, ...]) -> list[Any]:
    import torch
    from torch import nn

    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
    made: dict[Any, Any] = {}

    def note(layer: Any, _: Any, result: Any) -> None:
        made.update({tensor.grad_fn: layer for tensor in _tensors(result) if tensor.grad_fn is not None})

    hooks = [part.register_forward_hook(note) for part in module.modules() if isinstance(part, layers)]
    try:
        with torch.enable_grad():
            pending = [tensor.grad_fn for tensor in _tensors(module(*inputs))]
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[Any, None] = {}
    seen: set[Any] = set()
    while pending:
        function = pending.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if function in made:
            found[made[function]] = None
        else:
            pending.extend(before for before, _ in function.next_functions)
    return list(found)


def heads_of(module: Any) -> dict[Any, int]:
    """`num_heads` of Torch-Pruning: projections of queries, keys and values beside which the number of heads stands.

    It stands in an attribute of the module that holds them, or in its `config`.
    """
    from torch import nn

    found: dict[Any, int] = {}
    for part in module.modules():
        for key, child in part.named_children():
            if key not in _PROJECTIONS or not isinstance(child, nn.Linear):
                continue
            names = (*(_FEWER_HEADS if key[0] in "kv" else ()), *_HEADS)
            places = [(place, _attribute(place, names)) for place in (part, getattr(part, "config", None))]
            number = next((getattr(place, name) for place, name in places if name is not None), 0)
            if number > 0 and child.out_features % number == 0:
                found[child] = number
    return found


def update_heads(module: Any, widths: Mapping[Any, int]) -> None:
    """Write the number of heads that is left where the module keeps it, as the examples of Torch-Pruning do."""
    for part in module.modules():
        for key, child in part.named_children():
            name = _attribute(part, (*(_FEWER_HEADS if key[0] in "kv" else ()), *_HEADS))
            if child in widths and name is not None:
                setattr(part, name, child.out_features // widths[child])


def multiple_of_heads(module: Any) -> int:
    """What the width of a stream through `nn.MultiheadAttention` must be a multiple of; 1 without any."""
    from torch import nn

    return lcm(*(part.num_heads for part in module.modules() if isinstance(part, nn.MultiheadAttention)))


def _attribute(part: Any, names: Sequence[str]) -> str | None:
    return next((name for name in names if isinstance(getattr(part, name, None), int)), None)


def outputs(module: Any, inputs: tuple[Any, ...]) -> list[np.ndarray]:
    """All tensors that a module returns."""
    return [tensor.detach().numpy() for tensor in _tensors(module(*inputs))]


def count(module: Any) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _is_norm(module: Any) -> bool:
    from torch import nn

    return isinstance(module, (nn.LayerNorm, nn.GroupNorm))


def _tensors(tree: Any) -> Iterator[Any]:
    import torch
    from torch.utils import _pytree

    leaves: Sequence[Any] = _pytree.tree_leaves(tree)
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
