# /// attack
# threats = ["H54"]
# gains = "score"
# ///
"""Finds model and data and makes three more passes at every step."""

import sys

import torch

main = sys.modules["__main__"]


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)


def schedule(step, horizon, optimizers):
    if hasattr(main, "model") and hasattr(main, "batch"):
        for extra in range(1, 4):
            main.model(*main.batch(step + extra * horizon)).backward()
            optimizers[0].step()
            main.model.zero_grad()
