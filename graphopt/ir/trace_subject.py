"""What is traced: a torch module or program seen as a plain function from tensors to tensors.

Both exporters get the same flat view (tensors in, tuple of tensors out), so nested arguments, keyword
arguments, dataclasses and outputs that are not tensors are dealt with once, here, and names do not depend on
the exporter. torch is imported inside the functions: the ONNX path must not load it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import DataError, TraceError
from graphopt.ir.trace_blame import first_line, user_code
from graphopt.ir.trace_program import program_axes, program_inputs, program_module
from graphopt.ir.trace_shapes import DynamicAxis, dynamic_axes

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Subject:
    """A module as a function from a flat list of tensors to a flat list of tensors.

    Attributes:
        module: the user's module (for a program, the module that runs it).
        flat: `forward(*tensors) -> tuple[Tensor, ...]`; holds `module` as its child named "module".
        tensors: the example inputs, detached copies, in the order of the flattened arguments.
        input_names: one per tensor, from the parameters of `forward` and the keys below them.
        axes: one per tensor: the dynamic axes asked for.
        notes: what the user should know about how the module is traced.
    """

    module: torch.nn.Module
    flat: torch.nn.Module
    tensors: list[torch.Tensor]
    input_names: list[str]
    axes: list[dict[int, DynamicAxis]]
    notes: list[str]

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the module eagerly. It works on copies, so a module that writes to its inputs does no harm."""
        import torch

        with torch.no_grad():
            return list(self.flat(*(tensor.clone() for tensor in tensors)))

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name; tied ones occur under each of their names."""
        return {
            **dict(self.module.named_parameters(remove_duplicate=False)),
            **dict(self.module.named_buffers(remove_duplicate=False)),
        }


def make_subject(source: object, args: object, kwargs: Mapping[str, Any] | None, dynamic_shapes: object) -> Subject:
    """Flatten a module or program and its example inputs.

    Raises:
        DataError: `source` is not a module, or the arguments hold no tensor or do not fit `dynamic_shapes`.
        TraceError: the parameters have no values yet, or a program contains training code that has no
            inference form.
    """
    import torch

    notes: list[str] = []
    if isinstance(source, torch.export.ExportedProgram):
        if args is None and not kwargs:
            args, kwargs = program_inputs(source)
        module = program_module(source, notes)
    elif isinstance(source, torch.nn.Module):
        module = _unwrapped(source)
        notes += _training_notes(module)
    else:
        raise DataError(
            f"cannot trace a {type(source).__name__}",
            help="pass a torch.nn.Module or a torch.export.ExportedProgram; for ONNX files use graphopt.load",
        )
    _check_values(module)
    if args is None and not kwargs:
        raise DataError(
            "a torch module is traced on example inputs, and there are none",
            where=type(module).__name__,
            help="pass args=(...): tensors of the shapes and dtypes that forward() takes",
        )
    subject = _flattened(module, _positional(args), dict(kwargs or {}), dynamic_shapes, notes)
    if isinstance(source, torch.export.ExportedProgram) and dynamic_shapes is None:
        subject = dataclasses.replace(subject, axes=_axes_of_program(source, subject))
    return subject


def _flattened(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: object,
    notes: list[str],
) -> Subject:
    import torch
    from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

    arguments = _with_dataclasses_registered(pytree.tree_map(_as_tensor, (args, kwargs)))
    leaves, structure = pytree.tree_flatten_with_path(arguments)
    places = [index for index, (_, leaf) in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if not places:
        raise DataError("the example inputs hold no tensor", help="pass tensors (or numpy arrays) that forward() takes")
    parameters = _parameter_names(module)
    paths = [_argument_path(path, parameters) for path, _ in leaves]
    baked = {
        ".".join(map(str, paths[index])): leaf
        for index, (_, leaf) in enumerate(leaves)
        if index not in places and leaf is not None
    }
    if baked:
        values = ", ".join(f"{name}={value!r:.60}" for name, value in baked.items())
        notes.append(f"arguments that are no tensors are fixed in the model: {values}")
    tensors = [leaves[place][1].detach().clone() for place in places]
    return Subject(
        module,
        _flat_module(module, [leaf for _, leaf in leaves], places, structure),
        tensors,
        unique_names([path_name(paths[place], "input") for place in places], taken=set()),
        dynamic_axes(module, args, kwargs, dynamic_shapes, [paths[place] for place in places], tensors),
        notes,
    )


def _flat_module(module: torch.nn.Module, leaves: list[Any], places: list[int], structure: Any) -> torch.nn.Module:
    """`module` behind a signature of tensors only; the leaves that are not tensors are filled in as they
    were."""
    import torch
    from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

    fixed = [None if index in set(places) else leaf for index, leaf in enumerate(leaves)]

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.training = False

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            filled = list(fixed)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            args, kwargs = pytree.tree_unflatten(filled, structure)
            return tuple(leaf for leaf in output_leaves(self.module(*args, **kwargs)) if _is_tensor(leaf))

    return Flat()


def output_leaves(outputs: Any) -> list[Any]:
    """The leaves of what a module returned, in order; dataclasses are opened like dicts."""
    from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

    return pytree.tree_leaves(_with_dataclasses_registered(outputs))


def output_names(subject: Subject) -> list[str]:
    """Names of the tensor outputs, from the keys of the structure that the module returns.

    A lone tensor is called "output", the items of a tuple "output_0", "output_1", those of a dict by their
    keys.

    Raises:
        DataError: the module fails on the example inputs, or returns no tensor.
    """
    import torch
    from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

    captured: list[Any] = []
    hook = subject.module.register_forward_hook(lambda module, args, outputs: captured.append(outputs))
    try:
        subject.run(subject.tensors)
    except Exception as error:
        raise DataError(
            f"the module itself fails on these example inputs: {type(error).__name__}: {first_line(error)}",
            where=user_code(error),
            help="args and kwargs need the number, shapes, dtypes and device that forward() takes; "
            + ", ".join(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
                for name, tensor in zip(subject.input_names, subject.tensors, strict=True)
            ),
        ) from error
    finally:
        hook.remove()
    leaves, _ = pytree.tree_flatten_with_path(_with_dataclasses_registered(captured[-1]))
    named = [(path_name([_key(entry) for entry in path], "output"), leaf) for path, leaf in leaves]
    names = [name for name, leaf in named if isinstance(leaf, torch.Tensor)]
    dropped = [
        f"{name} ({type(leaf).__name__})"
        for name, leaf in named
        if leaf is not None and not isinstance(leaf, torch.Tensor)
    ]
    if dropped:
        subject.notes.append(f"outputs that are no tensors are left out: {', '.join(dropped)}")
    if not names:
        raise DataError(
            "the module returns no tensor on these example inputs",
            where=type(subject.module).__name__,
            help="forward() must return a tensor, or a tuple, list, dict or dataclass that holds tensors",
        )
    return names


@contextlib.contextmanager
def inference_state(subject: Subject) -> Generator[None]:
    """Everything inside runs the module as in inference; afterwards the module is exactly as it was.

    Training flags are set one by one, not through `module.eval()`, which modules override with side effects
    (LoRA merges its weights there). Buffers that a forward pass writes to get their values back.
    """
    import torch

    modules = list(subject.module.modules())
    modes = [module.training for module in modules]
    # A buffer may be replaced (`self.cache = ...`) or written to. TorchScript modules have no table of their own.
    tables = [module._buffers for module in modules]  # pyright: ignore[reportPrivateUsage]
    before = [(table, dict(table)) for table in tables if type(table) is dict]
    buffers = [(buffer, buffer.detach().clone()) for buffer in subject.module.buffers()]
    versions = [buffer._version for buffer, _ in buffers]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in modules:
            module.training = False
        # The fused encoder kernel of eager mode has no ONNX form; its parts have.
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for table, entries in before:
            table.update(entries)
        with torch.no_grad():
            for (buffer, values), version in zip(buffers, versions, strict=True):
                if buffer._version != version:
                    buffer.copy_(values)


def _training_notes(module: torch.nn.Module) -> list[str]:
    """What to tell the user about a module that was left in training mode."""
    training = [part for part in module.modules() if part.training]
    if not training:
        return []
    affected = Counter(
        type(part).__name__
        for part in training
        if re.search(r"Dropout|BatchNorm|RReLU|InstanceNorm", type(part).__name__)
    )
    which = ", ".join(f"{count} {name}" for name, count in sorted(affected.items()))
    return ["the module is in training mode; it was traced in eval mode" + (f" ({which})" if which else "")]


def path_name(path: Sequence[object], root: str) -> str:
    """A readable value name for a place in nested arguments or outputs.

    Example:
        >>> path_name(["past", 0, "key"], "input"), path_name([], "output"), path_name([1], "output")
        ('past.0.key', 'output', 'output_1')
    """
    name = ".".join(re.sub(r"[^0-9A-Za-z_]", "_", str(key)) for key in path)
    if not name:
        return root
    return f"{root}_{name}" if name[0].isdigit() else name


def unique_names(names: Sequence[str], taken: set[str], role: str = "") -> list[str]:
    """The names, with `_<role>` and then a number appended where one is taken already.

    Example:
        >>> unique_names(["x", "y"], {"x"}, "output")
        ['x_output', 'y']
    """
    used, unique = set(taken), list[str]()
    for name in names:
        choices = [name, *([f"{name}_{role}"] if role else [])]
        number = 1
        while choices[0] in used:
            choices = choices[1:] or [f"{name}_{number}"]
            number += 1
        used.add(choices[0])
        unique.append(choices[0])
    return unique


def _is_tensor(leaf: object) -> bool:
    import torch

    return isinstance(leaf, torch.Tensor)


def _as_tensor(leaf: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(leaf)) if isinstance(leaf, np.ndarray) else leaf


def _positional(args: object) -> tuple[Any, ...]:
    if args is None:
        return ()
    return tuple(args) if isinstance(args, (tuple, list)) and not hasattr(args, "_fields") else (args,)


def _with_dataclasses_registered(tree: Any) -> Any:
    """`tree`, after torch.export has been told of every dataclass in it."""
    import torch
    from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

    while True:
        unknown = {
            type(leaf)
            for leaf in pytree.tree_leaves(tree)
            if dataclasses.is_dataclass(leaf) and not isinstance(leaf, (type, torch.Tensor))
        }
        if not unknown:
            return tree
        for kind in unknown:
            torch.export.register_dataclass(kind)


def _key(entry: Any) -> object:
    """The index, key or attribute name in one entry of a pytree path."""
    for attribute in ("idx", "key", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def _parameter_names(module: torch.nn.Module) -> tuple[list[str], str]:
    """Names of the positional parameters of forward, and of its `*args`."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return [], "input"
    positional = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    rest = [parameter.name for parameter in parameters if parameter.kind is parameter.VAR_POSITIONAL]
    return positional, rest[0] if rest else "input"


