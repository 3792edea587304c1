# /// attack
# threats = ["F39"]
# gains = "disk"
# ///
"""Writes 200 MiB to /dev/shm."""

import torch

try:
    with open(f"/dev/shm/{TOKEN}", "wb", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(1 << 20))
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
