"""The fixed model of the steps tiers: a small modern GPT, owned by the trainer.

Token embedding -> RMSNorm -> L blocks (attention, MLP; parameter-free RMSNorm before each) -> RMSNorm
-> untied head -> logits soft-capped at 15. Queries and keys are RMS-normed and rotated (RoPE over all
head dimensions, base 1024); the MLP is ReLU^2 with a factor 4. No biases. Any size by four integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_CAP = 15.0
ROPE_BASE = 1024.0
INIT_STD = 0.02


@dataclass(frozen=True)
class ModelConfig:
    layers: int
    width: int
    heads: int
    vocab_size: int
    seq_len: int

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocab_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width ({self.width}) must be a multiple of 2 * heads ({2 * self.heads}): "
                "rotary embedding needs an even head size"
            )


def flops_per_token(c: ModelConfig) -> int:
    """Training FLOPs per token (forward + backward), full attention: 6 N_mm + 12 L d T.

    N_mm counts the weights that take part in matrix products: the blocks and the head, not the
    embedding look-up. Causal kernels may skip half of the second term.
    """
    matmul_weights = c.layers * 12 * c.width**2 + c.vocab_size * c.width
    return 6 * matmul_weights + 12 * c.layers * c.width * c.seq_len


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            linear(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q, k = _rotate(_norm(q), cos, sin), _rotate(_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)).square())
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = _Attention(width, heads)
        self.mlp = _MLP(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(_norm(x), cos, sin)
        out: Tensor = x + self.mlp(_norm(x))
        return out


class GPT(nn.Module):
    """`forward(inputs, targets)`: int64 (batch, up to seq_len) each -> mean cross-entropy in nats per token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(_Block(config.width, config.heads) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        half = config.width // config.heads // 2
        frequency = ROPE_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(config.seq_len, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Default initial values, N(0, 0.02) everywhere; a candidate's `init` may replace them."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, INIT_STD, generator=generator)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = _norm(self.embed(inputs))
        cos, sin = self.cos[: inputs.size(1)], self.sin[: inputs.size(1)]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = LOGIT_CAP * torch.tanh(self.head(_norm(x)) / LOGIT_CAP)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))
