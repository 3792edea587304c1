"""The model of train_gpt.py. Changed: sizes from the tier; logits instead of a loss; `build` for the evaluation."""

import torch
import torch.nn.functional as F
from torch import nn

from speedrun import config

args = config.model
gpu = torch.cuda.device_count() > 0


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width, bias=False)
        self.proj = nn.Linear(args.width, args.width, bias=False)
        self.up = nn.Linear(args.width, 4 * args.width, bias=False)
        self.down = nn.Linear(4 * args.width, args.width, bias=False)

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = self.qkv(norm(x)).view(rows, length, 3, args.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(norm(q), norm(k), v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(args.vocab_size, args.width)
        self.positions = nn.Embedding(args.seq_len, args.width)
        self.blocks = nn.ModuleList(Block() for _ in range(args.layers))
        self.head = nn.Linear(args.width, args.vocab_size, bias=False)

    def forward(self, ids):
        x = norm(self.embed(ids) + self.positions.weight[: ids.size(1)])
        for block in self.blocks:
            x = block(x)
        return 15 * torch.tanh(self.head(norm(x)).float() / 15)


def build(state):
    device = "cuda" if gpu else "cpu"
    model = GPT()
    model.load_state_dict(state)
    model.to(device).eval()
    return lambda ids: torch.cat([model(part.to(device)) for part in ids.split(8)])
