"""The networks that the benchmarks run on: plain torch exports with random weights, cached outside the repository.

ResNet-20 and ResNet-56 carry trained weights from `../shared/data` where that folder exists.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from benchmarks import vision

CACHE = Path(platformdirs.user_cache_dir("graphopt")) / "benchmarks"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def exported(name: str, batch: int = 1) -> Path:
    """Path of the plain torch export of a network of `NETWORKS`; done once for each torch and transformers version."""
    versions = "-".join(f"{package}-{version(package)}" for package in ("torch", "transformers"))
    path = CACHE / versions / (f"{name}.onnx" if batch == 1 else f"{name}-batch{batch}.onnx")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        module, inputs = NETWORKS[name]()
        inputs = {key: value.repeat(batch, *[1] * (value.ndim - 1)) for key, value in inputs.items()}
        unfinished = path.with_suffix(".part")
        _export(module, inputs, unfinished)
        unfinished.replace(path)
    return path


def _export(module: Any, inputs: dict[str, Any], path: Path) -> None:
    """The exporter's own result as a user gets it: dynamo, its default optimisations."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module.eval(), (), kwargs=inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))


def resnet50() -> tuple[Any, dict[str, Any]]:
    """ResNet-50, 224 x 224."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    return _logits(ResNetForImageClassification(ResNetConfig(num_labels=1000))), _image(224)


def mobilenetv2() -> tuple[Any, dict[str, Any]]:
    """MobileNetV2 1.0, 224 x 224."""
    import torch
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(num_labels=1000, tf_padding=False)
    return _logits(MobileNetV2ForImageClassification(config)), _image(224)


def vit_s() -> tuple[Any, dict[str, Any]]:
    """ViT-S/16, 224 x 224."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    return _logits(ViTForImageClassification(config)), _image(224)


def bert_base() -> tuple[Any, dict[str, Any]]:
    """BERT-base with a classifier, 128 tokens."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokens = torch.randint(0, 30000, (1, 128))
    return _logits(BertForSequenceClassification(BertConfig()), "input_ids"), {"input_ids": tokens}


def _image(side: int) -> dict[str, Any]:
    import torch

    return {"pixel_values": torch.randn(1, 3, side, side)}


def _logits(model: Any, input_name: str = "pixel_values") -> Any:
    """The model with one input and its logits as the only output."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    class LogitsOfImage(Logits):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixel_values).logits

    class LogitsOfTokens(Logits):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids).logits

    return {"pixel_values": LogitsOfImage, "input_ids": LogitsOfTokens}[input_name]()


def cifar_resnet(depth: int) -> Any:
    """The CIFAR ResNet of `../shared/data` (option A shortcuts) with its trained weights."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.stride, self.extra = stride, outputs - inputs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.stride != 1 or self.extra:
                pad = (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
                x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], pad)
            return torch.relu(y + x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            width = 16
            for stage, outputs in enumerate((16, 32, 64), start=1):
                blocks = []
                for index in range((depth - 2) // 6):
                    blocks.append(Block(width, outputs, 2 if stage > 1 and index == 0 else 1))
                    width = outputs
                self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.linear = nn.Linear(64, 10)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.bn1(self.conv1(pixel_values)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(x.mean(dim=(2, 3)))

    network = Network()
    network.load_state_dict(load_file(DATA / f"resnet{depth}-cifar10.safetensors"))
    return network.eval()


def _vision(name: str, side: int, *, has_logits: bool = False) -> Callable[[], tuple[Any, dict[str, Any]]]:
    def build() -> tuple[Any, dict[str, Any]]:
        module = getattr(vision, name)()
        return (_logits(module) if has_logits else module), _image(side)

    return build


def _cifar(depth: int) -> Callable[[], tuple[Any, dict[str, Any]]]:
    return lambda: (cifar_resnet(depth), _image(32))


def cifar10(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images float32 [N, 3, 32, 32] and labels int64 [N] of "train" or "test"; decoded once, then cached."""
    path = CACHE / f"cifar10-{split}.npz"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(path, **_decode(split))
    loaded = np.load(path)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = (loaded["images"] / 255.0 - mean) / std
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32)), loaded["labels"]


def _decode(split: str) -> dict[str, np.ndarray]:
    from PIL import Image

    images, labels = [], []
    with tarfile.open(DATA / f"cifar10-{split}.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda entry: entry.name):
            if not member.name.endswith(".jpg"):
                continue
            file = archive.extractfile(member)
            assert file is not None
            images.append(np.asarray(Image.open(file).convert("RGB")))
            labels.append(CIFAR_CLASSES.index(Path(member.name).parent.name))
    return {"images": np.stack(images), "labels": np.array(labels, np.int64)}


NETWORKS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "vit-s": vit_s,
    "bert-base": bert_base,
    "mobilenetv3": _vision("mobilenetv3_large", 224),
    "efficientnet": _vision("efficientnet_b0", 224, has_logits=True),
    "convnext": _vision("convnext_tiny", 224, has_logits=True),
    "swin": _vision("swin_tiny", 224, has_logits=True),
    "edsr": _vision("edsr", 64),
    "resnet20": _cifar(20),
    "resnet56": _cifar(56),
}
"""Builders by name: the module and its example inputs by argument name."""
