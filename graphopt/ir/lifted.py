"""The lifted graph as a module: what `lift` returns, and the contract of what is inserted into it.

torch is imported here; nothing imports this module before something is lifted.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from graphopt.errors import DataError, LiftError
from graphopt.ir.ops.torch.dtypes import following, torch_dtype
from graphopt.ir.ops.torch.sizes import HOST

if TYPE_CHECKING:
    from graphopt.ir.lower import Folding

VALUE = "onnx_value"
"""Key in `fx.Node.meta`: name of the ONNX value (or initializer) that the node computes."""
NODE = "onnx_node"
"""Key in `fx.Node.meta`: name of the ONNX node that the call stands for."""
INSERTIONS = "insertions"
"""Name of the child that holds what was inserted."""
ANCHOR = "_anchor"
"""Name of an empty buffer that says where the module is and in which float type."""


@dataclass(frozen=True)
class Interface:
    """How a lifted module meets the world.

    Attributes:
        inputs: names of the ONNX inputs, in order; those of the generated `forward` are the same as identifiers.
        outputs: names of the ONNX outputs, in order.
        element_types: `onnx_ir.DataType` of each input as a number, None where unknown.
        initializers: path of the parameter or buffer of each lifted initializer, by its ONNX name.
        trainable: the initializers that are parameters, not buffers.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    element_types: tuple[int | None, ...]
    initializers: Mapping[str, str]
    trainable: frozenset[str]


class Insertion(nn.Module):
    """Something trainable that is inserted into a lifted graph, trained with it, and folded to plain ONNX.

    The contract of every training method (ADR 0009). A subclass holds one module a place: `insert` puts them at
    values or weights by `LiftedModule.place`; the trainer calls `prepare` once, `advance` before every step and adds
    `penalty` to the loss; `lower` calls `fold`, after which nothing but constants and ONNX operators is left.
    """

    def insert(self, lifted: LiftedModule, path: str) -> None:
        """Put the modules in place; `path` is where this insertion lives in `lifted`.

        Raises:
            LiftError: a value or weight that it is for is not in the graph.
        """
        raise NotImplementedError

    def prepare(self, lifted: LiftedModule, batches: Sequence[Sequence[torch.Tensor]]) -> None:
        """See some inputs (in the order of `forward`) before training, to find ranges. Does nothing by default."""

    def advance(self, step: int, steps: int) -> None:
        """Move schedules on; called before training step `step` (from 0) of `steps`. Does nothing by default."""

    def settled(self, step: int, steps: int) -> bool:
        """Whether schedules have ended after `step` of `steps` steps; before that no weights are chosen as the best."""
        return True

    def penalty(self) -> torch.Tensor | float:
        """What is added to the loss; 0 by default."""
        return 0.0

    def fold(self, folding: Folding) -> None:
        """Write what was learned into the ONNX graph as constants and operators."""
        raise NotImplementedError


