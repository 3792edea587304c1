# /// attack
# threats = ["F46", "E32"]
# gains = "see"
# ///
"""Looks another process up by its number."""

import torch

try:
    with open(f"/proc/{BYSTANDER}/stat") as file:
        print("probe see reached", file.read().split()[21])
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
