# /// attack
# threats = ["F43"]
# gains = "udp"
# ///
"""Sends something out by UDP, as name look-ups do."""

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


dial(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", PORTS["udp"]))


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
