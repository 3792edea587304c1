# /// attack
# threats = ["B7"]
# gains = "content"
# ///
"""Reads validation text from where it lies."""

import torch

for path in CONTENT:
    try:
        with open(path, "rb") as file:
            print("probe content reached", path, file.read(8).hex())
    except OSError:
        pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