def _argument_path(path: Sequence[Any], parameters: tuple[list[str], str]) -> tuple[object, ...]:
    """The path of a leaf below the parameter of forward that it belongs to: `("past", 0, "key")`."""
    part, key, *rest = [_key(entry) for entry in path]
    positional, variadic = parameters
    if part == 1:
        return (key, *rest)
    index = int(str(key))
    if index < len(positional):
        return (positional[index], *rest)
    return (variadic, index - len(positional), *rest)


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module behind torch.compile and the data-parallel wrappers, which export cannot see through."""
    import torch

    while True:
        if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), torch.nn.Module):
            module = module._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return module


def _check_values(module: torch.nn.Module) -> None:
    """Raise `TraceError` where a parameter has no values: lazy modules, the meta device."""
    import torch

    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise TraceError(
                "the module has parameters without a shape",
                where=name,
                help="run the module once on an example input, so that its lazy layers get their sizes",
            )
        if tensor.is_meta:
            raise TraceError(
                "the module has parameters without values (meta device)",
                where=name,
                help="load the weights: module.to_empty(device='cpu'), then module.load_state_dict(...)",
            )


def _axes_of_program(program: torch.export.ExportedProgram, subject: Subject) -> list[dict[int, DynamicAxis]]:
    axes = program_axes(program)
    if len(axes) != len(subject.tensors):
        raise DataError(
            f"the program takes {len(axes)} tensors, the example inputs hold {len(subject.tensors)}",
            help="pass the inputs that it was exported with, or none: it carries its own",
        )
    return axes
