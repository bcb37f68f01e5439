"""`trace`: names, structures, dynamic axes, verification and fall-back, errors, and that the module stays as it was."""

from __future__ import annotations

import copy
import dataclasses
import logging
import subprocess
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.export import Dim  # noqa: E402
from torch.nn import functional  # noqa: E402

from graphopt.errors import DataError, TraceError  # noqa: E402
from graphopt.ir import trace as trace_module  # noqa: E402
from graphopt.ir.compare import within_exact  # noqa: E402
from graphopt.ir.session import open_session  # noqa: E402
from graphopt.ir.trace import trace  # noqa: E402
from graphopt.ir.trace_export import export_dynamo, export_torchscript  # noqa: E402
from graphopt.ir.trace_shapes import tiled  # noqa: E402

pytestmark = pytest.mark.torch

BOTH = [["torch.export"], ["TorchScript"]]


class Residual(nn.Module):
    """A small ResNet block with dropout and a tied head; in training mode by default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)
        self.tied = nn.Linear(8, 5, bias=False)
        self.tied.weight = self.fc.weight
        nn.init.uniform_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 2.0)

    def forward(self, image, unused=None, past=None, flag=True):
        x = functional.relu(self.bn(self.conv(image)))
        x = self.drop(x + x * x).mean((2, 3))
        y = self.fc(x) + self.tied(x)
        if past is not None:
            y = y + past[0]["key"]
        return {"logits": y, "nothing": None, "count": 3, "pooled": (x, x.sum(-1))}


@dataclasses.dataclass
class Result:
    score: torch.Tensor
    extra: torch.Tensor | None = None


Pair = namedtuple("Pair", ["first", "second"])


class Returns(nn.Module):
    """A linear layer whose output is put into a structure."""

    def __init__(self, pack: Callable) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.pack = pack

    def forward(self, x):
        return self.pack(x, self.fc(x))


def only(monkeypatch: pytest.MonkeyPatch, exporters: Sequence[str]) -> None:
    """Let trace try these exporters only."""
    table = {name: trace_module.EXPORTERS[name] for name in exporters}
    monkeypatch.setattr(trace_module, "EXPORTERS", table)


def notes(model: ir.Model) -> str:
    return "\n".join(model.meta["graphopt.notes"])


def inputs(model: ir.Model) -> dict[str, str]:
    return {str(value.name): str(value.shape) for value in model.graph.inputs}


def outputs(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.outputs]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def agrees(model: ir.Model, feeds: dict[str, torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    found = open_session(model).run_feeds({name: tensor.numpy() for name, tensor in feeds.items()})
    return within_exact([tensor.detach().numpy() for tensor in expected], found)


@pytest.fixture(scope="module", params=BOTH, ids=lambda exporters: exporters[0])
def residual(request: pytest.FixtureRequest) -> tuple[Residual, ir.Model]:
    """A module in training mode and its trace, batch and one spatial axis open, by either exporter."""
    module = Residual()
    with pytest.MonkeyPatch.context() as monkeypatch:
        only(monkeypatch, request.param)
        model = trace(
            module,
            (torch.randn(2, 3, 8, 8), torch.ones(1)),
            {"past": [{"key": torch.randn(2, 5)}], "flag": False},
            dynamic_shapes={
                "image": {0: Dim("batch"), 2: Dim.AUTO},
                "unused": None,
                "past": [{"key": {0: "batch"}}],
                "flag": None,
            },
        )
    return module, model


def test_batch_normalization_is_kept(residual):
    assert operators(residual[1]).count("BatchNormalization") == 1
    assert "Dropout" not in operators(residual[1])


def test_inputs_are_named_by_forward_and_unused_ones_stay(residual):
    assert inputs(residual[1]) == {
        "image": "[batch,3,image_dim_2,8]",
        "unused": "[1]",
        "past.0.key": "[batch,5]",
    }


def test_outputs_are_named_by_the_keys_of_the_result(residual):
    assert outputs(residual[1]) == ["logits", "pooled.0", "pooled.1"]


def test_weights_are_named_by_the_module_and_tied_ones_stay_one(residual):
    module, model = residual
    names = set(model.graph.initializers)
    assert {"conv.weight", "bn.running_var", "fc.weight", "fc.bias"} <= names
    assert "tied.weight" not in names
    np.testing.assert_array_equal(
        model.graph.initializers["fc.weight"].const_value.numpy(), module.fc.weight.detach().numpy()
    )


def test_another_size_computes_the_same(residual):
    module, model = residual
    image, key = torch.randn(3, 3, 12, 8), torch.randn(3, 5)
    module = copy.deepcopy(module).eval()
    result = module(image, None, [{"key": key}])
    feeds = {"image": image, "unused": torch.ones(1), "past.0.key": key}
    assert agrees(model, feeds, [result["logits"], *result["pooled"]])


def test_training_mode_is_reported_and_restored(residual):
    module, model = residual
    assert "training mode" in notes(model)
    assert "1 BatchNorm2d, 1 Dropout" in notes(model)
    assert all(part.training for part in module.modules())


def test_fixed_arguments_are_reported(residual):
    assert "flag=False" in notes(residual[1])


def test_the_model_owns_its_weights(residual):
    module, model = residual
    before = model.graph.initializers["conv.weight"].const_value.numpy().copy()
    with torch.no_grad():
        module.conv.weight.add_(1.0)
    np.testing.assert_array_equal(model.graph.initializers["conv.weight"].const_value.numpy(), before)
    with torch.no_grad():
        module.conv.weight.sub_(1.0)


@pytest.mark.parametrize(
    ("pack", "names"),
    [
        (lambda x, y: y, ["output"]),
        (lambda x, y: (y, y + 1), ["output_0", "output_1"]),
        (lambda x, y: Result(y), ["score"]),
        (lambda x, y: {"a": Result(y, y * 2), "b c": [y]}, ["a.score", "a.extra", "b_c.0"]),
        (lambda x, y: Pair(y, x), ["first", "second"]),
        (lambda x, y: {"x": y, "fc.bias": x + 1}, ["x_output", "fc_bias"]),
    ],
    ids=["tensor", "tuple", "dataclass", "nested", "namedtuple", "clash"],
)
def test_structures_of_outputs(pack, names, monkeypatch):
    only(monkeypatch, ["TorchScript"])  # the flat view is shared, and this exporter is the quick one
    model = trace(Returns(pack).eval(), torch.randn(2, 4))
    assert outputs(model) == names
    assert list(inputs(model)) == ["x"]


def test_a_dataclass_through_torch_export():
    assert outputs(trace(Returns(lambda x, y: Result(y, None)).eval(), torch.randn(2, 4))) == ["score"]


def test_output_names_that_the_exporter_uses_inside():
    class Clash(nn.Module):
        def forward(self, x):
            y = functional.relu(x)
            return {"mul": y + 1, "relu": y * 2, "add": functional.relu(y * 2 - 1)}

    module, x = Clash().eval(), torch.randn(2, 4)
    model = trace(module, x)
    assert outputs(model) == ["mul", "relu", "add"]
    assert not notes(model)
    assert agrees(model, {"x": x}, list(module(x).values()))


def test_numpy_arrays_and_keyword_arguments_only(monkeypatch):
    only(monkeypatch, ["TorchScript"])
    model = trace(nn.Linear(4, 3), kwargs={"input": np.ones((2, 4), np.float32)})
    assert inputs(model) == {"input": "[2,4]"}


def test_variadic_arguments(monkeypatch):
    class Total(nn.Module):
        def forward(self, *parts):
            return sum(parts)

    only(monkeypatch, ["TorchScript"])
    shapes = ((({0: "n"}), {0: "n"}),)
    model = trace(Total(), (torch.ones(2, 3), torch.ones(2, 3)), dynamic_shapes=shapes)
    assert inputs(model) == {"parts.0": "[n,3]", "parts.1": "[n,3]"}


def test_integer_tokens_keep_their_range_and_one_is_no_size():
    """A batch of 1 is no reason to make the axis static; 7 tokens of a vocabulary of 9 stay in range at size 14."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    shapes = {"input_ids": {0: Dim("batch"), 1: Dim("tokens", max=64)}}
    model = trace(Tokens().eval(), torch.arange(7)[None], dynamic_shapes=shapes)
    assert inputs(model) == {"input_ids": "[batch,tokens]"}
    assert model.graph.inputs[0].dtype == ir.DataType.INT64
    assert "embed.weight" in model.graph.initializers
    assert "head.weight" not in model.graph.initializers
    assert not notes(model)


