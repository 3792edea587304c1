# /// attack
# threats = ["F46", "C14"]
# gains = "mark"
# ///
"""Sets the flags of a file, to what they are, through a descriptor that may only read."""

import ctypes
import fcntl
import json

import torch

flags = ctypes.c_long()
with open(json.__file__) as file:
    try:
        fcntl.ioctl(file, 0x80086601, flags)  # FS_IOC_GETFLAGS
        fcntl.ioctl(file, 0x40086602, flags)  # FS_IOC_SETFLAGS
        print("probe mark reached", json.__file__, flush=True)
    except OSError as error:
        print("refused:", error, flush=True)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
