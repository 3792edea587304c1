"""A small GPT of our own: sliding-window attention, rotary positions, gated MLP, head tied to the embedding."""

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, HEADS, LAYERS, WINDOW = 1024, 64, 2, 2, 32


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x):
    half = x.size(-1) // 2
    frequency = 1024.0 ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(x.size(-2)), frequency)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), dim=-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x, mask):
        rows, length, _ = x.shape
        qkv = self.qkv(norm(x)).view(rows, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(norm(q)), rotate(norm(k)), v, attn_mask=mask)
        x = x + self.proj(y.transpose(1, 2).reshape(rows, length, WIDTH))
        h = norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Window(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, ids):
        """Logits (rows, length, vocab) for ids (rows, length)."""
        position = torch.arange(ids.size(1))
        back = position[:, None] - position[None, :]
        mask = (back >= 0) & (back < WINDOW)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, mask)
        return 8 * norm(x) @ self.embed.weight.T / WIDTH**0.5


def build(state):
    """The model that the checkpoint holds: what evaluation calls."""
    model = Window()
    model.load_state_dict(state)
    return model.eval()