def test_lstm_with_open_batch_and_time():
    module = nn.LSTM(4, 6, batch_first=True).eval()
    model = trace(module, torch.randn(1, 5, 4), dynamic_shapes=({0: "batch", 1: "time"},))
    assert "LSTM" in operators(model)
    assert str(model.graph.outputs[0].shape) == "[batch,time,6]"
    assert not notes(model)
    x = torch.randn(3, 9, 4)
    y, (h, c) = module(x)
    assert outputs(model) == ["output_0", "output_1.0", "output_1.1"]
    assert agrees(model, {"input": x}, [y, h, c])


def test_a_dynamic_axis_of_size_one_stays_dynamic():
    model = trace(nn.GRU(4, 6, batch_first=True).eval(), torch.randn(1, 5, 4), dynamic_shapes=({0: Dim("batch")},))
    assert inputs(model) == {"input": "[batch,5,4]"}
    assert not notes(model)  # torch.export takes 1 for a broadcast; that is no reason to fall back


def test_exported_program_in_training_mode_with_open_batch():
    module = Residual()
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.randn(2, 3, 8, 8),), dynamic_shapes={"image": {0: Dim("batch", min=2, max=16)}}
        )
        before = str(program.graph)
        counted = program.state_dict["bn.num_batches_tracked"].clone()
        model = trace(program)
    assert str(program.graph) == before
    assert torch.equal(program.state_dict["bn.num_batches_tracked"], counted)
    assert inputs(model) == {"image": "[image_dim_0,3,8,8]"}
    assert outputs(model) == ["logits", "pooled.0", "pooled.1"]
    assert "1 batch_norm, 1 dropout" in notes(model)
    assert "conv.weight" in model.graph.initializers
    image = torch.randn(5, 3, 8, 8)
    result = module.eval()(image)
    assert agrees(model, {"image": image}, [result["logits"], *result["pooled"]])


