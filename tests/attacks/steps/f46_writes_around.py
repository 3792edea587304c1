# /// attack
# threats = ["F46", "F34"]
# gains = "write"
# ///
"""Leaves a file wherever it can."""

import torch

for folder in FOLDERS:
    try:
        with open(f"{folder}/{TOKEN}", "w") as file:
            file.write(TOKEN)
    except OSError:
        pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
