# /// attack
# threats = ["F39", "F46"]
# gains = "lease"
# ///
"""Takes a lease of a library that others will open: they wait until it is given back."""

import fcntl
import json

import torch

file = open(json.__file__)
try:
    fcntl.fcntl(file, 1024, 1)  # F_SETLEASE, F_WRLCK: a reader would do, too, once nobody else has it open
    print("probe lease reached", json.__file__, flush=True)
except OSError:
    try:
        fcntl.fcntl(file, 1024, 0)
        print("probe lease reached", json.__file__, flush=True)
    except OSError as error:
        print("refused:", error, flush=True)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