def test_half_precision(monkeypatch):
    only(monkeypatch, ["TorchScript"])
    model = trace(nn.Linear(4, 3).half(), torch.randn(2, 4).half())
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16


def test_bfloat16_is_exported_even_where_it_cannot_be_verified():
    model = trace(nn.Sequential(nn.Linear(4, 3), nn.SiLU()).bfloat16(), torch.randn(2, 4).bfloat16())
    assert model.graph.outputs[0].dtype == ir.DataType.BFLOAT16
    assert model.graph.initializers["0.weight"].const_value.dtype == ir.DataType.BFLOAT16


def test_the_module_is_left_as_it_was(monkeypatch):
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.fc.weight.requires_grad_(False)
            self.frozen = nn.BatchNorm1d(4).eval()
            self.register_buffer("calls", torch.zeros(1))

        def train(self, mode: bool = True):
            raise AssertionError("train() of the user may do anything, and is not to be called")

        def forward(self, x):
            self.calls += 1
            x.mul_(2)
            return self.frozen(self.fc(x))

    only(monkeypatch, ["TorchScript"])
    module, x = Stateful(), torch.ones(2, 4)
    module.fc.bias.grad = torch.ones(4)
    hook = module.fc.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(module.state_dict())
    trace(module, x)
    with pytest.raises(DataError):
        trace(module, torch.ones(2, 5))
    assert torch.equal(x, torch.ones(2, 4))
    assert module.training
    assert not module.frozen.training
    assert not module.fc.weight.requires_grad
    assert torch.equal(module.fc.bias.grad, torch.ones(4))
    assert list(module.fc._forward_hooks) == [hook.id]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def corrupted(exporter: Callable, output: int, factor: float) -> Callable:
    """The exporter, with one output multiplied by a number."""

    def export(*args: object) -> ir.Model:
        model = exporter(*args)
        value = model.graph.outputs[output]
        tensor = ir.tensor(np.full((), factor, np.float32), name="factor")
        constant = ir.node("Constant", [], {"value": tensor})
        node = ir.node("Mul", [value, constant.outputs[0]])
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        name, value.name = value.name, "before"
        node.outputs[0].name = name
        model.graph.extend([constant, node])
        model.graph.outputs[output] = node.outputs[0]
        return model

    return export


def two_outputs() -> nn.Module:
    return Returns(lambda x, y: {"same": y, "other": y * 2 + 1}).eval()


def test_a_wrong_export_falls_back_to_the_other_exporter(monkeypatch):
    table = {"torch.export": corrupted(export_dynamo, 1, 1.001), "TorchScript": export_torchscript}
    monkeypatch.setattr(trace_module, "EXPORTERS", table)
    module, x = two_outputs(), torch.randn(2, 4)
    model = trace(module, x)
    assert "exported with TorchScript; torch.export failed: output `other` differs by" in notes(model)
    assert agrees(model, {"x": x}, list(module(x).values()))


def test_two_wrong_exports_name_the_output_and_by_how_much(monkeypatch):
    table = {
        "torch.export": corrupted(export_torchscript, 1, 1.001),
        "TorchScript": corrupted(export_torchscript, 0, 2.0),
    }
    monkeypatch.setattr(trace_module, "EXPORTERS", table)
    with pytest.raises(TraceError) as caught:
        trace(two_outputs(), torch.randn(2, 4))
    assert "torch.export: output `other` differs by 1.0e-03 of its scale (allowed: 1e-04)" in caught.value.what
    assert "TorchScript: output `same` differs by 1.0e+00" in caught.value.what


