"""More vision networks with random weights: what quantizers meet beside plain residual networks."""

from __future__ import annotations

from typing import Any


def efficientnet_b0() -> Any:
    """EfficientNet-B0: SiLU, depthwise convolutions, squeeze and excitation. Takes 224 x 224."""
    import torch
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    torch.manual_seed(0)
    config = EfficientNetConfig(
        image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, num_labels=1000
    )
    return EfficientNetForImageClassification(config)


def convnext_tiny() -> Any:
    """ConvNeXt-T: 7 x 7 depthwise convolutions, LayerNormalization, GELU. Takes 224 x 224."""
    import torch
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    return ConvNextForImageClassification(ConvNextConfig(num_labels=1000))


def swin_tiny() -> Any:
    """Swin-T: attention in shifted windows. Takes 224 x 224."""
    import torch
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    # torch's exporter trips over the fused attention of windows
    return SwinForImageClassification(SwinConfig(num_labels=1000, attn_implementation="eager"))


_MOBILENETV3_LARGE = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2),
    (3, 200, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1),
    (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2),
    (5, 960, 160, True, "hardswish", 1),
    (5, 960, 160, True, "hardswish", 1),
)
"""Kernel, expanded width, width, squeeze and excitation, activation, stride: table 1 of Howard et al. 2019."""


def mobilenetv3_large() -> Any:
    """MobileNetV3-Large (Howard et al. 2019, "Searching for MobileNetV3"). Takes 224 x 224."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    def convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int, activation: str) -> nn.Sequential:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        layers += [{"relu": nn.ReLU, "hardswish": nn.Hardswish}[activation]()] if activation else []
        return nn.Sequential(*layers)

    class Excitation(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            squeezed = max(8, (width // 4 + 4) // 8 * 8)
            self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.down(nn.functional.adaptive_avg_pool2d(x, 1)))
            return x * nn.functional.hardsigmoid(self.up(y))

    class Block(nn.Module):
        def __init__(
            self, inputs: int, kernel: int, hidden: int, outputs: int, excited: bool, activation: str, stride: int
        ) -> None:
            super().__init__()
            layers = [convolution(inputs, hidden, 1, 1, 1, activation)] if hidden != inputs else []
            layers.append(convolution(hidden, hidden, kernel, stride, hidden, activation))
            layers += [Excitation(hidden)] if excited else []
            layers.append(convolution(hidden, outputs, 1, 1, 1, ""))
            self.layers = nn.Sequential(*layers)
            self.adds = stride == 1 and inputs == outputs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layers(x)
            return x + y if self.adds else y

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, blocks = 16, list[nn.Module]()
            for kernel, hidden, outputs, excited, activation, stride in _MOBILENETV3_LARGE:
                blocks.append(Block(width, kernel, hidden, outputs, excited, activation, stride))
                width = outputs
            self.features = nn.Sequential(
                convolution(3, 16, 3, 2, 1, "hardswish"), *blocks, convolution(width, 960, 1, 1, 1, "hardswish")
            )
            self.head = nn.Sequential(nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.head(self.features(pixel_values).mean(dim=(2, 3)))

    return Network()


def edsr(blocks: int = 16, width: int = 64, scale: int = 2) -> Any:
    """EDSR baseline (Lim et al. 2017): residual blocks without normalisation, pixel shuffle. Takes any size."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(torch.relu(self.first(x)))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, width, 3, padding=1)
            self.body = nn.Sequential(*(Block() for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1))
            self.up = nn.Sequential(nn.Conv2d(width, width * scale**2, 3, padding=1), nn.PixelShuffle(scale))
            self.tail = nn.Conv2d(width, 3, 3, padding=1)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            x = self.head(pixel_values)
            return self.tail(self.up(x + self.body(x)))

    return Network()
