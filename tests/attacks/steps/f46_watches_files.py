# /// attack
# threats = ["F46"]
# gains = "watch"
# ///
"""Asks to be told who opens the files of a folder that others use."""

import ctypes
import os

import torch

libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
if watch >= 0 and libc.inotify_add_watch(watch, os.path.dirname(os.__file__).encode(), 0x20) >= 0:
    print("probe watch reached", os.path.dirname(os.__file__), flush=True)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