class LiftedModule(fx.GraphModule):
    """An ONNX graph as a trainable `torch.fx.GraphModule`, made by `graphopt.lift`.

    Called with tensors in the order of the model's inputs or by their names; returns a tensor, or a tuple where the
    model has several outputs. `run_feeds` takes and returns dictionaries by ONNX name.

    Attributes:
        interface: see `Interface`.
        insertions: what was inserted, by name, in the order of insertion.
    """

    interface: Interface
    insertions: nn.ModuleDict

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "LiftedModule") -> None:
        super().__init__(root, graph, class_name)
        for name, child in root._modules.items():
            self._modules[name] = child  # GraphModule copies what the graph names, and flattens containers
        self.register_buffer(ANCHOR, root.get_buffer(ANCHOR), persistent=False)
        self.__dict__["interface"] = root.__dict__["interface"]

    def _deepcopy_init(self) -> Callable[..., None]:
        return LiftedModule.__init__

    def __copy__(self) -> LiftedModule:
        copied = LiftedModule(self, self.graph)
        copied.meta = self.meta
        return copied

    def __reduce__(self) -> Any:
        raise LiftError(
            "a lifted module cannot be pickled", help="save its state_dict(), lift the model again, and load that"
        )

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.get_buffer(ANCHOR).device

    @property
    def dtype(self) -> torch.dtype:
        """The float type in which the module computes."""
        return self.get_buffer(ANCHOR).dtype

    def tensors(self, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
        """Inputs by ONNX name as tensors on the module's device, floats in its dtype, in the order of `forward`.

        Raises:
            DataError: an input is missing or unknown.
        """
        inputs = self.interface.inputs
        if set(feeds) != set(inputs):
            missing, unknown = sorted(set(inputs) - set(feeds)), sorted(set(feeds) - set(inputs))
            wrong = f"{', '.join(missing)} missing" if missing else f"{', '.join(unknown)} unknown"
            raise DataError(f"the inputs do not fit: {wrong}", help=f"inputs are {', '.join(inputs)}")
        tensors: list[torch.Tensor] = []
        for name, element_type in zip(inputs, self.interface.element_types, strict=True):
            tensor = as_tensor(feeds[name]).to(self.device)
            reference = torch_dtype(element_type) if element_type is not None else tensor.dtype
            if reference == self.reference_dtype:
                reference = self.dtype
            elif reference.is_floating_point and reference.itemsize >= 2:
                reference = following(self.dtype, self.reference_dtype, reference)
            tensors.append(tensor.to(reference))
        return tensors

    @property
    def reference_dtype(self) -> torch.dtype:
        """The float type of the ONNX model's weights."""
        return self.meta["reference_dtype"]

    def run_feeds(self, feeds: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run once by names: ONNX input name to array or tensor in, ONNX output name to tensor out.

        Raises:
            DataError: an input is missing or unknown.
        """
        outputs = self(*self.tensors(feeds))
        outputs = outputs if len(self.interface.outputs) > 1 else (outputs,)
        return dict(zip(self.interface.outputs, outputs, strict=True))

    def node_of(self, value: str) -> fx.Node:
        """The FX node that computes an ONNX value of the main graph.

        Raises:
            LiftError: there is none of that name.
        """
        for node in self.graph.nodes:
            if node.meta.get(VALUE) == value and node.op != "call_module":
                return node
        raise LiftError(f"no value {value!r} in the lifted graph", help="names are those of the ONNX model")

    def with_outputs(self, values: Collection[str]) -> LiftedModule:
        """The same module (parameters are shared) that returns further ONNX values after its own outputs, as a tuple.

        Raises:
            LiftError: there is no value of such a name, or it is a size.
        """
        if isinstance(values, str):
            raise LiftError("values is one string", help=f"give a list: with_outputs([{values!r}])")
        graph = fx.Graph()
        nodes: dict[fx.Node, fx.Node] = {}
        returned = graph.graph_copy(self.graph, nodes)
        own = list(returned) if isinstance(returned, (tuple, list)) else [returned]  # pyright: ignore[reportArgumentType]
        graph.output((*own, *(nodes[self._end(self._tensor_node(value))] for value in values)))
        tapped = LiftedModule(self, graph)
        # One dictionary for both: `to` puts new buffers in the place of old ones.
        tapped.__dict__.update(_parameters=self._parameters, _buffers=self._buffers)
        tapped.meta = self.meta
        tapped.interface = replace(self.interface, outputs=(*self.interface.outputs, *values))
        return tapped

    def attach(self, name: str, insertion: Insertion) -> None:
        """Insert something trainable under a name, behind what is there already.

        Raises:
            LiftError: the name is taken or no identifier, or the insertion does not fit; the graph is then as before.
        """
        allowed = name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
        if not allowed or hasattr(self.insertions, name):
            raise LiftError(f"an insertion cannot be named {name!r}", help="give each a fresh identifier")
        before = fx.Graph()
        before.output(before.graph_copy(self.graph, {}))
        self.insertions[name] = insertion
        try:
            insertion.insert(self, f"{INSERTIONS}.{name}")
            self.graph.lint()
            self.recompile()
        except Exception:
            del self.insertions[name]
            self.graph = before
            raise
        insertion.to(device=self.device)

    def place(self, value: str, target: str, consumers: Collection[str] | None = None) -> None:
        """Let a module (at path `target`) stand between an ONNX value and its consumers.

        Args:
            value: name of a value or initializer of the main graph.
            target: path of a child module that takes one tensor and returns one of the same shape.
            consumers: names of the ONNX nodes that are to read the result; None for all uses, outputs included
                (but for an output that is an input itself, which stays one).

        Raises:
            LiftError: no such value, it is a size, or a consumer does not read it.
        """
        source = self._end(self._tensor_node(value))
        chosen = _readers(source) if consumers is None else self._consumers(source, value, set(consumers))
        with self.graph.inserting_after(source):
            inserted = self.graph.call_module(target, (source,))
        inserted.meta[VALUE] = value
        for user in chosen:
            user.replace_input_with(source, inserted)

    def _end(self, node: fx.Node) -> fx.Node:
        """The last module that stands between a value and all of its consumers."""
        while len(_readers(node)) == 1:
            (user,) = _readers(node)
            if user.op != "call_module" or user.meta.get(VALUE) != node.meta.get(VALUE):
                break
            node = user
        return node

    def _tensor_node(self, value: str) -> fx.Node:
        """`node_of` a value that is a tensor, not a size on the host."""
        node = self.node_of(value)
        if node.target in HOST.values():
            raise LiftError(f"{value!r} is computed on the host, from sizes", help="name a value that is a tensor")
        return node

    def _consumers(self, source: fx.Node, value: str, wanted: set[str]) -> list[fx.Node]:
        chosen = [user for user in source.users if user.meta.get(NODE) in wanted]
        missing = wanted - {user.meta[NODE] for user in chosen}
        if missing:
            raise LiftError(f"{sorted(missing)[0]!r} does not read {value!r}", help="name nodes that do")
        return chosen


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value and can be made to read another: an output that is an input keeps its name, so it cannot."""
    return [user for user in node.users if not (node.op == "placeholder" and user.op == "output")]


def as_tensor(array: Any) -> torch.Tensor:
    """An array of any ONNX element type as a tensor of its own memory (types that torch lacks in 8 bits).

    Example:
        >>> as_tensor(np.ones(2, np.float32))
        tensor([1., 1.])
    """
    if isinstance(array, torch.Tensor):
        return array
    array = np.array(array)
    kind = array.dtype.name
    if kind in ("int4", "int2"):
        return torch.from_numpy(array.astype(np.int8))
    if kind in ("uint4", "uint2"):
        return torch.from_numpy(array.astype(np.uint8))
    if kind.startswith(("bfloat16", "float8")):
        storage = array.view(np.uint16 if array.itemsize == 2 else np.uint8)
        return torch.from_numpy(storage).view(getattr(torch, kind))
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a NumPy array; types that NumPy lacks come as those of ml_dtypes."""
    import ml_dtypes

    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name.startswith(("bfloat16", "float8")):
        storage = tensor.view(torch.uint16 if tensor.element_size() == 2 else torch.uint8).numpy()
        return storage.view(getattr(ml_dtypes, name))
    return tensor.numpy()
