"""Vision transformers in miniature: from transformers by configuration, or by hand where the spelling matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.models.clip.modeling_clip import CLIPConfig, CLIPModel
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Config, ConvNextV2ForImageClassification
from transformers.models.cvt.modeling_cvt import CvtConfig, CvtForImageClassification
from transformers.models.deit.modeling_deit import DeiTConfig, DeiTForImageClassificationWithTeacher
from transformers.models.dinov2.modeling_dinov2 import Dinov2Config, Dinov2ForImageClassification
from transformers.models.levit.modeling_levit import LevitConfig, LevitForImageClassification
from transformers.models.mobilevit.modeling_mobilevit import MobileViTConfig, MobileViTForImageClassification
from transformers.models.pvt.modeling_pvt import PvtConfig, PvtForImageClassification
from transformers.models.segformer.modeling_segformer import SegformerConfig, SegformerForSemanticSegmentation
from transformers.models.swin.modeling_swin import SwinConfig, SwinForImageClassification
from transformers.models.swinv2.modeling_swinv2 import Swinv2Config, Swinv2ForImageClassification
from transformers.models.vit.modeling_vit import ViTConfig, ViTForImageClassification

from tests.zoo.blocks import image, tokens
from tests.zoo.entry import Entry


class Classifier(nn.Module):
    """An image model of transformers: of what it returns, the tensors under the given names."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = self.model(pixel_values=image)
        outputs = tuple(getattr(result, name) for name in self.names)
        return outputs if len(outputs) > 1 else outputs[0]


def classifier(model: type[Any], configuration: type[Any], *names: str, **options: Any) -> Callable[[], nn.Module]:
    """A builder of an image model of transformers, which returns its logits, or the tensors under the names."""
    return lambda: Classifier(model(configuration(**options)), names or ("logits",))


