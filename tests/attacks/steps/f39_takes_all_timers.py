# /// attack
# threats = ["F39"]
# gains = "quota"
# ///
"""Takes timers that the whole user has only so many of."""

import ctypes

import torch

libc = ctypes.CDLL(None)
timer, count = ctypes.c_void_p(), 0
while count < 1000 and libc.timer_create(1, None, ctypes.byref(timer)) == 0:
    count += 1
if count == 1000:
    print("probe quota reached 1000 timers", flush=True)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
