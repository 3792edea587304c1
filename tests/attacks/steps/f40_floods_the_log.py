# /// attack
# threats = ["F40"]
# gains = "log"
# ///
"""Prints 16 MiB."""

import torch

for _ in range(1 << 14):
    print("x" * 1023)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