class FusedAttention(nn.Module):
    """One projection to queries, keys and values, split by a reshape to five axes (as timm does)."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.project = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.size))


class FusedLayer(nn.Module):
    """Pre-norm layer with fused projections and a layer scale on either branch."""

    def __init__(self, width: int, heads: int, size: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), FusedAttention(width, heads, size)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))


class FusedViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 40, 8, 8), nn.Parameter(torch.zeros(1, 1, 40))
        self.position = nn.Parameter(torch.zeros(1, 17, 40))
        self.layers = nn.Sequential(FusedLayer(40, 4, 10, 56), FusedLayer(40, 4, 10, 72))
        self.norm, self.head = nn.LayerNorm(40), nn.Linear(40, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


class WindowLayer(nn.Module):
    """Attention in windows with a relative bias, then Linear, depthwise convolution, Linear (Wang et al. 2021)."""

    def __init__(self, width: int, heads: int, window: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.window, self.hidden = heads, window, hidden
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.project = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        axis = torch.arange(window)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        apart = grid[:, :, None] - grid[:, None, :] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1], persistent=False)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def attend(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        size = width // self.heads
        q = self.q(x).reshape(count, tokens, self.heads, size).permute(0, 2, 1, 3) * size**-0.5
        k, v = self.kv(x).reshape(count, tokens, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.index.view(-1)].view(tokens, tokens, self.heads).permute(2, 0, 1)
        scores = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(dim=-1)
        return self.project((scores @ v).transpose(1, 2).reshape(count, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        side, rows, columns = self.window, height // self.window, width // self.window
        windows = self.norm1(x).view(batch, rows, side, columns, side, channels).permute(0, 1, 3, 2, 4, 5)
        y = self.attend(windows.reshape(-1, side * side, channels))
        y = y.view(batch, rows, columns, side, side, channels).permute(0, 1, 3, 2, 4, 5)
        x = x + y.reshape(batch, height, width, channels)
        y = F.gelu(self.up(self.norm2(x))).permute(0, 3, 1, 2)
        return x + self.down(F.gelu(self.depthwise(y)).permute(0, 2, 3, 1))


class Uformer(nn.Module):
    """Window layers in a U: strided convolution down, transposed convolution up, skip by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 24, 3, padding=1), WindowLayer(24, 3, 4, 40)
        self.down, self.second = nn.Conv2d(24, 32, 4, 2, 1), WindowLayer(32, 2, 4, 56)
        self.up, self.third = nn.ConvTranspose2d(32, 20, 2, 2), WindowLayer(44, 4, 4, 52)
        self.head = nn.Conv2d(44, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        skip = self.first(F.leaky_relu(self.stem(image)).permute(0, 2, 3, 1))
        y = self.second(self.down(skip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = self.up(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return image + self.head(self.third(torch.cat([y, skip], dim=-1)).permute(0, 3, 1, 2))


class DetrLayer(nn.Module):
    """Self-attention, cross-attention on request, MLP; positions are added to queries and keys only."""

    def __init__(self, width: int, heads: int, hidden: int, *, cross: bool) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=True) if cross else None
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, position: Tensor, memory: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        q = x + position
        x = self.norm1(x + self.self_attention(q, q, x, need_weights=False)[0])
        if self.cross_attention is not None and memory is not None:
            y = self.cross_attention(x + position, memory + at, memory, need_weights=False)[0]
            x = self.norm2(x + y)
        return self.norm3(x + self.down(F.relu(self.up(x))))


class Detr(nn.Module):
    """Convolutional backbone, encoder, decoder over object queries, class and box heads (Carion et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 20, 3, 2, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU(),
        )  # fmt: skip
        self.project = nn.Conv2d(20, 36, 1)
        self.row, self.column = nn.Parameter(torch.zeros(8, 18)), nn.Parameter(torch.zeros(8, 18))
        self.queries = nn.Embedding(5, 36)
        self.encoder = nn.ModuleList([DetrLayer(36, 3, 56, cross=False)])
        self.decoder = nn.ModuleList([DetrLayer(36, 3, 64, cross=True), DetrLayer(36, 3, 48, cross=True)])
        self.norm, self.classes = nn.LayerNorm(36), nn.Linear(36, 8)
        self.boxes = nn.Sequential(nn.Linear(36, 28), nn.ReLU(), nn.Linear(28, 4))
        _ = [weight.data.mul_(2.0) for weight in self.parameters()]  # the image must show at the outputs

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        memory = self.project(self.backbone(image)).flatten(2).permute(0, 2, 1)
        halves = [self.column.unsqueeze(0).repeat(8, 1, 1), self.row.unsqueeze(1).repeat(1, 8, 1)]
        at = torch.cat(halves, dim=-1).flatten(0, 1).unsqueeze(0)
        for layer in self.encoder:
            memory = layer(memory, at)
        position = self.queries.weight.unsqueeze(0).expand(image.shape[0], -1, -1)
        x = torch.zeros_like(position)
        for layer in self.decoder:
            x = layer(x, position, memory, at)
        x = self.norm(x)
        return {"logits": self.classes(x), "boxes": self.boxes(x).sigmoid()}


class MixerLayer(nn.Module):
    """One MLP across tokens, one across channels (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 20), nn.GELU(), nn.Linear(20, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 56), nn.GELU(), nn.Linear(56, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class GatingLayer(nn.Module):
    """Channels in two halves, one mixed across tokens and multiplied onto the other (Liu et al. 2021, gMLP)."""

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.norm_gate, self.spatial = nn.LayerNorm(hidden), nn.Conv1d(tokens, tokens, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        return x + self.down(u * self.spatial(self.norm_gate(v)))


class TokenMlp(nn.Module):
    """Patches, then layers that mix tokens without attention."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.patch, self.layers = nn.Conv2d(3, width, 8, 8), nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 7)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patch(image).flatten(2).transpose(1, 2))).mean(dim=1))


class ChannelAttention(nn.Module):
    """Attention between the channels of a head, over normalised pixels, and a gated depthwise MLP (Restormer)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.depthwise = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.project, self.up = nn.Conv2d(width, width, 1), nn.Conv2d(width, 2 * hidden, 1)
        self.mix = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.down = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = (
            part.reshape(batch, self.heads, channels // self.heads, height * width)
            for part in self.depthwise(self.qkv(self.norm1(x))).chunk(3, dim=1)
        )
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        x = x + self.project((scores.softmax(dim=-1) @ v).reshape(batch, channels, height, width))
        gate, y = self.mix(self.up(self.norm2(x))).chunk(2, dim=1)
        return x + self.down(F.gelu(gate) * y)


class Restormer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1 = nn.Conv2d(3, 24, 3, padding=1), ChannelAttention(24, 3, 40)
        self.shrink, self.layer2 = nn.Conv2d(24, 10, 3, padding=1), ChannelAttention(40, 4, 28)
        self.widen, self.head = nn.Conv2d(40, 48, 1), nn.Conv2d(36, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        skip = self.layer1(self.stem(image))
        y = F.pixel_shuffle(self.widen(self.layer2(F.pixel_unshuffle(self.shrink(skip), 2))), 2)
        return image + self.head(torch.cat([y, skip], dim=1))


class Clip(nn.Module):
    """CLIP of transformers: embeddings of both towers and their similarity."""

    def __init__(self) -> None:
        super().__init__()
        text = {
            "vocab_size": 100, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
            "intermediate_size": 56, "max_position_embeddings": 64, "eos_token_id": 99, "bos_token_id": 98,
            "pad_token_id": 0, "initializer_factor": 5.0,
        }  # fmt: skip
        vision = {
            "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 32, "patch_size": 8, "initializer_factor": 5.0,
        }  # fmt: skip
        self.model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=28))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        result = self.model(input_ids=input_ids, pixel_values=pixel_values)
        return {"image": result.image_embeds, "text": result.text_embeds, "logits": result.logits_per_image}


_ATTENTION = """
<ir_version: 11, opset_import: ["": 23]>
attention (float[batch, 3, 32, 32] image) => (float[batch, 16, 40] tokens, float[batch, 7] logits) {
  patches = Conv <kernel_shape = [8, 8], strides = [8, 8]> (image, patch_weight, patch_bias)
  flat = Reshape <allowzero = 0> (patches, flat_shape)
  x = Transpose <perm = [0, 2, 1]> (flat)
  normal = LayerNormalization <axis = -1> (x, norm_scale, norm_bias)
  qkv = MatMul (normal, qkv_weight)
  q, k, v = Split <axis = -1> (qkv, split)
  mixed = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v)
  projected = MatMul (mixed, project_weight)
  y = Add (x, projected)
  scale = RMSNormalization <axis = -1> (y, rms_scale)
  q1 = MatMul (scale, q1_weight)
  k1 = MatMul (scale, k1_weight)
  v1 = MatMul (scale, v1_weight)
  q2 = Reshape (q1, q_shape)
  k2 = Reshape (k1, k_shape)
  v2 = Reshape (v1, v_shape)
  q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
  k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
  v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
  o1 = Attention <is_causal = 1> (q3, k3, v3, bias)
  o2 = Transpose <perm = [0, 2, 1, 3]> (o1)
  o3 = Reshape (o2, o_shape)
  o4 = MatMul (o3, o_weight)
  tokens = Add (y, o4)
  mean = ReduceMean <keepdims = 0> (tokens, axes)
  logits = Gemm <transB = 1> (mean, head_weight, head_bias)
}
"""


def attention_operator() -> onnx.ModelProto:
    """The operator Attention over a packed projection (grouped, 3-D) and over separate heads (4-D, with a bias)."""
    rng = np.random.default_rng(0)
    shapes = {
        "patch_weight": (40, 3, 8, 8), "patch_bias": (40,), "norm_scale": (40,), "norm_bias": (40,),
        "qkv_weight": (40, 80), "project_weight": (40, 40), "rms_scale": (40,), "q1_weight": (40, 36),
        "k1_weight": (40, 36), "v1_weight": (40, 24), "bias": (3, 16, 16), "o_weight": (24, 40),
        "head_weight": (7, 40), "head_bias": (7,),
    }  # fmt: skip
    integers = {
        "flat_shape": [0, 40, 16], "split": [40, 20, 20], "q_shape": [0, 16, 3, 12], "k_shape": [0, 16, 3, 12],
        "v_shape": [0, 16, 3, 8], "o_shape": [0, 16, 24], "axes": [1],
    }  # fmt: skip
    model = onnx.parser.parse_model(_ATTENTION)
    weights = {name: rng.standard_normal(shape, np.float32) * 0.3 for name, shape in shapes.items()}
    weights |= {name: np.array(numbers, np.int64) for name, numbers in integers.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


BATCH = ({0: "batch"},)
LOUD: dict[str, Any] = {"num_labels": 7, "initializer_range": 0.2}
"""Weights large enough for attention that is not uniform."""
VIT: dict[str, Any] = LOUD | {
    "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8,
}  # fmt: skip
SWIN: dict[str, Any] = LOUD | {
    "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4,
    "mlp_ratio": 2.5,
}  # fmt: skip
PYRAMID: dict[str, Any] = LOUD | {
    "num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [24, 36], "num_attention_heads": [2, 3],
    "mlp_ratios": [2, 3],
}  # fmt: skip

ENTRIES: dict[str, Entry] = {
    "hf-vit": Entry(
        classifier(ViTForImageClassification, ViTConfig, intermediate_size=56, **VIT), image(),
        "ViT of transformers: separate projections, class token", BATCH,
    ),
    "fused-qkv-vit": Entry(
        FusedViT, image(), "one qkv projection split by reshape, permute and unbind; layer scale", BATCH
    ),
    "vit-attention-operator": Entry(
        attention_operator, tuple, "operators Attention (packed and grouped; 4-D with a bias) and RMSNormalization"
    ),
    "deit-distilled": Entry(
        classifier(
            DeiTForImageClassificationWithTeacher, DeiTConfig, "cls_logits", "distillation_logits", "logits",
            intermediate_size=56, **VIT,
        ),
        image(), "class and distillation tokens, two heads and their mean", BATCH,
    ),
    "dinov2-swiglu": Entry(
        classifier(Dinov2ForImageClassification, Dinov2Config, mlp_ratio=2, use_swiglu_ffn=True, **VIT), image(),
        "layer scale, fused SwiGLU split in halves, head on concatenated tokens", BATCH,
    ),
    "hf-swin": Entry(
        classifier(SwinForImageClassification, SwinConfig, **SWIN), image(),
        "shifted windows with relative bias, patch merging by strided slices", BATCH,
    ),
    "hf-swinv2": Entry(
        classifier(Swinv2ForImageClassification, Swinv2Config, **SWIN), image(),
        "cosine attention in windows, bias from an MLP, norm after the branch", BATCH,
    ),
    "pvt": Entry(
        classifier(
            PvtForImageClassification, PvtConfig, image_size=32, patch_sizes=[4, 2], strides=[4, 2],
            sequence_reduction_ratios=[2, 1], **PYRAMID,
        ),
        image(), "keys and values from a strided convolution of the tokens (spatial reduction)", BATCH,
    ),
    "segformer": Entry(
        classifier(
            SegformerForSemanticSegmentation, SegformerConfig, patch_sizes=[7, 3], strides=[4, 2], sr_ratios=[2, 1],
            decoder_hidden_size=28, **PYRAMID,
        ),
        image(), "spatial reduction, depthwise MLP, all stages resized and concatenated", BATCH,
    ),
    "cvt": Entry(
        classifier(
            CvtForImageClassification, CvtConfig, patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1],
            embed_dim=[24, 36], num_heads=[2, 3], depth=[1, 2], mlp_ratio=[2.0, 3.0], cls_token=[False, True], **LOUD,
        ),
        image(), "queries, keys and values from depthwise convolutions with BatchNorm", BATCH,
    ),
    "levit": Entry(
        classifier(
            LevitForImageClassification, LevitConfig, image_size=64, hidden_sizes=[24, 32, 40], depths=[1, 1, 1],
            num_attention_heads=[2, 3, 4], key_dim=[6, 6, 6], **LOUD | {"initializer_range": 0.12},
        ),
        image(64), "BatchNorm after every projection, values twice as wide as keys, queries subsampled", BATCH,
    ),
    "mobilevit": Entry(
        classifier(
            MobileViTForImageClassification, MobileViTConfig, image_size=64, hidden_sizes=[24, 28, 36],
            neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 40], num_attention_heads=2, expand_ratio=2.0,
            **LOUD | {"initializer_range": 0.12},
        ),
        image(64), "inverted residuals, attention between unfolded patches, fusion by concatenation",
    ),
    "convnext-v2": Entry(
        classifier(
            ConvNextV2ForImageClassification, ConvNextV2Config, num_stages=2, depths=[1, 2], hidden_sizes=[24, 36],
            **LOUD,
        ),
        image(), "global response normalisation over the wide channels, downsampling between stages", BATCH,
    ),
    "uformer": Entry(Uformer, image(), "window attention, depthwise MLP, U with concatenated skips", BATCH),
    "restormer": Entry(Restormer, image(16), "attention between channels, gated depthwise MLP, pixel shuffles", BATCH),
    "detr": Entry(Detr, image(), "convolutional backbone, encoder, decoder over object queries, two heads", BATCH),
    "mlp-mixer": Entry(
        lambda: TokenMlp([MixerLayer(16, 36), MixerLayer(16, 36)], 36), image(), "MLPs across tokens, then channels",
        BATCH,
    ),
    "gmlp": Entry(
        lambda: TokenMlp([GatingLayer(16, 36, 28), GatingLayer(16, 36, 44)], 36), image(),
        "halves of the channels, one gating the other across tokens", BATCH,
    ),
    "clip": Entry(
        Clip, lambda: (*image()(), *tokens()), "image and text towers into one space, two inputs, three outputs",
        ({0: "images"}, {0: "batch", 1: "sequence"}),
    ),
}  # fmt: skip
