"""A modern GPT-2: rotary positions, normed queries and keys, squared ReLU, a soft-capped head of its own, attention
that stays within a document and, in most layers, within a window."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from speedrun import config

SIZES = config.model
WINDOW, FULL_EVERY = SIZES.seq_len // 4, 4  # every fourth layer sees the whole sequence
CAP = 15.0
GPU = torch.cuda.device_count() > 0  # does not start CUDA, unlike is_available(): train.py still forks


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x)


def attention_masks(ids):
    """Which position may look at which, with a window and without: for flex_attention, or dense where there is none."""
    documents = (ids == config.first_token).cumsum(1)

    def near(b, h, q, k):
        return far(b, h, q, k) & (q - k < WINDOW)

    def far(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k])

    rows, length = ids.shape
    if GPU:
        return [create_block_mask(mask, rows, None, length, length, ids.device) for mask in (near, far)]
    b, at = torch.arange(rows)[:, None, None], torch.arange(length)
    return [mask(b, 0, at[:, None], at)[:, None] for mask in (near, far)]


def attend(q, k, v, mask):
    return flex_attention(q, k, v, block_mask=mask) if GPU else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, mask, cos, sin):
        rows, length, width = x.shape
        q, k, v = self.qkv(norm(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = attend(rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v, mask)
        x = x + self.proj(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.relu(self.up(norm(x))).square())


class Modern(nn.Module):
    """Logits (rows, length, vocab) for ids (rows, length) and their masks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SIZES.vocab_size, SIZES.width)
        self.blocks = nn.ModuleList(Block(SIZES.width, SIZES.heads) for _ in range(SIZES.layers))
        self.head = nn.Linear(SIZES.width, SIZES.vocab_size, bias=False)
        half = SIZES.width // SIZES.heads // 2
        frequency = torch.zeros(half)  # half of the dimensions stand still
        frequency[: half // 2] = 1024.0 ** -torch.linspace(0, 1, half // 2)
        angle = torch.outer(torch.arange(SIZES.seq_len, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids, masks):
        cos, sin = self.cos[: ids.size(1)], self.sin[: ids.size(1)]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=GPU):
            x = norm(self.embed(ids))
            for i, block in enumerate(self.blocks):
                x = block(x, masks[i % FULL_EVERY == FULL_EVERY - 1], cos, sin)
            logits = self.head(norm(x))
        return CAP * torch.tanh(logits / CAP)


def compiled(net):
    if GPU:
        net.compile(dynamic=False)
    return net


def build(state):
    """What evaluation calls."""
    device = "cuda" if GPU else "cpu"
    net = Modern()
    net.load_state_dict(state)
    compiled(net.to(device).eval())

    def logits(ids):
        ids = ids.to(device)
        # a few rows at a time, always as many: logits of the whole batch are all that is kept
        parts = ids.split(8)
        return torch.cat([net(part, attention_masks(part)) for part in parts])

    return logits
