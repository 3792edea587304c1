# /// attack
# threats = []
# gains = ""
# ///
"""Prints losses, times and markup of its own, as scripts do."""

import torch


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)


def schedule(step, horizon, optimizers):
    print(f"step:{step}/{horizon} lr {optimizers[0].param_groups[0]['lr']:.4f} val_loss: not mine to say")
