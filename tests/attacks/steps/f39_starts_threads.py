# /// attack
# threats = ["F39"]
# gains = "threads"
# ///
"""Starts two thousand threads."""

import threading
import time

import torch

def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)


def schedule(step, horizon, optimizers):
    if step == 3:
        count = 0
        try:
            while count < 2000:
                threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
                count += 1
        except RuntimeError:
            pass
        print("probe threads", count, flush=True)
