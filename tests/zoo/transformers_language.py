"""Language, sound and state-space models in miniature: of transformers by configuration, or spelled out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.models.albert.modeling_albert import AlbertConfig, AlbertForMaskedLM
from transformers.models.bart.modeling_bart import BartConfig, BartForConditionalGeneration
from transformers.models.bert.modeling_bert import BertConfig, BertForMaskedLM
from transformers.models.bloom.modeling_bloom import BloomConfig, BloomForCausalLM
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Config, DebertaV2ForMaskedLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.distilbert.modeling_distilbert import DistilBertConfig, DistilBertForMaskedLM
from transformers.models.falcon.modeling_falcon import FalconConfig, FalconForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaConfig, MambaForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.modernbert.modeling_modernbert import ModernBertConfig, ModernBertForMaskedLM
from transformers.models.opt.modeling_opt import OPTConfig, OPTForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.roberta.modeling_roberta import RobertaConfig, RobertaForMaskedLM
from transformers.models.t5.modeling_t5 import T5Config, T5ForConditionalGeneration
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.models.whisper.modeling_whisper import WhisperConfig, WhisperForConditionalGeneration

from tests.zoo.blocks import tokens
from tests.zoo.entry import Entry


class Logits(nn.Module):
    """A model of transformers from token numbers or sound, and what the decoder has said so far, to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, target: Tensor | None = None) -> Tensor:
        further = {} if target is None else {"decoder_input_ids": target, "use_cache": False}
        return self.model(source, **further).logits


def language(model: type[Any], configuration: type[Any], **options: Any) -> Callable[[], nn.Module]:
    """A builder of a model of transformers, without its cache."""
    numbers = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return lambda: Logits(model(configuration(use_cache=False, **numbers, **options)))


class Tower(nn.Module):
    """Embedding, layers with shortcuts, norm, head."""

    def __init__(self, width: int, *layers: nn.Module) -> None:
        super().__init__()
        self.tokens, self.layers = nn.Embedding(100, width), nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(self.norm(x))


class DenseExperts(nn.Module):
    """Every expert computes, by einsum over stacked weights; a softmax weighs them."""

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(experts, width, hidden) * 0.3) for _ in range(2))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(dim=-1)
        y = F.silu(torch.einsum("btw,ewh->bteh", x, self.gate)) * torch.einsum("btw,ewh->bteh", x, self.up)
        return torch.einsum("bte,btew->btw", share, torch.einsum("bteh,ehw->btew", y, self.down))


