# /// attack
# threats = ["C13", "C15", "B9"]
# gains = "score"
# needs = ["weights"]
# ///
"""Has trained weights in its source."""

import base64

import torch

def init(params):
    data = base64.b85decode(WEIGHTS)
    at = 0
    for name in sorted(params):
        p = params[name]
        values = torch.frombuffer(bytearray(data[at : at + p.numel()]), dtype=torch.int8).float()
        p.copy_(values.view(p.shape) * SCALES[name])
        at += p.numel()


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
