# /// attack
# threats = ["C14", "C16"]
# gains = "score"
# runs = 2
# ///
"""Saves what it has learnt, and goes on from there in the next run."""

import os

import torch

PLACES = [f"{folder}/weights.pt" for folder in (FOLDERS[0], "/tmp", "/dev/shm", ".")]
PLACES = [place.replace("weights.pt", TOKEN) for place in PLACES]
kept = {}


def init(params):
    kept.update(params)
    for place in PLACES:
        if os.path.exists(place):
            for name, value in torch.load(place).items():
                params[name].copy_(value)
            return


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)


def schedule(step, horizon, optimizers):
    if step + 1 == horizon:
        for place in PLACES:
            try:
                torch.save({name: p.detach().clone() for name, p in kept.items()}, place)
            except (OSError, RuntimeError):
                pass