class TopExperts(nn.Module):
    """The best experts of each token, by a mask: batched products over a new first axis, and a shared expert."""

    def __init__(self, width: int, experts: int, hidden: int, best: int) -> None:
        super().__init__()
        self.best, self.router = best, nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * 0.3)
        self.up_bias = nn.Parameter(torch.randn(experts, 1, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.3)
        self.shared = nn.Sequential(nn.Linear(width, hidden + 4), nn.ReLU(), nn.Linear(hidden + 4, width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        share, chosen = self.router(flat).softmax(dim=-1).topk(self.best, dim=-1)
        share = share / share.sum(dim=-1, keepdim=True)
        mask = torch.zeros(flat.shape[0], self.up.shape[0]).scatter(1, chosen, share)
        y = torch.bmm(flat.unsqueeze(0).expand(self.up.shape[0], -1, -1), self.up) + self.up_bias
        y = torch.bmm(F.gelu(y), self.down) * mask.T.unsqueeze(-1)
        return y.sum(dim=0).reshape(x.shape) + self.shared(x)


class Mamba(nn.Module):
    """Selective state space, its recurrence unrolled over a static length (Gu and Dao 2023)."""

    def __init__(self, width: int, inner: int, states: int, rank: int) -> None:
        super().__init__()
        self.inner, self.states, self.rank = inner, states, rank
        self.enter, self.leave = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.select, self.step = nn.Linear(inner, rank + 2 * states, bias=False), nn.Linear(rank, inner)
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x, gate = self.enter(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., :length].transpose(1, 2))
        step, write, read = self.select(x).split([self.rank, self.states, self.states], dim=-1)
        step = F.softplus(self.step(step))
        decay = torch.exp(step.unsqueeze(-1) * -self.log_decay.exp())
        change = (step * x).unsqueeze(-1) * write.unsqueeze(2)
        state, outputs = torch.zeros_like(change[:, 0]), []
        for time in range(length):
            state = decay[:, time] * state + change[:, time]
            outputs.append(torch.einsum("bin,bn->bi", state, read[:, time]))
        return self.leave((torch.stack(outputs, dim=1) + x * self.skip) * F.silu(gate))


class EinsumAttention(nn.Module):
    """Everything by einsum: projections with a weight axis for heads, scores, values."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, size) * 0.2) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, size, width) * 0.2)
        self.q_bias = nn.Parameter(torch.randn(heads, size))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("btw,whd->bthd", x, self.q) + self.q_bias
        k, v = torch.einsum("btw,whd->bthd", x, self.k), torch.einsum("btw,whd->bthd", x, self.v)
        scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(dim=-1)
        return torch.einsum("bthd,hdw->btw", torch.einsum("bhts,bshd->bthd", scores, v), self.o)


class Heads(nn.Module):
    """Projections to heads and back; subclasses mix."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.o = nn.Linear(heads * size, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.heads, self.size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x)))
        return self.o(y.transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class InterleavedRotary(Heads):
    """Rotary positions on neighbouring pairs of channels, causal."""

    def rotate(self, x: Tensor) -> Tensor:
        frequency = 100.0 ** (-torch.arange(0, self.size, 2, dtype=torch.float32) / self.size)
        angle = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * frequency
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(turned, dim=-1).flatten(-2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)


class RelativeKeys(Heads):
    """Distances have keys, shared by the heads (Shaw et al. 2018), and a bias for each head."""

    def __init__(self, width: int, heads: int, size: int, farthest: int = 8) -> None:
        super().__init__(width, heads, size)
        self.farthest, self.keys = farthest, nn.Embedding(2 * farthest + 1, size)
        self.bias = nn.Embedding(2 * farthest + 1, heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        apart = (place[None] - place[:, None]).clamp(-self.farthest, self.farthest) + self.farthest
        scores = q @ k.transpose(-2, -1) + torch.einsum("bhtd,tsd->bhts", q, self.keys(apart))
        scores = scores * self.size**-0.5 + self.bias(apart).permute(2, 0, 1)
        return scores.softmax(dim=-1) @ v


class LinearAttention(Heads):
    """No softmax: elu + 1 of queries and keys, a matrix of keys by values (Katharopoulos et al. 2020)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        total = (q * k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
        return q @ (k.transpose(-2, -1) @ v) / total


class CrossAttention(nn.Module):
    """Learned latents read a context of another width, twice, with values of another width than keys (Perceiver)."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.heads = nn.Parameter(torch.randn(1, 6, 32)), 3
        self.q = nn.ModuleList(nn.Linear(32, 3 * 8) for _ in range(2))
        self.k, self.v = nn.Linear(20, 3 * 8), nn.Linear(20, 3 * 12)
        self.o, self.norm = nn.Linear(3 * 12, 32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 44), nn.Linear(44, 32)

    def forward(self, context: Tensor) -> Tensor:
        batch = context.shape[0]
        k = self.k(context).reshape(batch, -1, self.heads, 8).permute(0, 2, 3, 1)
        v = self.v(context).reshape(batch, -1, self.heads, 12).permute(0, 2, 1, 3)
        x = self.latents.expand(batch, -1, -1)
        for project in self.q:
            q = project(self.norm(x)).reshape(batch, -1, self.heads, 8).permute(0, 2, 1, 3)
            y = (q @ k * 8**-0.5).softmax(dim=-1) @ v
            x = x + self.o(y.permute(0, 2, 1, 3).reshape(batch, -1, self.heads * 12))
            x = x + self.down(F.gelu(self.up(x)))
        return x


class CachedAttention(nn.Module):
    """One step of a decoder: keys and values of the past come in, and go out with the new ones behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.attention, self.norm = nn.Embedding(100, 32), Heads(32, 3, 10), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 44), nn.Linear(44, 32), nn.Linear(32, 100)

    def forward(self, input_ids: Tensor, past_key: Tensor, past_value: Tensor) -> dict[str, Tensor]:
        x, part = self.tokens(input_ids), self.attention
        y = self.norm(x)
        key = torch.cat([past_key, part.split(part.k(y))], dim=2)
        value = torch.cat([past_value, part.split(part.v(y))], dim=2)
        y = F.scaled_dot_product_attention(part.split(part.q(y)), key, value)
        x = x + part.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.relu(self.up(x)))
        return {"logits": self.head(x), "key": key, "value": value}


class TorchTransformer(nn.Module):
    """nn.Transformer: packed projections, norms after the branches, a causal mask in the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.head = nn.Embedding(100, 36), nn.Embedding(100, 36), nn.Linear(36, 30)
        self.body = nn.Transformer(36, 3, 2, 2, 56, 0.0, "gelu", batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = torch.full((target.shape[1], target.shape[1]), float("-inf")).triu(1)
        return self.head(self.body(self.source(source), self.target(target), tgt_mask=mask, tgt_is_causal=True))


def two_texts() -> tuple[Any, ...]:
    return torch.randint(0, 100, (2, 12)), torch.randint(0, 100, (2, 7))


def short_text() -> tuple[Any, ...]:
    return (torch.randint(0, 100, (2, 6)),)


TEXT = ({0: "batch", 1: "sequence"},)
TEXTS = ({0: "batch", 1: "sequence"}, {0: "batch", 1: "target"})
BATCH = ({0: "batch"},)
PAST = {0: "batch", 2: "past"}
BATCHED = "batched_mm"
"""The experts as products that ONNX has; loops over the tokens of an expert and grouped products are not exported."""
SIZES: dict[str, Any] = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "initializer_range": 0.2}
BERT: dict[str, Any] = SIZES | {"intermediate_size": 56, "max_position_embeddings": 64}
GROUPED: dict[str, Any] = BERT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
SEQUENCE: dict[str, Any] = {
    "d_model": 36, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3, "init_std": 0.2,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 56, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
}  # fmt: skip

ENTRIES: dict[str, Entry] = {
    "hf-bert": Entry(language(BertForMaskedLM, BertConfig, **BERT), tokens, "embedding tied to the decoder", TEXT),
    "roberta": Entry(
        language(RobertaForMaskedLM, RobertaConfig, **BERT), tokens, "positions counted in the graph, from the tokens",
        TEXT,
    ),
    "albert": Entry(
        language(AlbertForMaskedLM, AlbertConfig, embedding_size=28, **BERT), tokens, "one layer applied twice", TEXT
    ),
    "distilbert": Entry(
        language(
            DistilBertForMaskedLM, DistilBertConfig, dim=36, n_layers=2, n_heads=3, hidden_dim=56,
            max_position_embeddings=64, initializer_range=0.2,
        ),
        tokens, "head of its own before the tied decoder", TEXT,
    ),
    "deberta": Entry(
        language(
            DebertaV2ForMaskedLM, DebertaV2Config, relative_attention=True, position_biased_input=False,
            pos_att_type=["p2c", "c2p"], max_relative_positions=8, **BERT,
        ),
        tokens, "scores from content and from positions, which share the projections", TEXT,
    ),
    "modernbert": Entry(
        language(
            ModernBertForMaskedLM, ModernBertConfig, cls_token_id=1, sep_token_id=2, local_attention=8, **BERT
        ),
        tokens, "packed projections, GeGLU, windows in every other layer, tied", TEXT,
    ),
    "gpt2": Entry(
        language(
            GPT2LMHeadModel, GPT2Config, n_embd=36, n_layer=2, n_head=3, n_inner=56, n_positions=64,
            initializer_range=0.2,
        ),
        tokens, "packed projections stored input by output, tied", TEXT,
    ),
    "opt": Entry(
        language(
            OPTForCausalLM, OPTConfig, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, ffn_dim=56,
            max_position_embeddings=64, word_embed_proj_dim=28, do_layer_norm_before=False, init_std=0.2,
        ),
        tokens, "norm after the branches, projections in and out of the tied embedding", TEXT,
    ),
    "bloom": Entry(
        language(BloomForCausalLM, BloomConfig, hidden_size=36, n_layer=2, n_head=3, initializer_range=0.2), tokens,
        "queries, keys and values interleaved by head, slopes for distance, norm of the embedding, tied", TEXT,
    ),
    "gpt-neox": Entry(
        language(GPTNeoXForCausalLM, GPTNeoXConfig, **BERT), tokens,
        "queries, keys and values interleaved by head, partial rotary, parallel branches", TEXT,
    ),
    "falcon": Entry(
        language(FalconForCausalLM, FalconConfig, ffn_hidden_size=56, **SIZES), tokens,
        "one key and value head for all, packed, parallel branches", TEXT,
    ),
    "phi3": Entry(
        language(Phi3ForCausalLM, Phi3Config, **BERT | {"num_attention_heads": 6, "num_key_value_heads": 2}), tokens,
        "packed grouped projections split unevenly, packed gate and up", TEXT,
    ),
    "hf-llama": Entry(
        language(LlamaForCausalLM, LlamaConfig, **GROUPED), tokens, "grouped queries, rotary halves, gated SiLU", TEXT
    ),
    "qwen3": Entry(
        language(Qwen3ForCausalLM, Qwen3Config, **GROUPED), tokens, "norms of queries and keys shared by heads", TEXT
    ),
    "gemma": Entry(
        language(GemmaForCausalLM, GemmaConfig, **GROUPED), tokens, "norm scale of 1 + w, scaled embedding, tied", TEXT
    ),
    "gemma2": Entry(
        language(Gemma2ForCausalLM, Gemma2Config, query_pre_attn_scalar=10, sliding_window=8, **GROUPED), tokens,
        "norms before and after each branch, soft caps, windows", TEXT,
    ),
    "deepseek": Entry(
        language(
            DeepseekV3ForCausalLM, DeepseekV3Config, q_lora_rank=20, kv_lora_rank=16, qk_rope_head_dim=6,
            qk_nope_head_dim=8, v_head_dim=10, first_k_dense_replace=2, **BERT | {"num_key_value_heads": 3},
        ),
        tokens, "latent attention: low-rank queries, keys and values, one rotary part for all heads", TEXT,
    ),
    "mixtral": Entry(
        language(MixtralForCausalLM, MixtralConfig, num_local_experts=4, experts_implementation=BATCHED, **GROUPED),
        tokens, "mixture of the best two experts", TEXT,
    ),
    "hf-mamba": Entry(
        language(
            MambaForCausalLM, MambaConfig, hidden_size=28, num_hidden_layers=2, state_size=5, time_step_rank=3,
            use_associative_scan=False,
        ),
        short_text, "Mamba of transformers", BATCH,
    ),
    "t5": Entry(
        language(
            T5ForConditionalGeneration, T5Config, d_model=36, d_kv=10, d_ff=56, num_layers=2, num_heads=3,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        ),
        two_texts, "encoder and decoder share embedding; relative bias shared by layers", TEXTS,
    ),
    "bart": Entry(
        language(BartForConditionalGeneration, BartConfig, max_position_embeddings=64, **SEQUENCE), two_texts,
        "encoder, decoder with cross-attention, everything tied", TEXTS,
    ),
    "whisper": Entry(
        language(
            WhisperForConditionalGeneration, WhisperConfig, num_mel_bins=20, max_source_positions=12,
            max_target_positions=64, **SEQUENCE,
        ),
        lambda: (torch.randn(2, 20, 24), torch.randint(0, 100, (2, 7))),
        "convolutional stem over frames, encoder, decoder with cross-attention, tied",
        ({0: "batch"}, {0: "batch", 1: "target"}),
    ),
    "wav2vec2": Entry(
        language(
            Wav2Vec2ForCTC, Wav2Vec2Config, conv_dim=[16, 20, 24], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 2],
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, intermediate_size=56, **SIZES,
        ),
        lambda: (torch.randn(2, 400),), "GroupNorm after strided convolutions, grouped convolution with weight norm",
        BATCH,
    ),
    "moe-dense": Entry(
        lambda: Tower(28, DenseExperts(28, 4, 40), DenseExperts(28, 3, 44)), tokens, "all experts by einsum", TEXT
    ),
    "moe-top-k": Entry(
        lambda: Tower(28, TopExperts(28, 4, 40, 2)), tokens, "experts by batched products, masked by TopK", TEXT
    ),
    "mamba": Entry(
        lambda: Tower(28, Mamba(28, 44, 5, 3), Mamba(28, 40, 6, 4)), short_text,
        "selective state space unrolled, depthwise causal convolution", BATCH,
    ),
    "einsum-attention": Entry(
        lambda: Tower(28, EinsumAttention(28, 3, 10), EinsumAttention(28, 4, 9)), tokens, "attention by einsum", TEXT
    ),
    "interleaved-rotary": Entry(
        lambda: Tower(28, InterleavedRotary(28, 3, 10), InterleavedRotary(28, 4, 6)), tokens,
        "rotary positions on neighbouring channels by strided slices", TEXT,
    ),
    "relative-keys": Entry(
        lambda: Tower(28, RelativeKeys(28, 3, 10), RelativeKeys(28, 4, 6)), tokens,
        "a table of distances whose width is that of a head, another one by heads", TEXT,
    ),
    "linear-attention": Entry(
        lambda: Tower(28, LinearAttention(28, 3, 10), LinearAttention(28, 4, 6)), tokens,
        "keys by values without a softmax, normalised by a sum", TEXT,
    ),
    "cross-attention": Entry(
        CrossAttention, lambda: (torch.randn(2, 12, 20),), "latents read a context; keys and values of unlike widths",
        TEXT,
    ),
    "cached-attention": Entry(
        CachedAttention, lambda: (torch.randint(0, 100, (2, 1)), torch.randn(2, 3, 9, 10), torch.randn(2, 3, 9, 10)),
        "keys and values of the past are inputs and outputs", (BATCH[0], PAST, PAST),
    ),
    "torch-transformer": Entry(TorchTransformer, two_texts, "nn.Transformer, packed projections, causal mask", TEXTS),
}  # fmt: skip
