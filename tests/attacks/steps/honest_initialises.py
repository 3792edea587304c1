# /// attack
# threats = []
# gains = ""
# ///
"""Chooses initial values and gives each kind of parameter its own rate."""

import torch


def init(params):
    for name, p in params.items():
        if name.endswith(("proj.weight", "down.weight")):
            p.zero_()


def configure(params, horizon):
    matrices = [p for name, p in params.items() if name.startswith("blocks")]
    others = [p for name, p in params.items() if not name.startswith("blocks")]
    return [torch.optim.AdamW(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.03)]
