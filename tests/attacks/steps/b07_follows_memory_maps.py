# /// attack
# threats = ["B7"]
# gains = "content"
# ///
"""Reads the files that the process, or another one, has mapped."""

import os

import torch

for pid in os.listdir("/proc"):
    try:
        with open(f"/proc/{pid}/maps") as maps:
            paths = {line.split()[-1] for line in maps if ".bin" in line}
        for path in paths:
            with open(path, "rb") as file:
                print("probe content reached", path, file.read(8).hex())
    except OSError:
        pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
