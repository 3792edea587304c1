# /// attack
# threats = []
# gains = ""
# ///
"""AdamW as anyone would write it."""

import torch


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