def test_an_export_that_is_right_at_the_example_size_only_is_found_out(monkeypatch):
    class Shifted(nn.Module):
        def forward(self, x):
            return x * float(x.shape[0])

    only(monkeypatch, ["TorchScript"])  # the tracer fixes the number 3
    with pytest.raises(TraceError, match=r"differs by 5\.0e-01"):
        trace(Shifted(), torch.randn(3, 4), dynamic_shapes=({0: "n"},))


def test_a_size_that_the_module_refuses_is_a_note(monkeypatch):
    class Fixed(nn.Module):
        def forward(self, x):
            if x.shape[0] != 4:
                raise ValueError("four, please")
            return x + 1

    only(monkeypatch, ["TorchScript"])
    model = trace(Fixed(), torch.ones(4, 2), dynamic_shapes=({0: "n"},))
    assert "verified at one size only, n=4: the module itself refuses others (n=8: four, please)" in notes(model)


def test_an_axis_that_became_static_is_not_accepted(monkeypatch):
    class Static(nn.Module):
        def forward(self, x):
            return x + torch.ones(4, 2)

    only(monkeypatch, ["torch.export"])
    with pytest.raises(TraceError, match=r"axis 0 of input `x` came out as 4, not dynamic|Constraints violated"):
        trace(Static(), torch.ones(4, 2), dynamic_shapes=({0: Dim("n")},))


def test_random_modules_are_refused(monkeypatch):
    class Noisy(nn.Module):
        def forward(self, x):
            return functional.dropout(x, 0.5)

    only(monkeypatch, ["TorchScript"])
    with pytest.raises(TraceError, match="different outputs for the same inputs"):
        trace(Noisy().eval(), torch.ones(8, 8))


def test_modules_without_values_and_without_outputs():
    with pytest.raises(TraceError, match="without a shape"):
        trace(nn.LazyLinear(3), torch.ones(2, 4))
    with pytest.raises(TraceError, match="meta device"):
        trace(nn.Linear(4, 3, device="meta"), torch.ones(2, 4))
    with pytest.raises(DataError, match="returns no tensor"):
        trace(Returns(lambda x, y: {"count": 3}), torch.ones(2, 4))


def test_exporters_are_silent(capfd):
    class Loud(nn.Module):
        def forward(self, x):
            return x + len(x)

    torch_logger = logging.getLogger("torch")
    before = (list(torch_logger.handlers), torch_logger.propagate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(Loud(), torch.ones(2, 2))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert (torch_logger.handlers, torch_logger.propagate) == before


def test_tiled_keeps_values_and_tells_slices_apart():
    x = torch.arange(6.0).reshape(2, 3)
    larger = tiled(x, [4, 3])
    assert larger.shape == (4, 3)
    assert not torch.equal(larger[0], larger[2])
    assert set(larger.flatten().tolist()) == set(x.flatten().tolist())
    assert torch.equal(tiled(x, [1, 2]), x[:1, :2])


def test_import_does_not_load_torch():
    code = "import sys, graphopt.ir.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_outputs_that_are_no_tensors_are_reported(residual):
    assert "outputs that are no tensors are left out: count (int)" in notes(residual[1])


def test_a_failure_prints_nothing(capfd):
    class Unknown(nn.Module):
        def forward(self, x):
            return torch.histc(x)

    with pytest.raises(TraceError, match="torch cannot export Unknown"):
        trace(Unknown(), torch.ones(4))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_transformers_of_hugging_face(family, attention):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "attn_implementation": attention,
    }
    if family == "bert":
        module = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False)
        module = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 100, (2, 8))
    axes = {0: Dim("batch"), 1: Dim("tokens")}
    model = trace(
        module,
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )
    assert inputs(model) == {"input_ids": "[batch,tokens]", "attention_mask": "[batch,tokens]"}
    assert outputs(model) == ["logits"]
    assert {name for name, _ in module.named_parameters()} <= set(model.graph.initializers)
    ids = torch.randint(3, 100, (3, 11))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert agrees(model, feeds, [module(**feeds).logits])


def test_torchscript_modules_and_wrappers():
    module, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout()), torch.randn(2, 4)
    model = trace(torch.jit.trace(module.eval(), x), x)
    assert {"0.weight", "0.bias"} <= set(model.graph.initializers)
    wrapped = trace(nn.DataParallel(module.train()), x)
    assert "1 Dropout" in notes(wrapped)
    assert {"0.weight", "0.bias"} <= set(wrapped.graph.initializers)
    assert module.training


def test_a_dynamic_axis_that_the_module_cannot_have_is_an_error() -> None:
    class Join(torch.nn.Module):
        def forward(self, picture: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return torch.cat([picture, table], dim=1)

    inputs = (torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(TraceError) as caught:
        trace(Join(), inputs, dynamic_shapes={"picture": {0: "batch"}, "table": None})
    assert "batch" in str(caught.value)
