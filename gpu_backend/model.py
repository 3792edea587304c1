"""The fixed model of the tiers: a small modern GPT, owned by the trainer.

Token embedding -> RMSNorm -> L blocks (attention, MLP; parameter-free RMSNorm before each) -> RMSNorm
-> untied head -> logits soft-capped at 15. Queries and keys are RMS-normed and rotated (RoPE over all
head dimensions, base 1024); the MLP is ReLU^2 with a factor 4. No biases. Any size by four integers.

With `public` it is the model of the public optimization track: biases in all layers, gains in the norms around them,
RoPE over half of the head dimensions, attention scores times 0.12, a soft cap by a root instead of tanh.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_CAP = 15.0
ROPE_BASE = 1024.0
INIT_STD = 0.02
PUBLIC_SCALE = 0.12


@dataclass(frozen=True)
class ModelConfig:
    layers: int
    width: int
    heads: int
    vocab_size: int
    seq_len: int
    public: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocab_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width ({self.width}) must be a multiple of 2 * heads ({2 * self.heads}): "
                "rotary embedding needs an even head size"
            )
        if self.public and self.width % (4 * self.heads):
            raise ValueError("a public model rotates half of each head: model.width must be a multiple of 4 * heads")


def flops_per_token(c: ModelConfig) -> int:
    """Training FLOPs per token (forward + backward), full attention: 6 N_mm + 12 L d T.

    N_mm counts the weights that take part in matrix products: the blocks and the head, not the
    embedding look-up. Causal kernels may skip half of the second term.
    """
    matmul_weights = c.layers * 12 * c.width**2 + c.vocab_size * c.width
    return 6 * matmul_weights + 12 * c.layers * c.width * c.seq_len


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class _Norm(nn.Module):
    """Over the width; with gains if public."""

    def __init__(self, width: int, public: bool) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(width)) if public else None

    def forward(self, x: Tensor) -> Tensor:
        return _norm(x) if self.gains is None else _norm(x) * self.gains.type_as(x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, public: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, PUBLIC_SCALE if public else None
        self.q = nn.Linear(width, width, bias=public)
        self.k = nn.Linear(width, width, bias=public)
        self.v = nn.Linear(width, width, bias=public)
        self.proj = nn.Linear(width, width, bias=public)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            linear(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q, k = _rotate(_norm(q), cos, sin), _rotate(_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class _MLP(nn.Module):
    def __init__(self, width: int, public: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=public)
        self.down = nn.Linear(4 * width, width, bias=public)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)).square())
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, public: bool) -> None:
        super().__init__()
        self.attn_norm, self.attn = _Norm(width, public), _Attention(width, heads, public)
        self.mlp_norm, self.mlp = _Norm(width, public), _MLP(width, public)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """`forward(inputs, targets)`: int64 (batch, up to seq_len) each -> mean cross-entropy in nats per token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, public = config.width, config.public
        self.embed, self.embed_norm = nn.Embedding(config.vocab_size, width), _Norm(width, public)
        self.blocks = nn.ModuleList(_Block(width, config.heads, public) for _ in range(config.layers))
        self.head_norm, self.head = _Norm(width, public), nn.Linear(width, config.vocab_size, bias=public)
        half = width // config.heads // 2
        if public:  # the other half of the dimensions stands still
            frequency = torch.zeros(half)
            frequency[: half // 2] = ROPE_BASE ** -torch.linspace(0, 1, half // 2)
        else:
            frequency = ROPE_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(config.seq_len, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Default initial values: gains 1, biases 0, else N(0, 0.02); a candidate's `init` may replace them."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, INIT_STD, generator=generator)
                else:
                    parameter.fill_(1.0 if name.endswith("gains") else 0.0)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embed_norm(self.embed(inputs))
        cos, sin = self.cos[: inputs.size(1)], self.sin[: inputs.size(1)]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.head_norm(x))
        if self.config.public:
            logits = logits.float()
            logits = LOGIT_CAP * logits * (logits.square() + LOGIT_CAP**2).rsqrt()
        else:
            logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))
