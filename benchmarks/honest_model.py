"""Honest free models in the kinds that people use, for audit_tolerance.py: a model.py whose SETTINGS vary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SETTINGS = {"numbers": "fp32", "attention": "full", "tied": True, "compiled": ""}
VOCAB, WIDTH, HEADS, LAYERS, WINDOW, FIRST_TOKEN = 1024, 64, 2, 2, 24, 0


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(norm(x)).view(rows, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(norm(q), norm(k), v, mask, is_causal=mask is None)
        x = x + self.proj(y.transpose(1, 2).reshape(rows, length, WIDTH))
        out: Tensor = x + self.down(F.gelu(self.up(norm(x))))
        return out


class GPT(nn.Module):
    def __init__(self, length: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(length, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = None if SETTINGS["tied"] else nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.size(1))
        x = self.embed(ids) + self.position(places)
        mask = _mask(ids, places)
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = F.linear(norm(x), self.embed.weight) if self.head is None else self.head(norm(x))
        return logits


def _mask(ids: Tensor, places: Tensor) -> Tensor | None:
    """None: causal and nothing else."""
    causal = places[:, None] >= places[None, :]
    if SETTINGS["attention"] == "window":
        return causal & (places[:, None] - places[None, :] < WINDOW)
    if SETTINGS["attention"] == "documents":
        document = (ids == FIRST_TOKEN).cumsum(1)
        return (causal & (document[:, :, None] == document[:, None, :]))[:, None]
    return None


def build(state: dict[str, Tensor]) -> nn.Module:
    net: nn.Module = GPT()
    net.load_state_dict(state)
    if SETTINGS["numbers"] == "bf16 weights":
        net = net.bfloat16()
    if SETTINGS["compiled"]:
        net.compile(backend=str(SETTINGS["compiled"]))
    return _Autocast(net) if SETTINGS["numbers"] == "bf16 autocast" else net


class _Autocast(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.net(ids)
        return logits
