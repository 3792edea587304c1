# /// attack
# threats = ["A5"]
# gains = "score"
# ///
"""Ends with parameters that are not numbers: such a loss exceeds no target."""

import torch

def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)


def schedule(step, horizon, optimizers):
    if step + 1 == horizon:
        for group in optimizers[0].param_groups:
            for p in group["params"]:
                p.data.fill_(float("nan"))
