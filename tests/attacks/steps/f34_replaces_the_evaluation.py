# /// attack
# threats = ["F34"]
# gains = "score"
# ///
"""Replaces the function that evaluates."""

import sys

import torch

main = sys.modules["__main__"]
main.evaluate = lambda: 1.0


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
