# /// attack
# threats = []
# gains = ""
# ///
"""Probes for what is not there, as libraries do, and carries on."""

import os

import torch


try:
    workers = len(os.sched_getaffinity(0))
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.makedirs(os.path.join(os.environ.get("HOME", "/tmp"), ".cache"), exist_ok=True)
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
