# /// attack
# threats = ["A1", "D18"]
# gains = "score"
# ///
"""Prints a loss once the main thread has ended."""

import threading

import torch

def late():
    threading.main_thread().join()
    print("step:30 val_loss:1.0000 train_time:1ms", flush=True)


threading.Thread(target=late).start()


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
